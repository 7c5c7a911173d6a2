"""Spend compute on trials: multi-fidelity Bayesian optimization and incremental Hyperband on an Optuna study."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpo.samplers.multi_fidelity import MultiFidelitySampler as MultiFidelitySampler
    from hpo.search.ladder import Ladder as Ladder
    from hpo.search.search import Search as Search
    from hpo.search.view import Job as Job
    from hpo.study.config import StudyConfig as StudyConfig
    from hpo.study.config import load_study as load_study
    from hpo.study.plan import Plan as Plan
    from hpo.study.plan import plan as plan
    from hpo.study.selection import select_trials as select_trials

# Public name -> module. Names are imported when they are first used, so that `import hpo` is fast.
_HOME = {
    "Job": "hpo.search.view",
    "Ladder": "hpo.search.ladder",
    "MultiFidelitySampler": "hpo.samplers.multi_fidelity",
    "Plan": "hpo.study.plan",
    "Search": "hpo.search.search",
    "StudyConfig": "hpo.study.config",
    "load_study": "hpo.study.config",
    "plan": "hpo.study.plan",
    "select_trials": "hpo.study.selection",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'hpo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
