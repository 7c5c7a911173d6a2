"""Damaged and hostile files, as many as wanted, for everything that reads files of others: is each read, or refused cleanly?

    OMP_NUM_THREADS=1 python -m benchmarks.fuzz --target all --inputs 100000
    OMP_NUM_THREADS=1 python -m benchmarks.fuzz --target journal --inputs 5000 --engine plain --seed 3

Prints inputs per second, how many were read, refusals by kind, and crashes, each with an input that is kept in --out. The engine is
atheris (guided by coverage) where it is installed, else mutations drawn from the seed: input i of a seed is always the same.
Inputs run in processes of their own, so that one that ends, hangs or takes too much memory is found, too. Exit code 1: crashes.
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

SECONDS = 20.0  # for one input
MEMORY = 4 << 30  # bytes, beyond what the libraries take
BATCH = 1000  # inputs of one process
KEPT = 2  # inputs of one crash
SHM = Path(
    "/dev/shm"
)  # in memory, where there is one: journals and checkpoints are synchronized to disk, which takes most of the time
NAMES = ("study", "runs", "journal", "checkpoint")
WORDS = (
    b"nan", b"inf", b"-inf", b"-1", b"0", b"1e400", b"9" * 400, b"null", b"true", b"{}", b"[]", b"[" * 3000, b"{" * 50, b"''", b'""', b'"""', b"\\u0000",
    b"\x00", b"\xff\xfe", b"\xc3\x28", b"\n", b"\r\n", b",", b".", b"{lr.__class__}", b"{lr!r}", b"__class__", b"../", b"proxies:ProxyFamily",
    b'"op_code":99,', b"2026-01-01T00:00:00", b"<script>", b"=", b"R", b"b", b"\x81", b"\x93", b"\x94", b"r\xff\xff\xff\x7f", b"c__builtin__\neval\n",
)  # fmt: skip


class Hang(BaseException):
    """An input took longer than SECONDS."""


class Crash(Exception):
    """What a reader raised that is no clean refusal."""


def mutated(draw: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """The bytes with one to four changes: bits, pieces cut out, doubled or moved, numbers and words put in, lines changed places."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        at, size = draw.randrange(len(out) + 1), draw.choice((1, 2, 8, 64))
        match draw.randrange(11):
            case 0 if out:
                out[at % len(out)] ^= 1 << draw.randrange(8)
            case 1:
                out[at : at + size] = draw.randbytes(size)
            case 2:
                del out[at : at + size]
            case 3:
                out[at:at] = out[at : at + size]
            case 4:
                out[at:at] = draw.choice(WORDS)
            case 5:
                out[at : at + size] = draw.choice(WORDS)
            case 6:
                del out[at:]  # cut short
            case 7:
                other = draw.choice(others)
                out[at : at + size] = other[draw.randrange(len(other) + 1) :][: draw.choice((8, 64, 512))]
            case 8:  # another number
                digits = [i for i in range(at, min(at + 200, len(out))) if 48 <= out[i] <= 57]
                if digits:
                    out[digits[0] : digits[0] + 1] = draw.choice(
                        (b"-", b"0", b"99", b"1e9", b"1e-9", b".5", b"x", b"null")
                    )
            case _:  # whole lines
                lines = bytes(out).split(b"\n")
                i, j = draw.randrange(len(lines)), draw.randrange(len(lines))
                if draw.random() < 0.5:
                    lines[i], lines[j] = lines[j], lines[i]
                else:
                    lines[i : i + 1] = draw.choice(([], [lines[i], lines[i]], [lines[j]]))
                out = bytearray(b"\n".join(lines))
    return bytes(out)


def drawn(kinds: Sequence[Kind], seed: int, i: int) -> tuple[Kind, bytes]:
    """Input i of a seed: its reader and its bytes."""
    draw = random.Random(f"{seed} {i}")
    kind = kinds[i % len(kinds)]
    return kind, mutated(draw, draw.choice(kind.seeds), [s for k in kinds for s in k.seeds])


def outcome(kind: Kind, data: bytes, scratch: Path) -> str:
    """What became of an input, in an empty folder: "read", or the refusal's type. Crash otherwise."""

    def hang(*_: object) -> None:
        raise Hang

    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    before = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        kind.read(data, scratch)
        return "read"
    except (ValueError, OSError) as error:
        if str(scratch) in str(error) or "study 'search'" in str(error):  # as the journal's is called
            return type(error).__name__
        raise Crash(f"{type(error).__name__} that names no file: {error}") from error
    except MemoryError as error:
        raise Crash("too much memory") from error
    except Hang as error:
        raise Crash(f"more than {SECONDS:.0f} s") from error
    except Exception as error:
        raise Crash(f"{type(error).__name__}: {error}") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Tally:
    """What became of the inputs of one target; the first few of each crash are kept."""

    def __init__(self, out: Path) -> None:
        self.out, self.counts, self.crashes = out, Counter[str](), Counter[str]()

    def one(self, kind: Kind, data: bytes, scratch: Path) -> None:
        try:
            self.counts[f"{kind.name}: {outcome(kind, data, scratch)}"] += 1
        except Crash as crash:
            cause = crash.__cause__
            frames = traceback.extract_tb(cause.__traceback__) if cause else []
            ours = [f for f in frames if "site-packages" not in f.filename and "/lib/python" not in f.filename]
            where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
            self.crash(f"{kind.name}: {where}: {type(cause).__name__}", str(crash), kind, data)

    def crash(self, what: str, said: str, kind: Kind, data: bytes) -> None:
        self.crashes[what] += 1
        if self.crashes[what] <= KEPT:
            self.out.mkdir(parents=True, exist_ok=True)
            path = self.out / f"{kind.name.replace(' ', '-')}-{abs(hash(what)) % 10**6}-{self.crashes[what]}.bin"
            path.write_bytes(data)
            print(f"  {what}: {said[:300]!r}\n    {path}", file=sys.stderr, flush=True)

    def add(self, other: dict[str, Any]) -> None:
        self.counts.update(other["counts"])
        self.crashes.update(other["crashes"])

    @property
    def plain(self) -> dict[str, Any]:
        return {"counts": dict(self.counts), "crashes": dict(self.crashes)}


def limit_memory() -> None:
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))


