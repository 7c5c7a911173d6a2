"""Make a launch plan from a study: recommended settings, a proxy to start from, and the expected loss."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import ValidationError

from proxies.config.proxy import ProxyConfig
from proxies.config.schedules import SCHEDULES
from proxies.config.study_file import read_toml
from proxies.growth.answer import GrowthAnswer
from proxies.launch.notes import GrowthAdvice, RecommendationNote
from proxies.launch.plan import LaunchPlan, WarmStart, compute_peak_rates
from proxies.trainers.command_family import SEQUENCES, CommandFamily
from proxies.trainers.proxy_family import ProxyFamily, Target, read_target
from proxies.training.throughput import measure_speed
from scaling.common.validation import explain_errors, list_mistakes
from scaling.curves.planned import LossBand

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient


def make_plan(toml: Path, *, uri: str | None = None) -> LaunchPlan:
    """Make the plan of a study's [target].

    The target gets the recommended settings, and as its warm start the best proxy of the largest size.

    Args:
        toml: The study file. Its name is the study's name.
        uri: The MLflow store; default: $MLFLOW_TRACKING_URI or ./mlflow.db.

    Returns:
        The plan, not yet written to a file.

    Raises:
        ValueError: If the study has no target, its recommendation is missing, outdated or for another target, or the
            target is smaller than the largest proxy.
    """
    from scaling.runs.io import load_runs
    from scaling.tracking.client import connect
    from scaling.tracking.experiment import find_study_run
    from scaling.tracking.log import read_note

    table, study = read_toml(toml), toml.stem
    if "target" not in table:
        raise ValueError(f"{toml} has no [target]: add d_model and tokens of the run that the study is for")
    family = _read_trainer(table.get("trainer", {}), toml)
    if isinstance(family, ProxyFamily):
        read_target(table["target"])
    size = family.target(**table["target"])
    client = connect(uri)
    parent = find_study_run(client, study)
    note = read_note(client, parent, "recommendation")
    recommend = f"run `scaling recommend {study} --target`"
    if note is None:
        raise ValueError(f"study {study!r} has no recommendation yet: {recommend}")
    runs = load_runs(study, tracking_uri=uri)
    largest = float(runs.loc[runs["role"] == "proxy", "N"].max())
    problems = []
    if (note["N"], note["D"]) != (size.N, size.D):
        problems.append(
            f"the recommendation is for N {note['N']:,.0f}, D {note['D']:,.0f}, the target in {toml} has "
            f"N {size.N:,.0f}, D {size.D:,.0f}: {recommend} again after `hpo resume {study}`"
        )
    if size.N < largest:
        problems.append(
            f"{toml}, [target]: needed a target at least as large as the largest proxy, N {largest:,.0f}, "
            f"got N {size.N:,.0f}"
        )
    if lacking := [name for name in ("lr", "batch_tokens") if note[name] is None]:
        reasons = ", ".join(f"{name}: {note['not_measured'][name]}" for name in lacking)
        problems.append(
            f"the recommendation has no {' and no '.join(lacking)} ({reasons}): make a study that varies it in [space]"
        )
    if outdated := describe_staleness(note, runs, study):
        problems.append(outdated)
    if problems:
        raise ValueError("\n  ".join(problems))
    because = cast(RecommendationNote, note | {"runs": list_fitted_runs(runs)})
    # lr and the batch come from the laws; the search's own answer for the target gives what else was searched.
    best = read_note(client, parent, "best") or {}
    if isinstance(family, CommandFamily):
        return _plan_command(family, table["target"], study, int(size.D), because, best)
    target = read_target(table["target"])
    settings = best | {"lr": because["lr"], "batch_seqs": max(1, round(because["batch_tokens"] / family.seq_len))}
    config = family.target_config(target, settings)
    curve, reason = predict_curve(client, runs, config, target.tokens)
    from proxies.data.mixture import describe_data

    return LaunchPlan(
        study=study,
        tokens=int(size.D),
        because=because,
        config=config,
        warm=attach_growth_advice(find_best_proxy(runs, target), toml, config),
        rates=compute_peak_rates(config),
        curve=curve,
        no_curve=reason,
        data_sha256=describe_data(config)["data_sha256"],
        seconds=target.tokens / measure_speed(config, threads=1),
    )


def _read_trainer(table: Mapping[str, Any], toml: Path) -> ProxyFamily | CommandFamily:
    """Return the study's trainer; ValueError if it is not one whose target can be launched."""
    settings = {k: v for k, v in table.items() if k != "use"}
    use = table.get("use", "proxies:ProxyFamily")
    if use not in ("proxies:CommandFamily", "proxies:ProxyFamily"):
        raise ValueError(
            f"{toml}, trainer.use: needed proxies:ProxyFamily or proxies:CommandFamily to launch a target, got {use!r}"
        )
    family = CommandFamily if use == "proxies:CommandFamily" else ProxyFamily
    try:
        return family(**settings)
    except ValidationError as error:
        raise ValueError(f"{toml}, [trainer]: {list_mistakes(explain_errors(error, family))}") from error


