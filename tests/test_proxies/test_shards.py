"""Folders of shards: atomic, refused when damaged or foreign, read one tensor at a time; one rank on shards."""

from __future__ import annotations

import math
import os
import pickle
import resource
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from proxies.config.proxy import ProxyConfig
from proxies.config.steps import plan_steps
from proxies.model.dtensors import gather_full, is_sharded
from proxies.model.mup import param_groups
from proxies.model.transformer import build
from proxies.training import checkpoints, loop
from proxies.training.checkpoints import (
    FOLDER,
    FORMAT,
    HEADER,
    load_model,
    load_state,
    load_weights,
    open_weights,
    read_run,
    remove_run,
    write_run,
    write_state,
)
from proxies.training.distributed import ALONE, ENVIRONMENT, Ranks, find_free_port, join_ranks
from proxies.training.loop import train
from proxies.training.run_state import Run
from proxies.training.shards import TABLE, compute_checksums
from scaling.common import atomic

TREE: dict[str, Any] = {
    "format": FORMAT,
    "phase": "done",
    "trunk": {
        "step": 3,
        "model": {"a.b": torch.arange(4000.0), "c": torch.ones(3, 2, dtype=torch.float64)},
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.full((4000,), 0.5)}},
            "betas": (0.9, 0.95),
        },
        "look": [0.5, 7, None],
    },
}


def config(**changes: Any) -> ProxyConfig:
    small = {
        "d_model": 32,
        "base_width": 16,
        "d_head": 8,
        "n_layers": 1,
        "base_layers": 2,
        "qk_norm": True,
        "seq_len": 16,
        "batch_seqs": 4,
        "warmup_tokens": 64,
        "eval_windows": 4,
    }
    return ProxyConfig(**(small | changes))


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def changed(step: int) -> dict[str, Any]:
    return TREE | {"trunk": TREE["trunk"] | {"step": step, "model": {"a.b": torch.full((4000,), float(step))}}}


def test_a_folder_gives_back_the_tree_that_was_written(tmp_path: Path) -> None:
    path = tmp_path / "run"
    write_run(TREE, path)
    assert_same(load_state(path), TREE)
    write_run(changed(4), path)
    assert_same(load_state(path), changed(4))
    assert sorted(p.is_dir() for p in path.iterdir()) == [False, True], "the header and one folder of data"
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    moved = path.rename(tmp_path / "moved")
    assert_same(load_state(moved), changed(4))
    remove_run(moved)
    assert not list(tmp_path.iterdir())


class WriterKilled(BaseException):
    """Like SIGKILL: nothing of the writer runs after it."""


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("at", ["write_tensors", "compute_checksums", "write_state", "sync_folder"])
def test_a_writer_killed_anywhere_leaves_the_previous_checkpoint_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, first: bool
) -> None:
    path = tmp_path / "run"
    if not first:
        write_run(TREE, path)
    own, sync = getattr(checkpoints, at), checkpoints.sync_folder

    def killed(*args: Any) -> None:
        # This call is the header's own; the folder has no name yet.
        if at == "sync_folder" and first and not path.exists():
            sync(*args)
            return
        # The writer is killed after these two calls, and before the others.
        if at in ("write_tensors", "sync_folder"):
            own(*args)
        raise WriterKilled

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, at, killed)
        if at == "sync_folder":
            patch.setattr(atomic, at, killed)
        with pytest.raises(WriterKilled):
            write_run(changed(4), path)
    if at == "sync_folder":
        assert_same(load_state(path), changed(4))
    elif first:
        assert not path.exists(), "a folder with the name is complete"
    else:
        assert_same(load_state(path), TREE)
    # The next write removes what was left behind.
    write_run(changed(5), path)
    assert_same(load_state(path), changed(5))
    assert len(list(path.iterdir())) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("first", [True, False])
