"""Checkpoints: written atomically, read without executing code, and refused by name when foreign or damaged.

A path that ends in .pt is a file of one process. Any other path is a folder, which any number of processes write and
read together, each its own part:

    run/header    the content of the file, with shapes in place of tensors; names the data and their checksums
    run/DATA/     the tensors, by torch.distributed.checkpoint

A new folder gets its name when it is complete. The data of a later checkpoint are written beside the previous ones, and
become the run's when its header replaces the previous header.
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
from proxies.model.dtensors import copy_into, is_sharded
from proxies.model.transformer import Transformer, build
from proxies.training.distributed import ALONE, Ranks
from proxies.training.shards import (
    TABLE,
    Key,
    ShardedTensors,
    compute_checksums,
    join_key,
    map_tensors,
    read_tensors,
    split_tensors,
    write_tensors,
)
from scaling.common.atomic import replacing, sync_folder

FORMAT = "muscale-proxy-1"
FOLDER = "muscale-proxy-folder-1"
HEADER = "header"
# The suffix of a checkpoint in one file.
SUFFIX = ".pt"


def write_state(state: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint file atomically.

    Args:
        state: Nested dicts, lists and tuples of tensors and plain values.
        path: The file to write or replace.

    Raises:
        OSError: If it cannot be written, for example because the disk is full. What `path` held before is then intact.
    """
    try:
        # Through a stream of Python's, whose errors have a number where torch's own have none.
        with replacing(path) as temporary, temporary.open("wb") as stream:
            torch.save(dict(state), stream)
    except (OSError, RuntimeError) as error:
        raise _explain_write_error(error, path) from error


def write_run(state: Mapping[str, Any], path: Path, ranks: Ranks = ALONE) -> None:
    """Write a checkpoint atomically: a file, or a folder that all ranks write together.

    Args:
        state: As for `write_state`.
        path: A file if it ends in .pt, else a folder.
        ranks: This process among those that write.

    Raises:
        OSError: On every rank, as for `write_state`.
    """
    if path.suffix == SUFFIX:
        write_state(state, path)
        return
    header, tensors = split_tensors(dict(state))
    unnamed = path.with_name(f".{path.name}.tmp")
    with ranks.agree_on_errors():
        if ranks.rank == 0:
            _remove_leftovers(path, unnamed)
            (path if path.exists() else unnamed).mkdir(exist_ok=True)
    base, data = ranks.broadcast((path if path.exists() else unnamed, f"{time.time_ns():x}"))
    try:
        with ranks.agree_on_errors():
            write_tensors(tensors, base / data, ranks.world)
        with ranks.agree_on_errors():
            own = compute_checksums(
                [*(base / data).glob(f"__{ranks.rank}_*"), *[base / data / TABLE] * (ranks.rank == 0)]
            )
        files = {name: checksum for part in ranks.gather(own) for name, checksum in part.items()}
        with ranks.agree_on_errors():
            if ranks.rank == 0:
                write_state({"format": FOLDER, "data": data, "files": files, "run": header}, base / HEADER)
                if base == unnamed:
                    os.replace(unnamed, path)
                    sync_folder(path.parent)
                _remove_leftovers(path, unnamed)
    except (OSError, RuntimeError) as error:
        if ranks.rank == 0:
            shutil.rmtree(base / data if base == path else unnamed, ignore_errors=True)
        raise _explain_write_error(error, path) from error


def _remove_leftovers(path: Path, unnamed: Path) -> None:
    """Remove what killed writers left behind, and what the header no longer names."""
    shutil.rmtree(unnamed, ignore_errors=True)
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()
    if path.exists():
        check_destination(path)
        named = _read_header(path)["data"]
        for other in path.iterdir():
            if other.name not in (HEADER, named):
                shutil.rmtree(other) if other.is_dir() else other.unlink()


def check_destination(path: Path) -> None:
    """Raise ValueError if a run cannot be written to `path`: its folder is missing, or something else is there."""
    if not path.parent.is_dir():
        raise ValueError(f"needed a path in an existing folder, got {path}: create {path.parent}")
    if path.suffix == SUFFIX:
        if path.is_dir():
            raise ValueError(
                f"needed a file at {path}, got a folder: remove it, or give a path that does not end in {SUFFIX}"
            )
    elif (path / HEADER).is_file():
        _read_header(path)
    elif path.exists() and (path.is_file() or any(path.iterdir())):
        raise ValueError(f"needed a new path or a run's folder, got {path}, which is something else: give another path")


def remove_run(path: Path) -> None:
    """Remove a checkpoint. A folder loses its name first, since whatever has the name must be complete."""
    if path.is_dir():
        gone = path.with_name(f".{path.name}.tmp")
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
        shutil.rmtree(gone)
    else:
        path.unlink(missing_ok=True)


