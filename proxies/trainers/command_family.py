"""The trainer of a study whose runs are trained by a command, with sizes in a table and settings by {name}."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, field_validator

from proxies.trainers.command import DEFAULTS, find_names, format_shell_command, resolve_command, run_command
from scaling.common.measurement import Measurement
from scaling.common.suggest import find_similar
from scaling.laws.compute import Fidelity

logger = logging.getLogger("muscale.proxies")

Value = bool | int | float | str
# Names of a batch size that is counted in sequences.
SEQUENCES = ("batch_seqs", "batch_size", "batch")


class CommandTable(BaseModel):
    """The `[trainer]` table of `use = "proxies:CommandFamily"`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    command: str = Field(
        description="a program and its arguments, with {names} of settings, sizes, {tokens}, {seed}, ..."
    )
    sizes: tuple[dict[str, Value], ...] = Field(
        min_length=1, description="N of each size, and its other settings, such as d_model; the same names in all rows"
    )
    fixed: dict[str, Value] = Field(default_factory=dict, description="settings of the command that are not searched")
    seq_len: PositiveInt | None = Field(None, description="tokens per sequence, for a batch in sequences")
    parametrization: Literal["mup", "standard"] = Field("standard", description="how lr depends on the width")
    seed: int = Field(0, ge=0, lt=2**62)
    cwd: Path = Field(Path(), description="the folder in which the command is run")
    environment: dict[str, str] = Field(
        default_factory=dict, description="environment variables that are added to those of hpo"
    )
    data: tuple[Path, ...] = Field((), description="files that the command reads, for the record")
    tokens_per_second: PositiveFloat | tuple[PositiveFloat, ...] | None = Field(
        None,
        description="speed of one worker, for all sizes or for each; default: measured by a short run of each size",
    )
    measure_tokens: PositiveInt = Field(20_480, description="tokens of those short runs, in whole sequences of seq_len")

    @field_validator("sizes")
    @classmethod
    def _check_sizes(cls, sizes: tuple[dict[str, Value], ...]) -> tuple[dict[str, Value], ...]:
        N = [row.get("N") for row in sizes]
        if bad := [n for n in N if isinstance(n, bool) or not isinstance(n, int | float) or not n > 0]:
            raise ValueError(f"needed N, the parameters that multiply tokens, in every row, got {bad[0]!r}")
        if len(set(N)) < len(N):
            raise ValueError(f"N must differ, got {N}")
        if other := [row for row in sizes if row.keys() != sizes[0].keys()]:
            raise ValueError(f"needed the same names in every row, got {list(sizes[0])} and {list(other[0])}")
        return sizes


