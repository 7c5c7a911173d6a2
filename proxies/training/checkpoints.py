"""Checkpoints: written whole or not at all, read without running code, refused by name when foreign or broken.

A path that ends in .pt is a file of one process. Any other is a folder, which any number of processes write and read
together, each its own part:

    run/header    what the file would be, with shapes in place of tensors; names the data and their checksums
    run/DATA/     the tensors, by torch.distributed.checkpoint

A new folder gets its name when it is whole; a later checkpoint's data are written beside the ones before, and are those of
the run from the moment that its header has replaced the other.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from proxies.config.proxy import ProxyConfig
from proxies.model.dtensors import is_sharded, place
from proxies.model.transformer import Transformer, build
from proxies.training.distributed import ALONE, Ranks
from proxies.training.shards import TABLE, Key, Stored, mapped, name_of, read_tensors, sums, taken_apart, write_tensors

FORMAT = "muscale-proxy-1"
FOLDER = "muscale-proxy-folder-1"
HEADER = "header"
SUFFIX = ".pt"  # of a file


def write_state(state: Mapping[str, Any], path: Path) -> None:
    """Write whole or not at all: to a temporary file beside `path`, then over it.

    OSError when it cannot be written (a full disk, for one); what stood at `path` before is still there then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            torch.save(dict(state), stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        raise _unwritten(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def write_run(state: Mapping[str, Any], path: Path, ranks: Ranks = ALONE) -> None:
    """Write a file or, all ranks together, a folder; whole or not at all, with the errors of `write_state` on every rank."""
    if path.suffix == SUFFIX:
        write_state(state, path)
        return
    header, tensors = taken_apart(dict(state))
    unnamed = path.with_name(f".{path.name}.tmp")
    with ranks.agreeing():
        if ranks.rank == 0:
            _sweep(path, unnamed)
            (path if path.exists() else unnamed).mkdir(exist_ok=True)
    base, data = ranks.of_first((path if path.exists() else unnamed, f"{time.time_ns():x}"))
    try:
        with ranks.agreeing():
            write_tensors(tensors, base / data, ranks.world)
        with ranks.agreeing():
            own = sums([*(base / data).glob(f"__{ranks.rank}_*"), *[base / data / TABLE] * (ranks.rank == 0)])
        files = {name: said for part in ranks.of_all(own) for name, said in part.items()}
        with ranks.agreeing():
            if ranks.rank == 0:
                write_state({"format": FOLDER, "data": data, "files": files, "run": header}, base / HEADER)
                if base == unnamed:
                    os.replace(unnamed, path)
                    _sync(path.parent)
                _sweep(path, unnamed)
    except (OSError, RuntimeError) as error:
        if ranks.rank == 0:
            shutil.rmtree(base / data if base == path else unnamed, ignore_errors=True)
        raise _unwritten(error, path) from error


def _sweep(path: Path, unnamed: Path) -> None:
    """Take away what writers have left that were killed, and what the header no longer names."""
    shutil.rmtree(unnamed, ignore_errors=True)
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()
    if path.exists():
        check_place(path)
        named = _header(path)["data"]
        for other in path.iterdir():
            if other.name not in (HEADER, named):
                shutil.rmtree(other) if other.is_dir() else other.unlink()


def check_place(path: Path) -> None:
    """ValueError when a run cannot be written there: no folder to be in, or something else that would be lost."""
    if not path.parent.is_dir():
        raise ValueError(f"needed a path in an existing folder, got {path}: create {path.parent}")
    if path.suffix == SUFFIX:
        if path.is_dir():
            raise ValueError(
                f"needed a file at {path}, got a folder: remove it, or name a path that does not end in {SUFFIX}"
            )
    elif (path / HEADER).is_file():
        _header(path)
    elif path.exists() and (path.is_file() or any(path.iterdir())):
        raise ValueError(f"needed a new path or a run's folder, got {path}, which is something else: name another")


def remove_run(path: Path) -> None:
    """Take a file or a folder away, the folder's name first: what has the name is whole."""
    if path.is_dir():
        gone = path.with_name(f".{path.name}.tmp")
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
        shutil.rmtree(gone)
    else:
        path.unlink(missing_ok=True)


def _unwritten(error: Exception, path: Path) -> OSError:
    # torch's own writers raise RuntimeError where Python's would raise OSError
    number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
    before = "the one written before is intact" if path.exists() else "nothing was written"
    said = f"cannot write a checkpoint ({error}): free space or mend the folder; {before}"
    return OSError(number, said, str(path))


def _sync(folder: Path) -> None:
    """The new name must survive a power cut, too."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def read_run(path: Path, ranks: Ranks = ALONE, form: str = FORMAT) -> dict[str, Any]:
    """A file as `load_state` reads it, or a folder with shapes (meta tensors) in place of tensors, for `take` and `stored`.

    The ranks check the folder's files between them; when one of these is damaged, the ValueError is to be agreed on.
    """
    if not path.is_dir():
        return _read(path, form)
    if not (path / HEADER).is_file():
        raise ValueError(f"needed a saved run, got the folder {path}, which is something else: name another checkpoint")
    header = _header(path)
    data = path / header["data"]
    mine = sorted(header["files"])[ranks.rank :: ranks.world]
    wrong = [name for name in mine if not (data / name).is_file() or sums([data / name])[name] != header["files"][name]]
    if wrong:
        raise ValueError(
            f"needed a run saved by `train`, got {path}, which is cut short or damaged ({', '.join(wrong)} in {data.name}): "
            "name another checkpoint, or train it again"
        )
    run: dict[str, Any] = header["run"]
    if run.get("format") != form:
        raise ValueError(f"needed a run saved as {form}, got {path} with format {run.get('format')!r}")
    return run | {"data": header["data"]}


def take(
    saved: Mapping[str, Any], which: str, path: Path, like: Callable[[Key], Tensor | None] = lambda _: None
) -> Any:
    """One entry of what `read_run` has read, its tensors on CPU; or sharded, where what `like` names for their place is."""
    to_read: dict[str, Tensor] = {}

    def taken(at: Key, tensor: Tensor) -> Tensor:
        model = like(at)
        if model is not None and is_sharded(model) and model.shape == tensor.shape:
            target = torch.empty_like(model.detach(), dtype=tensor.dtype)
        elif tensor.is_meta:
            target = torch.empty_like(tensor, device="cpu")
        else:
            return tensor
        if tensor.is_meta:
            to_read[name_of((which, *at))] = target
        else:
            place(target, tensor)
        return target

    found = mapped(saved[which], taken)
    if to_read:
        read_tensors(to_read, path / saved["data"])
    return found


def stored(saved: Mapping[str, Any], path: Path, which: str, *more: str) -> Mapping[str, Tensor]:
    """Tensors of what `read_run` has read, such as "annealed", "model", by name; of a folder each is read when asked for."""
    found = saved[which]
    for key in more:
        found = found[key]
    if "data" not in saved:
        return dict(found)
    return Stored(path / saved["data"], name_of((which, *more, "")), found)


def load_state(path: Path, form: str = FORMAT) -> dict[str, Any]:
    """What `train` has written, or a file of another form of ours, whole and on CPU.

    Only tensors and plain values are read, never code. ValueError when there is no such thing, or it is damaged.
    """
    if not path.is_dir():
        return _read(path, form)
    saved = read_run(path)
    with reading(path):
        return {key: take(saved, key, path) for key in saved if key != "data"}


def _read(path: Path, form: str) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"needed a saved run, got {path}: no such file")
    try:
        # torch does not look at the checksums that it has written, and packs nothing: a packed part could fill the memory.
        with zipfile.ZipFile(path) as archive:
            packed = [part.filename for part in archive.infolist() if part.compress_type != zipfile.ZIP_STORED]
            broken = packed[0] if packed else archive.testzip()
        if broken:
            raise zipfile.BadZipFile(f"wrong checksum of {broken}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, torch and its unpickler raise all kinds
        if isinstance(error, OSError) and error.filename:
            raise
        raise ValueError(
            f"needed a run saved by `train`, got {path}, which is cut short, damaged or something else "
            f"({_first_line(error)}): name another checkpoint, or train it again"
        ) from error
    found = state.get("format") if isinstance(state, dict) else type(state).__name__
    if found != form:
        raise ValueError(f"needed a run saved as {form}, got {path} with format {found!r}")
    whole: dict[str, Any] = state
    return whole


def _header(path: Path) -> dict[str, Any]:
    """A folder's header. ValueError when it is damaged, or names something outside the folder."""
    header = _read(path / HEADER, FOLDER)
    data, files, run = (header.get(key) for key in ("data", "files", "run"))
    names = [data, *files] if isinstance(files, dict) and isinstance(run, dict) else [None]
    if not all(isinstance(name, str) and name not in ("", "..") and Path(name).name == name for name in names):
        raise ValueError(f"needed a saved run, got {path}, whose header is damaged: name another checkpoint")
    return header


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """A file can be whole and yet not hold what a run has: then a ValueError that names it."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (LookupError, TypeError, AttributeError, AssertionError, ArithmeticError, RuntimeError, ValueError) as error:
        if str(path) in str(error):
            raise
        raise ValueError(
            f"needed a run saved by `train`, got {path}, in which something is missing or of another kind "
            f"({type(error).__name__}: {error}): name another checkpoint"
        ) from error


def config_of(saved: Mapping[str, Any], weights: Mapping[str, Tensor]) -> ProxyConfig:
    """The configuration of a run. TypeError when these weights, or their shapes, are not its model's: it is built from it."""
    config = ProxyConfig.model_validate(saved["config"])
    if (found := sum(tensor.numel() for tensor in weights.values())) != config.counts.total:
        raise TypeError(f"{found:,} weights, its configuration has {config.counts.total:,}")
    return config


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def load_model(path: Path, which: Literal["annealed", "trunk"] = "annealed") -> tuple[ProxyConfig, Transformer]:
    """Configuration and model of a saved run: the weights after the cooldown, or those at its branch point."""
    saved = read_run(path)
    if which not in ("annealed", "trunk"):
        raise ValueError(f"needed which = 'annealed' or 'trunk', got {which!r}")
    if which not in saved:
        raise ValueError(
            f"needed a run that has ended, got {path} in its {saved.get('phase')}: ask for 'trunk', or finish it"
        )
    with reading(path):
        config = config_of(saved, saved[which]["model"])
        model = build(config)
        load_weights(model, stored(saved, path, which, "model"))
    return config, model


def load_weights(model: nn.Module, weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
    """Copy weights into a model, sharded or not, one tensor at a time; every rank gives the same ones.

    ValueError that names all that are missing, unknown or of another shape.
    """
    own, wrong, given = dict(model.named_parameters()), dict[str, str](), set[str]()
    for name, tensor in weights.items() if isinstance(weights, Mapping) else weights:
        given.add(name)
        needed = tuple(own[name].shape) if name in own else "no such parameter"
        if tuple(tensor.shape) != needed:
            wrong[name] = f"{name}: {tuple(tensor.shape)} given, {needed} needed"
        elif not wrong:
            place(own[name], tensor)
    wrong |= {name: f"{name}: missing given, {tuple(own[name].shape)} needed" for name in own.keys() - given}
    if wrong:
        raise ValueError(
            "needed weights of this configuration's shape, got " + "; ".join(wrong[n] for n in sorted(wrong))
        )


def copy_to_cpu(value: Any) -> Any:
    """Nested dicts, lists and tuples with every tensor copied to CPU."""
    return mapped(value, lambda _, tensor: tensor.detach().to("cpu", copy=True))
