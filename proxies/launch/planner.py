"""A plan made from a study: its target with the recommended settings, a proxy to start from, and what loss to expect."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxies.config.proxy import ProxyConfig
from proxies.config.schedules import SCHEDULES
from proxies.config.study_file import read_toml
from proxies.launch.plan import LaunchPlan, WarmStart, rates_of
from proxies.trainers.command_family import SEQUENCES, CommandFamily
from proxies.trainers.proxy_family import ProxyFamily, Target
from proxies.training.throughput import measure_speed
from scaling.curves.planned import Band

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient


def make_plan(toml: Path, *, uri: str | None = None) -> LaunchPlan:
    """The plan of a study's [target]: its recommended settings, and the best proxy of the largest size to start from.

    ValueError when the study has no target, no recommendation yet, one for another target or of an older table, or when the
    target is smaller than the largest proxy.
    """
    from scaling.runs.io import load_runs
    from scaling.tracking.client import connect
    from scaling.tracking.experiment import find_study_run
    from scaling.tracking.log import read_note

    table, study = read_toml(toml), toml.stem
    if "target" not in table:
        raise ValueError(f"{toml} has no [target]: add d_model and tokens of the run that the study is for")
    family = _family(table.get("trainer", {}), toml)
    size = family.target(**table["target"])
    client = connect(uri)
    parent = find_study_run(client, study)
    because = read_note(client, parent, "recommendation")
    again = f"run `scaling recommend {study} --target`"
    if because is None:
        raise ValueError(f"study {study!r} has no recommendation yet: {again}")
    runs = load_runs(study, tracking_uri=uri)
    largest = float(runs.loc[runs["role"] == "proxy", "N"].max())
    problems = []
    if (because["N"], because["D"]) != (size.N, size.D):
        problems.append(
            f"the recommendation is for N {because['N']:,.0f}, D {because['D']:,.0f}, the target in {toml} has N {size.N:,.0f}, "
            f"D {size.D:,.0f}: {again} again after `hpo resume {study}`"
        )
    if size.N < largest:
        problems.append(
            f"{toml}, [target]: needed a target at least as large as the largest proxy, N {largest:,.0f}, got N {size.N:,.0f}"
        )
    if old := older_than(because, runs, study):
        problems.append(old)
    if problems:
        raise ValueError("\n  ".join(problems))
    # lr and batch by the laws; what else was searched by the search's own answer for the target
    best = read_note(client, parent, "best") or {}
    plain: dict[str, Any] = {"study": study, "tokens": int(size.D), "because": because | {"runs": names_behind(runs)}}
    if isinstance(family, CommandFamily):
        return LaunchPlan.model_validate(plain | _by_command(family, table["target"], because, best))
    target = Target.model_validate(table["target"])
    settings = best | {"lr": because["lr"], "batch_seqs": max(1, round(because["batch_tokens"] / family.seq_len))}
    config = family.target_config(target, settings)
    curve, reason = predicted(client, runs, config, target.tokens)
    from proxies.data.mixture import record

    return LaunchPlan(
        **plain,
        config=config,
        warm=advised(best_proxy(runs, target), toml, config),
        rates=rates_of(config),
        curve=curve,
        no_curve=reason,
        data_sha256=record(config)["data_sha256"],
        seconds=target.tokens / measure_speed(config, threads=1),
    )


def _family(table: Mapping[str, Any], toml: Path) -> ProxyFamily | CommandFamily:
    """The study's trainer. ValueError when it is neither of those whose target can be launched here."""
    settings = {k: v for k, v in table.items() if k != "use"}
    use = table.get("use", "proxies:ProxyFamily")
    if use == "proxies:CommandFamily":
        return CommandFamily(**settings)
    if use != "proxies:ProxyFamily":
        raise ValueError(
            f"{toml}, trainer.use: a target is launched of proxies:ProxyFamily or proxies:CommandFamily, got {use!r}"
        )
    return ProxyFamily.model_validate(settings)


def _by_command(
    family: CommandFamily, target: Mapping[str, Any], because: Mapping[str, Any], best: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields of a plan that a command carries out."""
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
    return {
        "command": family.table.command,
        "values": {k: v for k, v in known.items() if v is not None} | values,
        "cwd": family.table.cwd.absolute(),
        "environment": family.table.environment,
        "no_curve": "how a command's rate goes with tokens is not known here; only the end is predicted",
    }


def older_than(because: dict[str, Any], runs: pd.DataFrame, study: str) -> str | None:
    """What is wrong with a recommendation that was made of other runs than the study has now; None when it was made of these."""
    from scaling.runs.table import table_sha256

    then = because.get("provenance", {}).get("table_sha256")
    if then == table_sha256(runs):
        return None
    why = "does not say which runs it was made of" if then is None else "was made of other runs than the study has now"
    return f"the recommendation {why}: run `scaling recommend {study} --target` again, and make the plan anew"


def predicted(client: MlflowClient, runs: pd.DataFrame, config: ProxyConfig, tokens: int) -> tuple[Band | None, str]:
    """The curve to expect from scratch, or why there is none."""
    from scaling.curves.planned import laws_without, predict_trunk, study_trunks
    from scaling.fitting.lr_batch_law import fit_hp_law, loss_fit
    from scaling.runs.table import usable

    if SCHEDULES[config.schedule].has_horizon:
        return None, f"under schedule {config.schedule!r} the way depends on the end; only the end is predicted"
    settings = {"lr": config.lr, "batch_tokens": float(config.batch_tokens)}
    try:
        hp = fit_hp_law(usable(runs))
        fit, _ = loss_fit(hp)
        trunks = study_trunks(client, runs, **settings)
        without = laws_without(hp.floors)
        return predict_trunk(trunks, fit, N=float(config.counts.N), D=float(tokens), without=without, **settings), ""
    except ValueError as error:  # no law can be fitted to so few runs, or no curve predicted from them
        return None, str(error)


def best_proxy(runs: pd.DataFrame, target: Target) -> WarmStart | None:
    """The run of the largest size with the lowest loss whose checkpoint is still there, to be grown as the target says."""
    from scaling.runs.table import usable

    proxies = usable(runs)
    proxies = proxies[proxies["role"] == "proxy"]  # a confirmation trains again what was chosen
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


def advised(warm: WarmStart | None, toml: Path, config: ProxyConfig) -> WarmStart | None:
    """With the newest answer of `proxies grow --plan` for this width, if the study has one. The [target] table decides; it is told."""
    found = [(path.stat().st_mtime, path) for path in (toml.parent / toml.stem).glob("growth-*/decision.json")]
    for _, path in sorted(found, reverse=True):
        answer = json.loads(path.read_text())
        if warm is not None and answer["because"]["question"]["real"]["target"] == config.d_model:
            asked = next(arm for arm in answer["decision"]["arms"] if arm["name"] == answer["method"])["at"][-1]
            said = {key: answer[key] for key in ("use", "method", "settings")}
            return warm.model_copy(
                update={"because": said | {k: asked[k] for k in ("horizon", "gain", "gain_with_base")}}
            )
    return warm


def names_behind(runs: pd.DataFrame) -> list[str]:
    """The runs that the laws were fitted to, by name."""
    from scaling.runs.table import usable

    used = usable(runs)
    return sorted({str(name) for name in used["name" if "name" in used else "run_id"]})