def _explain_write_error(error: Exception, path: Path) -> OSError:
    """Return the OSError that says what to do. torch raises RuntimeError where Python would raise OSError."""
    number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
    outcome = "the previous one is intact" if path.exists() else "nothing was written"
    message = f"cannot write a checkpoint ({error}): free disk space or fix the folder's permissions; {outcome}"
    return OSError(number, message, str(path))


def read_run(path: Path, ranks: Ranks = ALONE, form: str = FORMAT) -> dict[str, Any]:
    """Read a checkpoint: a file completely, a folder with shapes (meta tensors) in place of its tensors.

    The tensors of a folder are read by `materialize_tensors` and `open_weights`. The ranks share the work of verifying
    its checksums, so a caller on several ranks has to agree on the error (see `Ranks.agree_on_errors`).

    Args:
        path: The file or folder.
        ranks: This process among those that read.
        form: The expected format.

    Returns:
        The saved run by key.

    Raises:
        ValueError: If there is no checkpoint, or it is damaged or of another format.
    """
    if not path.is_dir():
        return _read_file(path, form)
    if not (path / HEADER).is_file():
        raise ValueError(f"needed a saved run, got the folder {path}, which is something else: give another checkpoint")
    header = _read_header(path)
    data = path / header["data"]
    mine = sorted(header["files"])[ranks.rank :: ranks.world]
    wrong = [
        name
        for name in mine
        if not (data / name).is_file() or compute_checksums([data / name])[name] != header["files"][name]
    ]
    if wrong:
        raise ValueError(
            f"needed a run saved by `train`, got {path}, which is truncated or damaged "
            f"({', '.join(wrong)} in {data.name}): give another checkpoint, or train it again"
        )
    run: dict[str, Any] = header["run"]
    if run.get("format") != form:
        raise ValueError(f"needed a run saved as {form}, got {path} with format {run.get('format')!r}")
    return run | {"data": header["data"]}


def materialize_tensors(
    saved: Mapping[str, Any], which: str, path: Path, like: Callable[[Key], Tensor | None] = lambda _: None
) -> Any:
    """Return one entry of what `read_run` returned, with real tensors.

    Args:
        saved: What `read_run` returned.
        which: The entry, such as "trunk".
        path: The checkpoint.
        like: The model's tensor for a position in the entry, or None. If it is sharded, so is the tensor read; others
            are on CPU.

    Returns:
        The entry: nested dicts, lists and tuples.
    """
    to_read: dict[str, Tensor] = {}

    def make_target(at: Key, tensor: Tensor) -> Tensor:
        model = like(at)
        if model is not None and is_sharded(model) and model.shape == tensor.shape:
            target = torch.empty_like(model.detach(), dtype=tensor.dtype)
        elif tensor.is_meta:
            target = torch.empty_like(tensor, device="cpu")
        else:
            return tensor
        if tensor.is_meta:
            to_read[join_key((which, *at))] = target
        else:
            copy_into(target, tensor)
        return target

    entry = map_tensors(saved[which], make_target)
    if to_read:
        read_tensors(to_read, path / saved["data"])
    return entry


def open_weights(saved: Mapping[str, Any], path: Path, which: str, *more: str) -> Mapping[str, Tensor]:
    """Return tensors of what `read_run` returned by name; those of a folder are read when they are looked up.

    Args:
        saved: What `read_run` returned.
        path: The checkpoint.
        which: The entry, such as "annealed".
        more: Keys within the entry, such as "model".

    Returns:
        The tensors by name.
    """
    entry = saved[which]
    for key in more:
        entry = entry[key]
    if "data" not in saved:
        return dict(entry)
    return ShardedTensors(path / saved["data"], join_key((which, *more, "")), entry)


def load_state(path: Path, form: str = FORMAT) -> dict[str, Any]:
    """Read a checkpoint completely, with all tensors on CPU.

    Only tensors and plain values are read; no code is executed.

    Args:
        path: The file or folder.
        form: The expected format; by default that of `train`.

    Returns:
        The saved run by key.

    Raises:
        ValueError: If there is no checkpoint, or it is damaged or of another format.
    """
    if not path.is_dir():
        return _read_file(path, form)
    saved = read_run(path)
    with explain_damage(path):
        return {key: materialize_tensors(saved, key, path) for key in saved if key != "data"}


