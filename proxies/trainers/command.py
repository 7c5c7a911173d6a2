"""Bring your own trainer: a command that trains, as a study's or a plan's (docs/external.md).

`torchrun train.py --lr {lr} --tokens {tokens}` is split into arguments as a shell would, then each {name} is replaced inside
its argument, so that no value can add one; there is no shell. The program reports by JSON lines on stdout, or logs to the
MLflow run whose id it finds in MLFLOW_RUN_ID.
"""

from __future__ import annotations

import json
import math
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import psutil

from scaling.common.measurement import Measurement
from scaling.common.redact import redact_passwords
from scaling.tracking.client import connect, fail_fast
from scaling.tracking.log import now_ms, read_curve

NAME = re.compile(r"\{(\w+)\}")
PART = re.compile(r"\{(\w+)([.\[!:])[^{}]*\}")  # of a value, as Python's format would have it
DEFAULTS = {
    "seed": 0,
    "save": "",
    "resume": "",
    "keep": "",
    "python": sys.executable,
}  # of names that any command may use
GRACE_SECONDS = 20.0  # between SIGTERM and SIGKILL; hpo gives its workers 30
POLL_SECONDS = 10.0  # between two looks into MLflow, for a program that reports there
SHOWN = 8  # last lines of a program that failed


def find_names(command: str) -> list[str]:
    """The {names} of a command, each once."""
    return list(dict.fromkeys(NAME.findall(command)))


