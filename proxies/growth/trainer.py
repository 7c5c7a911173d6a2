"""The trainer of the searches behind `proxies grow --plan`: a family whose members start from a smaller one that it trains first."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock
from pydantic import Field, PositiveInt

from proxies.config.growth_rules import check_growth
from proxies.config.proxy import ProxyConfig
from proxies.trainers.proxy_family import ProxyFamily, describe
from scaling.common.measurement import Measurement
from scaling.laws.compute import Fidelity

if TYPE_CHECKING:
    from torch import Tensor

Start = Literal["scratch", "shrink-pad-perturb", "duplicate", "hyperclone"]
# What a way to start has to be searched, besides what every family has.
OWN: dict[Start, tuple[str, ...]] = {
    "scratch": (),
    "shrink-pad-perturb": ("shrink", "noise"),
    "duplicate": ("noise",),
    "hyperclone": ("noise",),
}


class GrowthFamily(ProxyFamily):
    """A family (see ProxyFamily) whose runs start as `start` says; "shrink" and "noise" can be searched, too.

    The base of a seed has that seed, the family's own settings and source_tokens; it is trained once, by whoever comes first, and
    kept in the folder `bases`.
    """

    start: Start = "shrink-pad-perturb"
    source_width: PositiveInt = Field(description="d_model of the base")
    source_layers: PositiveInt | None = Field(None, description="default: the family's")
    source_tokens: PositiveInt = Field(description="that the base is trained for")
    shrink: float = Field(0.4, ge=0, le=1)
    noise: float | None = Field(None, ge=0, description="default: the method's own")
    bases: Path

    @property
    def plain(self) -> ProxyFamily:
        """Not validated again: that looks at every file of the corpus."""
        return ProxyFamily.model_construct(**{name: getattr(self, name) for name in ProxyFamily.model_fields})

    def member(self, d_model: int, params: Mapping[str, Any] | None = None) -> ProxyConfig:
        mine = OWN[self.start]
        return self.plain.member(d_model, {k: v for k, v in (params or {}).items() if k not in mine})

    def source(self, *, repeat: int = 0) -> ProxyConfig:
        """The base's configuration."""
        depth = {"n_layers": self.source_layers or self.n_layers, "seed": self.seed + repeat}
        return ProxyConfig.model_validate(self.member(self.source_width).model_dump() | depth)

    def problems(self, space: Mapping[str, Any], tokens: tuple[int, int] | None) -> list[str]:
        """Also: ends of "shrink" and "noise" that cannot be, a base that cannot be grown or is too short."""
        from proxies.config.steps import plan

        said = []
        for name in OWN[self.start]:
            if name not in space:
                continue
            ends = getattr(space[name], "choices", None) or (space[name].low, space[name].high)
            most = 1.0 if name == "shrink" else float("inf")
            said += [f"space.{name}: needed from 0 to {most:g}, got {end!r}" for end in ends if not 0 <= end <= most]
        said += self.plain.problems({k: v for k, v in space.items() if k not in OWN[self.start]}, tokens)
        try:
            if self.start != "scratch":
                plan(self.source(), self.source_tokens)
                for width in self.widths:
                    check_growth(self.source(), self.member(width), self.start)
        except ValueError as error:
            said.append(f"trainer.source_width, trainer.source_tokens: {error}")
        return said

    def describe(self, params: Mapping[str, Any], fidelity: Fidelity, *, repeat: int = 0) -> dict[str, Any]:
        started = {"start": self.start} | {k: params.get(k, getattr(self, k)) for k in OWN[self.start]}
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
        """Train the base if nobody has, grow it, train. A resumed run has its weights already."""
        from proxies.config.steps import plan

        config = self.config(params, fidelity, repeat=repeat)
        plan(config, int(fidelity.D))  # refused now, not after the base was trained
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
            init = self._grown(config, params, repeat)
        yield from train(config, tokens, resume=resume, save=save, keep=keep, init=init)

    def _grown(self, config: ProxyConfig, params: Mapping[str, Any], repeat: int) -> dict[str, Tensor]:
        from proxies.growth.weights import grow
        from proxies.training.checkpoints import load_model

        assert self.start != "scratch"
        small, model = load_model(self.base(repeat=repeat))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "N grows")  # whether it pays is what is being measured
            return grow(
                model.state_dict(),
                small,
                config,
                method=self.start,
                shrink=params.get("shrink", self.shrink),
                noise=params.get("noise", self.noise),
            )

    def base(self, *, repeat: int = 0) -> Path:
        """The trained base of this seed, trained now if it is not there. ValueError if it diverges."""
        from proxies.training.loop import train

        path = self.base_path(repeat=repeat)
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if path.exists():
                return path
            going, keep = path.with_suffix(".going.pt"), path.with_suffix(".partial.pt")
            resume = keep if keep.exists() else None
            *_, last = train(self.source(repeat=repeat), self.source_tokens, resume=resume, save=going, keep=keep)
            if last.diverged:
                raise ValueError(f"the base of width {self.source_width} diverged at lr {self.lr:g}: lower it")
            os.replace(going, path)
        return path

    def base_path(self, *, repeat: int = 0) -> Path:
        """Named by its settings, so that another base is another file."""
        source = self.source(repeat=repeat)
        said = json.dumps([source.model_dump(mode="json"), self.source_tokens], sort_keys=True)
        return self.bases / f"{source.d_model}-seed{source.seed}-{hashlib.sha256(said.encode()).hexdigest()[:8]}.pt"