def _read_file(path: Path, form: str) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"needed a saved run, got {path}: no such file")
    try:
        # torch does not verify the checksums that it writes. It never compresses, so a compressed part is not its own,
        # and could fill the memory.
        with zipfile.ZipFile(path) as archive:
            compressed = [part.filename for part in archive.infolist() if part.compress_type != zipfile.ZIP_STORED]
            broken = compressed[0] if compressed else archive.testzip()
        if broken:
            raise zipfile.BadZipFile(f"wrong checksum of {broken}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    # zipfile, torch and its unpickler raise many kinds of errors on damaged files.
    except Exception as error:
        if isinstance(error, OSError) and error.filename:
            raise
        raise ValueError(
            f"needed a run saved by `train`, got {path}, which is truncated, damaged or something else "
            f"({_take_first_line(error)}): give another checkpoint, or train it again"
        ) from error
    actual = state.get("format") if isinstance(state, dict) else type(state).__name__
    if actual != form:
        raise ValueError(f"needed a run saved as {form}, got {path} with format {actual!r}")
    checked: dict[str, Any] = state
    return checked


def _read_header(path: Path) -> dict[str, Any]:
    """Read a folder's header. ValueError if it is damaged or names something outside the folder."""
    header = _read_file(path / HEADER, FOLDER)
    data, files, run = (header.get(key) for key in ("data", "files", "run"))
    names = [data, *files] if isinstance(files, dict) and isinstance(run, dict) else [None]
    if not all(isinstance(name, str) and name not in ("", "..") and Path(name).name == name for name in names):
        raise ValueError(f"needed a saved run, got {path}, whose header is damaged: give another checkpoint")
    return header


@contextmanager
def explain_damage(path: Path) -> Iterator[None]:
    """Raise a ValueError that names the checkpoint if it is intact but does not contain what a run has."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (LookupError, TypeError, AttributeError, AssertionError, ArithmeticError, RuntimeError, ValueError) as error:
        if str(path) in str(error):
            raise
        raise ValueError(
            f"needed a run saved by `train`, got {path}, in which something is missing or of another kind "
            f"({type(error).__name__}: {error}): give another checkpoint"
        ) from error


def read_config(saved: Mapping[str, Any], weights: Mapping[str, Tensor]) -> ProxyConfig:
    """Return the configuration of a saved run. TypeError if its model has another number of weights."""
    config = ProxyConfig.model_validate(saved["config"])
    count = sum(tensor.numel() for tensor in weights.values())
    if count != config.counts.total:
        raise TypeError(f"{count:,} weights, its configuration has {config.counts.total:,}")
    return config


def _take_first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def load_model(path: Path, which: Literal["annealed", "trunk"] = "annealed") -> tuple[ProxyConfig, Transformer]:
    """Load the model of a saved run.

    Args:
        path: The checkpoint.
        which: "annealed" for the weights after the cooldown, "trunk" for those at the branch point.

    Returns:
        The run's configuration and its model on CPU.

    Raises:
        ValueError: If the checkpoint cannot be read, or the run has not reached its end and "annealed" is asked for.
    """
    saved = read_run(path)
    if which not in ("annealed", "trunk"):
        raise ValueError(f"needed which = 'annealed' or 'trunk', got {which!r}")
    if which not in saved:
        raise ValueError(
            f"needed a run that has ended, got {path} in its {saved.get('phase')}: ask for 'trunk', or finish the run"
        )
    with explain_damage(path):
        config = read_config(saved, saved[which]["model"])
        model = build(config)
        load_weights(model, open_weights(saved, path, which, "model"))
    return config, model


def load_weights(model: nn.Module, weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
    """Copy weights into a model, sharded or not, one tensor at a time.

    Args:
        model: The model.
        weights: Tensors by parameter name, the same on every rank.

    Raises:
        ValueError: If any are missing, unknown or of another shape. The message names all of them.
    """
    own, wrong, given = dict(model.named_parameters()), dict[str, str](), set[str]()
    for name, tensor in weights.items() if isinstance(weights, Mapping) else weights:
        given.add(name)
        needed = tuple(own[name].shape) if name in own else "no such parameter"
        if tuple(tensor.shape) != needed:
            wrong[name] = f"{name}: {tuple(tensor.shape)} given, {needed} needed"
        elif not wrong:
            copy_into(own[name], tensor)
    wrong |= {name: f"{name}: missing given, {tuple(own[name].shape)} needed" for name in own.keys() - given}
    if wrong:
        raise ValueError(
            "needed weights of this configuration's shape, got " + "; ".join(wrong[n] for n in sorted(wrong))
        )


def copy_to_cpu(value: Any) -> Any:
    """Copy nested dicts, lists and tuples with every tensor on CPU."""
    return map_tensors(value, lambda _, tensor: tensor.detach().to("cpu", copy=True))
