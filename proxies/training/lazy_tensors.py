"""Tensors of a checkpoint that are read one at a time, so that a large one is never held whole."""

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

from proxies.training.checkpoints import FORMAT, read_run, reading
from proxies.training.shards import Key, Stored, name_of


class Lazy(Mapping[str, Tensor]):
    """Named tensors; each look-up reads one afresh and keeps nothing."""

    def __init__(self, shapes: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
        """shapes: the same tensors without their numbers."""
        self.shapes, self.read = shapes, read

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class File:
    """An open file of storages. It stays what it is when another takes its place, and is closed with its last reader."""

    def __init__(self, path: Path) -> None:
        self.stream = path.open("rb")
        weakref.finalize(self, self.stream.close)

    def read(self, shape: Tensor) -> Tensor:
        with reading(Path(self.stream.name)):
            storage = shape.untyped_storage()
            place = storage._checkpoint_offset
            assert place is not None  # torch sets it under FakeTensorMode, of what is in a file
            if place + storage.nbytes() > os.fstat(self.stream.fileno()).st_size:
                raise ValueError(f"{self.stream.name} was cut short while it was read: name another checkpoint")
            data = bytearray(storage.nbytes())
            self.stream.seek(place)
            self.stream.readinto(data)
            flat = torch.frombuffer(data, dtype=shape.dtype) if data else torch.empty(0, dtype=shape.dtype)
            return flat.as_strided(shape.shape, shape.stride(), shape.storage_offset())


@dataclass(frozen=True)
class LazyArchive:
    """A checkpoint of which nothing but its plain values has been read."""

    path: Path
    saved: dict[str, Any]  # what `load_state` would give, with shapes in place of tensors
    file: File | None  # None: a folder

    def tensors(self, keys: Mapping[str, Key]) -> Lazy:
        """Tensors at these places in `saved`, by names of one's own."""
        shapes = {name: _at(self.saved, key) for name, key in keys.items()}
        if self.file is not None:
            file = self.file
            return Lazy(shapes, lambda name: file.read(shapes[name]))
        folder = Stored(self.path / self.saved["data"], "", {name_of(key): shapes[name] for name, key in keys.items()})
        # single numbers are in the header
        return Lazy(shapes, lambda name: folder[name_of(keys[name])] if shapes[name].is_meta else shapes[name])


def open_run(path: Path, form: str = FORMAT) -> LazyArchive:
    """A file or folder, checked as `load_state` does, with its errors."""
    if path.is_dir():
        return LazyArchive(path, read_run(path, form=form), None)
    if not path.is_file():
        raise ValueError(f"needed a saved run, got {path}: no such file")
    file = File(path)
    with FakeTensorMode():  # torch's way to learn where in the file storages lie: it reads nothing into them
        saved = read_run(path, form=form)
    if not os.path.samestat(os.fstat(file.stream.fileno()), path.stat()):
        raise ValueError(f"{path} was replaced while it was read: try again")
    return LazyArchive(path, saved, file)


def _at(tree: Any, key: Key) -> Any:
    for part in key:
        tree = tree[part]
    return tree
