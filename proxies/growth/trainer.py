"""The trainer behind `proxies grow --plan`: a family that trains a smaller model first and grows from it."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock
from pydantic import Field, PositiveInt

from proxies.config.growth_rules import check_growth
from proxies.config.proxy import ProxyConfig
from proxies.trainers.proxy_family import ProxyFamily, describe
from scaling.common.atomic import replacing
from scaling.common.measurement import Measurement
from scaling.laws.compute import Fidelity

if TYPE_CHECKING:
    from torch import Tensor

StartMethod = Literal["scratch", "shrink-pad-perturb", "duplicate", "hyperclone"]
# Settings of each method that can be searched besides those of every family.
METHOD_SETTINGS: dict[StartMethod, tuple[str, ...]] = {
    "scratch": (),
    "shrink-pad-perturb": ("shrink", "noise"),
    "duplicate": ("noise",),
    "hyperclone": ("noise",),
}


class GrowthFamily(ProxyFamily):
    """A family (see ProxyFamily) whose runs start as `start` says; `shrink` and `noise` can be searched, too.

    The base model of a seed has the same seed, the family's own settings and `source_tokens`. It is trained once, by
    the first process that needs it, and kept in the folder `bases`.
    """

    start: StartMethod = "shrink-pad-perturb"
    source_width: PositiveInt = Field(description="d_model of the base model")
    source_layers: PositiveInt | None = Field(None, description="n_layers of the base model; default: the family's")
    source_tokens: PositiveInt = Field(description="training tokens of the base model")
    shrink: float = Field(0.4, ge=0, le=1)
    noise: float | None = Field(None, ge=0, description="default: the method's own")
    bases: Path

    @property
    def plain_family(self) -> ProxyFamily:
        """The same family without growth."""
        # It is not validated again, because that reads every file of the corpus.
        return ProxyFamily.model_construct(**{name: getattr(self, name) for name in ProxyFamily.model_fields})

    def member(self, d_model: int, params: Mapping[str, Any] | None = None) -> ProxyConfig:
        """Return the family's proxy of this width; settings of the start method are left out."""
        own = METHOD_SETTINGS[self.start]
        return self.plain_family.member(d_model, {k: v for k, v in (params or {}).items() if k not in own})

    def source(self, *, repeat: int = 0) -> ProxyConfig:
        """Return the base model's configuration."""
        depth = {"n_layers": self.source_layers or self.n_layers, "seed": self.seed + repeat}
        return ProxyConfig.model_validate(self.member(self.source_width).model_dump() | depth)

    def problems(self, space: Mapping[str, Any], tokens: tuple[int, int] | None) -> list[str]:
        """Return the plain family's problems, bad ranges of `shrink` and `noise`, and why a base cannot be grown."""
        from proxies.config.steps import plan_steps

        problems = []
        for name in METHOD_SETTINGS[self.start]:
            if name not in space:
                continue
            ends = getattr(space[name], "choices", None) or (space[name].low, space[name].high)
            highest = 1.0 if name == "shrink" else float("inf")
            problems += [
                f"space.{name}: needed from 0 to {highest:g}, got {end!r}" for end in ends if not 0 <= end <= highest
            ]
        problems += self.plain_family.problems(
            {k: v for k, v in space.items() if k not in METHOD_SETTINGS[self.start]}, tokens
        )
        try:
            if self.start != "scratch":
                plan_steps(self.source(), self.source_tokens)
                for width in self.widths:
                    check_growth(self.source(), self.member(width), self.start)
        except ValueError as error:
            problems.append(f"trainer.source_width, trainer.source_tokens: {error}")
        return problems

    def describe(self, params: Mapping[str, Any], fidelity: Fidelity, *, repeat: int = 0) -> dict[str, Any]:
        """Return every setting of the run for the record, and how it starts."""
        started = {"start": self.start} | {k: params.get(k, getattr(self, k)) for k in METHOD_SETTINGS[self.start]}
        if self.start != "scratch":
            started |= {"source_width": self.source_width, "source_tokens": self.source_tokens}
        return describe(self.config(params, fidelity, repeat=repeat)) | started

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
        """Train the base unless it exists, grow it, and train the result. A resumed run has its weights already."""
        from proxies.config.steps import plan_steps

        config = self.config(params, fidelity, repeat=repeat)
        # Too short a run is refused now, not after the base was trained.
        plan_steps(config, int(fidelity.D))
        return self._run(config, dict(params), int(fidelity.D), resume, save, keep, repeat)

    def _run(
        self,
        config: ProxyConfig,
        params: dict[str, Any],
        tokens: int,
        resume: Path | None,
        save: Path | None,
        keep: Path | None,
        repeat: int,
    ) -> Iterator[Measurement]:
        from proxies.training.loop import train

        init = None
        if self.start != "scratch" and resume is None:
            init = self._grow_base(config, params, repeat)
        yield from train(config, tokens, resume=resume, save=save, keep=keep, init=init)

    def _grow_base(self, config: ProxyConfig, params: Mapping[str, Any], repeat: int) -> dict[str, Tensor]:
        from proxies.growth.weights import grow
        from proxies.training.checkpoints import load_model

        assert self.start != "scratch"
        small, model = load_model(self.train_base(repeat=repeat))
        with warnings.catch_warnings():
            # Whether growing so far is worth it is what is being measured.
            warnings.filterwarnings("ignore", "N grows")
            return grow(
                model.state_dict(),
                small,
                config,
                method=self.start,
                shrink=params.get("shrink", self.shrink),
                noise=params.get("noise", self.noise),
            )

    def train_base(self, *, repeat: int = 0) -> Path:
        """Train the base model of a seed unless it exists.

        Args:
            repeat: Added to the family's seed.

        Returns:
            Its checkpoint.

        Raises:
            ValueError: If it diverges.
        """
        from proxies.training.loop import train

        path = self.get_base_path(repeat=repeat)
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if path.exists():
                return path
            unfinished, keep = path.with_suffix(".going.pt"), path.with_suffix(".partial.pt")
            resume = keep if keep.exists() else None
            *_, last = train(self.source(repeat=repeat), self.source_tokens, resume=resume, save=unfinished, keep=keep)
            if last.diverged:
                raise ValueError(f"the base of width {self.source_width} diverged at lr {self.lr:g}: lower the rate")
            with replacing(path) as temporary:
                unfinished.rename(temporary)
        return path

    def get_base_path(self, *, repeat: int = 0) -> Path:
        """Return the base model's checkpoint, whose name has a hash of its settings."""
        source = self.source(repeat=repeat)
        settings = json.dumps([source.model_dump(mode="json"), self.source_tokens], sort_keys=True)
        return self.bases / f"{source.d_model}-seed{source.seed}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}.pt"
