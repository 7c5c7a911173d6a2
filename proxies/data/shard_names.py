"""Which files of a folder are for training and which are held out, by their names.

The layouts of llm.c, modded-nanogpt, NeMo, nanoGPT and the hubs of data sets are understood: files such as train.bin,
fineweb_val_000000.bin and train-00000-of-00010.parquet, or folders of such names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

# Words in names of files and folders.
TRAIN_WORDS = frozenset({"train", "training", "trn"})
VAL_WORDS = frozenset({"val", "valid", "validation", "dev", "eval", "heldout", "holdout"})
TEST_WORDS = frozenset({"test"})
NAMING = "call them train.bin and val.bin, or give all shards names with train or val, such as data_train_000001.bin"


class ShardFiles(NamedTuple):
    """The files of a corpus, in the order in which they are read.

    Attributes:
        train: Files of training data.
        val: Files of held-out data; empty if a part of the training data has to be held out.
        remarks: What a user should know of the files, one sentence each.
    """

    train: tuple[Path, ...]
    val: tuple[Path, ...]
    remarks: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[Path, ...]:
        """All files, those for training first."""
        return self.train + self.val


def assign_shards(folder: Path, names: Sequence[str], *, naming: str = NAMING) -> ShardFiles:
    """Assign the shards in a folder to training and held-out data by the words in their names, or in their folders'.

    Without shards for validation, those for testing are held out; otherwise those are left out.

    Args:
        folder: The folder.
        names: Relative paths of the shards.
        naming: What to do about names that do not say what a shard is for.

    Returns:
        The files. Shards that say nothing are for training if none says so.

    Raises:
        ValueError: If some shards are for training by their names, and others say nothing.
    """
    roles: dict[str, list[str]] = {"train": [], "val": [], "test": [], "": []}
    for name in sorted(names, key=_split_numbers):
        roles[_find_role(name)].append(name)
    if roles["train"] and roles[""]:
        raise ValueError(
            f"needed shards whose names say train or val, got {roles['train'][0]} and {roles[''][0]} in {folder}: "
            f"move {roles[''][0]} elsewhere, or {naming}"
        )
    train = roles["train"] or roles[""]
    val = roles["val"] or roles["test"]
    if not train:
        raise ValueError(f"needed shards to train on, got only {val[0]} and others like it in {folder}: {naming}")
    remarks = []
    if roles["val"] and roles["test"]:
        remarks.append(f"{folder}: files for testing are not read: {', '.join(roles['test'][:3])}")
    if missing := _find_gaps(train):
        remarks.append(f"{folder}: shards for training are missing: {', '.join(missing)}")
    return ShardFiles(tuple(folder / name for name in train), tuple(folder / name for name in val), tuple(remarks))


def _find_role(name: str) -> str:
    """Return "train", "val", "test" or "", by the words of a file's name, or else of its nearest folder's."""
    path = Path(name)
    for part in (path.name, *(folder.name for folder in path.parents)):
        words = set(re.split(r"[^a-z]+", part.lower()))
        for role, known in (("train", TRAIN_WORDS), ("val", VAL_WORDS), ("test", TEST_WORDS)):
            if words & known:
                return role
    return ""


def _split_numbers(name: str) -> list[tuple[int, str]]:
    """Return the sort key that puts shard_2 before shard_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _find_gaps(names: Sequence[str]) -> list[str]:
    """Return up to five numbers that are missing in a sequence of numbered shards."""
    numbers: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for name in names:
        # In train-00000-of-00010 the first number counts.
        if match := re.fullmatch(r"(.*?)(\d+)(-of-\d+.*|\D*)", name):
            numbers.setdefault((match[1], match[3]), []).append((int(match[2]), match[2]))
    missing = []
    for (before, after), found in numbers.items():
        present = {number for number, _ in found}
        width = len(found[0][1])
        missing += [
            f"{before}{number:0{width}d}{after}"
            for number in range(min(present), max(present))
            if number not in present
        ][:5]
    return missing[:5]
