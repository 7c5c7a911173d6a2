"""Feed damaged and hostile files to everything that reads files of others: is each read, or refused cleanly?

    OMP_NUM_THREADS=1 python -m benchmarks.fuzz --target all --inputs 100000
    OMP_NUM_THREADS=1 python -m benchmarks.fuzz --target journal --inputs 5000 --engine plain --seed 3

Prints inputs per second, how many were read, refusals by kind, and crashes, each with an input that is kept in --out.
The engine is atheris (guided by coverage) if it is installed, else mutations drawn from the seed: input i of a seed is
always the same. Inputs run in separate processes, so that one that exits, hangs or takes too much memory is found, too.
Exit code 1: crashes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.fuzz_targets import Kind

# Seconds for one input.
MAX_SECONDS = 20.0
# Bytes beyond what the libraries take.
MAX_MEMORY = 4 << 30
# Inputs of one process.
BATCH = 1000
# Inputs of one crash that are kept.
KEPT = 2
# In memory if possible: journals and checkpoints are synchronized to disk, which takes most of the time.
SHM = Path("/dev/shm")
NAMES = ("study", "runs", "journal", "checkpoint")
WORDS = (
    b"nan",
    b"inf",
    b"-inf",
    b"-1",
    b"0",
    b"1e400",
    b"9" * 400,
    b"null",
    b"true",
    b"{}",
    b"[]",
    b"[" * 3000,
    b"{" * 50,
    b"''",
    b'""',
    b'"""',
    b"\\u0000",
    b"\x00",
    b"\xff\xfe",
    b"\xc3\x28",
    b"\n",
    b"\r\n",
    b",",
    b".",
    b"{lr.__class__}",
    b"{lr!r}",
    b"__class__",
    b"../",
    b"proxies:ProxyFamily",
    b'"op_code":99,',
    b"2026-01-01T00:00:00",
    b"<script>",
    b"=",
    b"R",
    b"b",
    b"\x81",
    b"\x93",
    b"\x94",
    b"r\xff\xff\xff\x7f",
    b"c__builtin__\neval\n",
)


class Hang(BaseException):
    """An input took longer than MAX_SECONDS."""


class Crash(Exception):
    """A reader raised something that is not a clean refusal."""


