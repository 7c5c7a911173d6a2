"""The trainer of a study whose runs are made by a command: its sizes as a table, its settings by {name}."""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, field_validator

from proxies.trainers.command import DEFAULTS, format_shell_command, find_names, resolve_command, run_command
from scaling.common.cli import say
from scaling.common.measurement import Measurement
from scaling.laws.compute import Fidelity

Value = bool | int | float | str
SEQUENCES = ("batch_seqs", "batch_size", "batch")  # names of a batch that is counted in sequences


class CommandTable(BaseModel):
    """The `[trainer]` table of `use = "proxies:CommandFamily"`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    command: str = Field(
        description="a program and its arguments, with {names} of settings, sizes, {tokens}, {seed}, ..."
    )
    sizes: tuple[dict[str, Value], ...] = Field(
        min_length=1, description="N of each size, and what else makes it, such as d_model: the same names in all"
    )
    fixed: dict[str, Value] = Field(default_factory=dict, description="settings of the command that are not searched")
    seq_len: PositiveInt | None = Field(None, description="tokens per sequence, for a batch in sequences")
    parametrization: Literal["mup", "standard"] = Field("standard", description="what lr means at another width")
    seed: int = Field(0, ge=0)
    cwd: Path = Field(Path(), description="where the command is run")
    environment: dict[str, str] = Field(default_factory=dict, description="beside the one that hpo was started with")
    data: tuple[Path, ...] = Field((), description="files that it reads, for the record")
    tokens_per_second: PositiveFloat | tuple[PositiveFloat, ...] | None = Field(
        None,
        description="of one worker, for all sizes or one after the other; default: measured by a short run of each",
    )
    measure_tokens: PositiveInt = Field(20_480, description="length of those runs, in whole sequences of seq_len")

    @field_validator("sizes")
    @classmethod
    def _alike_and_different(cls, sizes: tuple[dict[str, Value], ...]) -> tuple[dict[str, Value], ...]:
        N = [row.get("N") for row in sizes]
        if wrong := [n for n in N if isinstance(n, bool) or not isinstance(n, int | float) or not n > 0]:
            raise ValueError(f"needed N, the parameters that multiply tokens, in every row, got {wrong[0]!r}")
        if len(set(N)) < len(N):
            raise ValueError(f"N must differ, got {N}")
        if odd := [row for row in sizes if row.keys() != sizes[0].keys()]:
            raise ValueError(f"needed the same names in every row, got {list(sizes[0])} and {list(odd[0])}")
        return sizes


class CommandFamily:
    """A family of runs that another program trains. It satisfies hpo's Trainer."""

    model_fields: ClassVar = CommandTable.model_fields  # for the hints of `hpo validate`
    is_program: ClassVar = True  # hpo tells it its MLflow run, in the environment

    def __init__(self, **table: Any) -> None:
        self.table = CommandTable(**table)
        self.names = set(find_names(self.table.command))
        self._measured: dict[float, tuple[float, float]] = {}  # N -> seconds to start, tokens per second

    @property
    def sizes(self) -> tuple[float, ...]:
        """N of every size, ascending."""
        return tuple(sorted(float(row["N"]) for row in self.table.sizes))

    @property
    def resumable(self) -> bool:
        """Whether longer runs go on from shorter ones: the program takes where to save and what to resume."""
        return {"save", "resume"} <= self.names

    @property
    def repeatable(self) -> bool:
        """Whether a run can have another random seed."""
        return "seed" in self.names

    def problems(self, space: Mapping[str, Any], tokens: tuple[int, int] | None) -> list[str]:
        """What is wrong with the command and its names."""
        t = self.table
        rows = [name for name in t.sizes[0] if name != "N"]
        given = {"N": "a size", "tokens": "the length of a run"} | dict.fromkeys(DEFAULTS, "set for each run")
        said = []
        for source, names in (("sizes", rows), ("fixed", list(t.fixed)), ("space", list(space))):
            for name in names:
                where = f"space.{name}" if source == "space" else f"trainer.{source}: {name}"
                if name in given:
                    said.append(f"{where}: is {given[name]} already; give it another name")
                elif source != "sizes" and name not in self.names:
                    near = difflib.get_close_matches(name, self.names, n=1, cutoff=0.4)
                    hint = f" (it has {{{near[0]}}})" if near else ""
                    said.append(
                        f"{where}: the command never uses it: put {{{name}}} where it belongs{hint}, or leave it out"
                    )
                given.setdefault(name, f"among trainer.{source}" if source != "space" else "searched")
        for name in find_names(t.command):
            if name not in given:
                near = difflib.get_close_matches(name, given, n=1, cutoff=0.6)
                hint = (
                    f"did you mean {{{near[0]}}}?"
                    if near
                    else f"search it, or give its value: fixed = {{ {name} = ... }}"
                )
                said.append(f"trainer.command: nothing has the name {{{name}}}; {hint}")
        if "tokens" not in self.names:
            said.append("trainer.command: needed {tokens}, which says how long to train")
        if len(t.sizes) > 1 and not self.names & {"N", *rows}:
            said.append(
                f"trainer.command: needed what makes the sizes differ, one of {', '.join(f'{{{n}}}' for n in ['N', *rows])}"
            )
        if ("save" in self.names) != ("resume" in self.names):
            said.append("trainer.command: needed {save} and {resume} both, or neither (longer runs then start afresh)")
        if isinstance(t.tokens_per_second, tuple) and len(t.tokens_per_second) != len(t.sizes):
            said.append(
                f"trainer.tokens_per_second: needed one for each of {len(t.sizes)} sizes, got {len(t.tokens_per_second)}"
            )
        if (batch := [n for n in SEQUENCES if n in space or n in t.fixed]) and t.seq_len is None:
            said.append(f"trainer.seq_len: missing; {batch[0]} counts sequences, laws need tokens per step")
        said += [f"trainer.data: no file {path}" for path in t.data if not path.is_file()]
        if not t.cwd.is_dir():
            said.append(f"trainer.cwd: no folder {t.cwd}")
        return said + self._program()

    def _program(self) -> list[str]:
        try:
            words = resolve_command(self.table.command, dict.fromkeys(self.names, "0") | {"python": DEFAULTS["python"]})
        except ValueError as error:
            return [f"trainer.{error}"]
        path = self.table.environment.get("PATH")
        found = (self.table.cwd / words[0]).is_file() if "/" in words[0] else shutil.which(words[0], path=path)
        return [] if found else [f"trainer.command: no program {words[0]}"]

    def target(self, **table: Any) -> Fidelity:
        """N and D of the target: `tokens`, N and whatever else of the sizes the command uses."""
        needed = ["tokens", *(n for n in self.table.sizes[0] if n == "N" or n in self.names)]
        missing, more = (
            [n for n in needed if n not in table],
            [n for n in table if n not in {*needed, *self.table.sizes[0]}],
        )
        if missing or more:
            got = f"it lacks {', '.join(missing)}" if missing else f"{', '.join(more)} too many"
            raise ValueError(f"needed {', '.join(needed)}, as the sizes of [trainer] have; {got}")
        for name in ("N", "tokens"):
            value = table[name]
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"{name}: needed a positive number, got {value!r}")
        return Fidelity(float(table["N"]), float(table["tokens"]))

    def values(self, params: Mapping[str, Any], fidelity: Fidelity, *, repeat: int = 0) -> dict[str, Any]:
        """What the command's names stand for in one run, files apart."""
        rows = {float(row["N"]): row for row in self.table.sizes}
        if fidelity.N not in rows:
            raise ValueError(f"no size of this family has N = {fidelity.N:g}; it has {sorted(rows)}")
        if repeat and not self.repeatable:
            raise ValueError("trainer.command: needed {seed} to train the same settings again, got none")
        return self._of(rows[fidelity.N], params, fidelity.D) | {"seed": self.table.seed + repeat}

    def target_values(
        self, table: Mapping[str, Any], *, lr: float, batch_tokens: float, others: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The same for the target of this table: the recommended lr and batch, and what else was searched."""
        row = {k: v for k, v in table.items() if k != "tokens"}
        own = {"lr": lr, "batch_tokens": max(1, round(batch_tokens))}
        if self.table.seq_len is not None:
            own |= dict.fromkeys(SEQUENCES, max(1, round(batch_tokens / self.table.seq_len)))
        values = self._of(row, dict(others), self.target(**table).D)
        return values | {k: v for k, v in own.items() if k in self.names} | {"seed": self.table.seed}

    def _of(self, row: Mapping[str, Any], params: Mapping[str, Any], tokens: float) -> dict[str, Any]:
        return self.table.fixed | dict(row) | dict(params) | {"tokens": int(tokens)}

    def describe(self, params: Mapping[str, Any], fidelity: Fidelity, *, repeat: int = 0) -> dict[str, Any]:
        """Every setting of the run, by the names of the command, and tokens per step where they can be known."""
        values = self.values(params, fidelity, repeat=repeat)
        length = self.table.seq_len
        batch = next((values[n] * length for n in SEQUENCES if n in values and length), values.get("batch_tokens"))
        known = {"batch_tokens": batch, "seq_len": length, "parametrization": self.table.parametrization}
        own = {
            k: v for k, v in values.items() if k != "tokens"
        }  # a longer run of the same configuration is the same record
        return own | {k: v for k, v in known.items() if v is not None} | {"command": self.table.command}

    def manifest(self) -> list[dict[str, Any]]:
        """Path and bytes of the files that the study says are read. ValueError when one is missing."""
        try:
            return [{"path": str(path), "size": path.stat().st_size} for path in self.table.data]
        except OSError as error:
            raise ValueError(f"trainer.data: {error}") from error

    def example(self, params: Mapping[str, Any], fidelity: Fidelity) -> str:
        """The command of one run, as a shell would take it; files that are named when it runs are left empty."""
        return format_shell_command(
            resolve_command(self.table.command, self.values(params, fidelity)), self.table.cwd, self.table.environment
        )

    def seconds(self, params: Mapping[str, Any], fidelities: Sequence[Fidelity], *, threads: int) -> list[float]:
        """From the stated speed; or from one short run of each size, as its start and its tokens per second after that."""
        stated, order = self.table.tokens_per_second, [float(row["N"]) for row in self.table.sizes]
        if isinstance(stated, tuple):
            return [f.D / stated[order.index(f.N)] for f in fidelities]
        if stated is not None:
            return [f.D / stated for f in fidelities]
        for N in {f.N for f in fidelities} - self._measured.keys():
            self._measured[N] = self._measure(params, N, threads)
        return [self._measured[f.N][0] + f.D / self._measured[f.N][1] for f in fidelities]

    def _measure(self, params: Mapping[str, Any], N: float, threads: int) -> tuple[float, float]:
        length = self.table.seq_len or 1
        short = Fidelity(N, float(max(1, self.table.measure_tokens // length) * length))
        say(f"measuring its speed: {self.example(params, short)}")
        try:
            points = list(self._run(params, short, 0, {}, {"OMP_NUM_THREADS": str(threads)}))
        except RuntimeError as error:
            raise ValueError(f"the command cannot be run: {error}") from error
        first, last = points[0], points[-1]
        if (
            first.tokens == last.tokens or first.seconds == last.seconds
        ):  # all that can be told is the time of the whole
            return 0.0, last.tokens / last.seconds
        speed = (last.tokens - first.tokens) / (last.seconds - first.seconds)
        return max(0.0, first.seconds - first.tokens / speed), speed

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
        """Run the command. What it prints beside its points is kept beside `save`, with the ending .log.

        RuntimeError as of `run_command`, and when it did not write the {save} that it was given.
        """
        files = {
            name: str(path.absolute()) for name, path in (("save", save), ("resume", resume), ("keep", keep)) if path
        }
        log = save.with_suffix(".log") if save else None
        for point in self._run(params, fidelity, repeat, files, {}, log):
            if point.final and not point.diverged and save and "save" in self.names and not save.exists():
                raise RuntimeError(f"the command ended well without writing {{save}}, {save}")
            yield point
        if keep is not None:
            keep.unlink(missing_ok=True)

    def _run(
        self,
        params: Mapping[str, Any],
        fidelity: Fidelity,
        repeat: int,
        files: Mapping[str, str],
        environment: Mapping[str, str],
        log: Path | None = None,
    ) -> Iterator[Measurement]:
        values = self.values(params, fidelity, repeat=repeat) | dict(files)
        surroundings = self.table.environment | dict(environment)
        return run_command(self.table.command, values, cwd=self.table.cwd, environment=surroundings, log=log)
