"""The trainer that a study file names: a family of proxies that differ in width, and the target that they stand for."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, ValidationInfo, field_validator

from proxies.config.growth_rules import GrowthMethod, check_growth
from proxies.config.mixture_weights import MIX_PREFIX
from proxies.config.optimizer_gate import CERTIFIED_SETTINGS, VERIFIED_RULES, explain_refusal
from proxies.config.proxy import ProxyConfig, ProxySettings
from proxies.config.schedules import SCHEDULES, find_unused_settings
from proxies.training.throughput import measure_speed
from scaling.common.measurement import Measurement
from scaling.laws.compute import Fidelity

# What may be searched: numbers that leave the shape alone (widths are the study's sizes; tokens are its fidelity).
SEARCHABLE = (
    "alpha_attn",
    "alpha_in",
    "alpha_out",
    "batch_seqs",
    "beta1",
    "beta2",
    "beta3",
    "cooldown",
    "embed_lr_mult",
    "embed_std",
    "eps",
    "init_std",
    "lr",
    "lr_floor",
    "momentum",
    "power_a",
    "power_b",
    "slow_warmup_tokens",
    "slow_weight",
    "sqrt_tokens",
    "warmup_tokens",
    "weight_decay",
)

# Settings that only some optimizers have; searching one where nothing depends on it would waste the search.
ONLY_OF = {
    "beta3": ("ademamix",),
    "momentum": ("muon", "muon-rms"),
    "slow_warmup_tokens": ("ademamix",),
    "slow_weight": ("ademamix",),
}

OTHER_NAMES = {
    "learning_rate": "lr",
    "max_lr": "lr",
    "batch": "batch_seqs",
    "batch_size": "batch_seqs",
    "batch_tokens": "batch_seqs",
    "wd": "weight_decay",
    "warmup": "warmup_tokens",
    "warmup_steps": "warmup_tokens",
}


class Target(BaseModel):
    """The `[target]` table: a size of the same family, how long to train it, and how to grow its start from a proxy."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    d_model: PositiveInt
    n_layers: PositiveInt | None = Field(None, description="default: the family's")
    tokens: PositiveInt
    method: GrowthMethod = "shrink-pad-perturb"
    shrink: float = Field(0.4, ge=0, le=1)
    noise: float | None = Field(None, ge=0, description="default: the method's own")


