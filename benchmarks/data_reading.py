"""How fast windows are read, beside a plain torch DataLoader of the same windows and beside a training step.

    python benchmarks/data_reading.py --rounds 7 --width 64
    python benchmarks/data_reading.py --open 1         # what opening a .bin of 1 GiB costs, and again

Bytes held in memory, a mapped .bin file, a mixture of three .bin files, passes instead of draws. All are measured in turn, round
after round, so that a noisy machine disturbs all alike; the ratios are of the same round, their median is printed.
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
from proxies.data import corpora
from proxies.data.corpora import load_corpus
from proxies.data.mixture import WindowReader, open_data
from proxies.data.token_files import Tokens
from proxies.training.throughput import measure_speed


class PlainReader(Dataset[tuple[Tensor, Tensor]]):
    """One window at a random place per item, as many a training script has it."""

    def __init__(self, tokens: Tokens, seq_len: int, items: int) -> None:
        self.tokens, self.seq_len, self.items = tokens, seq_len, items
        self.generator = np.random.default_rng(0)

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        at = int(self.generator.integers(0, len(self.tokens) - self.seq_len))
        window = torch.from_numpy(self.tokens[at : at + self.seq_len + 1].astype(np.int64))
        return window[:-1], window[1:]


def of_reader(reader: WindowReader, batch: int, batches: int) -> Callable[[], None]:
    position = 0

    def run() -> None:
        nonlocal position
        for _ in range(batches):
            reader.batch(position, batch)
            position += batch

    return run


def of_loader(tokens: Tokens, seq_len: int, batch: int, batches: int) -> Callable[[], None]:
    def run() -> None:
        for _ in DataLoader(PlainReader(tokens, seq_len, batch * batches), batch_size=batch):
            pass

    return run


def seconds(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=300)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--open", type=float, metavar="GIB", help="instead: the cost of opening a .bin of this size")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if options.open:
            report_opening(Path(folder), options.open, options.rounds)
        else:
            report(Path(folder), options.rounds, options.batches, options.width)


def report_opening(folder: Path, gib: float, rounds: int) -> None:
    """Each round with an empty cache, then with the digest kept there; the file's pages are in memory both times."""
    os.environ["MUSCALE_CACHE"] = str(folder / "cache")
    path = folder / "tokens.bin"
    tokens = np.random.default_rng(0).integers(0, 50_000, size=1 << 20).astype("<u2")
    with path.open("wb") as stream:
        for _ in range(round(gib * 512)):
            stream.write(tokens.tobytes())
    time.sleep(2.5)  # a file that was just written is not remembered

    def opened() -> None:
        corpora.load_cached.cache_clear()
        load_corpus(str(path), vocab=50_257)

    opened()
    first, again = [], []
    for _ in range(rounds):
        shutil.rmtree(folder / "cache")
        first.append(seconds(opened))
        again.append(seconds(opened))
    print(f"a .bin of {path.stat().st_size / 2**30:.2f} GiB, {rounds} rounds: every token checked and hashed ", end="")
    print(f"{statistics.median(first):.2f} s, known by its stamp {1e3 * statistics.median(again):.1f} ms")


def report(folder: Path, rounds: int, batches: int, width: int) -> None:
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
    runs = {name: of_reader(open_data(config).windows, base.batch_seqs, batches) for name, config in configs.items()}
    mapped = load_corpus(three["s0"]).train
    runs["DataLoader, bytes"] = of_loader(stdlib.train, base.seq_len, base.batch_seqs, batches)
    runs["DataLoader, .bin"] = of_loader(mapped, base.seq_len, base.batch_seqs, batches)
    took: dict[str, list[float]] = {name: [] for name in [*runs, "step"]}
    for run in runs.values():
        seconds(run)  # the first pass touches the pages
    for _ in range(rounds):
        for name, run in runs.items():
            took[name].append(seconds(run) / batches)
        took["step"].append(base.batch_tokens / measure_speed(base, threads=1))
    print(
        f"batches of {base.batch_seqs} x {base.seq_len} tokens, {rounds} rounds; a training step at width {width}: ",
        end="",
    )
    print(f"{1e3 * statistics.median(took['step']):.1f} ms on one thread")
    print(f"{'':22}{'us/batch':>10}{'batches/s':>12}{'x DataLoader':>14}{'% of a step':>13}{'% worst':>9}")
    for name in runs:
        loader = took["DataLoader, bytes" if "bytes" in name else "DataLoader, .bin"]
        faster = statistics.median(b / a for a, b in zip(took[name], loader, strict=True))
        shares = [100 * a / b for a, b in zip(took[name], took["step"], strict=True)]
        middle = statistics.median(took[name])
        print(
            f"{name:22}{1e6 * middle:10.0f}{1 / middle:12,.0f}{faster:14.1f}{statistics.median(shares):13.2f}{max(shares):9.2f}"
        )


if __name__ == "__main__":
    main()