def mutate(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Return the bytes with one to four changes to bits, pieces, numbers, words or lines."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, size = rng.randrange(len(out) + 1), rng.choice((1, 2, 8, 64))
        match rng.randrange(11):
            case 0 if out:
                out[at % len(out)] ^= 1 << rng.randrange(8)
            case 1:
                out[at : at + size] = rng.randbytes(size)
            case 2:
                del out[at : at + size]
            case 3:
                out[at:at] = out[at : at + size]
            case 4:
                out[at:at] = rng.choice(WORDS)
            case 5:
                out[at : at + size] = rng.choice(WORDS)
            case 6:
                # Truncated.
                del out[at:]
            case 7:
                other = rng.choice(others)
                out[at : at + size] = other[rng.randrange(len(other) + 1) :][: rng.choice((8, 64, 512))]
            # Another number.
            case 8:
                digits = [i for i in range(at, min(at + 200, len(out))) if 48 <= out[i] <= 57]
                if digits:
                    out[digits[0] : digits[0] + 1] = rng.choice(
                        (b"-", b"0", b"99", b"1e9", b"1e-9", b".5", b"x", b"null")
                    )
            # Whole lines.
            case _:
                lines = bytes(out).split(b"\n")
                i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
                if rng.random() < 0.5:
                    lines[i], lines[j] = lines[j], lines[i]
                else:
                    lines[i : i + 1] = rng.choice(([], [lines[i], lines[i]], [lines[j]]))
                out = bytearray(b"\n".join(lines))
    return bytes(out)


def draw_input(kinds: Sequence[Kind], seed: int, i: int) -> tuple[Kind, bytes]:
    """Return input i of a seed: its reader and its bytes."""
    rng = random.Random(f"{seed} {i}")
    kind = kinds[i % len(kinds)]
    return kind, mutate(rng, rng.choice(kind.seeds), [s for k in kinds for s in k.seeds])


def try_input(kind: Kind, data: bytes, scratch: Path) -> str:
    """Read an input in an empty folder. Return "read" or the type of the refusal; raise Crash for anything else."""

    def raise_hang(*_: object) -> None:
        raise Hang

    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    before = signal.signal(signal.SIGALRM, raise_hang)
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    try:
        kind.read(data, scratch)
        return "read"
    except (ValueError, OSError) as error:
        # The journal's study is called "search".
        if str(scratch) in str(error) or "study 'search'" in str(error):
            return type(error).__name__
        raise Crash(f"{type(error).__name__} that names no file: {error}") from error
    except MemoryError as error:
        raise Crash("too much memory") from error
    except Hang as error:
        raise Crash(f"more than {MAX_SECONDS:.0f} s") from error
    except Exception as error:
        raise Crash(f"{type(error).__name__}: {error}") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Tally:
    """Counts what became of the inputs of one target, and keeps the first few of each crash."""

    def __init__(self, out: Path) -> None:
        self.out, self.counts, self.crashes = out, Counter[str](), Counter[str]()

    def try_one(self, kind: Kind, data: bytes, scratch: Path) -> None:
        try:
            self.counts[f"{kind.name}: {try_input(kind, data, scratch)}"] += 1
        except Crash as crash:
            cause = crash.__cause__
            frames = traceback.extract_tb(cause.__traceback__) if cause else []
            ours = [f for f in frames if "site-packages" not in f.filename and "/lib/python" not in f.filename]
            where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
            self.record_crash(f"{kind.name}: {where}: {type(cause).__name__}", str(crash), kind, data)

    def record_crash(self, what: str, message: str, kind: Kind, data: bytes) -> None:
        self.crashes[what] += 1
        if self.crashes[what] <= KEPT:
            self.out.mkdir(parents=True, exist_ok=True)
            path = self.out / f"{kind.name.replace(' ', '-')}-{abs(hash(what)) % 10**6}-{self.crashes[what]}.bin"
            path.write_bytes(data)
            print(f"  {what}: {message[:300]!r}\n    {path}", file=sys.stderr, flush=True)

    def add(self, other: dict[str, Any]) -> None:
        self.counts.update(other["counts"])
        self.crashes.update(other["crashes"])

    @property
    def plain(self) -> dict[str, Any]:
        """The counts as JSON."""
        return {"counts": dict(self.counts), "crashes": dict(self.crashes)}


def limit_memory() -> None:
    """Limit this process to its present memory and MAX_MEMORY more."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MAX_MEMORY, now + MAX_MEMORY))


def fuzz_by_seed(kinds: Sequence[Kind], inputs: int, seed: int, scratch: Path, tally: Tally) -> None:
    """Try inputs 0 to inputs - 1 of a seed in batches, each in a process of its own."""
    at, place = 0, scratch / "at"
    while at < inputs:
        end = min(at + BATCH, inputs)
        answer = scratch / "answer.json"
        answer.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            limit_memory()
            mine = Tally(tally.out)
            mine.crashes.update(tally.crashes)
            for i in range(at, end):
                place.write_text(str(i))
                mine.try_one(*draw_input(kinds, seed, i), scratch / "here")
            mine.crashes.subtract(tally.crashes)
            answer.write_text(json.dumps(mine.plain))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if answer.exists():
            tally.add(json.loads(answer.read_text()))
            at = end
        # The counts of the batch are lost, but its crashes are kept.
        else:
            i = int(place.read_text())
            tally.record_crash(f"the process ended, {status}", f"input {i}", *draw_input(kinds, seed, i))
            tally.counts["with the process that ended"] += i - at
            at = i + 1


def fuzz_by_coverage(kinds: Sequence[Kind], inputs: int, seed: int, scratch: Path, tally: Tally, answer: Path) -> None:
    """Run atheris, which does not return: the last input writes the answer. The first byte selects the reader."""
    import atheris  # type: ignore[import-not-found]

    limit_memory()
    tally.out.mkdir(parents=True, exist_ok=True)
    corpus = scratch / "corpus"
    corpus.mkdir()
    for i, kind in enumerate(kinds):
        for j, whole in enumerate(kind.seeds):
            (corpus / f"{i}-{j}").write_bytes(bytes([i]) + whole)
    others = [s for k in kinds for s in k.seeds]
    done = 0

    def try_bytes(data: bytes) -> None:
        nonlocal done
        done += 1
        if data:
            tally.try_one(kinds[data[0] % len(kinds)], data[1:], scratch / "here")
        if done % BATCH == 0 or done >= inputs:
            answer.write_text(json.dumps(tally.plain))

    def change(data: bytes, longest: int, drawn_seed: int) -> bytes:
        rng = random.Random(drawn_seed)
        match rng.randrange(4):
            case 0 if data:
                return bytes(atheris.Mutate(data, longest))
            case 1 if data:
                return (data[:1] + mutate(rng, data[1:], others))[:longest]
            # Inputs with new coverage are soon mostly those that fail early: so half of all are near a valid file.
            case _:
                i = rng.randrange(len(kinds))
                return (bytes([i]) + mutate(rng, rng.choice(kinds[i].seeds), others))[:longest]

    options = [
        f"-runs={inputs}",
        f"-seed={seed + 1}",
        "-max_len=65536",
        "-timeout=60",
        "-rss_limit_mb=0",
        "-mutate_depth=1",
        "-print_final_stats=0",
    ]
    atheris.Setup(["fuzz", *options, f"-artifact_prefix={tally.out}/", str(corpus)], try_bytes, custom_mutator=change)
    atheris.Fuzz()


def fuzz(target: str, inputs: int, seed: int, engine: str, out: Path, answer: Path | None = None) -> Tally:
    """Fuzz one target. With `answer`, atheris runs in this process and ends it."""
    tally = Tally(out / target)
    if engine == "atheris" and answer is None:
        with tempfile.TemporaryDirectory(dir=SHM if SHM.is_dir() else None) as folder:
            file = Path(folder) / "answer.json"
            words = [
                sys.executable,
                "-m",
                "benchmarks.fuzz",
                "--target",
                target,
                "--inputs",
                str(inputs),
                "--seed",
                str(seed),
            ]
            log = (Path(folder) / "log").open("wb")
            code = subprocess.run(
                [*words, "--engine", engine, "--out", str(out), "--answer", str(file)], stdout=log, stderr=log
            )
            if file.exists():
                tally.add(json.loads(file.read_text()))
            if code.returncode:
                tally.crashes[f"the process ended, {code.returncode}"] += 1
                print((Path(folder) / "log").read_text(errors="replace")[-3000:], file=sys.stderr)
        return tally
    if engine == "atheris":
        import atheris

        with atheris.instrument_imports(include=["scaling", "hpo", "proxies", "tomllib"]):
            from benchmarks.fuzz_targets import make_targets
    else:
        from benchmarks.fuzz_targets import make_targets
    # atheris leaves its folder to the process that started it.
    place = answer.parent if answer else SHM if SHM.is_dir() else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        whole = Path(folder) / "whole"
        whole.mkdir()
        kinds = make_targets(target, whole)
        for kind in kinds:
            for data in kind.seeds:
                if (result := try_input(kind, data, Path(folder) / "here")) != "read":
                    raise RuntimeError(f"a valid {kind.name} should be read, got {result}")
        if answer is not None:
            fuzz_by_coverage(kinds, inputs, seed, Path(folder), tally, answer)
        fuzz_by_seed(kinds, inputs, seed, Path(folder), tally)
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=[*NAMES, "all"], default="all")
    parser.add_argument("--inputs", type=int, default=100_000, help="inputs of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=["auto", "atheris", "plain"], default="auto")
    parser.add_argument("--out", type=Path, default=Path("fuzz-crashes"), help="where inputs that crash are kept")
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    engine = options.engine
    if engine == "auto":
        engine = "atheris" if importlib.util.find_spec("atheris") else "plain"
    failed = 0
    for target in NAMES if options.target == "all" else [options.target]:
        began = time.perf_counter()
        tally = fuzz(target, options.inputs, options.seed, engine, options.out, options.answer)
        seconds, crashes = time.perf_counter() - began, sum(tally.crashes.values())
        done = sum(tally.counts.values()) + crashes
        print(
            f"{target}, {engine}: {done:,} inputs, {done / seconds:,.0f} per second, {crashes} crashes of "
            f"{len(tally.crashes)} kinds"
        )
        for what, count in sorted(tally.counts.items()):
            print(f"  {count:7,}  {what}")
        for what, count in tally.crashes.most_common():
            print(f"  {count:7,}  CRASH {what}")
        sys.stdout.flush()
        failed += crashes
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
