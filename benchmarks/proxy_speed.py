"""Compare a proxy's training step with two plain ones (benchmarks/nano.py), alternately in one process.

    python benchmarks/proxy_speed.py --threads 1 2 --widths 64 128 256
    python benchmarks/proxy_speed.py --profile                  where a step's time goes, by kind of operation
    python benchmarks/proxy_speed.py --startup 5                seconds to the first step in a fresh process
    python benchmarks/proxy_speed.py --memory                   peak memory of a fresh process by width
    python benchmarks/proxy_speed.py --together 8               8 members in one program against one by one
    python benchmarks/proxy_speed.py --gpu-124m                 124M parameters, T = 1024, bfloat16, compiled, on a GPU

A ratio is the plain step's time divided by ours in the same round; the median and the quartiles of all rounds are
printed. With --cpu-time a step is timed by the CPU time of the process, which other processes disturb less (one thread
only).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from nano import Step, compute_gpt2_flops_per_token, make_gpt2_step, make_llama_step

from proxies.config.proxy import ProxyConfig
from proxies.config.steps import plan_steps
from proxies.data.mixture import open_data
from proxies.training.run_state import Run
from proxies.training.stacked import Stack

# Dense, SXM.
H100_BF16_FLOPS = 989e12
# Kinds of operations by the beginning of their names.
FAMILIES = {
    "matrix products": ("mm", "bmm", "addmm", "baddbmm"),
    "attention": ("_scaled_dot_product",),
    "optimizer": ("_fused_adamw", "_foreach", "lerp_", "addcdiv_", "addcmul_", "sqrt", "Optimizer"),
    "softmax and loss": ("_log_softmax", "nll_loss", "exp", "gather", "scatter", "logsumexp"),
    "activation": ("silu", "gelu"),
    "norm": ("native_layer_norm", "rsqrt", "pow", "mean", "_weight_norm", "linalg_vector_norm"),
}


def make_proxy_step(config: ProxyConfig, device: str = "cpu") -> Step:
    """Return a training step as `train` takes it."""
    run = Run(config, plan_steps(config, 1 << 40), "", torch.device(device))

    def step(x_bt: torch.Tensor, y_bt: torch.Tensor) -> torch.Tensor:
        loss = run.backward(x_bt, y_bt)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def read_batch(config: ProxyConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a batch of text, since random tokens would have gradients of another size."""
    return open_data(config).windows.batch(0, config.batch_seqs)


def format_quartiles(values: list[float]) -> str:
    """Return the median and the quartiles as text."""
    low, median, high = statistics.quantiles(values, n=4)
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def compare(options: argparse.Namespace) -> None:
    """Compare our step with the plain steps, by threads and width."""
    clock = time.process_time if options.cpu_time else time.perf_counter
    print(f"{'threads':>7}{'width':>6}{'T':>5}{'ours tok/s':>12}{'GFLOP/s':>9}   time of a plain step / ours")
    for threads in options.threads:
        torch.set_num_threads(threads)
        for width in options.widths:
            config = ProxyConfig(d_model=width, seq_len=options.seq_len, precision=options.precision)
            x_bt, y_bt = read_batch(config)
            steps = {"ours": make_proxy_step(config), "gpt2": make_gpt2_step(config), "llama": make_llama_step(config)}
            times: dict[str, list[float]] = {name: [] for name in steps}
            for _ in range(options.rounds + 3):
                for name, step in steps.items():
                    start = clock()
                    step(x_bt, y_bt)
                    times[name].append(clock() - start)
            times = {name: seconds[3:] for name, seconds in times.items()}
            speed = config.batch_tokens / statistics.median(times["ours"])
            ratios = {n: [b / a for a, b in zip(times["ours"], times[n], strict=True)] for n in ("gpt2", "llama")}
            flops_ratio = config.flops_per_token / compute_gpt2_flops_per_token(config)
            print(
                f"{threads:>7}{width:>6}{config.seq_len:>5}{speed:>12,.0f}{speed * config.flops_per_token / 1e9:>9.1f}"
                f"   gpt2 {format_quartiles(ratios['gpt2'])}, "
                f"per FLOP {flops_ratio * statistics.median(ratios['gpt2']):.2f};"
                f" same shape {format_quartiles(ratios['llama'])}",
                flush=True,
            )


def profile(options: argparse.Namespace) -> None:
    """Print the share of each kind of operation in the time of a step."""
    torch.set_num_threads(options.threads[0])
    for width in options.widths:
        config = ProxyConfig(d_model=width, seq_len=options.seq_len)
        x_bt, y_bt = read_batch(config)
        makers: dict[str, Callable[[ProxyConfig], Step]]
        makers = {"ours": make_proxy_step, "gpt2": make_gpt2_step, "llama": make_llama_step}
        for name, make_step in makers.items():
            step = make_step(config)
            for _ in range(3):
                step(x_bt, y_bt)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
                for _ in range(options.rounds):
                    step(x_bt, y_bt)
            microseconds: Counter[str] = Counter()
            for row in trace.key_averages():
                microseconds[get_family(row.key)] += row.self_cpu_time_total
            total = microseconds.total()
            shares = ", ".join(f"{kind} {100 * us / total:.0f} %" for kind, us in microseconds.most_common())
            print(f"width {width:>4} {name:>6} {total / options.rounds / 1e3:8.1f} ms: {shares}", flush=True)


