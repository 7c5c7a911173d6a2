"""Checkpoints when things go wrong: truncated, damaged or foreign files, and no disk space."""

from __future__ import annotations

import errno
import os
import pickle
import random
import uuid
from pathlib import Path

import pytest
import torch

from proxies.training.checkpoints import FORMAT, load_model, load_state, write_state

STATE = {"format": FORMAT, "weights": torch.arange(4000.0), "step": 3}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_state(STATE, tmp_path / "run.pt")
    back = load_state(tmp_path / "run.pt")
    assert torch.equal(back["weights"], STATE["weights"])
    assert back["step"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def test_a_checkpoint_is_replaced_and_never_overwritten(tmp_path: Path) -> None:
    """A process that has the old file open keeps all of it: a second name of it keeps its bytes."""
    path, other = tmp_path / "run.pt", tmp_path / "other.pt"
    write_state(STATE, path)
    os.link(path, other)
    before = other.read_bytes()
    write_state(STATE | {"step": 4}, path)
    assert load_state(path)["step"] == 4
    assert other.read_bytes() == before


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, share: float) -> None:
    path = tmp_path / "run.pt"
    write_state(STATE, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"run\.pt, which is truncated, damaged"):
        load_state(path)


def test_a_flipped_bit_in_the_weights_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    write_state(STATE, path)
    whole = path.read_bytes()
    middle = whole.index(torch.arange(100.0, 120.0).numpy().tobytes())
    for at in random.Random(0).sample(range(middle, middle + 80), 5):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(ValueError, match="damaged"):
            load_state(path)


def test_foreign_files_are_refused_and_their_code_does_not_run(tmp_path: Path) -> None:
    class PickleTrap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    foreign = tmp_path / "foreign.pt"
    torch.save({"model": torch.zeros(2)}, foreign)
    with pytest.raises(ValueError, match=r"foreign\.pt with format None"):
        load_state(foreign)
    torch.save([1, 2], foreign)
    with pytest.raises(ValueError, match="with format 'list'"):
        load_state(foreign)
    foreign.write_bytes(pickle.dumps(PickleTrap()))
    with pytest.raises(ValueError, match="something else"):
        load_state(foreign)
    torch.save({"format": FORMAT, "model": PickleTrap()}, foreign)
    with pytest.raises(ValueError, match="something else"):
        load_state(foreign)
    assert not (tmp_path / "ran").exists()
    foreign.write_text("loss,lr\n")
    with pytest.raises(ValueError, match="something else"):
        load_model(foreign)
    with pytest.raises(ValueError, match="no such file"):
        load_state(tmp_path / "absent.pt")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_reported_and_the_previous_checkpoint_is_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The temporary file is a link to /dev/full, for which the kernel reports a full disk."""
    monkeypatch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=0))
    path = tmp_path / "run.pt"
    write_state(STATE, path)
    before = path.read_bytes()
    (tmp_path / f".run.pt.{12 * '0'}.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"cannot write a checkpoint .*the previous one is intact") as stopped:
        write_state(STATE | {"step": 4}, path)
    assert stopped.value.errno == errno.ENOSPC
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]
    (tmp_path / f".new.pt.{12 * '0'}.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="nothing was written"):
        write_state(STATE, tmp_path / "new.pt")
    assert not (tmp_path / "new.pt").exists()
