"""What a search that has ended without a single loss shows, and what to change."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from optuna.distributions import FloatDistribution, IntDistribution

from hpo.storage.trial_attributes import read_crashes, read_loss, read_stopped
from hpo.study.mlflow_run import list_outcomes

if TYPE_CHECKING:
    from hpo.search.search import Search
    from hpo.study.files import StudyFiles

# Parts of the names of parameters that make training diverge if they are too large.
RATE_NAMES = ("lr", "learning_rate")
# Most characters of a crash's reason that are shown.
SHOWN_CHARACTERS = 200


def explain_lack_of_answer(search: Search, files: StudyFiles) -> str | None:
    """Return why a finished search has no answer and what to change.

    Args:
        search: The search.
        files: The files of its study.

    Returns:
        A few lines for the terminal; None if a run has ended with a finite loss, or runs are left.
    """
    outcomes = list_outcomes(search)
    has_loss = any(math.isfinite(read_loss(t)) or read_stopped(t) is not None for t in outcomes)
    if not outcomes or has_loss or not search.finished:
        return None
    count = len(outcomes)
    runs = f"all {count} runs" if count > 1 else "the only run"
    lines = [f"{runs} of study {files.name!r} diverged: there is no answer"]
    crashes = [read_crashes(t) for t in outcomes]
    if any(crashes):
        reason = [reasons for reasons in crashes if reasons][-1][-1].strip().splitlines()[-1]
        crashed = sum(bool(reasons) for reasons in crashes)
        lines.append(f"  {crashed} of them crashed, the last one because of: {reason[:SHOWN_CHARACTERS]}")
    lines.append(f"  {_advise_ranges(search)}check the settings under [trainer]")
    lines.append(
        f"  a study's settings are fixed once it is launched: change them in a copy of {files.toml} under a new name, "
        f"or run `hpo forget {files.name}` and launch it again"
    )
    return "\n".join(lines)


def _advise_ranges(search: Search) -> str:
    """Return which ranges under [space] to lower, as the beginning of a sentence."""
    ranges = {
        name: f"{name} (now {distribution.low:g} to {distribution.high:g})"
        for name, distribution in search.space.items()
        if isinstance(distribution, FloatDistribution | IntDistribution)
    }
    rates = [text for name, text in ranges.items() if any(part in name.lower() for part in RATE_NAMES)]
    chosen = rates or list(ranges.values())
    return f"lower the range of {', '.join(chosen)} under [space], or " if chosen else ""
