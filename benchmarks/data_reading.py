"""Measure how fast windows are read, compared with a plain torch DataLoader and with a training step.

    python benchmarks/data_reading.py --rounds 7 --width 64
    python benchmarks/data_reading.py --open 1         # the cost of opening a .bin of 1 GiB, first and again

It measures bytes held in memory, a mapped .bin file, a mixture of three .bin files, and passes instead of draws. They
take turns in every round, so that a noisy machine disturbs all alike. Ratios are taken within a round; their median is
printed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from proxies.config.proxy import ProxyConfig
from proxies.data.corpora import load_cached, load_corpus
from proxies.data.mixture import WindowReader, open_data
from proxies.data.token_files import Tokens
from proxies.training.throughput import measure_speed


class PlainReader(Dataset[tuple[Tensor, Tensor]]):
    """A data set with one window at a random place per item, as in many training scripts."""

    def __init__(self, tokens: Tokens, seq_len: int, items: int) -> None:
        self.tokens, self.seq_len, self.items = tokens, seq_len, items
        self.generator = np.random.default_rng(0)

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = int(self.generator.integers(0, len(self.tokens) - self.seq_len))
        window = torch.from_numpy(self.tokens[start : start + self.seq_len + 1].astype(np.int64))
        return window[:-1], window[1:]


def make_reader_run(reader: WindowReader, batch: int, batches: int) -> Callable[[], None]:
    """Return a function that reads the next batches of a reader."""
    position = 0

    def run() -> None:
        nonlocal position
        for _ in range(batches):
            reader.batch(position, batch)
            position += batch

    return run


def make_loader_run(tokens: Tokens, seq_len: int, batch: int, batches: int) -> Callable[[], None]:
    """Return a function that reads batches with a DataLoader."""

    def run() -> None:
        for _ in DataLoader(PlainReader(tokens, seq_len, batch * batches), batch_size=batch):
            pass

    return run


def measure_seconds(run: Callable[[], None]) -> float:
    """Return the seconds that a function takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=300)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--open", type=float, metavar="GIB", help="measure opening a .bin of this size instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if options.open:
            compare_opening(Path(folder), options.open, options.rounds)
        else:
            compare_reading(Path(folder), options.rounds, options.batches, options.width)


def compare_opening(folder: Path, gib: float, rounds: int) -> None:
    """Open a file with an empty cache and with its digest in the cache; its pages are in memory both times."""
    os.environ["MUSCALE_CACHE"] = str(folder / "cache")
    path = folder / "tokens.bin"
    tokens = np.random.default_rng(0).integers(0, 50_000, size=1 << 20).astype("<u2")
    with path.open("wb") as stream:
        for _ in range(round(gib * 512)):
            stream.write(tokens.tobytes())
    # The digest of a file that was just written is not stored.
    time.sleep(2.5)

    def open_file() -> None:
        load_cached.cache_clear()
        load_corpus(str(path), vocab=50_257)

    open_file()
    first, again = [], []
    for _ in range(rounds):
        shutil.rmtree(folder / "cache")
        first.append(measure_seconds(open_file))
        again.append(measure_seconds(open_file))
    print(f"a .bin of {path.stat().st_size / 2**30:.2f} GiB, {rounds} rounds: every token checked and hashed ", end="")
    print(f"{statistics.median(first):.2f} s, recognized by its stamp {1e3 * statistics.median(again):.1f} ms")


def compare_reading(folder: Path, rounds: int, batches: int, width: int) -> None:
    """Compare the readers with DataLoaders and with a training step, and print a table."""
    stdlib = load_corpus("stdlib")
    for k in range(3):
        stdlib.train.astype("<u2").tofile(folder / f"{k}.bin")
    three: dict[str, str] = {f"s{k}": str(folder / f"{k}.bin") for k in range(3)}
    base = ProxyConfig(d_model=width)
    mixture = {"s0": 5.0, "s1": 3.0, "s2": 2.0}
    configs = {
        "bytes in memory": base,
        ".bin mapped": base.model_copy(update={"corpus": three["s0"]}),
        ".bin mapped, passes": base.model_copy(update={"corpus": three["s0"], "order": "epochs"}),
        "mixture of 3 .bin": ProxyConfig.model_validate(base.model_dump() | {"corpus": three, "mixture": mixture}),
    }
    runs = {
        name: make_reader_run(open_data(config).windows, base.batch_seqs, batches) for name, config in configs.items()
    }
    mapped = load_corpus(three["s0"]).train
    runs["DataLoader, bytes"] = make_loader_run(stdlib.train, base.seq_len, base.batch_seqs, batches)
    runs["DataLoader, .bin"] = make_loader_run(mapped, base.seq_len, base.batch_seqs, batches)
    times: dict[str, list[float]] = {name: [] for name in [*runs, "step"]}
    # The first pass loads the pages.
    for run in runs.values():
        measure_seconds(run)
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(measure_seconds(run) / batches)
        times["step"].append(base.batch_tokens / measure_speed(base, threads=1))
    print(
        f"batches of {base.batch_seqs} x {base.seq_len} tokens, {rounds} rounds; "
        f"a training step at width {width}: {1e3 * statistics.median(times['step']):.1f} ms on one thread"
    )
    print(f"{'':22}{'us/batch':>10}{'batches/s':>12}{'x DataLoader':>14}{'% of a step':>13}{'% worst':>9}")
    for name in runs:
        loader = times["DataLoader, bytes" if "bytes" in name else "DataLoader, .bin"]
        speedup = statistics.median(b / a for a, b in zip(times[name], loader, strict=True))
        shares = [100 * a / b for a, b in zip(times[name], times["step"], strict=True)]
        median = statistics.median(times[name])
        print(
            f"{name:22}{1e6 * median:10.0f}{1 / median:12,.0f}{speedup:14.1f}"
            f"{statistics.median(shares):13.2f}{max(shares):9.2f}"
        )


if __name__ == "__main__":
    main()
