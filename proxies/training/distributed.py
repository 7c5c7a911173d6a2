"""Train one model with several processes: their ranks, how they exchange values, how the model is wrapped for them.

torchrun starts them. Without it there is one process, and nothing here changes what it computes.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from proxies.model.transformer import Transformer

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

Engine = Literal["plain", "ddp", "fsdp2"]
T = TypeVar("T")
# Modules that the server of `spawn_ranks` imports once for all processes that it forks.
PRELOADED = ("proxies.training.loop", "torch.distributed.checkpoint", "torch.distributed.fsdp")
# The variables that torchrun sets.
ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """This process among those that train one model together.

    Attributes:
        rank: Its number, from 0.
        world: How many processes there are.
        engine: How the model is distributed.
    """

    rank: int
    world: int
    engine: Engine

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over ranks in place, and return it."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def max_over_ranks(self, *values: float) -> tuple[float, ...]:
        """Return the largest value of each number among ranks, so that all take the same decision.

        The values are exchanged on the CPU, without waiting for the device.
        """
        if self.world == 1:
            return values
        reduced = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(reduced, torch.distributed.ReduceOp.MAX)
        return tuple(reduced.tolist())

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on all ranks."""
        if self.world == 1:
            return value
        sent = [value]
        torch.distributed.broadcast_object_list(sent)
        return sent[0]

    def gather(self, value: T) -> list[T]:
        """Return the value of every rank, by rank, on all ranks."""
        if self.world == 1:
            return [value]
        gathered = [value] * self.world
        torch.distributed.all_gather_object(gathered, value)
        return gathered

    @contextmanager
    def agree_on_errors(self) -> Iterator[None]:
        """Raise on all ranks if one rank raises in the block, so that none waits for a rank that is gone.

        Every rank has to enter the block, which must not wait for other ranks. A rank without an error of its own
        raises the first other rank's message as ValueError, OSError or RuntimeError.
        """
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            if self.world == 1:
                raise
            own = error
        if self.world == 1:
            return
        errors = self.gather(None if own is None else (_name_kind(own), str(own)))
        if own is not None:
            raise own
        for rank, other in enumerate(errors):
            if other is not None:
                kind, text = other
                raise {"ValueError": ValueError, "OSError": OSError}.get(kind, RuntimeError)(f"rank {rank}: {text}")

    def check_same(self, **settings: Any) -> None:
        """Raise ValueError on every rank if ranks were given different settings."""
        if self.world == 1:
            return
        given = self.gather({name: repr(value) for name, value in settings.items()})
        wrong = [
            f"{name}: {first} on rank 0, {theirs[name]} on rank {rank}"
            for name, first in given[0].items()
            for rank, theirs in enumerate(given)
            if theirs[name] != first
        ]
        if wrong:
            raise ValueError("needed the same run on every rank, got " + "; ".join(wrong))


ALONE = Ranks(0, 1, "plain")


def _name_kind(error: Exception) -> str:
    return next((kind.__name__ for kind in (ValueError, OSError) if isinstance(error, kind)), "RuntimeError")


@contextmanager
def join_ranks(engine: Engine, *, timeout_s: float = 600.0) -> Iterator[Ranks]:
    """Join torchrun's process group for the block.

    The backend is gloo on CPU, and nccl on CUDA, on device LOCAL_RANK.

    Args:
        engine: How the model is distributed.
        timeout_s: How long a rank waits for another before it fails, in seconds.

    Yields:
        This process's rank; `ALONE` without torchrun.

    Raises:
        ValueError: If torchrun's environment is incomplete, or the engine does not fit the number of processes.
    """
    if engine not in get_args(Engine):
        raise ValueError(f"needed an engine out of {', '.join(get_args(Engine))}, got {engine!r}")
    missing = [name for name in ENVIRONMENT if name not in os.environ]
    if "RANK" in missing:
        yield ALONE
        return
    if missing:
        raise ValueError(f"needed torchrun's environment, got no {', '.join(missing)}: start with torchrun")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if engine == "plain" and world > 1:
        raise ValueError(
            f"needed the engine ddp or fsdp2 for {world} processes, got plain: each process would train the same model "
            "alone"
        )
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    wait = timedelta(seconds=timeout_s)
    torch.distributed.init_process_group(backend, store=_open_store(wait), rank=rank, world_size=world, timeout=wait)
    try:
        yield Ranks(rank, world, engine)
    finally:
        torch.distributed.destroy_process_group()


def _open_store(wait: timedelta) -> Store:
    """Open the store in which ranks find each other, separately for each attempt of torchrun.

    torchrun (2.13) keeps one store for all attempts of a node, so restarted ranks would look for each other at the
    addresses of ranks that are gone. The restart count is the same for all ranks of one node. On several nodes, the
    printed commands make torchrun open a store for each attempt.
    """
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store: Store
    store, _, _ = next(rendezvous("env://", timeout=wait))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        return PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    return store


def spawn_ranks(work: Callable[..., None], world: int, engine: Engine, *args: Any) -> None:
    """Call `work(ranks, *args)` in new processes on this machine, with one thread each.

    Args:
        work: The function; it must be importable by name.
        world: How many processes.
        engine: How the model is distributed.
        args: More arguments for `work`.

    Raises:
        ProcessRaisedException: If one of them raises.
    """
    from multiprocessing import get_context

    from torch.multiprocessing.spawn import start_processes

    # The processes are forked from one that has imported these modules once and holds neither threads nor a device.
    get_context("forkserver").set_forkserver_preload(list(PRELOADED))
    given = (world, find_free_port(), engine, dict(os.environ), work, args)
    start_processes(_run_rank, given, world, start_method="forkserver")  # type: ignore[no-untyped-call]


def _run_rank(
    rank: int,
    world: int,
    port: int,
    engine: Engine,
    environment: dict[str, str],
    work: Callable[..., None],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    words = (rank, world, rank, "localhost", port)
    os.environ.clear()
    os.environ.update(environment | {name: str(word) for name, word in zip(ENVIRONMENT, words, strict=True)})
    with join_ranks(engine) as ranks:
        work(ranks, *args)


def find_free_port() -> int:
    """Return a TCP port of this machine that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def wrap_model(model: Transformer, engine: Engine, device: torch.device) -> nn.Module:
    """Wrap a model for an engine. Make optimizers after this: FSDP2 replaces parameters by sharded ones."""
    if engine == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if engine == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model
