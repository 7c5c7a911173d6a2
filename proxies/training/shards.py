"""Tensors that several processes hold in parts, and folders of them written by torch.distributed.checkpoint.

A folder stores whole tensors, so any number of processes can read what any other number has written. torch's modules
for this are imported when they are first needed, since importing takes a second that a run in one process should not
pay.
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

from proxies.model.dtensors import gather_full

if TYPE_CHECKING:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata

# The file in which torch describes the tensors of a folder.
TABLE = ".metadata"
# The position of a tensor in nested dicts, lists and tuples.
Key = tuple[Any, ...]


def map_tensors(tree: Any, change: Callable[[Key, Tensor], Any], at: Key = ()) -> Any:
    """Apply a function to the tensors in nested dicts, lists and tuples.

    Args:
        tree: The nested containers.
        change: Called with the position and the tensor.
        at: The position of `tree` itself.

    Returns:
        The same containers with the results in place of the tensors.
    """
    if isinstance(tree, Tensor):
        return change(at, tree)
    if isinstance(tree, dict):
        return {key: map_tensors(item, change, (*at, key)) for key, item in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map_tensors(item, change, (*at, i)) for i, item in enumerate(tree))
    return tree


def split_tensors(tree: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Split a tree into its structure and its tensors.

    Args:
        tree: Nested dicts, lists and tuples.

    Returns:
        The tree with meta tensors (shapes without values) in place of all tensors but single numbers; the tensors by
        name.
    """
    tensors: dict[str, Tensor] = {}

    def replace_tensor(at: Key, tensor: Tensor) -> Tensor:
        if tensor.ndim == 0:
            return gather_full(tensor)
        tensors[join_key(at)] = tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    return map_tensors(tree, replace_tensor), tensors


def join_key(at: Key) -> str:
    """Return the name in a folder of the tensor at a position."""
    return "/".join(str(part) for part in at)


def write_tensors(tensors: Mapping[str, Tensor], folder: Path, world: int) -> None:
    """Write tensors to a new folder. All processes call this together.

    Args:
        tensors: The tensors by name; each process gives its own parts.
        folder: The folder, which must not exist.
        world: How many processes there are.

    Raises:
        OSError: On every rank, if one of them cannot write.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    with _silence_torch():
        try:
            save(dict(tensors), storage_writer=FileSystemWriter(folder), no_dist=world == 1)
        # torch raises it on every rank. It is not a subclass of Exception.
        except CheckpointException as error:
            raise OSError(_describe_cause(error)) from error


def read_tensors(targets: Mapping[str, Tensor], folder: Path, reader: FileSystemReader | None = None) -> None:
    """Read tensors from a folder into targets, whole or sharded, each process separately.

    Args:
        targets: The tensors to fill by name.
        folder: The folder.
        reader: An open reader of the folder, if there is one.

    Raises:
        ValueError: If a tensor is missing or damaged.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    with _silence_torch():
        try:
            load(dict(targets), storage_reader=reader or open_tensors(folder), no_dist=True)
        except CheckpointException as error:
            raise ValueError(
                f"needed the tensors of a run, got {folder}, which is damaged: {_describe_cause(error)}"
            ) from error


def _describe_cause(error: CheckpointException) -> str:
    """Return what happened on which rank. An interrupt that torch has caught is raised again."""
    rank, (cause, _) = next(iter(error.failures.items()))
    if not isinstance(cause, Exception):
        raise cause from None
    return f"rank {rank}: {str(cause) or type(cause).__name__}"


def open_tensors(folder: Path) -> FileSystemReader:
    """Open a folder of tensors. Its table is read once, and no code in it is executed. ValueError if it is damaged."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    try:
        table = _check_table(_TableUnpickler(io.BytesIO((folder / TABLE).read_bytes())).load())
    # A damaged pickle can raise anything.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"needed the tensors of a run, got {folder}, whose table is damaged ({reason})") from error

    class Reader(FileSystemReader):
        def read_metadata(self, *_: Any, **__: Any) -> Metadata:
            return table

    return Reader(folder)


# Without BytesStorageMetadata: torch would read such an entry with pickle in place of the tensor.
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
# The opcodes that torch writes, in any protocol.
OPCODES = b"\x80\x95.\x8cX\x94\x93cq(N\x88\x89KMJ\x8aG])a}sut\x85\x86\x87ehrj\x81Rb"


class _TableUnpickler(pickle._Unpickler):
    """Unpickles torch's table of a folder, which may contain torch's records, sizes and dtypes, and nothing else.

    It is based on the unpickler written in Python, because the one in C allocates as much memory as a damaged table
    asks for, and sets attributes of classes.
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
        raise pickle.UnpicklingError(f"a name that is not allowed there: {module}.{name}")

    def load_build(self) -> None:
        if type(self.stack[-2]).__module__ not in RECORDS:  # type: ignore[attr-defined]
            raise pickle.UnpicklingError("a state for an object that has none")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build


def _check_table(table: Any) -> Metadata:
    """Return the table if it locates every part of each tensor in the folder's own files, else raise ValueError."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

    if not isinstance(table, Metadata):
        raise ValueError(f"a {type(table).__name__}")
    for name, tensor in table.state_dict_metadata.items():
        if not isinstance(tensor, TensorStorageMetadata):
            raise ValueError(f"{name}: not a tensor")
        if sum(math.prod(chunk.sizes) for chunk in tensor.chunks) < math.prod(tensor.size):
            raise ValueError(f"{name}: a part is missing")
    for location in table.storage_data.values():
        if not isinstance(location, _StorageInfo) or Path(location.relative_path).name != location.relative_path:
            raise ValueError("a file outside the folder")
    return table


@contextmanager
def _silence_torch() -> Iterator[None]:
    """Silence torch's warning that one process reads and writes alone, which is intended here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


class ShardedTensors(Mapping[str, Tensor]):
    """The tensors of a folder below a prefix, each read to CPU when it is looked up."""

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


def compute_checksums(paths: Iterable[Path]) -> dict[str, tuple[int, int]]:
    """Return the size in bytes and the CRC-32 of files, by file name."""
    return {path.name: (path.stat().st_size, _compute_crc(path)) for path in paths}


def _compute_crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as stream:
        while part := stream.read(1 << 20):
            crc = zlib.crc32(part, crc)
    return crc
