"""Training a proxy: a trunk that knows no horizon, then a cooldown that ends at exactly D tokens.

The trunk's state at the branch point is what a longer run of the same configuration resumes, so extending a run pays
only for the new tokens. A schedule with a horizon has no trunk: its branch point is the start, so a longer run starts
afresh. A resumed run is bitwise the uninterrupted one, on the same device with the same thread count; on several ranks,
or on another number of them, it is the same to rounding.
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
from proxies.config.steps import plan, point_steps
from proxies.data.mixture import Data, open_data
from proxies.data.windows import share
from proxies.model.optimizers import check_sharding, evaluation
from proxies.model.transformer import loss_of
from proxies.training.checkpoints import SUFFIX, check_place, copy_to_cpu, load_weights, read_run, remove_run, write_run
from proxies.training.distributed import ALONE, Ranks
from proxies.training.moments import load_moments
from proxies.training.run_state import CHECK_EVERY, Run, autocast
from scaling.common.measurement import Measurement
from scaling.common.signals import defer_signals

EVAL_CHUNK = 16  # windows per forward pass; fixed, so that the same weights always give the same loss


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
    """Train for `tokens` tokens (rounded down to whole windows), yielding trunk points and last the annealed point.

    resume: what `save` or `keep` has written for the same configuration and data. Its trunk goes on; if it was cut off
        in the cooldown of this very D, so does the cooldown. With a horizon only this very D goes on; another starts
        afresh, with a warning.
    save: gets the trunk's state at the branch point, then also the annealed weights and their measurement.
    keep: gets the whole state every `keep_every_s` seconds and when the run is cut off; removed on completion.
    device: CUDA if there is one, unless given. There matrix products are in bfloat16, unless config.precision says other.
    init: weights to start from instead of fresh ones (a warm start), by parameter name; taken one at a time.
    moments: Adam's, to go with `init` (proxies/growth/moments.py); fresh ones unless given.
    ranks: this process among those that train together, each calling `train` alike (`proxies.training.distributed.joined`). Each takes its
        part of every batch and of the held-out windows, all yield the same measurements, and config.micro_seqs counts the
        sequences of one rank. SIGINT and SIGTERM then wait for the end of a step, at which all stop and write `keep`.

    `save` and `keep` are files of one process where they end in .pt, else folders that any number of ranks resume.

    A loss that is not finite, or that has been lost for long (LOST_LOOKS), ends the run with final=True, diverged=True,
    loss=NaN and the tokens trained so far. A final loss above ln(vocab), that of guessing, is reported with
    diverged=True too.
    Bad arguments raise ValueError here, before the first `next`.
    """
    where = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    ranks.alike(**config.model_dump(), tokens=tokens, resume=resume, save=save, keep=keep, warm=init is not None)
    with ranks.agreeing():
        cut = plan(config, tokens)
        if resume is not None and init is not None:
            raise ValueError("needed resume or init, got both: a resumed run has its weights already")
        if moments is not None and init is None:
            raise ValueError("needed init with moments, got moments alone: they belong to weights")
        for name, path in (("save", save), ("keep", keep)):
            _check_place(name, path, ranks)
        _check_shares(config, ranks)
        data = open_data(config)
        saved = None if resume is None else read_run(resume, ranks)
    run = Run(config, cut, data.sha256, where, ranks)
    with ranks.agreeing():
        if init is not None:
            load_weights(run.model, init)
            if moments is not None:
                load_moments(run.optimizer, run.model, moments)
        if saved is not None and resume is not None:
            run.restore(saved, resume)
    return _measurements(run, data, save, keep, keep_every_s)


def _check_place(name: str, path: Path | None, ranks: Ranks) -> None:
    if path is None:
        return
    if path.suffix == SUFFIX and (ranks.world > 1 or ranks.engine == "fsdp2"):
        raise ValueError(
            f"{name}: needed a folder for what several ranks write, got {path}: a path that does not end in {SUFFIX}"
        )
    try:
        check_place(path)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _check_shares(config: ProxyConfig, ranks: Ranks) -> None:
    """ValueError when the ranks cannot divide a batch, or the optimizer's steps cannot be taken on shards."""
    n, world = config.batch_seqs, ranks.world
    if n % world:
        near = " or ".join(str(m) for m in (n // world * world, -(-n // world) * world) if m)
        raise ValueError(
            f"needed batch_seqs that {world} ranks can divide, got {n}: set {near}, or another number of ranks"
        )
    if ranks.engine == "fsdp2":
        check_sharding(config)


def _measurements(
    run: Run,
    data: Data,
    save: Path | None,
    keep: Path | None,
    keep_every_s: float,
) -> Generator[Measurement, None, None]:
    ranks, began = run.ranks, time.perf_counter()
    kept = began
    points = point_steps(run.config, run.cut.trunk_steps or run.cut.steps - 1)

    def measure(loss: float, *, final: bool = False, diverged: bool = False) -> Measurement:
        (seconds,) = ranks.largest(time.perf_counter() - began)
        return run.measured(loss, seconds, final=final, diverged=diverged)

    # One process may be stopped anywhere. Several stop after the same step, or some would wait for others for ever.
    with defer_signals() if ranks.world > 1 else nullcontext(list[int]()) as came:
        try:
            while True:
                at_branch, at_end = run.step == run.cut.trunk_steps, run.step == run.cut.steps
                # Nothing summed means that the point of this step was taken before the run was cut off.
                at_point = run.step in points and run.loss_windows > 0
                looked_at = at_branch or at_end or at_point or run.step % CHECK_EVERY == 0
                if looked_at and run.is_lost():
                    last = measure(math.nan, final=True, diverged=True)
                    break
                if at_point:
                    with evaluation(run.optimizer):
                        point = measure(evaluate(run.model, data.held, ranks))
                    left = time.perf_counter()
                    yield from _handed(point, ranks)
                    began += time.perf_counter() - left  # what the consumer does meanwhile is not training
                if at_branch and run.trunk is None:
                    run.trunk = run.snapshot()
                    if save is not None:
                        write_run(run.file("trunk"), save, ranks)
                if at_end:
                    with evaluation(run.optimizer):
                        loss = evaluate(run.model, data.held, ranks)
                        last = measure(loss, final=True, diverged=not loss <= math.log(run.config.vocab))
                        annealed = {"model": copy_to_cpu(run.model.state_dict()), "measurement": asdict(last)}
                        if data.parts and save is not None:
                            by_source = {name: evaluate(run.model, part, ranks) for name, part in data.parts.items()}
                            annealed["by_source"] = by_source
                    if save is not None:
                        write_run(run.file("done", annealed=annealed), save, ranks)
                    break
                run.advance(data.windows)
                due = keep is not None and time.perf_counter() - kept > keep_every_s
                stop, due = (bool(x) for x in ranks.largest(bool(came), due))
                if stop:
                    raise KeyboardInterrupt("a rank was told to stop")
                if due and keep is not None:
                    write_run(run.partial(), keep, ranks)
                    kept = time.perf_counter()
        except (GeneratorExit, KeyboardInterrupt, SystemExit):
            if keep is not None:  # a step is whole or not begun, whenever a signal came
                write_run(run.partial(), keep, ranks)
            raise
        try:
            yield from _handed(last, ranks)
        finally:  # not before the measurement is out: an interrupt in between would lose both
            if keep is not None and ranks.rank == 0:
                remove_run(keep)


def _handed(point: Measurement, ranks: Ranks) -> Iterator[Measurement]:
    """Yield a point; where the consumer of one rank closes its run then, those of all ranks end here."""
    closed: GeneratorExit | None = None
    try:
        yield point
    except GeneratorExit as close:
        closed = close
    if ranks.largest(closed is not None)[0]:
        raise closed or KeyboardInterrupt("a rank's run was closed")


@torch.no_grad()
def evaluate(model: nn.Module, windows: tuple[Tensor, Tensor], ranks: Ranks = ALONE) -> float:
    """Mean loss over windows (inputs and next tokens, [n, t] each), nats per token; each rank takes a part of them."""
    n = len(windows[0])
    start, own = share(0, n, ranks.rank, ranks.world)
    x_nt, y_nt = (w[start : start + own] for w in windows)
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    config: ProxyConfig = model.config  # type: ignore[assignment]
    chunks = list(zip(torch.split(x_nt, EVAL_CHUNK), torch.split(y_nt, EVAL_CHUNK), strict=True)) if own else []
    idle = math.ceil(math.ceil(n / ranks.world) / EVAL_CHUNK) - len(chunks)  # others' chunks, which FSDP2 joins in
    with autocast(device, config.precision):
        for x_bt, y_bt in chunks:
            total += loss_of(model, x_bt.to(device), y_bt.to(device)).double() * len(x_bt)
        for _ in range(idle):
            model(windows[0][:1].to(device))
    return float(ranks.total(total)) / n
