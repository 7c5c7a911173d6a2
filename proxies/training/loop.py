"""Train a proxy: a trunk without a horizon, then a cooldown that ends at exactly D tokens.

A longer run of the same configuration resumes the trunk's state at the branch point, so extending a run costs only the
new tokens. A schedule with a horizon has no trunk: its branch point is the start, so a longer run starts from the
beginning. A resumed run equals the uninterrupted one bit for bit on the same device with the same number of threads; on
several ranks, or another number of them, it is the same up to rounding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from proxies.config.proxy import ProxyConfig
from proxies.config.steps import find_eval_steps, plan_steps
from proxies.data.mixture import RunData, open_data
from proxies.data.windows import assign_windows
from proxies.model.optimizers import check_sharding, use_eval_weights
from proxies.model.transformer import compute_loss
from proxies.training.checkpoints import (
    SUFFIX,
    check_destination,
    copy_to_cpu,
    load_weights,
    read_run,
    remove_run,
    write_run,
)
from proxies.training.distributed import ALONE, Ranks
from proxies.training.moments import load_moments
from proxies.training.run_state import CHECK_EVERY, Run, autocast
from scaling.common.measurement import Measurement
from scaling.common.signals import defer_signals

# Windows per forward pass of an evaluation. It is fixed, so that the same weights always give the same loss.
EVAL_CHUNK = 16


def train(
    config: ProxyConfig,
    tokens: int,
    *,
    resume: Path | None = None,
    save: Path | None = None,
    keep: Path | None = None,
    keep_every_s: float = 30.0,
    device: str | torch.device | None = None,
    init: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | None = None,
    moments: Mapping[str, Tensor] | None = None,
    ranks: Ranks = ALONE,
) -> Generator[Measurement, None, None]:
    """Train a proxy and yield measurements: trunk points, and last the annealed point.

    A loss that is not finite, or that has been far above guessing for `LOST_CHECKS` checks, ends the run with
    `final=True`, `diverged=True`, a NaN loss and the tokens trained so far. A final loss above ln(vocab), that of
    guessing, is reported with `diverged=True`, too.

    Args:
        config: The proxy.
        tokens: Training tokens, rounded down to whole windows.
        resume: What `save` or `keep` wrote for the same configuration and data. Its trunk is continued, and so is its
            cooldown if it was interrupted in the cooldown of the same `tokens`. With a horizon only the same `tokens`
            can be continued; any other run starts from the beginning, with a warning.
        save: Where the trunk's state at the branch point is written, then also the annealed weights and their
            measurement.
        keep: Where the complete state is written every `keep_every_s` seconds and when the run is interrupted; removed
            on completion.
        keep_every_s: Seconds between two writes of `keep`.
        device: The device. Default: CUDA if there is one. Matrix products on CUDA are in bfloat16, unless
            `config.precision` says otherwise.
        init: Weights to start from (a warm start) by parameter name, read one at a time. Default: fresh ones.
        moments: Adam's moments that belong to `init` (see `proxies/growth/moments.py`). Default: fresh ones.
        ranks: This process among those that train together, each of which calls `train` with the same arguments (see
            `proxies.training.distributed.join_ranks`). Each takes its part of every batch and of the held-out windows,
            all yield the same measurements, and `config.micro_seqs` counts the sequences of one rank. SIGINT and
            SIGTERM then wait for the end of a step, at which all ranks stop and write `keep`. `save` and `keep` are
            files of one process if they end in .pt, else folders that any number of ranks can resume.

    Yields:
        Measurements; the last one is final.

    Raises:
        ValueError: For bad arguments, before the first `next`.
    """
    where = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    ranks.check_same(**config.model_dump(), tokens=tokens, resume=resume, save=save, keep=keep, warm=init is not None)
    with ranks.agree_on_errors():
        cut = plan_steps(config, tokens)
        if resume is not None and init is not None:
            raise ValueError("needed resume or init, got both: a resumed run already has weights")
        if moments is not None and init is None:
            raise ValueError("needed init with moments, got moments alone: moments belong to weights")
        for name, path in (("save", save), ("keep", keep)):
            _check_destination(name, path, ranks)
        _check_divisible(config, ranks)
        data = open_data(config)
        saved = None if resume is None else read_run(resume, ranks)
    run = Run(config, cut, data.sha256, where, ranks)
    with ranks.agree_on_errors():
        if init is not None:
            load_weights(run.model, init)
            if moments is not None:
                load_moments(run.optimizer, run.model, moments)
        if saved is not None and resume is not None:
            run.restore(saved, resume)
    return _generate_measurements(run, data, save, keep, keep_every_s)


def _check_destination(name: str, path: Path | None, ranks: Ranks) -> None:
    if path is None:
        return
    if path.suffix == SUFFIX and (ranks.world > 1 or ranks.engine == "fsdp2"):
        raise ValueError(
            f"{name}: needed a folder, since several ranks write it, got {path}: give a path that does not end in "
            f"{SUFFIX}"
        )
    try:
        check_destination(path)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _check_divisible(config: ProxyConfig, ranks: Ranks) -> None:
    """Raise ValueError if the ranks cannot divide a batch, or the optimizer cannot take steps on shards."""
    n, world = config.batch_seqs, ranks.world
    if n % world:
        near = " or ".join(str(m) for m in (n // world * world, -(-n // world) * world) if m)
        raise ValueError(
            f"needed batch_seqs divisible by {world} ranks, got {n}: set {near}, or use another number of ranks"
        )
    if ranks.engine == "fsdp2":
        check_sharding(config)


def _generate_measurements(
    run: Run,
    data: RunData,
    save: Path | None,
    keep: Path | None,
    keep_every_s: float,
) -> Generator[Measurement, None, None]:
    ranks, began = run.ranks, time.perf_counter()
    kept = began
    points = find_eval_steps(run.config, run.cut.trunk_steps or run.cut.steps - 1)

    def take_measurement(loss: float, *, final: bool = False, diverged: bool = False) -> Measurement:
        (seconds,) = ranks.max_over_ranks(time.perf_counter() - began)
        return run.measure(loss, seconds, final=final, diverged=diverged)

    # One process may be stopped anywhere. Several stop after the same step, or some would wait for others forever.
    with defer_signals() if ranks.world > 1 else nullcontext(list[int]()) as signals:
        try:
            while True:
                at_branch, at_end = run.step == run.cut.trunk_steps, run.step == run.cut.steps
                # No loss has been summed if the point of this step was taken before the run was interrupted.
                at_point = run.step in points and run.loss_windows > 0
                checked = at_branch or at_end or at_point or run.step % CHECK_EVERY == 0
                if checked and run.is_lost():
                    last = take_measurement(math.nan, final=True, diverged=True)
                    break
                if at_point:
                    with use_eval_weights(run.optimizer):
                        point = take_measurement(evaluate(run.model, data.held_out, ranks))
                    paused = time.perf_counter()
                    yield from _yield_together(point, ranks)
                    # What the consumer does meanwhile is not training.
                    began += time.perf_counter() - paused
                if at_branch and run.trunk is None:
                    run.trunk = run.snapshot()
                    if save is not None:
                        write_run(run.to_file("trunk"), save, ranks)
                if at_end:
                    with use_eval_weights(run.optimizer):
                        loss = evaluate(run.model, data.held_out, ranks)
                        last = take_measurement(loss, final=True, diverged=not loss <= math.log(run.config.vocab))
                        annealed = {"model": copy_to_cpu(run.model.state_dict()), "measurement": asdict(last)}
                        if data.held_out_by_source and save is not None:
                            by_source = {
                                name: evaluate(run.model, part, ranks) for name, part in data.held_out_by_source.items()
                            }
                            annealed["by_source"] = by_source
                    if save is not None:
                        write_run(run.to_file("done", annealed=annealed), save, ranks)
                    break
                run.advance(data.windows)
                due = keep is not None and time.perf_counter() - kept > keep_every_s
                stop, due = (bool(x) for x in ranks.max_over_ranks(bool(signals), due))
                if stop:
                    raise KeyboardInterrupt("a rank received a stop signal")
                if due and keep is not None:
                    write_run(run.to_partial_file(), keep, ranks)
                    kept = time.perf_counter()
        except (GeneratorExit, KeyboardInterrupt, SystemExit):
            # A step is complete or not begun, whenever the signal came.
            if keep is not None:
                write_run(run.to_partial_file(), keep, ranks)
            raise
        try:
            yield from _yield_together(last, ranks)
        # Not before the measurement has been yielded: an interrupt in between would lose both.
        finally:
            if keep is not None and ranks.rank == 0:
                remove_run(keep)


def _yield_together(point: Measurement, ranks: Ranks) -> Iterator[Measurement]:
    """Yield a point. If the consumer of one rank closes its run, the runs of all ranks end here."""
    closed: GeneratorExit | None = None
    try:
        yield point
    except GeneratorExit as close:
        closed = close
    if ranks.max_over_ranks(closed is not None)[0]:
        raise closed or KeyboardInterrupt("a rank's run was closed")


@torch.no_grad()
def evaluate(model: nn.Module, windows: tuple[Tensor, Tensor], ranks: Ranks = ALONE) -> float:
    """Compute the mean loss over windows; each rank takes a part of them.

    Args:
        model: The model.
        windows: Inputs and next tokens, each of shape [n, t].
        ranks: This process among those that evaluate together.

    Returns:
        The mean loss, in nats per token.
    """
    n = len(windows[0])
    start, own = assign_windows(0, n, ranks.rank, ranks.world)
    x_nt, y_nt = (w[start : start + own] for w in windows)
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    config: ProxyConfig = model.config  # type: ignore[assignment]
    chunks = list(zip(torch.split(x_nt, EVAL_CHUNK), torch.split(y_nt, EVAL_CHUNK), strict=True)) if own else []
    # Chunks that only other ranks have; FSDP2 needs every rank to take part in them.
    idle = math.ceil(math.ceil(n / ranks.world) / EVAL_CHUNK) - len(chunks)
    with autocast(device, config.precision):
        for x_bt, y_bt in chunks:
            total += compute_loss(model, x_bt.to(device), y_bt.to(device)).double() * len(x_bt)
        for _ in range(idle):
            model(windows[0][:1].to(device))
    return float(ranks.sum_over_ranks(total)) / n
