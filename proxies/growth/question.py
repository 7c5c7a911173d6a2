"""What `proxies grow --plan` asks: the real pair, the small one that stands in for it, lengths, searches, price. All checked."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from proxies.config.study_file import read_toml
from proxies.growth.trainer import GrowthFamily, Start
from proxies.trainers.proxy_family import ProxyFamily, Target
from scaling.laws.compute import Fidelity

ETA = 3  # of the searches' ladders
COMMON_BASE = 20.0  # tokens per parameter of a base, where no study says how long its proxies are trained


class Pair(BaseModel):
    """The widths of a base and of what it grows into."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    source: PositiveInt
    target: PositiveInt

    def __str__(self) -> str:
        return f"{self.source} to {self.target}"


class Question(BaseModel):
    """What is asked. Lengths are in tokens per parameter (N) of a pair's larger model; the base's in those of the base."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    study: str
    folder: Path  # of the study
    family: ProxyFamily  # n_layers and base_layers: of the larger models
    source_layers: PositiveInt
    real: Pair
    small: Pair
    second: Pair | None  # still smaller, to see what changes with size
    base: PositiveFloat
    at: PositiveFloat
    horizons: tuple[PositiveFloat, ...]
    seeds: int = Field(ge=2)
    budget: PositiveFloat = Field(description="of each search, in runs of the small pair's larger model to `at`")
    starts: tuple[Start, ...]  # "scratch" first

    @cached_property
    def id(self) -> str:
        """Names what is searched and trained; other lengths and more seeds are added to it."""
        said = self.model_dump_json(exclude={"folder", "horizons", "seeds", "second", "real"})
        return hashlib.sha256(said.encode()).hexdigest()[:8]

    @property
    def home(self) -> Path:
        return self.folder / f"growth-{self.id}"

    @property
    def pairs(self) -> tuple[Pair, ...]:
        return (self.small, self.second) if self.second else (self.small,)

    @property
    def base_cost(self) -> float:
        """FLOPs of the real base, 6 N D, in tokens per parameter of the real target."""
        trainer = self.trainer("scratch", self.real)
        return self.base * (trainer.source().counts.N / trainer.sizes[0]) ** 2

    def trainer(self, start: Start, pair: Pair) -> GrowthFamily:
        """One way to start in this pair."""
        changes = {"widths": (pair.target,), "start": start, "source_width": pair.source, "source_tokens": 1}
        made = self._trainer.model_copy(update=changes)
        return made.model_copy(update={"source_tokens": int(self.base * made.source().counts.N)})

    @cached_property
    def _trainer(self) -> GrowthFamily:
        more = {"source_width": self.real.source, "source_layers": self.source_layers, "source_tokens": 1}
        return GrowthFamily.model_validate(self.family.model_dump() | more | {"bases": self.home / "bases"})

    def lengths(self, start: Start) -> tuple[float, ...]:
        """A ladder. Scratch is also trained for what the base cost on top of the longest."""
        found = {*self.horizons, self.at}
        if start == "scratch":
            found.add(max(found) + self.base_cost)
        return tuple(sorted(found))

    def ladder(self, pair: Pair, start: Start) -> dict[int, float]:
        """Its lengths by tokens."""
        N = self.trainer("scratch", pair).sizes[0]
        return {int(length * N): length for length in self.lengths(start)}

    @property
    def searched(self) -> tuple[int, int]:
        """Shortest and longest run of a search, in tokens: up to two rungs below the length asked about, as the warm-up allows."""
        trainer = self.trainer("scratch", self.small)
        whole, window = int(self.at * trainer.sizes[0]), self.family.seq_len
        for rungs in (2, 1, 0):
            least = max(whole // ETA**rungs // window, 1) * window
            if not trainer.problems({}, (least, least)):
                break
        return least, least * ETA**rungs

    def problems(self) -> list[str]:
        """All that keeps this from being trained, each once."""
        said: list[str] = []
        for pair in self.pairs:
            for start in self.starts:
                shortest = min(self.ladder(pair, start))
                said += [f"pair {pair}: {p}" for p in self.trainer(start, pair).problems({}, (shortest, shortest))]
        return list(dict.fromkeys(said))

    @property
    def cost(self) -> list[tuple[str, GrowthFamily, Fidelity, float]]:
        """Everything to be trained: (what, trainer, size of one run, how many such runs)."""
        rows = []
        for start in self.starts:
            trainer = self.trainer(start, self.small)
            size = Fidelity(trainer.sizes[0], self.searched[1])
            rows.append((f"search {start}", trainer, size, self.budget))
        for pair in self.pairs:
            for start in self.starts:
                trainer, before = self.trainer(start, pair), 0.0
                trained = 0.0
                for tokens in sorted(self.ladder(pair, start)):
                    trained += tokens - before
                    before = tokens * (1 - self.family.cooldown) if trainer.resumable else 0.0
                rows.append(
                    (f"ladder {start}, {pair}", trainer, Fidelity(trainer.sizes[0], trained), float(self.seeds))
                )
        return rows


def make_question(
    toml: Path,
    family: ProxyFamily,
    *,
    real: Sequence[int] | None = None,
    small: Sequence[int] | None = None,
    source: int | None = None,
    at: float | None = None,
    horizons: Sequence[float] = (2.0, 5.0, 10.0, 20.0),
    base: float | None = None,
    seeds: int = 3,
    budget: float = 6.0,
    starts: Sequence[Start] | None = None,
) -> Question:
    """The question about a study's [target], or about another pair `real`; ValueError with all its mistakes.

    family: the study's, with the settings to train with. source: width of the base; default: the study's largest proxy. small: the
    pair to train; default: see `stand_in`. at: the length asked about; default: the target's, without one the longest of `horizons`.
    base: tokens per parameter of the base; default: those of the study's longest proxy run at that width, else 20.
    """
    table = read_toml(toml)
    target = Target.model_validate(table["target"]) if "target" in table else None
    if real is None:
        if target is None:
            raise ValueError(f"{toml} has no [target]: add one, or name the pair with --pair, such as --pair 64,96")
        real = (source or max(family.widths), target.d_model)
    elif source is not None:
        raise ValueError("--pair names the base's width already: leave out --from")
    said = []
    for name, widths in (("--pair", real), ("--small", small)):
        if widths is not None and (len(widths) != 2 or not 0 < widths[0] <= widths[1]):
            said.append(f"{name}: needed two widths, the base's and at least that, got {','.join(map(str, widths))}")
    if not horizons or min(horizons) <= 0 or (at is not None and at <= 0):
        said.append(f"--horizons, --at: needed positive tokens per parameter, got {list(horizons)}, {at}")
    if seeds < 2:
        said.append(f"--seeds: needed at least 2, an interval is made of their differences, got {seeds}")
    if not budget > 0:
        said.append(f"--budget: needed a positive number of runs, got {budget:g}")
    if base is not None and not base > 0:
        said.append(f"--base: needed positive tokens per parameter, got {base:g}")
    if said:
        raise ValueError("; ".join(said))
    layers = (target.n_layers if target else None) or family.n_layers
    if layers == family.n_layers and real[0] == real[1]:
        raise ValueError(f"needed a target that is wider or deeper than its base, got {real[0]} to {real[1]}")
    depth = {"n_layers": layers}
    if layers != family.n_layers:
        depth["base_layers"] = family.base_layers or family.n_layers
    grown = ProxyFamily.model_validate(family.model_dump() | depth | {"widths": sorted(set(real))})
    chosen = Pair(source=real[0], target=real[1])
    pair = Pair(source=small[0], target=small[1]) if small else stand_in(grown, chosen)
    if not (pair.target < chosen.target and pair.source * chosen.target == pair.target * chosen.source):
        raise ValueError(
            f"--small: needed a smaller pair of the same growth as {chosen} (settings transfer at equal growth), got {pair}"
        )
    group = family.d_head * family.q_per_kv
    half = Pair(source=max(pair.source // 2, 1), target=max(pair.target // 2, 1))
    second = half if pair.source % (2 * group) == 0 and pair.target % (2 * group) == 0 else None
    if base is None:
        searched = table.get("search", {}).get("tokens", {}).get("max")
        base = searched / family.member(real[0]).counts.N if searched and real[0] in family.widths else COMMON_BASE
    if at is None:
        N = ProxyFamily.member(grown, real[1]).counts.N
        asked_of_target = target is not None and real[1] == target.d_model
        at = target.tokens / N if asked_of_target and target else max(horizons)
    question = Question(
        study=toml.stem,
        folder=toml.parent / toml.stem,
        family=grown,
        source_layers=family.n_layers,
        real=chosen,
        small=pair,
        second=second,
        base=base,
        at=at,
        horizons=tuple(sorted(set(horizons))),
        seeds=seeds,
        budget=budget,
        starts=tuple(starts) if starts else possible_starts(chosen),
    )
    if wrong := question.problems():
        raise ValueError(f"{toml}: nothing was started\n  " + "\n  ".join(wrong))
    return question


def possible_starts(pair: Pair) -> tuple[Start, ...]:
    """All that this growth allows."""
    if pair.target % pair.source:
        return ("scratch", "shrink-pad-perturb")
    copies: tuple[Start, ...] = ("duplicate", "hyperclone") if pair.target > pair.source else ("duplicate",)
    return ("scratch", "shrink-pad-perturb", *copies)


def stand_in(family: ProxyFamily, real: Pair) -> Pair:
    """The pair to train instead: half the widths, else the smallest of the same factor. ValueError with what would be possible."""
    group = family.d_head * family.q_per_kv
    if not any(width % (2 * group) for width in (real.source, real.target)):
        return Pair(source=real.source // 2, target=real.target // 2)
    divisor = math.gcd(real.source, real.target)
    p, q = real.source // divisor, real.target // divisor
    k = math.lcm(group // math.gcd(group, p), group // math.gcd(group, q))
    if p * k < real.source:
        return Pair(source=p * k, target=q * k)
    finer = [d for d in range(2, family.d_head, 2) if divisor % (2 * d * family.q_per_kv) == 0]
    heads = f", or d_head = {max(finer)}, with which half of it can be trained" if finer else ""
    raise ValueError(
        f"needed a smaller pair of the growth {real}, got none whose widths are multiples of d_head * q_per_kv = {group}: "
        f"possible are larger pairs of this growth, from {2 * p * k} to {2 * q * k} on{heads}"
    )


def tuned(family: ProxyFamily, best: Mapping[str, Any] | None, recommended: Mapping[str, Any] | None) -> ProxyFamily:
    """The family with what its study has found: the search's answer, lr and batch by the laws."""
    found = dict(best or {})
    if recommended:
        batch = max(1, round(recommended["batch_tokens"] / family.seq_len))
        found |= {"lr": recommended["lr"], "batch_seqs": batch}
    settings = family.member(max(family.widths), found).model_dump(exclude={"d_model"})
    return ProxyFamily.model_validate(family.model_dump() | settings)