def get_family(operation: str) -> str:
    """Return the kind of an operation."""
    name = operation.removeprefix("aten::")
    return next((kind for kind, names in FAMILIES.items() if name.startswith(names)), "other")


def run_in_fresh_process(code: str) -> float:
    """Run code in a new process and return the number that it prints."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(result.stdout.split()[-1])


FIRST_STEP = """
import time; start = time.perf_counter()
import proxies
points = proxies.train(proxies.ProxyConfig(d_model={width}, eval_windows=1, warmup_tokens=0), 4096)
next(points)
import resource
print({expression})
"""


def measure_startup(options: argparse.Namespace) -> None:
    """Print the seconds to the first step in fresh processes."""
    code = FIRST_STEP.format(width=options.widths[0], expression="time.perf_counter() - start")
    times = ", ".join(f"{run_in_fresh_process(code):.1f}" for _ in range(options.startup))
    print(f"import, data, build, first steps at width {options.widths[0]}: {times} s")


def measure_memory(options: argparse.Namespace) -> None:
    """Print the peak memory of fresh processes by width."""
    peak = "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss"
    for width in options.widths:
        kib = run_in_fresh_process(FIRST_STEP.format(width=width, expression=peak))
        print(f"width {width:>4}: peak {kib / 1024:,.0f} MiB, torch and data included")


def compare_together(options: argparse.Namespace) -> None:
    """Compare K members trained in one program with the same members one by one."""
    clock = time.process_time if options.cpu_time else time.perf_counter
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(options.threads[0])
    for width in options.widths:
        members = [
            ProxyConfig(d_model=width, seq_len=options.seq_len, batch_seqs=options.batch, lr=0.002 * (k + 1), seed=k)
            for k in range(options.together)
        ]
        data = [open_data(c) for c in members]
        alone, stacked = ([Run(c, plan_steps(c, 1 << 40), "", device) for c in members] for _ in range(2))
        stack = Stack(stacked)
        ratios = []
        for _ in range(options.rounds + 2):
            start = clock()
            for run, run_data in zip(alone, data, strict=True):
                # The conversion to float waits for the device.
                float(run.advance(run_data.windows))
            middle = clock()
            float(stack.advance(data).sum())
            ratios.append((middle - start) / (clock() - middle))
        print(
            f"{device.type}, width {width}, batch {options.batch}: "
            f"time one by one / together {format_quartiles(ratios[2:])}"
        )


def measure_gpu_124m(options: argparse.Namespace) -> None:
    """Print the speed of 124M parameters: 12 layers, d = 768, heads of 64, GPT-2's vocabulary rounded up to 50,304."""
    tiny = options.tiny
    device = "cpu" if tiny else "cuda"
    config = ProxyConfig(
        n_layers=1 if tiny else 12,
        d_model=64 if tiny else 768,
        d_head=16 if tiny else 64,
        base_width=64,
        seq_len=32 if tiny else 1024,
        vocab=256 if tiny else 50_304,
        batch_seqs=2 if tiny else 32,
        precision="bfloat16",
        compile=not tiny,
    )
    step = make_proxy_step(config, device)
    generator = torch.Generator().manual_seed(0)
    x_bt, y_bt = (torch.randint(config.vocab, (config.batch_seqs, config.seq_len), generator=generator) for _ in "xy")
    x_bt, y_bt = x_bt.to(device), y_bt.to(device)
    for _ in range(5):
        float(step(x_bt, y_bt))
    times = []
    for _ in range(options.rounds):
        start = time.perf_counter()
        # The conversion to float waits for the device.
        float(step(x_bt, y_bt))
        times.append(time.perf_counter() - start)
    speed = config.batch_tokens / statistics.median(times)
    name = "CPU, a smoke test" if tiny else torch.cuda.get_device_name()
    print(f"{name}: N = {config.counts.N:,}, {speed:,.0f} tokens/s, {speed * config.flops_per_token:.3g} FLOP/s (PaLM)")
    if not tiny:
        print(f"MFU {100 * speed * config.flops_per_token / H100_BF16_FLOPS:.1f} % of an H100's 989 TFLOP/s")
        print(f"peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16, help="sequences per step with --together")
    parser.add_argument(
        "--precision", choices=["float32", "bfloat16"], help="precision of our step; the plain steps use float32"
    )
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--startup", type=int, metavar="TIMES")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--together", type=int, metavar="K")
    parser.add_argument("--gpu-124m", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="--gpu-124m as a smoke test on CPU")
    options = parser.parse_args()
    if options.cpu_time and options.threads != [1]:
        parser.error("needed one thread with --cpu-time, which adds up the time of all threads")
    chosen = {
        profile: options.profile,
        measure_startup: options.startup,
        measure_memory: options.memory,
        compare_together: options.together,
        measure_gpu_124m: options.gpu_124m,
    }
    for mode in [mode for mode, is_chosen in chosen.items() if is_chosen] or [compare]:
        mode(options)


if __name__ == "__main__":
    main()