def test_without_space_the_previous_checkpoint_is_intact(tmp_path: Path, first: bool) -> None:
    """The kernel refuses files above 8 KiB; the header is smaller."""
    path = tmp_path / "run"
    if not first:
        write_run(TREE, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(OSError, match="nothing was written" if first else "the previous one is intact"):
            write_run(changed(4), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ([] if first else ["run"])
    if not first:
        assert_same(load_state(path), TREE)
        assert len(list(path.iterdir())) == 2


def find_data_folder(path: Path) -> Path:
    return path / torch.load(path / HEADER, weights_only=True)["data"]


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_folder_with_a_truncated_file_is_refused_by_name(tmp_path: Path, share: float) -> None:
    path = tmp_path / "run"
    write_run(TREE, path)
    data = find_data_folder(path)
    for file in (data / "__0_0.distcp", data / TABLE, path / HEADER):
        content = file.read_bytes()
        file.write_bytes(content[: int(share * len(content))])
        with pytest.raises(ValueError, match=r"run.* truncated"):
            read_run(path)
        file.write_bytes(content)
    read_run(path)


def test_a_flipped_bit_or_a_missing_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "run"
    write_run(TREE, path)
    file = find_data_folder(path) / "__0_0.distcp"
    content = file.read_bytes()
    for at in (300, len(content) // 2, len(content) - 300):
        file.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        with pytest.raises(ValueError, match=r"damaged \(__0_0\.distcp"):
            load_state(path)
    file.unlink()
    with pytest.raises(ValueError, match=r"damaged \(__0_0\.distcp"):
        load_model(path)


def test_foreign_folders_are_refused_and_their_code_does_not_run(tmp_path: Path) -> None:
    class ShardTrap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="foreign, which is something else"):
        read_run(foreign)
    with pytest.raises(ValueError, match="save: needed a new path or a run's folder"):
        train(config(), 1_000, save=foreign)
    with pytest.raises(ValueError, match="something else"):
        write_run(TREE, foreign)
    assert (foreign / "notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="no such file"):
        read_run(tmp_path / "absent")
    path = tmp_path / "run"
    write_run(TREE, path)
    table = find_data_folder(path) / TABLE
    header = torch.load(path / HEADER, weights_only=True)
    module, name = (b"\x8c" + bytes([len(n)]) + n for n in (b"torch.distributed.checkpoint.filesystem", b"io.FileIO"))
    arguments = pickle.dumps((str(tmp_path / "ran"), "w"), protocol=4)[2:-1]
    # It calls what torch's own module has imported.
    opened = b"\x80\x04" + module + name + b"\x93" + arguments + b"R."
    for reason, trap in (("mkdir", pickle.dumps(ShardTrap())), (r"io\.FileIO", opened)):
        table.write_bytes(trap)
        # An attacker would also fix the checksum.
        write_state(header | {"files": header["files"] | compute_checksums([table])}, path / HEADER)
        with pytest.raises(ValueError, match=rf"run/\w+, whose table is damaged .*{reason}"):
            load_state(path)
        assert not (tmp_path / "ran").exists()
    write_state(header | {"files": {}, "run": {"format": "other"}}, path / HEADER)
    with pytest.raises(ValueError, match="with format 'other'"):
        load_state(path)
    assert header["format"] == FOLDER


def test_a_mapping_on_disk_reads_one_tensor_when_it_is_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(TREE, tmp_path / "run")
    saved = read_run(tmp_path / "run")
    weights = open_weights(saved, tmp_path / "run", "trunk", "model")
    read: list[tuple[int, ...]] = []
    load = torch.load

    def recording_load(*args: Any, **more: Any) -> Any:
        tensor = load(*args, **more)
        read.append(tuple(tensor.shape))
        return tensor

    monkeypatch.setattr(torch, "load", recording_load)
    assert list(weights) == ["a.b", "c"]
    assert len(weights) == 2
    assert not read
    assert torch.equal(weights["c"], TREE["trunk"]["model"]["c"])
    assert read == [(3, 2)]
    with pytest.raises(KeyError):
        weights["d"]


def test_weights_are_taken_from_a_stream_one_at_a_time() -> None:
    c = config()
    source, model = build(c.model_copy(update={"seed": 1})), build(c)
    alive: list[weakref.ref[Tensor]] = []

    def stream(change: str = "") -> Iterator[tuple[str, Tensor]]:
        for name, value in source.state_dict().items():
            assert sum(ref() is not None for ref in alive) <= 1, "the tensor before the last is freed"
            tensor = value.clone() if name != change else value[:1].clone()
            alive.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    load_weights(model, stream())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"blocks\.0\.q: \(1, 32\) given, \(32, 32\) needed"):
        load_weights(model, stream("blocks.0.q"))
    missing = [(name, t) for name, t in source.state_dict().items() if name != "embed"] + [("extra", torch.ones(2))]
    with pytest.raises(ValueError, match=r"embed: missing given, \(256, 32\) needed; extra: \(2,\) given, no such"):
        train(c, 1_000, init=iter(missing))
    *_, a = train(c, 1_000, init=iter(source.state_dict().items()))
    *_, b = train(c, 1_000, init=source.state_dict())
    assert a.loss == b.loss


def test_one_process_writes_folders_that_are_its_files(tmp_path: Path) -> None:
    for form in ("run.pt", "run"):
        *_, last = train(config(), 1_280, save=tmp_path / form, keep=tmp_path / f"keep-{form}", keep_every_s=0.0)
    file, folder = load_state(tmp_path / "run.pt"), load_state(tmp_path / "run")
    for saved in (file, folder):
        saved["annealed"]["measurement"].pop("seconds")
    assert_same(file, folder)
    assert not (tmp_path / "keep-run").exists(), "removed on completion"
    ends = [[*train(config(), 2_560, resume=tmp_path / form)][-1].loss for form in ("run.pt", "run")]
    assert ends[0] == ends[1]
    assert load_model(tmp_path / "run")[0] == config()
    with pytest.raises(ValueError, match=r"other lr"):
        train(config(lr=0.1), 2_560, resume=tmp_path / "run")
    assert last.final


@pytest.fixture(scope="module")
def shards() -> Iterator[Ranks]:
    """One rank of FSDP2, in this process."""
    words = (0, 1, 0, "localhost", find_free_port())
    with pytest.MonkeyPatch.context() as patch:
        for name, word in zip(ENVIRONMENT, words, strict=True):
            patch.setenv(name, str(word))
        with join_ranks("fsdp2") as ranks:
            yield ranks


def test_groups_are_those_of_the_whole_model_on_shards(shards: Ranks) -> None:
    """It holds where width, depth and head gains each have their own rate, decay and epsilon."""
    c = config(d_model=64, embed_lr_mult=2.0)
    run = Run(c, plan_steps(c, 2_560), "", torch.device("cpu"), shards)
    alone = build(c)
    assert all(is_sharded(p) for p in run.model.parameters())
    names = {id(p): name for name, p in [*run.model.named_parameters(), *alone.named_parameters()]}
    ours, theirs = (
        {
            names[id(p)]: (group["lr"], group["weight_decay"], group["eps"], group["role"])
            for group in groups
            for p in group["params"]
        }
        for groups in (run.optimizer.param_groups, param_groups(alone, c))
    )
    assert ours == theirs
    assert len({rule[:3] for rule in ours.values()}) == 6, "each role has its own values"
    for p, q in zip(run.model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(gather_full(p), q), "the start is that of one process"


def test_a_run_on_shards_continues_one_without_shards_and_vice_versa(shards: Ranks, tmp_path: Path) -> None:
    straight = [*train(config(), 2_560)]
    for engine, other in ((shards, ALONE), (ALONE, shards)):
        path = tmp_path / f"{engine.engine}"
        first = [*train(config(), 1_280, save=path, ranks=engine)]
        rest = [*train(config(), 2_560, resume=path, ranks=other)]
        points = [*first[:-1], *rest]
        assert [m.tokens for m in points] == [m.tokens for m in straight]
        assert [m.loss for m in points] == pytest.approx([m.loss for m in straight], abs=1e-6)
    assert load_model(tmp_path / "fsdp2")[0] == config()


def test_what_ranks_cannot_do_is_refused_before_anything_is_spent(shards: Ranks, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"save: needed a folder, since several ranks write it, got .*run\.pt"):
        train(config(), 1_000, save=tmp_path / "run.pt", ranks=shards)
    with pytest.raises(ValueError, match=r"can work on FSDP2's shards, adamw.*got 'soap'.*engine ddp"):
        train(config(optimizer="soap"), 1_000, ranks=shards)
    with pytest.raises(ValueError, match=r"batch_seqs divisible by 3 ranks, got 4: set 3 or 6"):
        loop._check_divisible(config(), Ranks(0, 3, "ddp"))
    with pytest.raises(ValueError, match=r"divisible by 8 ranks, got 4: set 8,"):
        loop._check_divisible(config(), Ranks(0, 8, "ddp"))


def test_impossible_engines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, word in zip(ENVIRONMENT, ("0", "2", "0", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, word)
    with pytest.raises(ValueError, match="needed the engine ddp or fsdp2 for 2 processes"), join_ranks("plain"):
        pass
    with pytest.raises(ValueError, match="an engine out of plain, ddp, fsdp2, got 'fsdp'"), join_ranks("fsdp"):  # type: ignore[arg-type]
        pass


def test_a_loss_that_is_not_finite_ends_a_run_on_shards(shards: Ranks, tmp_path: Path) -> None:
    weights = build(config()).state_dict()
    weights["blocks.0.gate"][0, 0] = math.nan
    keep = tmp_path / "keep"
    (last,) = train(config(), 2_560, init=weights, ranks=shards, keep=keep, keep_every_s=0.0)
    assert (last.final, last.diverged, math.isnan(last.loss)) == (True, True, True)
    assert not keep.exists()


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    with join_ranks("fsdp2") as ranks:
        assert ranks == ALONE
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="needed torchrun's environment, got no WORLD_SIZE"), join_ranks("ddp"):
        pass
