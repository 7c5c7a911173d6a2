"""A trainer whose losses are a formula and that logs every step, so that a test can count what was trained."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from pydantic import BaseModel, ConfigDict

from scaling.common.measurement import Measurement
from scaling.laws.compute import Fidelity


class ToyTrainer(BaseModel):
    """Loss 2 + ln(lr / 0.01)^2 / 20 + N^-0.3 + D^-0.3; diverges above lr 0.5. A step trains 1000 tokens.

    If the folder `steps` has a file `hold` with [repeat, tokens], every run of at least this repeat and this many
    tokens stops after its first step until the file is removed. Meanwhile a file held-PID shows that its process
    waits.

    Attributes:
        sizes: N of each proxy.
        pause: Seconds that each step takes.
        noise: Repeats above 0 add this times a normal random number of their own to the loss.
        hungry: Below this lr a run uses up all memory that it may have, 1 GiB.
        hanging: Above this lr a run never yields a measurement.
        steps: A folder where each process logs the steps that it has trained.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sizes: tuple[float, ...] = (1000.0, 4000.0)
    pause: float = 0.0
    noise: float = 0.0
    hungry: float = 0.0
    hanging: float = math.inf
    steps: Path | None = None

    def problems(self, space: Mapping[str, Any], tokens: tuple[int, int] | None) -> list[str]:
        return []

    def target(self, **table: Any) -> Fidelity:
        return Fidelity(float(table["N"]), float(table["D"]))

    def describe(self, params: Mapping[str, Any], fidelity: Fidelity, *, repeat: int = 0) -> dict[str, Any]:
        return {"N": fidelity.N, "lr": params["lr"], "batch_tokens": 256, "seq_len": 128}

    def manifest(self) -> list[dict[str, Any]]:
        return []

    def seconds(self, params: Mapping[str, Any], fidelities: Sequence[Fidelity], *, threads: int) -> list[float]:
        return [f.D / 1000 * (self.pause + 1e-4) for f in fidelities]

    def __call__(
        self,
        params: Mapping[str, Any],
        fidelity: Fidelity,
        *,
        resume: Path | None = None,
        save: Path | None = None,
        keep: Path | None = None,
        repeat: int = 0,
    ) -> Iterator[Measurement]:
        state = (
            json.loads(resume.read_text())
            if resume
            else {"lr": params["lr"], "N": fidelity.N, "repeat": repeat, "tokens": 0}
        )
        own = (params["lr"], fidelity.N, repeat)
        assert (state["lr"], state["N"], state["repeat"]) == own, "resumed another run's checkpoint"
        assert state["tokens"] <= fidelity.D
        if params["lr"] < self.hungry:
            resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 2**30,) * 2)
            blocks = []
            while True:
                blocks.append(bytearray(2**26))
        while params["lr"] > self.hanging:
            time.sleep(60)
        started_at = state["tokens"]
        try:
            while state["tokens"] < fidelity.D:
                if state["tokens"] > started_at:
                    self._wait_while_held(fidelity, repeat)
                time.sleep(self.pause)
                state["tokens"] += 1000
                if self.steps is not None:
                    with (self.steps / f"{os.getpid()}.jsonl").open("a") as log:
                        log.write(json.dumps([fidelity.N, params["lr"], repeat, state["tokens"]]) + "\n")
                if params["lr"] > 0.5:
                    yield Measurement(state["tokens"], math.nan, final=True, diverged=True)
                    return
                yield Measurement(state["tokens"], 3.0, lr=params["lr"])
            if save is not None:
                save.write_text(json.dumps(state))
        except (GeneratorExit, KeyboardInterrupt):
            if keep is not None:
                keep.write_text(json.dumps(state))
            raise
        loss = 2 + math.log(params["lr"] / 0.01) ** 2 / 20 + fidelity.N**-0.3 + fidelity.D**-0.3
        if repeat:
            loss += self.noise * random.Random(f"{params['lr']} {fidelity} {repeat}").gauss(0.0, 1.0)
        try:
            yield Measurement(int(fidelity.D), loss, lr=params["lr"], final=True)
        finally:
            if keep is not None:
                keep.unlink(missing_ok=True)

    def _wait_while_held(self, fidelity: Fidelity, repeat: int) -> None:
        """Wait while the file `hold` exists and applies to this run."""
        if self.steps is None:
            return
        hold, marker = self.steps / "hold", self.steps / f"held-{os.getpid()}"
        with contextlib.suppress(FileNotFoundError):
            while True:
                first_repeat, least_tokens = json.loads(hold.read_text())
                if repeat < first_repeat or fidelity.D < least_tokens:
                    break
                marker.touch()
                time.sleep(0.02)
        marker.unlink(missing_ok=True)