def resolve_command(command: str, values: Mapping[str, Any]) -> list[str]:
    """The arguments of a command, {names} replaced by values. ValueError when it cannot be split, or a name has no value."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"command: cannot be split into arguments ({error}): {command}") from error
    if not words:
        raise ValueError("command: needed a program and its arguments, got nothing")
    values = DEFAULTS | dict(values)
    if missing := [name for name in find_names(" ".join(words)) if name not in values]:
        known = ", ".join(sorted(values))
        raise ValueError(f"command: needed a value for {{{'}, {'.join(missing)}}}, got values for {known}")
    if parts := [part[0] for part in PART.finditer(" ".join(words)) if part[2] != ":" or part[1] in values]:
        raise ValueError(f"command: needed a {{name}} and no more between braces, got {', '.join(parts)}")
    return [NAME.sub(lambda name: format_value(values[name[1]]), word) for word in words]


def format_shell_command(words: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> str:
    """All that is run, as a shell would take it: the folder and the variables, too."""
    variables = ["env", *(f"{name}={value}" for name, value in environment.items())] if environment else []
    folder = f"cd {shlex.quote(str(cwd))} && " if cwd != Path() else ""
    return folder + shlex.join([*variables, *words])


def format_value(value: Any) -> str:
    """A value as an argument: numbers to the last digit, true and false as in JSON."""
    return json.dumps(value) if isinstance(value, bool | int | float) else str(value)


def run_command(
    command: str,
    values: Mapping[str, Any],
    *,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    log: Path | None = None,
) -> Iterator[Measurement]:
    """Run a program that trains for values["tokens"] tokens; yields its points, the final one once it has ended well.

    environment: beside this process's own. log: takes its stderr and what else it prints; default: our stderr. A loss that is
    not finite (diverged) ends it, as does closing the generator: its whole process group gets SIGTERM, then SIGKILL.

    ValueError when it cannot be started. RuntimeError when its exit code is not 0, when it reports no final point, or one of other
    tokens than asked, or prints a point that cannot be read.
    """
    asked = int(values["tokens"])
    program = _Program(resolve_command(command, values), cwd, os.environ | dict(environment or {}), log)
    try:
        yield from program.points(asked)
    finally:
        program.stop()


class _Program:
    """A training program at work."""

    def __init__(self, words: list[str], cwd: Path | None, environment: Mapping[str, str], log: Path | None) -> None:
        self.words, self.environment = words, environment
        self.began, self.since = time.perf_counter(), now_ms()
        self.log = None
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            self.log = log.open("ab")
        self.last: deque[str] = deque(maxlen=SHOWN)  # of what it printed, points apart
        try:
            self.process = subprocess.Popen(
                words, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
            )
        except OSError as error:
            if self.log:
                self.log.close()
            raise ValueError(f"command: cannot be started ({error}): {shlex.join(words)}") from error
        self.lines: queue.Queue[str | None] = queue.Queue()  # of its stdout; None: it has been closed
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        streams = ((self.process.stdout, self.lines.put), (self.process.stderr, self.note))
        self.readers = [threading.Thread(target=_read, args=stream, daemon=True) for stream in streams]
        for reader in self.readers:
            reader.start()

    def points(self, asked: int) -> Iterator[Measurement]:
        """What it reports; the final point when it has ended well."""
        final = None
        for point in self._arriving():
            if point.diverged:
                yield point
                return
            if point.final:
                final = point
            else:
                yield point
        if final is None:
            needed = '{"tokens": ..., "loss": ..., "final": true} on stdout, or final_loss in MLflow'
            raise RuntimeError(self._said(f"ended without a final point, {needed}"))
        if final.tokens != asked:
            got = f"ended at {final.tokens:,} tokens, {asked:,} were asked for: let its last step be a smaller one"
            raise RuntimeError(self._said(got))
        yield final

    def stop(self) -> None:
        """SIGTERM to its process group; when it has ended, or GRACE_SECONDS later, SIGKILL to all that is left of it."""
        others: list[psutil.Process] = []
        try:
            if self.process.poll() is None:
                with suppress(psutil.NoSuchProcess):  # torchrun's workers have groups of their own
                    others = psutil.Process(self.process.pid).children(recursive=True)
                self._signal(signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    self.process.wait(GRACE_SECONDS)
        finally:
            self._signal(signal.SIGKILL)
            for other in others:
                with suppress(psutil.NoSuchProcess):
                    other.kill()
            self.process.wait()
            for reader in self.readers:
                reader.join(1.0)
            if self.log:
                self.log.close()

    def note(self, line: str | None) -> None:
        """Keep a line that is no point."""
        if line is None:
            return
        self.last.append(line.rstrip("\n"))
        if self.log:
            self.log.write(line.encode())
            self.log.flush()
        else:
            print(line, end="", file=sys.stderr, flush=True)

    def _arriving(self) -> Iterator[Measurement]:
        """Points from stdout, or from MLflow as long as none is printed there."""
        seen, printed, looked = 0, False, time.monotonic()
        while True:
            try:
                line = self.lines.get(timeout=0.2)
            except queue.Empty:
                if self.process.poll() is not None:
                    break  # its stdout is held open by a process that it left behind
                line = ""
            if line is None:
                break
            if line:
                point = self._point(line)
                printed |= point is not None
                if point is not None:
                    yield point
                else:
                    self.note(line)
            elif self._reports_there and not printed and time.monotonic() - looked > POLL_SECONDS:
                for point in self._logged(seen, last=False):
                    seen = point.tokens
                    yield point
                looked = time.monotonic()
        if code := self.process.wait():
            why = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise RuntimeError(self._said(why))
        if self._reports_there and not printed:
            yield from self._logged(seen, last=True)

    def _point(self, line: str) -> Measurement | None:
        """A line as a point; None when it is none. RuntimeError when it is meant to be one and cannot be read."""
        if not line.startswith("{") or not ('"tokens"' in line or '"loss"' in line):
            return None
        try:
            told = json.loads(line)
            lr, train_loss = (math.nan if told.get(k) is None else float(told[k]) for k in ("lr", "train_loss"))
            loss = math.nan if told["loss"] is None else float(told["loss"])
            tokens, final = told["tokens"], told.get("final", False)
            if not (isinstance(tokens, int) and isinstance(final, bool) and tokens >= 0):
                raise TypeError("tokens is a whole number, final true or false")
        except (ValueError, TypeError, KeyError) as error:
            raise RuntimeError(
                self._said(f"printed a point that cannot be read ({error!r}): {line.strip()[:200]}")
            ) from error
        diverged = not math.isfinite(loss)
        seconds = time.perf_counter() - self.began
        return Measurement(
            tokens, math.nan if diverged else loss, lr, train_loss, seconds, final=final or diverged, diverged=diverged
        )

    @property
    def _reports_there(self) -> bool:
        return bool(self.environment.get("MLFLOW_RUN_ID") and self.environment.get("MLFLOW_TRACKING_URI"))

    def _logged(self, seen: int, *, last: bool) -> list[Measurement]:
        """Points that it has logged to its run in MLflow beyond `seen` tokens; of those of one key the last counts."""
        run = self.environment["MLFLOW_RUN_ID"]
        try:
            with fail_fast():
                client = connect(self.environment["MLFLOW_TRACKING_URI"])
                curve, end = (read_curve(client, run, k, since=self.since) for k in ("loss", "final_loss"))
        except (
            Exception
        ) as error:  # MLflow may be away while the program goes on; what it logged is asked for again at the end
            if last:
                raise RuntimeError(
                    self._said(f"printed no point, and MLflow cannot be asked for its own: {redact_passwords(error)}")
                ) from error
            return []
        points = [(tokens, loss, False) for tokens, loss in zip(*curve, strict=True) if tokens > seen]
        if last:
            points += [(tokens, loss, True) for tokens, loss in zip(*end, strict=True)]
        return [
            Measurement(
                int(t), loss, final=final or not math.isfinite(loss), diverged=not math.isfinite(loss), recorded=True
            )
            for t, loss, final in points
        ]

    def _said(self, what: str) -> str:
        """What happened to which program, and its last words."""
        text = f"{shlex.join(self.words)}\n  {what}"
        self.readers[1].join(1.0)  # for its last words
        if self.last:
            text += "\n  its last lines:\n" + "\n".join(f"    {line}" for line in self.last)
        return text

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def _read(stream: IO[bytes], take: Callable[[str | None], None]) -> None:
    with stream:
        for line in stream:
            take(line.decode(errors="replace"))
    take(None)