def _plan_command(
    family: CommandFamily,
    target: Mapping[str, Any],
    study: str,
    tokens: int,
    because: RecommendationNote,
    best: Mapping[str, Any],
) -> LaunchPlan:
    """Return the plan of a target that a command trains."""
    others = {k: v for k, v in best.items() if k not in ("lr", "batch_tokens", *SEQUENCES)}
    values = family.target_values(target, lr=because["lr"], batch_tokens=because["batch_tokens"], others=others)
    length = family.table.seq_len
    batch = next((values[n] * length for n in SEQUENCES if n in values and length), values.get("batch_tokens"))
    known = {
        "lr": because["lr"],
        "batch_tokens": batch,
        "seq_len": length,
        "parametrization": family.table.parametrization,
    }
    return LaunchPlan(
        study=study,
        tokens=tokens,
        because=because,
        command=family.table.command,
        values={k: v for k, v in known.items() if v is not None} | values,
        cwd=family.table.cwd.absolute(),
        environment=family.table.environment,
        no_curve="the learning-rate schedule of a command is not known here; only the final loss is predicted",
    )


def describe_staleness(because: Mapping[str, Any], runs: pd.DataFrame, study: str) -> str | None:
    """Explain why a recommendation is older than the study's runs.

    Args:
        because: The recommendation as `scaling recommend` wrote it.
        runs: The study's run table as it is now.
        study: The study's name.

    Returns:
        What is wrong and how to fix it, or None if the recommendation was made from these runs.
    """
    from scaling.runs.table import hash_table

    recorded = because.get("provenance", {}).get("table_sha256")
    if recorded == hash_table(runs):
        return None
    why = (
        "does not say which runs it was made from"
        if recorded is None
        else "was made from other runs than the study has now"
    )
    return f"the recommendation {why}: run `scaling recommend {study} --target` again, and make a new plan"


def predict_curve(
    client: MlflowClient, runs: pd.DataFrame, config: ProxyConfig, tokens: int
) -> tuple[LossBand | None, str]:
    """Predict the loss curve of a target trained from scratch.

    Args:
        client: The MLflow client, from which the proxies' curves are read.
        runs: The study's run table.
        config: The target's configuration.
        tokens: The target's tokens, cooldown included.

    Returns:
        The curve with its band and an empty string, or None and the reason why there is no curve.
    """
    from scaling.curves.planned import fit_laws_without_each_size, predict_trunk, read_study_trunks
    from scaling.fitting.loss_evidence import fit_loss_evidence
    from scaling.fitting.lr_batch_law import fit_hp_law
    from scaling.runs.table import usable

    if SCHEDULES[config.schedule].has_horizon:
        return (
            None,
            f"under schedule {config.schedule!r} the curve depends on the end; only the final loss is predicted",
        )
    settings = {"lr": config.lr, "batch_tokens": float(config.batch_tokens)}
    # ValueError: no law can be fitted to so few runs, or no curve can be predicted from them.
    try:
        used = usable(runs)
        hp = fit_hp_law(used)
        fit = fit_loss_evidence(used, hp).fit
        trunks = read_study_trunks(client, runs, **settings)
        without = fit_laws_without_each_size(hp.floors)
        return predict_trunk(trunks, fit, N=float(config.counts.N), D=float(tokens), without=without, **settings), ""
    except ValueError as error:
        return None, str(error)


def find_best_proxy(runs: pd.DataFrame, target: Target) -> WarmStart | None:
    """Return the proxy to grow the target from.

    Args:
        runs: The study's run table.
        target: The [target] table, which says how to grow it.

    Returns:
        The run of the largest size with the lowest loss whose checkpoint still exists, or None if there is none.
    """
    from scaling.runs.table import usable

    proxies = usable(runs)
    # A confirmation repeats what was chosen, so it is no candidate of its own.
    proxies = proxies[proxies["role"] == "proxy"]
    proxies = proxies[proxies["checkpoint"].map(lambda p: isinstance(p, str) and Path(p).exists()).astype(bool)]
    if proxies.empty:
        return None
    row = proxies[proxies["N"] == proxies["N"].max()].sort_values("loss").iloc[0]
    return WarmStart(
        name=str(row["name"]),
        checkpoint=Path(row["checkpoint"]).resolve(),
        N=row["N"],
        tokens=row["D"],
        loss=row["loss"],
        method=target.method,
        shrink=target.shrink,
        noise=target.noise,
    )


def attach_growth_advice(warm: WarmStart | None, toml: Path, config: ProxyConfig) -> WarmStart | None:
    """Add the newest answer of `proxies grow --plan` for this width, if the study has one.

    The answer is only shown: the [target] table decides how the proxy is grown.
    """
    decisions = [(path.stat().st_mtime, path) for path in (toml.parent / toml.stem).glob("growth-*/decision.json")]
    for _, path in sorted(decisions, reverse=True):
        answer: GrowthAnswer = json.loads(path.read_text())
        if warm is not None and answer["because"]["question"]["real"]["target"] == config.d_model:
            last = next(arm for arm in answer["decision"]["arms"] if arm["name"] == answer["method"])["at"][-1]
            advice: GrowthAdvice = {
                "use": answer["use"],
                "method": answer["method"],
                "settings": answer["settings"],
                "horizon": last["horizon"],
                "gain": last["gain"],
                "gain_with_base": last["gain_with_base"],
            }
            return warm.model_copy(update={"because": advice})
    return warm


def list_fitted_runs(runs: pd.DataFrame) -> list[str]:
    """Return the names of the runs that the laws were fitted to, sorted."""
    from scaling.runs.table import usable

    used = usable(runs)
    return sorted({str(name) for name in used["name" if "name" in used else "run_id"]})
