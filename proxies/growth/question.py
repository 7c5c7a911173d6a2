"""The question of `proxies grow --plan`: the real pair, the small one in its place, run lengths, searches and cost."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from proxies.config.study_file import read_toml
from proxies.growth.trainer import GrowthFamily, StartMethod
from proxies.trainers.proxy_family import ProxyFamily, read_target
from scaling.laws.compute import Fidelity

# Reduction factor of the searches' ladders.
ETA = 3
# Tokens per parameter of a base model where no study says how long its proxies are trained.
DEFAULT_BASE = 20.0


class Pair(BaseModel):
    """The widths of a base model and of the model into which it grows."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    source: PositiveInt
    target: PositiveInt

    def __str__(self) -> str:
        return f"{self.source} to {self.target}"


@dataclass(frozen=True)
class QuestionOptions:
    """What may be chosen about a question.

    Attributes:
        real: Widths of the real pair; default: `source` and the study's [target].
        small: Widths of the pair to train; default: see `choose_small_pair`.
        source: Width of the base model; default: the study's largest proxy.
        at: The run length in question, tokens per parameter; default: the target's, or the longest of `horizons`.
        horizons: Other run lengths to report, tokens per parameter.
        base: Tokens per parameter of the base model; default: those of the study's longest proxy run at that width,
            else DEFAULT_BASE.
        seeds: Seeds of the runs that decide.
        budget: Budget of each search, in runs of the small pair's larger model to `at`.
        starts: The start methods to compare, "scratch" first; default: see `list_possible_starts`.
    """

    real: Sequence[int] | None = None
    small: Sequence[int] | None = None
    source: int | None = None
    at: float | None = None
    horizons: Sequence[float] = (2.0, 5.0, 10.0, 20.0)
    base: float | None = None
    seeds: int = 3
    budget: float = 6.0
    starts: Sequence[StartMethod] | None = None


@dataclass(frozen=True)
class PlannedRuns:
    """Runs of one kind that are to be trained.

    Attributes:
        what: What they are for.
        trainer: What trains them.
        size: N and D of one run.
        count: How many runs, possibly a fraction.
    """

    what: str
    trainer: GrowthFamily
    size: Fidelity
    count: float


