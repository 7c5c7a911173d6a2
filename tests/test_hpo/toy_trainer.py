"""A trainer whose losses are a formula and whose every step is written down, so that a test can count what was trained."""

from __future__ import annotations

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
    """Loss 2 + (ln(lr / 0.01))^2 / 20 + N^-0.3 + D^-0.3; diverges above lr 0.5. Trains 1000 tokens a step, after `pause` seconds.

    Repeats above 0 add `noise` times a normal number of their own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    sizes: tuple[float, ...] = (1000.0, 4000.0)
    pause: float = 0.0
    noise: float = 0.0
    hungry: float = 0.0  # below this lr a run takes all the memory that it may have, a GB
    hanging: float = math.inf  # above this one it never says anything
    steps: Path | None = None  # a folder where every process writes the steps that it has trained

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
        try:
            while state["tokens"] < fidelity.D:
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
