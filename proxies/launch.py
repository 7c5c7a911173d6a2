"""The target run: planned whole, printable before anything is spent, trained beside a twin from scratch, scored against its prediction."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, PositiveInt

from proxies.config import ProxyConfig
from proxies.family import ProxyFamily, Target, describe, measure_speed
from scaling import tracking
from scaling.cli import say
from scaling.runs import usable

if TYPE_CHECKING:
    import pandas as pd

Arm = Literal["warm", "scratch"]
ARMS: tuple[Arm, ...] = ("warm", "scratch")
REPORT_SECONDS = 5.0


class WarmStart(BaseModel):
    """The trained proxy that the target grows from."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    checkpoint: Path
    N: float
    tokens: float
    loss: float
    method: Literal["shrink-pad-perturb", "pad", "duplicate"] = "shrink-pad-perturb"
    shrink: float = 0.4
    noise: float | None = None

    @property
    def flops(self) -> float:
        """What the proxy's own training cost, 6 N D."""
        return 6.0 * self.N * self.tokens


class LaunchPlan(BaseModel):
    """The target run, in full."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    study: str
    config: ProxyConfig
    tokens: PositiveInt
    warm: WarmStart | None
    because: dict[str, Any]  # the Recommendation, as scaling wrote it

    @property
    def id(self) -> str:
        """Names what is trained: another configuration, length or start is another target."""
        return hashlib.sha256(self.model_dump_json(include={"config", "tokens", "warm"}).encode()).hexdigest()[:8]

    @property
    def flops(self) -> float:
        """Training FLOPs of one arm, with attention (PaLM convention)."""
        return self.config.flops_per_token * self.tokens

    @property
    def arms(self) -> tuple[Arm, ...]:
        return ARMS if self.warm else ("scratch",)

    def __str__(self) -> str:
        c, because = self.config, self.because
        lo, hi = because["loss_interval"]
        lines = [
            f"target of study {self.study}: N {c.counts.N:,}, d_model {c.d_model}, {c.n_layers} layers, {self.tokens:,} tokens",
            f"  lr {c.lr:.4g} at base width {c.base_width}, batch {c.batch_seqs} x {c.seq_len} = {c.batch_tokens:,} tokens",
            f"  predicted loss {because['loss']:.4f}, {100 * because['mass']:.0f} % ({lo:.4f}, {hi:.4f})",
            f"  cost of each arm {self.flops:.2e} FLOPs; arms: {', '.join(self.arms)}",
        ]
        if self.warm:
            lines.append(
                f"  warm start from {self.warm.name} (N {self.warm.N:,.0f}, {self.warm.tokens:,.0f} tokens, loss {self.warm.loss:.4f}) "
                f"by {self.warm.method}, shrink {self.warm.shrink:g}"
            )
        return "\n".join(lines)


def make_plan(toml: Path, *, uri: str | None = None) -> LaunchPlan:
    """The plan of a study's [target]: its recommended settings, and the best proxy of the largest size to start from.

    ValueError when the study has no target, no recommendation yet, or a recommendation for another target.
    """
    table = tomllib.loads(toml.read_text())
    if "target" not in table:
        raise ValueError(f"{toml} has no [target]: add d_model and tokens of the run that the study is for")
    family = ProxyFamily.model_validate({k: v for k, v in table.get("trainer", {}).items() if k != "use"})
    target = Target.model_validate(table["target"])
    study = toml.stem
    client = tracking.connect(uri)
    parent = tracking.find_study_run(client, study)
    because = tracking.read_note(client, parent, "recommendation")
    if because is None:
        raise ValueError(f"study {study!r} has no recommendation yet: run `scaling recommend {study} --target`")
    # lr and batch by the laws; what else was searched by the search's own answer for the target
    settings = (tracking.read_note(client, parent, "best") or {}) | {
        "lr": because["lr"],
        "batch_seqs": max(1, round(because["batch_tokens"] / family.seq_len)),
    }
    config = ProxyConfig.model_validate(family.member(target.d_model, settings).model_dump())
    if because["N"] != config.counts.N or because["D"] != target.tokens:
        raise ValueError(
            f"the recommendation is for N {because['N']:,.0f}, D {because['D']:,.0f}, the target in {toml} has N {config.counts.N:,}, "
            f"D {target.tokens:,}: run `scaling recommend {study} --target` again after `hpo resume {study}`"
        )
    from proxies.checkpoints import load_model
    from proxies.warmstart import check_growth
    from scaling.runs import load_runs

    warm = best_proxy(load_runs(study, tracking_uri=uri), target)
    if warm:
        check_growth(load_model(warm.checkpoint)[0], config, warm.method)
    return LaunchPlan(study=study, config=config, tokens=target.tokens, warm=warm, because=because)


def best_proxy(runs: pd.DataFrame, target: Target) -> WarmStart | None:
    """The run of the largest size with the lowest loss whose checkpoint is still there, to be grown as the target says."""
    proxies = usable(runs)
    proxies = proxies[proxies["role"] == "proxy"]  # a confirmation trains again what was chosen
    proxies = proxies[proxies["checkpoint"].map(lambda p: isinstance(p, str) and Path(p).exists()).astype(bool)]
    if proxies.empty:
        return None
    row = proxies[proxies["N"] == proxies["N"].max()].sort_values("loss").iloc[0]
    return WarmStart(
        name=str(row["name"]),
        checkpoint=Path(row["checkpoint"]),
        N=row["N"],
        tokens=row["D"],
        loss=row["loss"],
        method=target.method,
        shrink=target.shrink,
        noise=target.noise,
    )


def train_arm(plan: LaunchPlan, arm: Arm, folder: Path, *, uri: str | None = None) -> float:
    """Train one arm to its end and record it (resumed when it was interrupted); its final loss, NaN when it diverged."""
    from proxies.checkpoints import load_model
    from proxies.training import train
    from proxies.warmstart import grow

    client = tracking.connect(uri)
    parent = tracking.find_study_run(client, plan.study)
    name = f"target-{arm}-{plan.id}"
    save, keep = folder / f"{arm}.pt", folder / f"{arm}.partial.pt"
    done = tracking.find_child(client, parent, name)
    if done is not None and "rung_0/loss" in done.data.metrics:
        loss = float(done.data.metrics["rung_0/loss"])
        say(f"{name}: trained before, loss {loss:.4f}")
        return loss
    params = describe(plan.config) | {"tokens": plan.tokens, "arm": arm}
    init = None
    if arm == "warm":
        if plan.warm is None:
            raise ValueError(f"the plan of study {plan.study!r} has no proxy to start from: train --only scratch")
        small, model = load_model(plan.warm.checkpoint)
        warm = plan.warm
        init = grow(model.state_dict(), small, plan.config, method=warm.method, shrink=warm.shrink, noise=warm.noise)
        params |= {f"warm.{k}": v for k, v in plan.warm.model_dump(mode="json").items()}
    run = tracking.child_run(client, parent, name, role="target", params=params)
    tracking.finish(client, run, status="RUNNING")
    folder.mkdir(parents=True, exist_ok=True)
    resume = keep if keep.exists() else None
    started, last, said = time.perf_counter(), None, 0.0
    with tracking.CurveWriter(client, run) as curve:
        for last in train(plan.config, plan.tokens, resume=resume, save=save, keep=keep, init=None if resume else init):
            curve.add(last)
            took = time.perf_counter() - started
            if last.final or took - said > REPORT_SECONDS:
                said = took
                left = took * (plan.tokens - last.tokens) / max(last.tokens, 1)
                say(
                    f"target, {arm}: {last.tokens:,} of {plan.tokens:,} tokens, loss {last.loss:.4f}"
                    f"{' (annealed)' if last.final else ''}, {last.tokens / took:,.0f} tokens/s, left {int(left // 60)}:{int(left % 60):02d}"
                )
    if last is None or not last.final:
        raise RuntimeError(f"{name} ended without a final measurement")
    loss = math.nan if last.diverged else last.loss
    tracking.log_result(
        client, run, rung=0, tokens=plan.tokens, loss=loss, seconds=time.perf_counter() - started, checkpoint=save
    )
    tracking.finish(client, run)
    return loss


def launch(plan: LaunchPlan, folder: Path, *, uri: str | None = None) -> dict[str, Any]:
    """Train all arms (beside each other on a CPU with cores to spare, else one after the other), then score them.

    RuntimeError when an arm failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "plan.json"
    path.write_text(plan.model_dump_json(indent=2) + "\n")
    at_once = len(plan.arms) if not _has_gpu() and (os.cpu_count() or 1) >= len(plan.arms) else 1
    threads = max(1, (os.cpu_count() or 1) // at_once)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    if uri:
        environment["MLFLOW_TRACKING_URI"] = uri
    commands = [[sys.executable, "-m", "proxies", "launch", str(path), "--only", arm] for arm in plan.arms]
    for i in range(0, len(commands), at_once):
        running = [subprocess.Popen(c, env=environment) for c in commands[i : i + at_once]]
        try:
            codes = [p.wait() for p in running]
        except KeyboardInterrupt:
            for p in running:
                p.terminate()  # after Ctrl-C they know already, after SIGTERM not; either way they save where they are
            for p in running:
                p.wait()
            raise
        if any(codes):
            raise RuntimeError(
                f"an arm of {path} ended with exit codes {codes}; mend the cause and launch again: it resumes"
            )
    return score(plan, uri=uri)


def score(plan: LaunchPlan, *, uri: str | None = None) -> dict[str, Any]:
    """What the arms gave: against the prediction, and against each other. Kept on the study's run as the note `warm_start`."""
    from scaling.curves import tokens_to_reach
    from scaling.runs import load_runs

    client = tracking.connect(uri)
    runs = load_runs(plan.study, tracking_uri=uri)
    arms = {f"target-{arm}-{plan.id}": arm for arm in plan.arms}
    targets = {arms[str(r["name"])]: r for _, r in runs[runs["name"].isin(list(arms))].iterrows()}
    lo, hi = plan.because["loss_interval"]
    outcome: dict[str, Any] = {}
    for arm in plan.arms:
        loss = float(targets[arm]["loss"])
        outcome[f"loss at {plan.tokens:,} tokens, {arm}"] = round(loss, 4)
        outcome[f"{arm} in the predicted interval"] = bool(lo <= loss <= hi)
    curves = {a: tracking.read_curve(client, str(targets[a]["run_id"])) for a in plan.arms}
    if plan.warm and all(points for points, _ in curves.values()):  # none, when an arm diverged before its first
        tokens, losses = curves["scratch"]
        level = losses[-1]
        reached = tokens_to_reach(*curves["warm"], level)
        outcome["loss on the trunk that both are asked for (scratch's last)"] = round(level, 4)
        outcome["tokens to it from scratch"] = int(tokens[-1])
        outcome["tokens to it from the warm start"] = "not reached" if math.isinf(reached) else int(reached)
        if math.isfinite(reached):
            base = plan.warm.flops / (6.0 * plan.config.counts.N)  # the proxy's compute in tokens of the target
            outcome["speed-up in tokens"] = round(tokens[-1] / reached, 2)
            outcome["speed-up when the proxy's own training is paid, too"] = round(tokens[-1] / (reached + base), 2)
    parent = tracking.find_study_run(client, plan.study)
    tracking.write_note(client, parent, "warm_start", outcome)
    tracking.write_note(client, parent, "targets", {arm: str(row["run_id"]) for arm, row in targets.items()})
    return outcome


def estimate_seconds(plan: LaunchPlan) -> float:
    """About how long all arms take one core of this machine, from a few measured steps."""
    return len(plan.arms) * plan.tokens / measure_speed(plan.config, threads=1)


def read_plan(path: Path) -> LaunchPlan:
    return LaunchPlan.model_validate(json.loads(path.read_text()))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
