"""Processes that train one model together: who they are, what they agree on, how the model is wrapped for them.

Started by torchrun; without it there is one process, and nothing here changes what it computes.
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
IMPORTED = ("proxies.training.loop", "torch.distributed.checkpoint", "torch.distributed.fsdp")
ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int
    world: int
    engine: Engine

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place; the tensor itself for one process."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def largest(self, *values: float) -> tuple[float, ...]:
        """Each number's largest among ranks, so that all decide alike. Over CPU: the device is not waited for."""
        if self.world == 1:
            return values
        both = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX)
        return tuple(both.tolist())

    def of_first(self, value: T) -> T:
        """Rank 0's value on all ranks."""
        if self.world == 1:
            return value
        sent = [value]
        torch.distributed.broadcast_object_list(sent)
        return sent[0]

    def of_all(self, value: T) -> list[T]:
        """Every rank's value, by rank."""
        if self.world == 1:
            return [value]
        given = [value] * self.world
        torch.distributed.all_gather_object(given, value)
        return given

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """An error of one rank in the block is an error of all, so that none waits for one that is gone.

        Every rank comes by here; the block holds nothing that waits for others. Ranks without an error of their own raise
        the first other one's kind and text, as one of ValueError, OSError and RuntimeError.
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
        said = self.of_all(None if own is None else (_kind(own), str(own)))
        if own is not None:
            raise own
        for rank, other in enumerate(said):
            if other is not None:
                kind, text = other
                raise {"ValueError": ValueError, "OSError": OSError}.get(kind, RuntimeError)(f"rank {rank}: {text}")

    def alike(self, **settings: Any) -> None:
        """ValueError on every rank when ranks were given different settings."""
        if self.world == 1:
            return
        given = self.of_all({name: repr(value) for name, value in settings.items()})
        wrong = [
            f"{name}: {first} on rank 0, {theirs[name]} on rank {rank}"
            for name, first in given[0].items()
            for rank, theirs in enumerate(given)
            if theirs[name] != first
        ]
        if wrong:
            raise ValueError("needed the same run on every rank, got " + "; ".join(wrong))


ALONE = Ranks(0, 1, "plain")


def _kind(error: Exception) -> str:
    return next((kind.__name__ for kind in (ValueError, OSError) if isinstance(error, kind)), "RuntimeError")


@contextmanager
def joined(engine: Engine, *, timeout_s: float = 600.0) -> Iterator[Ranks]:
    """This process's place in torchrun's group, which is joined here and left at the end; ALONE without torchrun.

    gloo on CPU; on CUDA also nccl, on device LOCAL_RANK. timeout_s: how long a rank waits for another before it gives up.
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
            f"needed the engine ddp or fsdp2 for {world} processes, got plain, with which each would train the same alone"
        )
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    wait = timedelta(seconds=timeout_s)
    torch.distributed.init_process_group(backend, store=_store(wait), rank=rank, world_size=world, timeout=wait)
    try:
        yield Ranks(rank, world, engine)
    finally:
        torch.distributed.destroy_process_group()


def _store(wait: timedelta) -> Store:
    """Where ranks find each other, apart from what an attempt that torchrun has ended left there.

    torchrun (2.13) keeps one store for all attempts of a node, whose ranks would look for each other at addresses of the dead. How often it
    has started is the same for all ranks of one node; on several the printed commands make it open a store for each attempt.
    """
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store: Store
    store, _, _ = next(rendezvous("env://", timeout=wait))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        return PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    return store


def spawned(work: Callable[..., None], world: int, engine: Engine, *args: Any) -> None:
    """Call work(ranks, *args) in `world` new processes of one thread each, on this machine; an error in one is raised here."""
    from multiprocessing import get_context

    from torch.multiprocessing.spawn import start_processes

    # They are forks of one process that has imported all this once, and holds neither threads nor a device.
    get_context("forkserver").set_forkserver_preload(list(IMPORTED))
    given = (world, free_port(), engine, dict(os.environ), work, args)
    start_processes(_spawned, given, world, start_method="forkserver")  # type: ignore[no-untyped-call]


def _spawned(
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
    with joined(engine) as ranks:
        work(ranks, *args)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def wrapped(model: Transformer, engine: Engine, device: torch.device) -> nn.Module:
    """The model as the engine runs it. Optimizers are made after this: FSDP2 puts sharded parameters in place of whole ones."""
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
