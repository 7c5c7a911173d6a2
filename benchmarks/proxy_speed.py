"""Training speed of the proxies: tokens per second by width, batch and threads, each the median of its steps.

    python benchmarks/proxy_speed.py --threads 1 2 --widths 16 32 64 128 --batches 1 4 16

Settings are measured in turn, round after round, so that a noisy machine disturbs all alike.
"""

from __future__ import annotations

import argparse
import itertools
import statistics

from proxies.config import ProxyConfig
from proxies.family import measure_speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    settings = list(itertools.product(options.threads, options.widths, options.batches))
    speeds: dict[tuple[int, int, int], list[float]] = {setting: [] for setting in settings}
    for _ in range(options.rounds):
        for threads, width, batch in settings:
            speeds[threads, width, batch].append(
                measure_speed(ProxyConfig(d_model=width, batch_seqs=batch), threads=threads)
            )
    print(f"{'threads':>8}{'width':>8}{'N':>12}{'batch':>8}{'tokens/s':>12}{'GFLOP/s':>10}")
    for (threads, width, batch), values in speeds.items():
        config = ProxyConfig(d_model=width, batch_seqs=batch)
        speed = statistics.median(values)
        flops = speed * config.flops_per_token / 1e9
        print(f"{threads:>8}{width:>8}{config.counts.N:>12,}{batch:>8}{speed:>12,.0f}{flops:>10.1f}")


if __name__ == "__main__":
    main()
