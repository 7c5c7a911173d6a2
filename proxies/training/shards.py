"""Tensors that several processes hold in parts, and folders of them written by torch.distributed.checkpoint.

A folder knows whole tensors only, so any number of processes can read what any other number has written. torch's modules
for this are imported when first needed: that takes a second, which a run in one process does not pay.
"""

from __future__ import annotations

import io
import math
import pickle
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from proxies.model.dtensors import whole

if TYPE_CHECKING:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata

TABLE = ".metadata"  # torch's own, in a folder that it writes
Key = tuple[Any, ...]  # where a tensor is in nested dicts, lists and tuples


def mapped(tree: Any, change: Callable[[Key, Tensor], Any], at: Key = ()) -> Any:
    """Nested dicts, lists and tuples with `change` applied to the tensors in them."""
    if isinstance(tree, Tensor):
        return change(at, tree)
    if isinstance(tree, dict):
        return {key: mapped(item, change, (*at, key)) for key, item in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(mapped(item, change, (*at, i)) for i, item in enumerate(tree))
    return tree


def taken_apart(tree: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The tree with meta tensors, which have a shape and no numbers, in place of all but single numbers; and those, by key."""
    tensors: dict[str, Tensor] = {}

    def take(at: Key, tensor: Tensor) -> Tensor:
        if tensor.ndim == 0:
            return whole(tensor)
        tensors[name_of(at)] = tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    return mapped(tree, take), tensors


def name_of(at: Key) -> str:
    """The name of a tensor in a folder."""
    return "/".join(str(part) for part in at)


def write_tensors(tensors: Mapping[str, Tensor], folder: Path, world: int) -> None:
    """Write them into a folder that there is not yet. All processes do this together."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    with _no_news():
        try:
            save(dict(tensors), storage_writer=FileSystemWriter(folder), no_dist=world == 1)
        except CheckpointException as error:  # on every rank, and none that `except Exception` would catch
            raise OSError(_cause(error)) from error


def read_tensors(targets: Mapping[str, Tensor], folder: Path, reader: FileSystemReader | None = None) -> None:
    """Fill the targets, whole or sharded, each process by itself. ValueError when one is not there."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    with _no_news():
        try:
            load(dict(targets), storage_reader=reader or open_tensors(folder), no_dist=True)
        except CheckpointException as error:
            raise ValueError(f"needed the tensors of a run, got {folder}, which is damaged: {_cause(error)}") from error


def _cause(error: CheckpointException) -> str:
    """What happened on which rank. An interrupt, which torch has caught as well, goes on as one."""
    rank, (cause, _) = next(iter(error.failures.items()))
    if not isinstance(cause, Exception):
        raise cause from None
    return f"rank {rank}: {str(cause) or type(cause).__name__}"


def open_tensors(folder: Path) -> FileSystemReader:
    """A reader that has looked at the folder's table once and runs no code that is in it. ValueError when it is damaged."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    try:
        table = _checked(_Table(io.BytesIO((folder / TABLE).read_bytes())).load())
    except Exception as error:  # a pickle can raise anything
        said = str(error) or type(error).__name__
        raise ValueError(f"needed the tensors of a run, got {folder}, whose table is damaged ({said})") from error

    class Reader(FileSystemReader):
        def read_metadata(self, *_: Any, **__: Any) -> Metadata:
            return table

    return Reader(folder)


# Not BytesStorageMetadata: torch reads such an entry with pickle, in place of the tensor that was asked for.
RECORDS = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
}
OPCODES = (
    b"\x80\x95.\x8cX\x94\x93cq(N\x88\x89KMJ\x8aG])a}sut\x85\x86\x87ehrj\x81Rb"  # what torch writes, in any protocol
)


class _Table(pickle._Unpickler):
    """Reads torch's table of a folder, made of its own records, sizes and dtypes, and nothing else.

    Python's own unpickler, because the one in C takes as much memory as a damaged table says, and writes to classes.
    """

    dispatch: ClassVar[dict[int, Any]] = {code: pickle._Unpickler.dispatch[code] for code in OPCODES}

    def find_class(self, module: str, name: str) -> Any:
        if name in RECORDS.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if (module, name) == ("torch", "Size"):
            return torch.Size
        if (module, name) == ("torch.serialization", "_get_layout"):
            return lambda layout: torch.serialization._get_layout(layout)  # type: ignore[no-untyped-call]
        if module in ("pathlib", "pathlib._local") and name in ("PosixPath", "WindowsPath"):
            return PurePosixPath
        raise pickle.UnpicklingError(f"a name that does not belong there: {module}.{name}")

    def load_build(self) -> None:
        if type(self.stack[-2]).__module__ not in RECORDS:  # type: ignore[attr-defined]
            raise pickle.UnpicklingError("a state for what has none")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build


def _checked(table: Any) -> Metadata:
    """The table, when it says of every tensor where all of it lies, in files of its own folder. ValueError otherwise."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

    if not isinstance(table, Metadata):
        raise ValueError(f"a {type(table).__name__}")
    for name, tensor in table.state_dict_metadata.items():
        if not isinstance(tensor, TensorStorageMetadata):
            raise ValueError(f"{name}: no tensor")
        if sum(math.prod(chunk.sizes) for chunk in tensor.chunks) < math.prod(tensor.size):
            raise ValueError(f"{name}: a part is missing")
    for place_ in table.storage_data.values():
        if not isinstance(place_, _StorageInfo) or Path(place_.relative_path).name != place_.relative_path:
            raise ValueError("a place outside the folder")
    return table


@contextmanager
def _no_news() -> Iterator[None]:
    """One process reads and writes by itself on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


class Stored(Mapping[str, Tensor]):
    """The tensors of a folder below a prefix, each read when it is asked for, on CPU."""

    def __init__(self, folder: Path, prefix: str, shapes: Mapping[str, Tensor]) -> None:
        self.prefix, self.shapes, self.folder = prefix, dict(shapes), folder
        self._reader = open_tensors(folder)

    def __getitem__(self, name: str) -> Tensor:
        tensor = torch.empty_like(self.shapes[name], device="cpu")
        read_tensors({self.prefix + name: tensor}, self.folder, self._reader)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def sums(paths: Iterable[Path]) -> dict[str, tuple[int, int]]:
    """Size and CRC-32 of files, by name."""
    return {path.name: (path.stat().st_size, _crc(path)) for path in paths}


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as stream:
        while part := stream.read(1 << 20):
            crc = zlib.crc32(part, crc)
    return crc