def by_plan(kinds: Sequence[Kind], inputs: int, seed: int, scratch: Path, tally: Tally) -> None:
    """Inputs 0 to inputs - 1 of a seed, in batches, each batch a process."""
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
                mine.one(*drawn(kinds, seed, i), scratch / "here")
            mine.crashes.subtract(tally.crashes)
            answer.write_text(json.dumps(mine.plain))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if answer.exists():
            tally.add(json.loads(answer.read_text()))
            at = end
        else:  # what the batch found up to there is lost, its crashes are kept
            i = int(place.read_text())
            tally.crash(f"the process ended, {status}", f"input {i}", *drawn(kinds, seed, i))
            tally.counts["with the process that ended"] += i - at
            at = i + 1


def by_coverage(kinds: Sequence[Kind], inputs: int, seed: int, scratch: Path, tally: Tally, answer: Path) -> None:
    """atheris does not return: the last input writes the answer. An input's first byte chooses its reader."""
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

    def one(data: bytes) -> None:
        nonlocal done
        done += 1
        if data:
            tally.one(kinds[data[0] % len(kinds)], data[1:], scratch / "here")
        if done % BATCH == 0 or done >= inputs:
            answer.write_text(json.dumps(tally.plain))

    def change(data: bytes, longest: int, drawn_seed: int) -> bytes:
        draw = random.Random(drawn_seed)
        match draw.randrange(4):
            case 0 if data:
                return bytes(atheris.Mutate(data, longest))
            case 1 if data:
                return (data[:1] + mutated(draw, data[1:], others))[:longest]
            case _:  # what is interesting soon is mostly what fails early: half of the inputs are near a whole file
                i = draw.randrange(len(kinds))
                return (bytes([i]) + mutated(draw, draw.choice(kinds[i].seeds), others))[:longest]

    options = [
        f"-runs={inputs}",
        f"-seed={seed + 1}",
        "-max_len=65536",
        "-timeout=60",
        "-rss_limit_mb=0",
        "-mutate_depth=1",
        "-print_final_stats=0",
    ]
    atheris.Setup(["fuzz", *options, f"-artifact_prefix={tally.out}/", str(corpus)], one, custom_mutator=change)
    atheris.Fuzz()


def fuzz(target: str, inputs: int, seed: int, engine: str, out: Path, answer: Path | None = None) -> Tally:
    """One target; with `answer` atheris, in this process, which it ends."""
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
            from benchmarks.fuzz_targets import targets
    else:
        from benchmarks.fuzz_targets import targets
    place = answer.parent if answer else SHM if SHM.is_dir() else None  # atheris leaves its folder to who started it
    with tempfile.TemporaryDirectory(dir=place) as folder:
        whole = Path(folder) / "whole"
        whole.mkdir()
        kinds = targets(target, whole)
        for kind in kinds:
            for data in kind.seeds:
                if (said := outcome(kind, data, Path(folder) / "here")) != "read":
                    raise RuntimeError(f"a whole {kind.name} should be read, got {said}")
        if answer is not None:
            by_coverage(kinds, inputs, seed, Path(folder), tally, answer)
        by_plan(kinds, inputs, seed, Path(folder), tally)
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=[*NAMES, "all"], default="all")
    parser.add_argument("--inputs", type=int, default=100_000, help="of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=["auto", "atheris", "plain"], default="auto")
    parser.add_argument("--out", type=Path, default=Path("fuzz-crashes"), help="where inputs go that crash")
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    engine = given.engine
    if engine == "auto":
        engine = "atheris" if importlib.util.find_spec("atheris") else "plain"
    failed = 0
    for target in NAMES if given.target == "all" else [given.target]:
        began = time.perf_counter()
        tally = fuzz(target, given.inputs, given.seed, engine, given.out, given.answer)
        took, crashes = time.perf_counter() - began, sum(tally.crashes.values())
        done = sum(tally.counts.values()) + crashes
        print(
            f"{target}, {engine}: {done:,} inputs, {done / took:,.0f} a second, {crashes} crashes of {len(tally.crashes)} kinds"
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
