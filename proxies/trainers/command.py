"""Run a command that trains, for a study's or a plan's own trainer (docs/external.md).

`torchrun train.py --lr {lr} --tokens {tokens}` is split into arguments as a shell does, then each {name} is replaced
inside its argument, so no value can add an argument; there is no shell. The program reports by JSON lines on stdout, or
logs to the MLflow run whose id it finds in MLFLOW_RUN_ID.
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
# A part of a value as Python's format would have it, such as {lr.real} or {lr:g}, which is not supported.
PART = re.compile(r"\{(\w+)([.\[!:])[^{}]*\}")
# Values of the names that any command may use.
DEFAULTS = {
    "seed": 0,
    "save": "",
    "resume": "",
    "keep": "",
    "python": sys.executable,
}
# Seconds between SIGTERM and SIGKILL. hpo gives its workers 30.
GRACE_SECONDS = 20.0
# Seconds between two requests to MLflow, for a program that reports there.
POLL_SECONDS = 10.0
# Number of last lines that are shown of a program that failed.
SHOWN_LINES = 8


def find_names(command: str) -> list[str]:
    """Return the {names} of a command, each once."""
    return list(dict.fromkeys(NAME.findall(command)))


def resolve_command(command: str, values: Mapping[str, Any]) -> list[str]:
    """Split a command into its arguments and replace its {names}.

    Args:
        command: The command, as for a shell.
        values: The values by name; those of DEFAULTS need not be given.

    Returns:
        The program and its arguments.

    Raises:
        ValueError: If the command cannot be split, or a name has no value.
    """
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
    """Format a command for a shell, with its folder and its environment variables."""
    variables = ["env", *(f"{name}={value}" for name, value in environment.items())] if environment else []
    folder = f"cd {shlex.quote(str(cwd))} && " if cwd != Path() else ""
    return folder + shlex.join([*variables, *words])


def format_value(value: Any) -> str:
    """Format a value as an argument: numbers with all digits, true and false as in JSON."""
    return json.dumps(value) if isinstance(value, bool | int | float) else str(value)


def run_command(
    command: str,
    values: Mapping[str, Any],
    *,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    log: Path | None = None,
) -> Iterator[Measurement]:
    """Run a program that trains for values["tokens"] tokens.

    A loss that is not finite (diverged) ends the program, as does closing the generator: its whole process group gets
    SIGTERM, then SIGKILL.

    Args:
        command: The command, see `resolve_command`.
        values: The values of its {names}.
        cwd: The folder in which it is run; default: this process's.
        environment: Environment variables that are added to this process's.
        log: A file to which its stderr and whatever else it prints is appended; default: this process's stderr.

    Yields:
        The points that it reports; the final one after it has ended successfully.

    Raises:
        ValueError: If it cannot be started.
        RuntimeError: If its exit code is not 0, it reports no final point or one of other tokens, or it prints a point
            that cannot be read.
    """
    tokens = int(values["tokens"])
    program = _Program(resolve_command(command, values), cwd, os.environ | dict(environment or {}), log)
    try:
        yield from program.read_points(tokens)
    finally:
        program.stop()


class _Program:
    """A running training program."""

    def __init__(self, words: list[str], cwd: Path | None, environment: Mapping[str, str], log: Path | None) -> None:
        self.words, self.environment = words, environment
        self.started, self.started_ms = time.perf_counter(), now_ms()
        self.log = None
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            self.log = log.open("ab")
        # The last lines that it printed, except points.
        self.last_lines: deque[str] = deque(maxlen=SHOWN_LINES)
        try:
            self.process = subprocess.Popen(
                words, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
            )
        except OSError as error:
            if self.log:
                self.log.close()
            raise ValueError(f"command: cannot be started ({error}): {shlex.join(words)}") from error
        # The lines of its stdout; None after it was closed.
        self.lines: queue.Queue[str | None] = queue.Queue()
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        streams = ((self.process.stdout, self.lines.put), (self.process.stderr, self.keep_line))
        self.readers = [threading.Thread(target=_read_lines, args=stream, daemon=True) for stream in streams]
        for reader in self.readers:
            reader.start()

    def read_points(self, tokens: int) -> Iterator[Measurement]:
        """Yield the points that it reports; the final point after it has ended successfully.

        Args:
            tokens: The tokens that the final point must have.
        """
        final = None
        for point in self._receive_points():
            if point.diverged:
                yield point
                return
            if point.final:
                final = point
            else:
                yield point
        if final is None:
            needed = '{"tokens": ..., "loss": ..., "final": true} on stdout, or final_loss in MLflow'
            raise RuntimeError(self._explain(f"ended without a final point, {needed}"))
        if final.tokens != tokens:
            got = f"ended at {final.tokens:,} tokens, {tokens:,} were asked for: make its last step smaller"
            raise RuntimeError(self._explain(got))
        yield final

    def stop(self) -> None:
        """Send SIGTERM to its process group, then SIGKILL to what is left when it has ended or after GRACE_SECONDS."""
        others: list[psutil.Process] = []
        try:
            if self.process.poll() is None:
                # The workers of torchrun have process groups of their own.
                with suppress(psutil.NoSuchProcess):
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

    def keep_line(self, line: str | None) -> None:
        """Keep a line that is not a point: in the log file, or else on stderr."""
        if line is None:
            return
        self.last_lines.append(line.rstrip("\n"))
        if self.log:
            self.log.write(line.encode())
            self.log.flush()
        else:
            # It is the other program's output, not a record of this one's log.
            print(line, end="", file=sys.stderr, flush=True)

    def _receive_points(self) -> Iterator[Measurement]:
        """Yield points from stdout, or from MLflow as long as none is printed on stdout."""
        seen, printed, polled = 0, False, time.monotonic()
        while True:
            try:
                line = self.lines.get(timeout=0.2)
            except queue.Empty:
                if self.process.poll() is not None:
                    # A process that it left behind keeps its stdout open.
                    break
                line = ""
            if line is None:
                break
            if line:
                point = self._parse_point(line)
                printed |= point is not None
                if point is not None:
                    yield point
                else:
                    self.keep_line(line)
            elif self._can_use_mlflow and not printed and time.monotonic() - polled > POLL_SECONDS:
                for point in self._read_logged_points(seen, last=False):
                    seen = point.tokens
                    yield point
                polled = time.monotonic()
        if code := self.process.wait():
            why = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise RuntimeError(self._explain(why))
        if self._can_use_mlflow and not printed:
            yield from self._read_logged_points(seen, last=True)

    def _parse_point(self, line: str) -> Measurement | None:
        """Parse a line as a point; None if it is not one, RuntimeError if it looks like one and cannot be read."""
        if not line.startswith("{") or not ('"tokens"' in line or '"loss"' in line):
            return None
        try:
            fields = json.loads(line)
            lr, train_loss = (math.nan if fields.get(k) is None else float(fields[k]) for k in ("lr", "train_loss"))
            loss = math.nan if fields["loss"] is None else float(fields["loss"])
            tokens, final = fields["tokens"], fields.get("final", False)
            if not (isinstance(tokens, int) and isinstance(final, bool) and tokens >= 0):
                raise TypeError("tokens is a whole number, final true or false")
        except (ValueError, TypeError, KeyError) as error:
            raise RuntimeError(
                self._explain(f"printed a point that cannot be read ({error!r}): {line.strip()[:200]}")
            ) from error
        diverged = not math.isfinite(loss)
        seconds = time.perf_counter() - self.started
        return Measurement(
            tokens, math.nan if diverged else loss, lr, train_loss, seconds, final=final or diverged, diverged=diverged
        )

    @property
    def _can_use_mlflow(self) -> bool:
        return bool(self.environment.get("MLFLOW_RUN_ID") and self.environment.get("MLFLOW_TRACKING_URI"))

    def _read_logged_points(self, seen: int, *, last: bool) -> list[Measurement]:
        """Return the points beyond `seen` tokens in its MLflow run, of which the last one at each step counts."""
        run = self.environment["MLFLOW_RUN_ID"]
        try:
            with fail_fast():
                client = connect(self.environment["MLFLOW_TRACKING_URI"])
                curve, end = (read_curve(client, run, k, since=self.started_ms) for k in ("loss", "final_loss"))
        except Exception as error:
            # MLflow may be away while the program continues. What it logged is read again at the end.
            if last:
                raise RuntimeError(
                    self._explain(
                        f"printed no point, and MLflow cannot be asked for its own: {redact_passwords(error)}"
                    )
                ) from error
            return []
        points = [(tokens, loss, False) for tokens, loss in zip(*curve, strict=True) if tokens > seen]
        if last:
            points += [(tokens, loss, True) for tokens, loss in zip(*end, strict=True)]
        return [
            Measurement(
                int(tokens),
                loss,
                final=final or not math.isfinite(loss),
                diverged=not math.isfinite(loss),
                recorded=True,
            )
            for tokens, loss, final in points
        ]

    def _explain(self, problem: str) -> str:
        """Return a problem with the command that has it and the last lines that it printed."""
        text = f"{shlex.join(self.words)}\n  {problem}"
        # Wait for the last lines of its stderr.
        self.readers[1].join(1.0)
        if self.last_lines:
            text += "\n  its last lines:\n" + "\n".join(f"    {line}" for line in self.last_lines)
        return text

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def _read_lines(stream: IO[bytes], take: Callable[[str | None], None]) -> None:
    """Pass the lines of a stream on, and None at its end."""
    with stream:
        for line in stream:
            take(line.decode(errors="replace"))
    take(None)