class ProxyFamily(ProxySettings):
    """The `[trainer]` table of a study: what all proxies share, and their widths."""

    target_table: ClassVar[type[BaseModel]] = Target
    widths: tuple[PositiveInt, ...] = Field((32, 64, 128), min_length=1, description="d_model of each proxy size")

    # Checked by field, so that every mistake is found in one reading of the file.

    @field_validator("corpus")
    @classmethod
    def _corpus_is_there(cls, corpus: str | dict[str, str], info: ValidationInfo) -> str | dict[str, str]:
        from proxies.data.corpora import check_corpora

        wrong = check_corpora(
            {"": corpus} if isinstance(corpus, str) else corpus,
            vocab=info.data.get("vocab", 256),
            seq_len=info.data.get("seq_len", 1),
            tokenizer=info.data.get("tokenizer", "bytes"),
        )
        if wrong:
            raise ValueError("; ".join(wrong))
        return corpus

    @field_validator("widths")
    @classmethod
    def _widths_make_whole_heads(cls, widths: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        group = info.data.get("d_head", 1) * info.data.get("q_per_kv", 1)
        broken = [w for w in (*widths, info.data.get("base_width", group)) if w % group]
        if broken:
            raise ValueError(
                f"d_model must be a multiple of d_head * q_per_kv = {group} (whole heads, whole groups), as must base_width; "
                f"got {', '.join(map(str, broken))}"
            )
        if len(set(widths)) < len(widths):
            raise ValueError(f"they must differ, got {list(widths)}")
        return widths

    @property
    def resumable(self) -> bool:
        """Whether a longer run goes on from a shorter one. Not under a schedule with a horizon: it pays its full price."""
        return not SCHEDULES[self.schedule].has_horizon

    def member(self, d_model: int, params: Mapping[str, Any] | None = None) -> ProxyConfig:
        """The family's proxy of this width, with searched parameters in place of its own.

        "mix.NAME" is the weight of a source; the others keep theirs, and the proxy has the shares that follow.
        """
        given = dict(params or {})
        weights = {name.removeprefix(MIX_PREFIX): given.pop(name) for name in list(given) if name.startswith(MIX_PREFIX)}
        if weights:
            given["mixture"] = self.weights | weights
        return ProxyConfig(**self.model_dump(exclude={"widths"}), d_model=d_model).model_copy(update=given)

    @property
    def weights(self) -> dict[str, float]:
        """The weight of every source as the study gives it; 1 if it gives none."""
        return self.mixture or ({} if isinstance(self.corpus, str) else dict.fromkeys(self.corpus, 1.0))

    @property
    def sizes(self) -> tuple[float, ...]:
        """N of every width, ascending."""
        return tuple(float(self.member(w).counts.N) for w in sorted(self.widths))

    def config(self, params: Mapping[str, Any], fidelity: Fidelity, *, repeat: int = 0) -> ProxyConfig:
        """The proxy with these parameters whose N is `fidelity.N`, validated. repeat: added to the family's seed."""
        by_size = {float(self.member(w).counts.N): w for w in self.widths}
        if fidelity.N not in by_size:
            raise ValueError(f"no width of this family has N = {fidelity.N:g}; it has {sorted(by_size)}")
        settings = self.member(by_size[fidelity.N], params).model_dump()
        return ProxyConfig.model_validate(settings | {"seed": self.seed + repeat})

    def target(self, **table: Any) -> Fidelity:
        """N and D of the target, which must be a size that the family can have."""
        target = Target.model_validate(table)
        config = self.target_config(target)
        if wrong := explain_refusal(config):
            raise ValueError(wrong)
        check_growth(self.member(max(self.widths)), config, target.method)
        return Fidelity(float(config.counts.N), float(target.tokens))

    def target_config(self, target: Target, params: Mapping[str, Any] | None = None) -> ProxyConfig:
        """The target with searched parameters in place of the family's, validated.

        One of another depth than its proxies has theirs as its base, so that CompleteP carries their rates to it.
        """
        depth = {"n_layers": target.n_layers or self.n_layers, "base_layers": self.base_layers}
        if depth["n_layers"] != self.n_layers:
            depth["base_layers"] = self.base_layers or self.n_layers
        return ProxyConfig.model_validate(self.member(target.d_model, params).model_dump() | depth)

    def problems(self, space: Mapping[str, Any], tokens: tuple[int, int] | None) -> list[str]:
        """Names that cannot be searched, values that cannot be trained, runs too short for their steps and warm-up."""
        said = []
        width = min(self.widths)
        sources = [] if isinstance(self.corpus, str) else [MIX_PREFIX + name for name in self.corpus]
        known = [*SEARCHABLE, *sources]
        for name, dimension in space.items():
            if name not in known:
                near = [OTHER_NAMES[name.lower()]] if name.lower() in OTHER_NAMES else []
                near += difflib.get_close_matches(name, known, n=1, cutoff=0.6)
                hint = f"did you mean {near[0]}?" if near else f"searchable: {', '.join(known)}"
                said.append(f"space.{name}: unknown parameter; {hint}")
                continue
            if name in find_unused_settings(self):
                said.append(
                    f"space.{name}: schedule {self.schedule!r} with decay {self.decay!r} never reads it; leave it out, or "
                    "choose a schedule that does"
                )
                continue
            owners = ONLY_OF.get(name)
            if owners and self.optimizer not in owners:
                said.append(f"space.{name}: a setting of {', '.join(owners)}; optimizer is {self.optimizer!r}")
            ends = getattr(dimension, "choices", None) or (dimension.low, dimension.high)
            for end in ends:
                try:
                    changed = (
                        {"mixture": self.weights | {name.removeprefix(MIX_PREFIX): end}} if name in sources else {name: end}
                    )
                    ProxyConfig.model_validate(self.member(width).model_dump() | changed)
                except ValidationError as error:
                    said += [f"space.{name}: {e['msg']}, got {end!r}" for e in error.errors()]
        said += self._unverified(space)
        batch = space.get("batch_seqs")
        largest = int(batch.high if batch is not None and hasattr(batch, "high") else self.batch_seqs) * self.seq_len
        if tokens is None:
            return said
        if tokens[0] < 2 * largest:
            said.append(
                f"search.tokens.min: the smallest run must hold at least two of the largest steps "
                f"(2 x {largest:,} = {2 * largest:,} tokens), got {tokens[0]:,}"
            )
        before, what = float(tokens[0]), "smallest run ends"
        if SCHEDULES[self.schedule].has_cooldown:
            before, what = before * (1 - self.cooldown), "smallest run's cooldown begins"
        if before <= self.warmup_tokens:
            said.append(
                f"trainer.warmup_tokens: the warm-up must end before the {what} "
                f"({before:,.0f} tokens), got {self.warmup_tokens:,}"
            )
        return said

    def _unverified(self, space: Mapping[str, Any]) -> list[str]:
        """Widths that the optimizer has no rule for; a setting that its certificate fixes cannot be searched either."""
        if self.optimizer in VERIFIED_RULES or self.parametrization != "mup" or set(self.widths) == {self.base_width}:
            return []
        wrong = explain_refusal(self.member(max(self.widths)), self.widths)
        return ([f"trainer.optimizer: {wrong}"] if wrong else []) + [
            f"space.{name}: the coordinate check of {self.optimizer!r} is for one value"
            for name in space
            if name in CERTIFIED_SETTINGS
        ]

    def describe(self, params: Mapping[str, Any], fidelity: Fidelity, *, repeat: int = 0) -> dict[str, Any]:
        """Every setting of the run, resolved, and the data's hash."""
        return describe(self.config(params, fidelity, repeat=repeat))

    def manifest(self) -> list[dict[str, Any]]:
        """Path, size in bytes and split of every file of the corpus, and its source if there are several."""
        from proxies.data.mixture import open_data

        corpora = open_data(self.member(min(self.widths))).corpora
        return [
            asdict(file) | ({"source": name} if name else {})
            for name, corpus in corpora.items()
            for file in corpus.files
        ]

    def seconds(self, params: Mapping[str, Any], fidelities: Sequence[Fidelity], *, threads: int) -> list[float]:
        """Measured on a few steps of each size."""
        speed: dict[float, float] = {}
        for fidelity in fidelities:
            if fidelity.N not in speed:
                speed[fidelity.N] = measure_speed(self.config(params, fidelity), threads=threads)
        return [f.D / speed[f.N] for f in fidelities]

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
        """Train the proxy with these parameters and this N for D tokens, on the `repeat`-th seed after its own."""
        from proxies.training.loop import train

        config = self.config(params, fidelity, repeat=repeat)
        return train(config, int(fidelity.D), resume=resume, save=save, keep=keep)


def describe(config: ProxyConfig) -> dict[str, Any]:
    """The record of a run: its settings, its three parameter counts, the data's name, size, hash and shares."""
    from proxies.data.mixture import describe_data

    return config.model_dump() | {
        "N": config.counts.N,
        "N_nonembedding": config.counts.nonembedding,
        "N_total": config.counts.total,
        "batch_tokens": config.batch_tokens,
        **describe_data(config),
    }
