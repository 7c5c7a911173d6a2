"""The resources of a run: peak memory, tokens and FLOPs per second, and the share of the device's peak (MFU)."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Iterator

import torch

from proxies.config.proxy import ProxyConfig
from scaling.common.measurement import Measurement

# FLOPs per second, dense bfloat16, by a part of the device's name (NVIDIA's data sheets, SXM versions).
PEAKS = {"H100": 989e12, "A100": 312e12}


class Usage:
    """Collects throughput from a run's measurements as they pass.

    Args:
        config: The proxy.
        peak_flops: Peak FLOPs per second of the device. Default: by the device's name; if it is unknown, no MFU is
            reported.
    """

    def __init__(self, config: ProxyConfig, peak_flops: float | None = None) -> None:
        self.config = config
        self.device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        self.peak_flops = peak_flops or next((peak for name, peak in PEAKS.items() if name in self.device), None)
        self.first: Measurement | None = None
        self.last: Measurement | None = None

    def watch(self, points: Iterator[Measurement]) -> Iterator[Measurement]:
        """Yield the measurements unchanged, and keep the first and the last."""
        for point in points:
            self.first, self.last = self.first or point, point
            yield point

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second between the first and the last measurement, evaluation included; None with fewer than two.

        What came before the first may have been trained by another process, and includes the start-up.
        """
        if self.first is None or self.last is None or self.last.seconds <= self.first.seconds:
            return None
        return (self.last.tokens - self.first.tokens) / (self.last.seconds - self.first.seconds)

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilization as in PaLM (arXiv 2204.02311, appendix B); None if the device's peak is unknown."""
        if self.tokens_per_second is None or self.peak_flops is None:
            return None
        return self.tokens_per_second * self.config.flops_per_token / self.peak_flops

    def __str__(self) -> str:
        parts = [f"peak memory {get_peak_memory() / 2**20:,.0f} MiB"]
        if (speed := self.tokens_per_second) is not None:
            parts.append(f"{speed:,.0f} tokens/s")
            parts.append(f"{speed * self.config.flops_per_token / 1e12:.4g} TFLOP/s (PaLM)")
        if self.mfu is not None:
            parts.append(f"MFU {100 * self.mfu:.1f} % of {self.peak_flops:.3g} FLOP/s")
        return f"{self.device}: " + ", ".join(parts)


def get_peak_memory() -> int:
    """Return the peak memory in bytes: allocated on the GPU if there is one, else resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # getrusage reports bytes on macOS and KiB on Linux.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure_speed(config: ProxyConfig, *, threads: int, min_seconds: float = 0.15) -> float:
    """Measure the training speed of a configuration on this machine's CPU from the median of a few steps.

    The model is not compiled: that takes longer than all other work here, and was measured to gain a quarter at most.

    Args:
        config: The proxy.
        threads: Threads to use.
        min_seconds: How long to measure at least, in seconds.

    Returns:
        Training tokens per second.
    """
    from proxies.config.steps import StepPlan
    from proxies.training.run_state import Run

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    config = config.model_copy(update={"compile": False})
    run = Run(config, StepPlan(config.batch_tokens, 1, 1), "", torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(config.vocab, (config.batch_seqs, config.seq_len), generator=generator)
    # The first pass allocates memory.
    run.backward(x, x)
    durations: list[float] = []
    while sum(durations) < min_seconds:
        began = time.perf_counter()
        run.backward(x, x)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        durations.append(time.perf_counter() - began)
    torch.set_num_threads(before)
    return config.batch_tokens / statistics.median(durations)
