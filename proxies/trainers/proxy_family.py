"""The trainer that a study file names: a family of proxies that differ in width, and their target."""

from __future__ import annotations

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
from scaling.common.suggest import find_similar
from scaling.common.validation import explain_errors, list_mistakes
from scaling.laws.compute import Fidelity

# Settings that may be searched: numbers that do not change the shape. Widths are the study's sizes, tokens its
# fidelity.
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

# Settings that only some optimizers have. Searching one on which nothing depends would waste the search.
OPTIMIZER_SETTINGS = {
    "beta3": ("ademamix",),
    "momentum": ("muon", "muon-rms"),
    "slow_warmup_tokens": ("ademamix",),
    "slow_weight": ("ademamix",),
}

# Names that other programs use for these settings.
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
    """The `[target]` table: a size of the same family, its training tokens, and how to grow its start from a proxy."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    d_model: PositiveInt
    n_layers: PositiveInt | None = Field(None, description="default: the family's")
    tokens: PositiveInt
    method: GrowthMethod = "shrink-pad-perturb"
    shrink: float = Field(0.4, ge=0, le=1)
    noise: float | None = Field(None, ge=0, description="default: the method's own")


def read_target(table: Any) -> Target:
    """Return a [target] table; ValueError with all mistakes in it."""
    try:
        return Target.model_validate(table)
    except ValidationError as error:
        problems = explain_errors(error, Target, synonyms=OTHER_NAMES)
        raise ValueError("[target]: " + list_mistakes(problems)) from error


class ProxyFamily(ProxySettings):
    """The `[trainer]` table of a study: settings of all proxies, and their widths. It implements hpo's `Trainer`."""

    target_table: ClassVar[type[BaseModel]] = Target
    # The setting whose values `list_sizes` returns.
    size_setting: ClassVar[str] = "widths"
    widths: tuple[PositiveInt, ...] = Field((32, 64, 128), min_length=1, description="d_model of each proxy size")

    # Fields are checked one by one, so that every mistake is found in one reading of the file.

    @field_validator("corpus")
    @classmethod
    def _check_corpus(cls, corpus: str | dict[str, str], info: ValidationInfo) -> str | dict[str, str]:
        from proxies.data.corpora import check_corpora

        problems = check_corpora(
            {"": corpus} if isinstance(corpus, str) else corpus,
            vocab=info.data.get("vocab", 256),
            seq_len=info.data.get("seq_len", 1),
            tokenizer=info.data.get("tokenizer", "bytes"),
        )
        if problems:
            raise ValueError("; ".join(problems))
        return corpus

    @field_validator("widths")
    @classmethod
    def _check_widths(cls, widths: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        group = info.data.get("d_head", 1) * info.data.get("q_per_kv", 1)
        broken = [w for w in (*widths, info.data.get("base_width", group)) if w % group]
        if broken:
            raise ValueError(
                f"d_model must be a multiple of d_head * q_per_kv = {group} (whole heads, whole groups), as must "
                f"base_width; got {', '.join(map(str, broken))}"
            )
        if len(set(widths)) < len(widths):
            raise ValueError(f"they must differ, got {list(widths)}")
        return widths

    @property
    def resumable(self) -> bool:
        """Whether a longer run continues from a shorter one; under a schedule with a horizon it starts from scratch."""
        return not SCHEDULES[self.schedule].has_horizon

    def member(self, d_model: int, params: Mapping[str, Any] | None = None) -> ProxyConfig:
        """Return the family's proxy of this width, with searched parameters in place of its own. It is not validated.

        Args:
            d_model: The width.
            params: Searched parameters by name. "mix.NAME" is the weight of a source; the other sources keep theirs,
                and the proxy gets the resulting shares.
        """
        settings = dict(params or {})
        weights = {
            name.removeprefix(MIX_PREFIX): settings.pop(name) for name in list(settings) if name.startswith(MIX_PREFIX)
        }
        if weights:
            settings["mixture"] = self.weights | weights
        return ProxyConfig(**self.model_dump(exclude={"widths"}), d_model=d_model).model_copy(update=settings)

    @property
    def weights(self) -> dict[str, float]:
        """The weight of every source in the study file; 1 if it has none."""
        return self.mixture or ({} if isinstance(self.corpus, str) else dict.fromkeys(self.corpus, 1.0))

    @property
    def sizes(self) -> tuple[float, ...]:
        """N of every width, in ascending order."""
        return tuple(float(self.member(w).counts.N) for w in sorted(self.widths))

    def list_sizes(self, largest: float) -> dict[float, int]:
        """Return the sizes that the family could have, up to one, as {N: width}.

        Widths are whole groups of heads, spaced by about an eighth.

        Args:
            largest: The largest N.
        """
        group = self.d_head * self.q_per_kv
        sizes: dict[float, int] = {}
        width = group
        while (size := float(self.member(width).counts.N)) <= largest:
            sizes[size] = width
            width = max(width + group, round(width * 1.125 / group) * group)
        return sizes

    def config(self, params: Mapping[str, Any], fidelity: Fidelity, *, repeat: int = 0) -> ProxyConfig:
        """Return the validated configuration of a run.

        Args:
            params: Searched parameters by name.
            fidelity: N of one of the family's widths, and D.
            repeat: Added to the family's seed.

        Raises:
            ValueError: If no width has this N, or a parameter cannot have its value.
        """
        by_size = {float(self.member(w).counts.N): w for w in self.widths}
        if fidelity.N not in by_size:
            raise ValueError(f"no width of this family has N = {fidelity.N:g}; it has {sorted(by_size)}")
        settings = self.member(by_size[fidelity.N], params).model_dump()
        return ProxyConfig.model_validate(settings | {"seed": self.seed + repeat})

    def target(self, **table: Any) -> Fidelity:
        """Return N and D of a [target] table; ValueError if it is not a size of this family or cannot be grown."""
        target = Target.model_validate(table)
        config = self.target_config(target)
        if refusal := explain_refusal(config):
            raise ValueError(refusal)
        check_growth(self.member(max(self.widths)), config, target.method)
        return Fidelity(float(config.counts.N), float(target.tokens))

    def target_config(self, target: Target, params: Mapping[str, Any] | None = None) -> ProxyConfig:
        """Return the target's validated configuration.

        A target of another depth than its proxies has theirs as its base depth, so that CompleteP transfers their
        rates.

        Args:
            target: The [target] table.
            params: Searched parameters that replace the family's settings.
        """
        depth = {"n_layers": target.n_layers or self.n_layers, "base_layers": self.base_layers}
        if depth["n_layers"] != self.n_layers:
            depth["base_layers"] = self.base_layers or self.n_layers
        return ProxyConfig.model_validate(self.member(target.d_model, params).model_dump() | depth)

    def problems(self, space: Mapping[str, Any], tokens: tuple[int, int] | None) -> list[str]:
        """Return names that cannot be searched, values that cannot be trained, and runs that are too short.

        Args:
            space: The searched parameters.
            tokens: Tokens of the shortest and the longest run; None if they are not known yet.

        Returns:
            One sentence per problem.
        """
        problems = [*self._find_space_problems(space), *self._find_unverified(space)]
        return problems if tokens is None else problems + self._find_length_problems(space, tokens[0])

    def _find_space_problems(self, space: Mapping[str, Any]) -> list[str]:
        problems = []
        width = min(self.widths)
        sources = [] if isinstance(self.corpus, str) else [MIX_PREFIX + name for name in self.corpus]
        known = [*SEARCHABLE, *sources]
        for name, dimension in space.items():
            if name not in known:
                similar = [OTHER_NAMES[name.lower()]] if name.lower() in OTHER_NAMES else []
                similar += find_similar(name, known, cutoff=0.6)
                hint = f"did you mean {similar[0]}?" if similar else f"searchable: {', '.join(known)}"
                problems.append(f"space.{name}: unknown parameter; {hint}")
                continue
            if name in find_unused_settings(self):
                problems.append(
                    f"space.{name}: schedule {self.schedule!r} with decay {self.decay!r} never reads it; leave it "
                    "out, or "
                    "choose a schedule that does"
                )
                continue
            owners = OPTIMIZER_SETTINGS.get(name)
            if owners and self.optimizer not in owners:
                problems.append(f"space.{name}: a setting of {', '.join(owners)}; optimizer is {self.optimizer!r}")
            ends = getattr(dimension, "choices", None) or (dimension.low, dimension.high)
            for end in ends:
                if name in sources:
                    changed = {"mixture": self.weights | {name.removeprefix(MIX_PREFIX): end}}
                else:
                    changed = {name: end}
                try:
                    ProxyConfig.model_validate(self.member(width).model_dump() | changed)
                except ValidationError as error:
                    # The space's own name says where, instead of that of the setting.
                    sentences = [sentence.removeprefix(f"{name}: ") for sentence in explain_errors(error, ProxyConfig)]
                    problems += [f"space.{name}: {sentence}" for sentence in sentences]
        return problems

    def _find_unverified(self, space: Mapping[str, Any]) -> list[str]:
        """Return widths for which the optimizer has no rule, and searched settings that its certificate fixes."""
        if self.optimizer in VERIFIED_RULES or self.parametrization != "mup" or set(self.widths) == {self.base_width}:
            return []
        refusal = explain_refusal(self.member(max(self.widths)), self.widths)
        return ([f"trainer.optimizer: {refusal}"] if refusal else []) + [
            f"space.{name}: the coordinate check of {self.optimizer!r} is for one value"
            for name in space
            if name in CERTIFIED_SETTINGS
        ]

    def _find_length_problems(self, space: Mapping[str, Any], shortest: int) -> list[str]:
        """Return why a run of so many tokens is too short for its steps or its warm-up."""
        problems = []
        batch = space.get("batch_seqs")
        largest = int(batch.high if batch is not None and hasattr(batch, "high") else self.batch_seqs) * self.seq_len
        if shortest < 2 * largest:
            problems.append(
                f"search.tokens.min: the smallest run must hold at least two of the largest steps "
                f"(2 x {largest:,} = {2 * largest:,} tokens), got {shortest:,}"
            )
        before, what = float(shortest), "smallest run ends"
        if SCHEDULES[self.schedule].has_cooldown:
            before, what = before * (1 - self.cooldown), "smallest run's cooldown begins"
        if before <= self.warmup_tokens:
            problems.append(
                f"trainer.warmup_tokens: the warm-up must end before the {what} "
                f"({before:,.0f} tokens), got {self.warmup_tokens:,}"
            )
        return problems

    def describe(self, params: Mapping[str, Any], fidelity: Fidelity, *, repeat: int = 0) -> dict[str, Any]:
        """Return every setting of a run, defaults included, and the hash of its data."""
        return describe(self.config(params, fidelity, repeat=repeat))

    def manifest(self) -> list[dict[str, Any]]:
        """Return path, size in bytes and split of every file of the corpus, and its source if there are several."""
        from proxies.data.mixture import open_data

        corpora = open_data(self.member(min(self.widths))).corpora
        return [
            asdict(file) | ({"source": name} if name else {})
            for name, corpus in corpora.items()
            for file in corpus.files
        ]

    def seconds(self, params: Mapping[str, Any], fidelities: Sequence[Fidelity], *, threads: int) -> list[float]:
        """Estimate how long runs take one worker, from a few measured steps of each size."""
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
        """Train a proxy.

        Args:
            params: Searched parameters by name.
            fidelity: N of one of the family's widths, and D in tokens.
            resume: See `proxies.train`.
            save: See `proxies.train`.
            keep: See `proxies.train`.
            repeat: Added to the family's seed.

        Returns:
            The measurements, see `proxies.train`.
        """
        from proxies.training.loop import train

        config = self.config(params, fidelity, repeat=repeat)
        return train(config, int(fidelity.D), resume=resume, save=save, keep=keep)


def describe(config: ProxyConfig) -> dict[str, Any]:
    """Return the record of a run: its settings, its parameter counts, and the data's name, size, hash and shares."""
    from proxies.data.mixture import describe_data

    return config.model_dump() | {
        "N": config.counts.N,
        "N_nonembedding": config.counts.nonembedding,
        "N_total": config.counts.total,
        "batch_tokens": config.batch_tokens,
        **describe_data(config),
    }
