"""Checkpoints of finished runs: what was written, whether it is still intact, and where a run starts if it is not.

The size and the checksum of a checkpoint stand beside the loss of its run. A run whose checkpoint was lost or damaged
continues from the longest intact one below, or starts at the beginning, and pays for it.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hpo.worker.results import CheckpointRecord, read_checkpoint_record

if TYPE_CHECKING:
    from hpo.search.view import Job
    from hpo.study.files import StudyFiles

logger = logging.getLogger("muscale.hpo")

# Larger checkpoints are compared by their size only, because reading them would take longer than a second.
MAX_CHECKED_BYTES = 2**30
CHUNK_BYTES = 2**22


class CheckpointDamaged(Exception):
    """A trainer cannot read the checkpoint that its run was to continue.

    Attributes:
        path: The checkpoint.
        reason: What is wrong with it.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason


class _Candidate(NamedTuple):
    tokens: int
    path: Path


def measure_checkpoint(path: Path) -> CheckpointRecord | None:
    """Return the size and the checksum of a checkpoint, a file or a folder; None if there is none."""
    if not path.exists():
        return None
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files)
    if size > MAX_CHECKED_BYTES:
        return CheckpointRecord(size, None)
    checksum = 0
    for chunk in _read_chunks(files):
        checksum = zlib.crc32(chunk, checksum)
    return CheckpointRecord(size, checksum)


def explain_damage(path: Path, result: Path) -> str | None:
    """Return what is wrong with a checkpoint; None if it is as it was written.

    Args:
        path: The checkpoint.
        result: The file with the loss of its run, which records what was written. Studies of older versions have no
            such record. Then only a missing or an empty checkpoint is found here.
    """
    try:
        found = measure_checkpoint(path)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if found is None:
        return "is missing"
    written = read_checkpoint_record(result)
    if found.bytes == 0:
        return "is empty"
    if written is not None and found.bytes != written.bytes:
        return f"is damaged: it has {found.bytes:,} bytes, and {written.bytes:,} were written"
    if written is not None and None not in (found.crc32, written.crc32) and found.crc32 != written.crc32:
        return "is damaged: its checksum is wrong"
    return None


def find_starts(job: Job, files: StudyFiles) -> list[int]:
    """Return where each training of a job starts, and log the checkpoints that were lost or damaged.

    Args:
        job: The job.
        files: The study's files.

    Returns:
        Tokens by repeat: those of its checkpoint, of the longest intact one below, or 0 for the beginning.
    """
    return [_find_start(job, files, repeat) for repeat in range(job.seeds)]


def _find_start(job: Job, files: StudyFiles, repeat: int) -> int:
    planned, tokens = job.get_start(repeat), int(job.fidelity.D)
    partial = files.partial(job.config, tokens, repeat)
    is_begun = partial.is_file() and partial.stat().st_size > 0
    if not planned or is_begun or files.result(job.config, tokens, repeat).exists():
        return planned
    path = files.checkpoint(job.config, planned, repeat)
    damage = explain_damage(path, files.result(job.config, planned, repeat))
    if damage is None:
        return planned
    start = 0
    for candidate in _list_candidates(job, files, repeat):
        if candidate.tokens < planned:
            result = files.result(job.config, candidate.tokens, repeat)
            if explain_damage(candidate.path, result) is None:
                start = candidate.tokens
                break
    where = f"from {start:,} tokens" if start else "from the beginning"
    logger.warning(f"checkpoint {path} {damage}: trial {job.number} is trained again {where}")
    return start


def _list_candidates(job: Job, files: StudyFiles, repeat: int) -> Iterator[_Candidate]:
    """Yield the checkpoints of a job's configuration and repeat, the longest run first."""
    shape = files.checkpoint(job.config, 0, repeat)
    before, after = shape.name.split("-0", 1)
    found = []
    for path in shape.parent.glob(f"{before}-*{after}"):
        tokens = path.name.removeprefix(f"{before}-").removesuffix(after)
        if tokens.isdecimal():
            found.append(_Candidate(int(tokens), path))
    yield from sorted(found, reverse=True)


def set_aside(path: Path) -> None:
    """Rename a damaged file, so that it is not read again."""
    path.replace(path.with_name(f"{path.name}.damaged"))


def _read_chunks(files: list[Path]) -> Iterator[bytes]:
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