class Question(BaseModel):
    """Whether a warm start is worth it for one pair, and how that is found out.

    Run lengths are in tokens per parameter of a pair's larger model, that of the base model in its own.

    Attributes:
        study: The study's name.
        folder: The study's folder.
        family: The study's family; its n_layers and base_layers are those of the larger models.
        source_layers: n_layers of the base models.
        real: The pair in question.
        small: The pair that is trained.
        second: A still smaller pair, which shows how gains change with size.
        base: Tokens per parameter of a base model.
        at: The run length in question.
        horizons: Other run lengths to report.
        seeds: Seeds of the runs that decide.
        budget: Budget of each search.
        starts: The start methods to compare, "scratch" first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    study: str
    folder: Path
    family: ProxyFamily
    source_layers: PositiveInt
    real: Pair
    small: Pair
    second: Pair | None
    base: PositiveFloat
    at: PositiveFloat
    horizons: tuple[PositiveFloat, ...]
    seeds: int = Field(ge=2)
    budget: PositiveFloat = Field(description="of each search, in runs of the small pair's larger model to `at`")
    starts: tuple[StartMethod, ...]

    @cached_property
    def id(self) -> str:
        """A hash of what is searched and trained. More run lengths and seeds are added to the same question."""
        settings = self.model_dump_json(exclude={"folder", "horizons", "seeds", "second", "real"})
        return hashlib.sha256(settings.encode()).hexdigest()[:8]

    @property
    def home(self) -> Path:
        """The folder of all files that belong to the question."""
        return self.folder / f"growth-{self.id}"

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The pairs that are trained."""
        return (self.small, self.second) if self.second else (self.small,)

    @property
    def base_cost(self) -> float:
        """FLOPs of the real base model, 6 N D, in tokens per parameter of the real target."""
        trainer = self.make_trainer("scratch", self.real)
        return self.base * (trainer.source().counts.N / trainer.sizes[0]) ** 2

    def make_trainer(self, start: StartMethod, pair: Pair) -> GrowthFamily:
        """Return the trainer of one start method in one pair."""
        changes = {"widths": (pair.target,), "start": start, "source_width": pair.source, "source_tokens": 1}
        trainer = self._trainer.model_copy(update=changes)
        return trainer.model_copy(update={"source_tokens": int(self.base * trainer.source().counts.N)})

    @cached_property
    def _trainer(self) -> GrowthFamily:
        more = {"source_width": self.real.source, "source_layers": self.source_layers, "source_tokens": 1}
        return GrowthFamily.model_validate(self.family.model_dump() | more | {"bases": self.home / "bases"})

    def list_lengths(self, start: StartMethod) -> tuple[float, ...]:
        """Return the run lengths of a ladder, ascending.

        Scratch has one more: the longest run length plus what the base model costs.
        """
        lengths = {*self.horizons, self.at}
        if start == "scratch":
            lengths.add(max(lengths) + self.base_cost)
        return tuple(sorted(lengths))

    def compute_ladder(self, pair: Pair, start: StartMethod) -> dict[int, float]:
        """Return the run lengths of a ladder by their tokens in this pair."""
        N = self.make_trainer("scratch", pair).sizes[0]
        return {int(length * N): length for length in self.list_lengths(start)}

    @property
    def searched_tokens(self) -> tuple[int, int]:
        """Tokens of the shortest and the longest run of a search.

        The shortest is up to two rungs below the run length in question, as far as the warm-up allows.
        """
        trainer = self.make_trainer("scratch", self.small)
        tokens, window = int(self.at * trainer.sizes[0]), self.family.seq_len
        for rungs in (2, 1, 0):
            least = max(tokens // ETA**rungs // window, 1) * window
            if not trainer.problems({}, (least, least)):
                break
        return least, least * ETA**rungs

    def find_problems(self) -> list[str]:
        """Return the reasons why this cannot be trained, each once."""
        problems: list[str] = []
        for pair in self.pairs:
            for start in self.starts:
                shortest = min(self.compute_ladder(pair, start))
                of_pair = self.make_trainer(start, pair).problems({}, (shortest, shortest))
                problems += [f"pair {pair}: {problem}" for problem in of_pair]
        return list(dict.fromkeys(problems))

    @property
    def planned_runs(self) -> list[PlannedRuns]:
        """Everything that is to be trained but the base models: the searches, then the ladders."""
        planned = []
        for start in self.starts:
            trainer = self.make_trainer(start, self.small)
            size = Fidelity(trainer.sizes[0], self.searched_tokens[1])
            planned.append(PlannedRuns(f"search {start}", trainer, size, self.budget))
        for pair in self.pairs:
            for start in self.starts:
                trainer, before = self.make_trainer(start, pair), 0.0
                trained = 0.0
                for tokens in sorted(self.compute_ladder(pair, start)):
                    trained += tokens - before
                    # A longer run of a resumable trainer continues from the trunk of the shorter one.
                    before = tokens * (1 - self.family.cooldown) if trainer.resumable else 0.0
                size = Fidelity(trainer.sizes[0], trained)
                planned.append(PlannedRuns(f"ladder {start}, {pair}", trainer, size, float(self.seeds)))
        return planned


def make_question(toml: Path, family: ProxyFamily, options: QuestionOptions | None = None) -> Question:
    """Make the question about a study's [target], or about another pair.

    Args:
        toml: The study file.
        family: The study's family, with the settings to train with.
        options: What is chosen about the question.

    Returns:
        The question, checked, so that all of its runs can be trained.

    Raises:
        ValueError: With all mistakes.
    """
    chosen = options or QuestionOptions()
    table = read_toml(toml)
    target = read_target(table["target"]) if "target" in table else None
    real = chosen.real
    if real is None:
        if target is None:
            raise ValueError(f"{toml} has no [target]: add one, or name the pair with --pair, such as --pair 64,96")
        real = (chosen.source or max(family.widths), target.d_model)
    elif chosen.source is not None:
        raise ValueError("--pair names the base model's width already: leave out --from")
    _check_options(chosen, real)
    layers = (target.n_layers if target else None) or family.n_layers
    if layers == family.n_layers and real[0] == real[1]:
        raise ValueError(f"needed a target that is wider or deeper than its base, got {real[0]} to {real[1]}")
    depth = {"n_layers": layers}
    if layers != family.n_layers:
        depth["base_layers"] = family.base_layers or family.n_layers
    large_family = ProxyFamily.model_validate(family.model_dump() | depth | {"widths": sorted(set(real))})
    real_pair = Pair(source=real[0], target=real[1])
    small = chosen.small
    pair = Pair(source=small[0], target=small[1]) if small else choose_small_pair(large_family, real_pair)
    if not (pair.target < real_pair.target and pair.source * real_pair.target == pair.target * real_pair.source):
        raise ValueError(
            f"--small: needed a smaller pair of the same growth as {real_pair} (settings transfer at equal growth), "
            f"got {pair}"
        )
    group = family.d_head * family.q_per_kv
    half = Pair(source=max(pair.source // 2, 1), target=max(pair.target // 2, 1))
    second = half if pair.source % (2 * group) == 0 and pair.target % (2 * group) == 0 else None
    base = chosen.base
    if base is None:
        longest = table.get("search", {}).get("tokens", {}).get("max")
        known = longest and real[0] in family.widths
        base = longest / family.member(real[0]).counts.N if known else DEFAULT_BASE
    at = chosen.at
    if at is None:
        N = ProxyFamily.member(large_family, real[1]).counts.N
        is_study_target = target is not None and real[1] == target.d_model
        at = target.tokens / N if is_study_target and target else max(chosen.horizons)
    question = Question(
        study=toml.stem,
        folder=toml.parent / toml.stem,
        family=large_family,
        source_layers=family.n_layers,
        real=real_pair,
        small=pair,
        second=second,
        base=base,
        at=at,
        horizons=tuple(sorted(set(chosen.horizons))),
        seeds=chosen.seeds,
        budget=chosen.budget,
        starts=tuple(chosen.starts) if chosen.starts else list_possible_starts(real_pair),
    )
    if problems := question.find_problems():
        raise ValueError(f"{toml}: nothing was started\n  " + "\n  ".join(problems))
    return question


def _check_options(options: QuestionOptions, real: Sequence[int]) -> None:
    """Raise ValueError with all options that are wrong by themselves."""
    problems = []
    for name, widths in (("--pair", real), ("--small", options.small)):
        if widths is not None and (len(widths) != 2 or not 0 < widths[0] <= widths[1]):
            problems.append(
                f"{name}: needed two widths, the base's and one at least as large, got {','.join(map(str, widths))}"
            )
    horizons, at, base = options.horizons, options.at, options.base
    if not horizons or min(horizons) <= 0 or (at is not None and at <= 0):
        problems.append(f"--horizons, --at: needed positive tokens per parameter, got {list(horizons)}, {at}")
    if options.seeds < 2:
        problems.append(
            f"--seeds: needed at least 2, because intervals come from their differences, got {options.seeds}"
        )
    if not options.budget > 0:
        problems.append(f"--budget: needed a positive number of runs, got {options.budget:g}")
    if base is not None and not base > 0:
        problems.append(f"--base: needed positive tokens per parameter, got {base:g}")
    if problems:
        raise ValueError("; ".join(problems))


def list_possible_starts(pair: Pair) -> tuple[StartMethod, ...]:
    """Return the start methods that this growth allows, "scratch" first."""
    if pair.target % pair.source:
        return ("scratch", "shrink-pad-perturb")
    copies: tuple[StartMethod, ...] = ("duplicate", "hyperclone") if pair.target > pair.source else ("duplicate",)
    return ("scratch", "shrink-pad-perturb", *copies)


def choose_small_pair(family: ProxyFamily, real: Pair) -> Pair:
    """Choose the pair to train in place of the real one.

    Args:
        family: The study's family, which says which widths are possible.
        real: The real pair.

    Returns:
        Half the widths, or else the smallest possible pair of the same growth factor.

    Raises:
        ValueError: If no smaller pair is possible. The message names what would be.
    """
    group = family.d_head * family.q_per_kv
    if not any(width % (2 * group) for width in (real.source, real.target)):
        return Pair(source=real.source // 2, target=real.target // 2)
    divisor = math.gcd(real.source, real.target)
    p, q = real.source // divisor, real.target // divisor
    k = math.lcm(group // math.gcd(group, p), group // math.gcd(group, q))
    if p * k < real.source:
        return Pair(source=p * k, target=q * k)
    finer = [d for d in range(2, family.d_head, 2) if divisor % (2 * d * family.q_per_kv) == 0]
    heads = f", or d_head = {max(finer)}, with which half the widths can be trained" if finer else ""
    raise ValueError(
        f"needed a smaller pair of the growth {real}, got none whose widths are multiples of d_head * q_per_kv = "
        f"{group}: "
        f"take a larger pair of this growth, {2 * p * k} to {2 * q * k} or larger{heads}"
    )


def apply_found_settings(
    family: ProxyFamily, best: Mapping[str, Any] | None, recommendation: Mapping[str, Any] | None
) -> ProxyFamily:
    """Return a family with the settings that its study has found.

    Args:
        family: The study's family.
        best: The search's best settings, if there are any.
        recommendation: The recommendation, whose learning rate and batch size take precedence, if there is one.
    """
    settings = dict(best or {})
    # A study that varied neither has a recommendation without them.
    if recommendation and recommendation["batch_tokens"] is not None:
        settings["batch_seqs"] = max(1, round(recommendation["batch_tokens"] / family.seq_len))
    if recommendation and recommendation["lr"] is not None:
        settings["lr"] = recommendation["lr"]
    member = family.member(max(family.widths), settings).model_dump(exclude={"d_model"})
    return ProxyFamily.model_validate(family.model_dump() | member)