class CommandFamily:
    """A family of runs that another program trains. It implements hpo's `Trainer`.

    Attributes:
        table: The study's [trainer] table.
        names: The {names} of its command.
    """

    # `hpo validate` suggests these names.
    model_fields: ClassVar = CommandTable.model_fields
    # hpo tells the program its MLflow run by the environment.
    is_program: ClassVar = True

    def __init__(self, **table: Any) -> None:
        """Validate the study's [trainer] table."""
        self.table = CommandTable(**table)
        self.names = set(find_names(self.table.command))
        # (seconds to start, tokens per second) by N.
        self._measured: dict[float, tuple[float, float]] = {}

    @property
    def sizes(self) -> tuple[float, ...]:
        """N of every size, in ascending order."""
        return tuple(sorted(float(row["N"]) for row in self.table.sizes))

    @property
    def resumable(self) -> bool:
        """Whether longer runs continue from shorter ones: the command has {save} and {resume}."""
        return {"save", "resume"} <= self.names

    @property
    def repeatable(self) -> bool:
        """Whether a run can have another random seed: the command has {seed}."""
        return "seed" in self.names

    def problems(self, space: Mapping[str, Any], tokens: tuple[int, int] | None) -> list[str]:
        """Return what is wrong with the command, its names and its folders, one sentence per problem."""
        table = self.table
        rows = [name for name in table.sizes[0] if name != "N"]
        problems = self._find_name_problems(rows, space)
        if "tokens" not in self.names:
            problems.append("trainer.command: needed {tokens}, which says how long to train")
        if len(table.sizes) > 1 and not self.names & {"N", *rows}:
            names = ", ".join(f"{{{n}}}" for n in ["N", *rows])
            problems.append(f"trainer.command: needed what makes the sizes differ, one of {names}")
        if ("save" in self.names) != ("resume" in self.names):
            problems.append(
                "trainer.command: needed {save} and {resume} both, or neither (longer runs then start from scratch)"
            )
        if isinstance(table.tokens_per_second, tuple) and len(table.tokens_per_second) != len(table.sizes):
            problems.append(
                f"trainer.tokens_per_second: needed one for each of {len(table.sizes)} sizes, "
                f"got {len(table.tokens_per_second)}"
            )
        if (batch := [n for n in SEQUENCES if n in space or n in table.fixed]) and table.seq_len is None:
            problems.append(f"trainer.seq_len: missing; {batch[0]} counts sequences, laws need tokens per step")
        problems += [f"trainer.data: no file {path}" for path in table.data if not path.is_file()]
        if not table.cwd.is_dir():
            problems.append(f"trainer.cwd: no folder {table.cwd}")
        return problems + self._find_program_problems()

    def _find_name_problems(self, rows: Sequence[str], space: Mapping[str, Any]) -> list[str]:
        """Return names that are used twice, that the command lacks, or that have no value."""
        table = self.table
        owners = {"N": "a size", "tokens": "the length of a run"} | dict.fromkeys(DEFAULTS, "set for each run")
        problems = []
        for source, names in (("sizes", rows), ("fixed", list(table.fixed)), ("space", list(space))):
            for name in names:
                where = f"space.{name}" if source == "space" else f"trainer.{source}: {name}"
                if name in owners:
                    problems.append(f"{where}: is {owners[name]} already; give it another name")
                elif source != "sizes" and name not in self.names:
                    similar = find_similar(name, self.names, cutoff=0.4)
                    hint = f" (it has {{{similar[0]}}})" if similar else ""
                    problems.append(
                        f"{where}: the command never uses it: put {{{name}}} where it belongs{hint}, or leave it out"
                    )
                owners.setdefault(name, f"among trainer.{source}" if source != "space" else "searched")
        for name in find_names(table.command):
            if name not in owners:
                similar = find_similar(name, owners, cutoff=0.6)
                hint = (
                    f"did you mean {{{similar[0]}}}?"
                    if similar
                    else f"search it, or give its value: fixed = {{ {name} = ... }}"
                )
                problems.append(f"trainer.command: nothing has the name {{{name}}}; {hint}")
        return problems

    def _find_program_problems(self) -> list[str]:
        try:
            words = resolve_command(self.table.command, dict.fromkeys(self.names, "0") | {"python": DEFAULTS["python"]})
        except ValueError as error:
            return [f"trainer.{error}"]
        path = self.table.environment.get("PATH")
        exists = (self.table.cwd / words[0]).is_file() if "/" in words[0] else shutil.which(words[0], path=path)
        return [] if exists else [f"trainer.command: no program {words[0]}"]

    def target(self, **table: Any) -> Fidelity:
        """Return N and D of a [target] table: `tokens`, N and whatever else of the sizes the command uses."""
        needed = ["tokens", *(n for n in self.table.sizes[0] if n == "N" or n in self.names)]
        missing = [n for n in needed if n not in table]
        unknown = [n for n in table if n not in {*needed, *self.table.sizes[0]}]
        if missing or unknown:
            got = f"it lacks {', '.join(missing)}" if missing else f"{', '.join(unknown)} too many"
            raise ValueError(f"needed {', '.join(needed)}, as the sizes of [trainer] have; {got}")
        for name in ("N", "tokens"):
            value = table[name]
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name}: needed a finite positive number, got {value!r}")
        return Fidelity(float(table["N"]), float(table["tokens"]))

    def values(self, params: Mapping[str, Any], fidelity: Fidelity, *, repeat: int = 0) -> dict[str, Any]:
        """Return the values of the command's names in one run, except those of files."""
        rows = {float(row["N"]): row for row in self.table.sizes}
        if fidelity.N not in rows:
            raise ValueError(f"no size of this family has N = {fidelity.N:g}; it has {sorted(rows)}")
        if repeat and not self.repeatable:
            raise ValueError("trainer.command: needed {seed} to train the same settings again, got none")
        return self._merge(rows[fidelity.N], params, fidelity.D) | {"seed": self.table.seed + repeat}

    def target_values(
        self, table: Mapping[str, Any], *, lr: float, batch_tokens: float, others: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the values of the command's names for the target.

        Args:
            table: The study's [target] table.
            lr: The recommended learning rate.
            batch_tokens: The recommended batch size, tokens per step.
            others: The best values of what else was searched.
        """
        row = {k: v for k, v in table.items() if k != "tokens"}
        own = {"lr": lr, "batch_tokens": max(1, round(batch_tokens))}
        if self.table.seq_len is not None:
            own |= dict.fromkeys(SEQUENCES, max(1, round(batch_tokens / self.table.seq_len)))
        values = self._merge(row, dict(others), self.target(**table).D)
        return values | {k: v for k, v in own.items() if k in self.names} | {"seed": self.table.seed}

    def _merge(self, row: Mapping[str, Any], params: Mapping[str, Any], tokens: float) -> dict[str, Any]:
        return self.table.fixed | dict(row) | dict(params) | {"tokens": int(tokens)}

    def describe(self, params: Mapping[str, Any], fidelity: Fidelity, *, repeat: int = 0) -> dict[str, Any]:
        """Return every setting of the run by the command's names, and tokens per step where they are known."""
        values = self.values(params, fidelity, repeat=repeat)
        length = self.table.seq_len
        batch = next((values[n] * length for n in SEQUENCES if n in values and length), values.get("batch_tokens"))
        known = {"batch_tokens": batch, "seq_len": length, "parametrization": self.table.parametrization}
        # Longer runs of one configuration share one record.
        own = {k: v for k, v in values.items() if k != "tokens"}
        return own | {k: v for k, v in known.items() if v is not None} | {"command": self.table.command}

    def manifest(self) -> list[dict[str, Any]]:
        """Return path and size in bytes of the files in `data`; ValueError if one is missing."""
        try:
            return [{"path": str(path), "size": path.stat().st_size} for path in self.table.data]
        except OSError as error:
            raise ValueError(f"trainer.data: {error}") from error

    def example(self, params: Mapping[str, Any], fidelity: Fidelity) -> str:
        """Return the command of one run for a shell, with empty values for files that are named when it runs."""
        return format_shell_command(
            resolve_command(self.table.command, self.values(params, fidelity)), self.table.cwd, self.table.environment
        )

    def seconds(self, params: Mapping[str, Any], fidelities: Sequence[Fidelity], *, threads: int) -> list[float]:
        """Estimate how long runs take one worker, by the stated speed or by one short run of each size.

        A short run gives the time to start and the tokens per second after that.
        """
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
        logger.info(f"measuring its speed: {self.example(params, short)}")
        try:
            points = list(self._run(params, short, 0, {}, {"OMP_NUM_THREADS": str(threads)}))
        except RuntimeError as error:
            raise ValueError(f"the command cannot be run: {error}") from error
        first, last = points[0], points[-1]
        if first.tokens == last.tokens or first.seconds == last.seconds:
            # Only the time of the whole run is known.
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
        """Run the command. What it prints besides its points goes to a file beside `save` that ends in .log.

        Raises:
            RuntimeError: As `run_command`, and if the command does not write the {save} that it was given.
        """
        files = {
            name: str(path.absolute()) for name, path in (("save", save), ("resume", resume), ("keep", keep)) if path
        }
        log = save.with_suffix(".log") if save else None
        for point in self._run(params, fidelity, repeat, files, {}, log):
            if point.final and not point.diverged and save and "save" in self.names and not save.exists():
                raise RuntimeError(f"the command ended successfully without writing {{save}}, {save}")
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
        variables = self.table.environment | dict(environment)
        return run_command(self.table.command, values, cwd=self.table.cwd, environment=variables, log=log)
