"""Read the tensors of a checkpoint one at a time, so that a large one is never held in memory completely."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from proxies.training.checkpoints import FORMAT, explain_damage, read_run
from proxies.training.shards import Key, ShardedTensors, join_key


class LazyTensors(Mapping[str, Tensor]):
    """Named tensors, each read from disk at every look-up and not kept."""

    def __init__(self, shapes: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
        """Initialize with the tensors' shapes and the function that reads one by its name.

        Args:
            shapes: The same tensors without values.
            read: Reads the tensor of a name.
        """
        self.shapes, self.read = shapes, read

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class StorageFile:
    """An open checkpoint file. It stays readable when another file replaces it, and is closed with its last reader."""

    def __init__(self, path: Path) -> None:
        self.stream = path.open("rb")
        weakref.finalize(self, self.stream.close)

    def read(self, shape: Tensor) -> Tensor:
        """Read the tensor whose shape, stride and offset in the file `shape` has."""
        with explain_damage(Path(self.stream.name)):
            storage = shape.untyped_storage()
            # torch sets the offset under FakeTensorMode for storages of a file.
            offset = storage._checkpoint_offset
            assert offset is not None
            if offset + storage.nbytes() > os.fstat(self.stream.fileno()).st_size:
                raise ValueError(f"{self.stream.name} was truncated while it was read: give another checkpoint")
            data = bytearray(storage.nbytes())
            self.stream.seek(offset)
            self.stream.readinto(data)
            flat = torch.frombuffer(data, dtype=shape.dtype) if data else torch.empty(0, dtype=shape.dtype)
            return flat.as_strided(shape.shape, shape.stride(), shape.storage_offset())


@dataclass(frozen=True)
class LazyArchive:
    """A checkpoint of which only the plain values have been read.

    Attributes:
        path: The file or folder.
        saved: What `load_state` would return, with shapes in place of tensors.
        file: The open file; None for a folder.
    """

    path: Path
    saved: dict[str, Any]
    file: StorageFile | None

    def tensors(self, keys: Mapping[str, Key]) -> LazyTensors:
        """Return tensors at positions in `saved`, under names that the caller chooses.

        Args:
            keys: The position of each tensor by its new name.

        Returns:
            The tensors, read when they are looked up.
        """
        shapes = {name: _look_up(self.saved, key) for name, key in keys.items()}
        if self.file is not None:
            file = self.file
            return LazyTensors(shapes, lambda name: file.read(shapes[name]))
        folder = ShardedTensors(
            self.path / self.saved["data"], "", {join_key(key): shapes[name] for name, key in keys.items()}
        )
        # Single numbers are in the header.
        return LazyTensors(shapes, lambda name: folder[join_key(keys[name])] if shapes[name].is_meta else shapes[name])


def open_run(path: Path, form: str = FORMAT) -> LazyArchive:
    """Open a checkpoint without reading its tensors.

    Args:
        path: The file or folder.
        form: The expected format.

    Returns:
        The checkpoint.

    Raises:
        ValueError: As for `load_state`.
    """
    if path.is_dir():
        return LazyArchive(path, read_run(path, form=form), None)
    if not path.is_file():
        raise ValueError(f"needed a saved run, got {path}: no such file")
    file = StorageFile(path)
    # In this mode torch records where the storages lie in the file, and reads none of them.
    with FakeTensorMode():
        saved = read_run(path, form=form)
    if not os.path.samestat(os.fstat(file.stream.fileno()), path.stat()):
        raise ValueError(f"{path} was replaced while it was read: try again")
    return LazyArchive(path, saved, file)


def _look_up(tree: Any, key: Key) -> Any:
    for part in key:
        tree = tree[part]
    return tree
