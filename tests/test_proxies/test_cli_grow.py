"""`proxies grow` and its files: the same weights as in memory, read one at a time, written as a whole or not at all."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from proxies.__main__ import app
from proxies.config.proxy import ProxyConfig
from proxies.growth.files import open_trained, read_grown
from proxies.growth.moments import locate_moments
from proxies.growth.weights import grow, grow_tensors
from proxies.model.optimizers import make_optimizer
from proxies.model.transformer import build, compute_loss
from proxies.trainers.proxy_family import ProxyFamily, Target
from proxies.training.checkpoints import FORMAT, load_model, load_state, write_run, write_state
from proxies.training.lazy_tensors import open_run
from proxies.training.loop import train

runner = CliRunner()
SMALL = ProxyConfig(
    d_model=16,
    base_width=16,
    d_head=4,
    q_per_kv=2,
    qk_norm=True,
    n_layers=2,
    seq_len=16,
    batch_seqs=8,
    warmup_tokens=128,
    eval_windows=2,
    eps=1e-6,
)
STUDY = """
[trainer]
use = "proxies:ProxyFamily"
widths = [16]
""" + "".join(
    f"{name} = {str(value).lower()}\n"
    for name, value in SMALL.model_dump(include=set(SMALL.model_fields_set) - {"d_model"}).items()
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 40 steps."""
    path = tmp_path_factory.mktemp("trained") / "small.pt"
    assert [*train(SMALL, 40 * SMALL.batch_tokens, save=path)][-1].final
    return path


def run_grow(*arguments: object) -> Result:
    return runner.invoke(app, ["grow", *map(str, arguments)])


def larger(**size: int) -> ProxyConfig:
    return ProxyConfig.model_validate(SMALL.model_dump() | size)


@pytest.mark.parametrize("which", ["annealed", "trunk"])
def test_tensors_read_one_at_a_time_are_those_of_the_whole_file(trained: Path, which: Any) -> None:
    lazy, whole = open_trained(trained, which), load_state(trained)[which]
    assert lazy.config == SMALL
    assert list(lazy.weights) == list(whole["model"])
    assert all(torch.equal(lazy.weights[name], whole["model"][name]) for name in lazy.weights)
    assert lazy.tokens == (40 if which == "annealed" else 32) * SMALL.batch_tokens
    assert (lazy.moments is None) == (which == "annealed")


@pytest.mark.parametrize("which", ["annealed", "trunk"])
def test_a_folder_of_shards_holds_what_a_file_does(trained: Path, tmp_path: Path, which: Any) -> None:
    folder = tmp_path / "small"
    assert [*train(SMALL, 40 * SMALL.batch_tokens, save=folder)][-1].final
    file, shards = open_trained(trained, which), open_trained(folder, which)
    assert (shards.config, shards.tokens, shards.data_sha256) == (file.config, file.tokens, file.data_sha256)
    assert all(torch.equal(file.weights[name], shards.weights[name]) for name in {*file.weights, *shards.weights})
    if which == "trunk":
        assert file.moments is not None
        assert shards.moments is not None
        assert all(torch.equal(file.moments[name], shards.moments[name]) for name in {*file.moments, *shards.moments})


def test_moments_by_name_are_those_of_that_parameter(trained: Path) -> None:
    model = build(SMALL)
    optimizer = make_optimizer(model, SMALL)
    x = torch.randint(SMALL.vocab, (4, 16), generator=torch.Generator().manual_seed(0))
    compute_loss(model, x, x).backward()
    optimizer.step()
    named = {name: reduce(getitem, key, optimizer.state_dict()) for name, key in locate_moments(SMALL).items()}
    for name, parameter in model.named_parameters():
        for kind in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(named[f"{name}.{kind}"], optimizer.state[parameter][kind])
    moments = open_trained(trained, "trunk").moments
    assert moments is not None
    assert set(moments) == set(named)
    assert moments["step"].item() == 32
    assert all(moments[name].shape == named[name].shape for name in named)


def test_a_file_stays_what_it_was_when_another_takes_its_place(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    write_state({"format": FORMAT, "model": {"a": torch.arange(4000.0)}}, path)
    lazy = open_run(path).tensors({"a": ("model", "a")})
    write_state({"format": FORMAT, "model": {"a": torch.zeros(10)}}, path)
    assert torch.equal(lazy["a"], torch.arange(4000.0))
    os.truncate(path, 100)
    with pytest.raises(ValueError, match="damaged"):
        open_run(path)


def test_a_file_cut_short_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    write_state({"format": FORMAT, "model": {"a": torch.arange(4000.0)}}, path)
    lazy = open_run(path).tensors({"a": ("model", "a")})
    os.truncate(path, 1000)
    with pytest.raises(ValueError, match="truncated while it was read"):
        lazy["a"]


@pytest.mark.parametrize(
    ("options", "size", "how"),
    [
        (["--width", "24"], {"d_model": 24}, {}),
        (["--width", "24", "--shrink", "1", "--noise", ".25"], {"d_model": 24}, {"shrink": 1.0, "noise": 0.25}),
        (["--width", "24", "--method", "pad"], {"d_model": 24}, {"method": "pad"}),
        (["--width", "32", "--method", "hyperclone"], {"d_model": 32}, {"method": "hyperclone"}),
        (["--layers", "4", "--method", "stack"], {"n_layers": 4, "base_layers": 2}, {"method": "stack"}),
        (
            ["--width", "32", "--layers", "4", "--method", "duplicate", "--which", "trunk"],
            {"d_model": 32, "n_layers": 4, "base_layers": 2},
            {"method": "duplicate"},
        ),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ""])
@pytest.mark.filterwarnings("ignore:N grows")
def test_the_command_writes_what_growth_in_memory_gives(
    trained: Path, tmp_path: Path, options: list[str], size: dict[str, Any], how: dict[str, Any], suffix: str
) -> None:
    out = tmp_path / f"grown{suffix}"
    result = run_grow(trained, *options, "--out", out)
    assert result.exit_code == 0, result.output
    large = larger(**size)
    assert f"N {large.counts.N:,} from N {SMALL.counts.N:,}" in result.stdout
    small, model = load_model(trained, "trunk" if "trunk" in options else "annealed")
    expected = grow(model.state_dict(), small, large, **how)
    start = read_grown(out, large)
    assert start.weights is not None
    assert start.moments is None
    assert list(start.weights) == list(expected)
    assert all(torch.equal(start.weights[name], expected[name]) for name in expected)
    assert [p.name for p in tmp_path.iterdir()] == [out.name]


def test_growth_beyond_the_measured_break_even_is_warned_of(trained: Path, tmp_path: Path) -> None:
    """In parameters that multiply tokens, 16 to 32 is less than fourfold here, 16 to 48 is more."""
    factors = [larger(d_model=d).counts.N / SMALL.counts.N for d in (32, 48)]
    assert factors[0] < 4 < factors[1]
    state = load_model(trained)[1].state_dict()
    # Warnings are errors in tests, so this growth gives none.
    grow(state, SMALL, larger(d_model=32))
    with pytest.warns(UserWarning, match=rf"N grows {factors[1]:.1f} times, .* 4 to 6 times .*2605\.13405"):
        grow_tensors(state, SMALL, larger(d_model=48))
    quiet, loud = (run_grow(trained, "--width", w, "--out", tmp_path / "x.pt") for w in (32, 48))
    assert (quiet.exit_code, loud.exit_code) == (0, 0)
    assert "warning" not in quiet.stderr
    assert "warning: N grows" in loud.stderr


def test_a_target_of_another_depth_has_its_proxies_as_the_base() -> None:
    family = ProxyFamily(widths=(16,), **SMALL.model_dump(exclude={"d_model"}))
    same = family.target_config(Target(d_model=32, tokens=10**6), {"lr": 0.02})
    assert (same.n_layers, same.base_layers, same.lr) == (2, None, 0.02)
    deep = family.target_config(Target(d_model=32, n_layers=6, tokens=10**6))
    assert (deep.n_layers, deep.base_layers, deep.r) == (6, 2, 3.0)
    assert family.target(d_model=32, n_layers=6, tokens=10**6).N == deep.counts.N
    based = family.model_copy(update={"base_layers": 1})
    assert based.target_config(Target(d_model=32, n_layers=6, tokens=10**6)).base_layers == 1
    for table, message in (
        ({"d_model": 32, "n_layers": 3}, "a multiple of 2, got 3"),
        ({"d_model": 8}, "at least as wide as the small one"),
        ({"d_model": 24, "method": "hyperclone"}, "shrink-pad-perturb or pad"),
    ):
        with pytest.raises(ValueError, match=message):
            family.target(tokens=10**6, **table)


def test_the_time_to_stack_is_reported_with_doubt_outside_the_fit(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.pt"
    message = run_grow(trained, "--layers", 4, "--method", "stack", "--out", out).stderr
    assert f"here after {40 * SMALL.batch_tokens:,}" in message
    assert "far outside its range" in message
    long = run_grow(trained, "--layers", 4, "--method", "stack", "--out", out, "--tokens", 10**14).stderr
    assert "by G_stack's fit (arXiv 2405.15319)" in long
    assert "no advice" not in long
    assert "stack" not in run_grow(trained, "--width", 32, "--out", out).stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--width", "8"], "at least as wide"),
        (["--width", "20"], "d_model: must be a multiple of d_head"),
        (["--width", "24", "--method", "duplicate"], "shrink-pad-perturb or pad"),
        (["--width", "32", "--method", "stack"], "grows depth alone"),
        (["--width", "8", "--layers", "3"], "n_layers must be a multiple of 2, got 3"),
        (["--width", "32", "--method", "pad", "--noise", ".1"], "adds no noise"),
        ([], "needed --width, --layers or both"),
        (["--width", "32", "--moments"], "duplicate' without noise, got 'shrink-pad-perturb'"),
        (
            ["--width", "32", "--moments", "--method", "duplicate", "--noise", ".1"],
            "only be grown by method 'duplicate' without noise",
        ),
        (["--width", "32", "--moments", "--method", "duplicate", "--which", "annealed"], "ask for 'trunk'"),
        (["--layers", "4", "--moments", "--method", "duplicate"], "grow width alone"),
    ],
)
def test_bad_sizes_and_options_are_refused_before_anything_is_written(
    trained: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    result = run_grow(trained, "--out", tmp_path / "grown.pt", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not [*tmp_path.iterdir()]


def test_bad_paths_are_refused(trained: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.pt"
    torch.save({"model": {}}, foreign)
    before = trained.read_bytes()
    for arguments, message in (
        ((tmp_path / "absent.pt", "--width", 32, "--out", tmp_path / "g.pt"), "no such file"),
        ((foreign, "--width", 32, "--out", tmp_path / "g.pt"), "with format None"),
        ((trained, "--width", 32, "--out", tmp_path / "absent" / "g.pt"), "existing folder"),
        ((trained, "--width", 32, "--out", trained), "than the checkpoint's"),
    ):
        result = run_grow(*arguments)
        assert result.exit_code == 2, message
        assert message in result.stderr
    assert trained.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["foreign.pt"]


@contextmanager
def limit_file_size(size: int) -> Iterator[None]:
    """Let no file grow beyond so many bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["grown.pt", "grown"])
def test_without_space_nothing_is_left_and_what_was_there_stays(trained: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    with limit_file_size(20_000):
        result = run_grow(trained, "--width", 32, "--out", out)
    assert result.exit_code == 1
    assert "cannot write a checkpoint" in result.stderr
    assert "nothing was written" in result.stderr
    assert not [*tmp_path.iterdir()]
    assert run_grow(trained, "--width", 24, "--out", out).exit_code == 0
    with limit_file_size(20_000):
        assert run_grow(trained, "--width", 32, "--out", out).exit_code == 1
    weights = read_grown(out, larger(d_model=24)).weights
    assert weights is not None
    assert weights["final_norm"].shape == (24,)
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "study.toml"
    path.write_text(STUDY)
    return path


def train_command(study: Path, width: int, steps: int, *options: object) -> Result:
    arguments = [study, "--width", width, "--tokens", steps * SMALL.batch_tokens, *options]
    return runner.invoke(app, ["train", *map(str, arguments)])


def parse_points(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("suffix", [".pt", ""])
def test_a_duplicated_run_with_moments_continues_as_the_small_one_would(
    trained: Path, study: Path, tmp_path: Path, suffix: str
) -> None:
    """The losses of ten float32 trunk steps after growth are the same; without the moments they differ."""
    grown_paths = {width: tmp_path / f"{width}{suffix}" for width in (16, 32)}
    for width, out in grown_paths.items():
        result = run_grow(trained, "--width", width, "--method", "duplicate", "--moments", "--out", out)
        assert result.exit_code == 0, result.output
        assert "moments too" in result.stdout
    small, large = (parse_points(train_command(study, w, 13, "--init", out)) for w, out in grown_paths.items())
    assert [p["tokens"] // SMALL.batch_tokens for p in small] == [1, 2, 3, 4, 6, 8, 13]
    for a, b in zip(small, large, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)
        assert b["train_loss"] == pytest.approx(a["train_loss"], abs=1e-5)
    bare = tmp_path / f"bare{suffix}"
    run_grow(trained, "--width", 32, "--method", "duplicate", "--which", "trunk", "--out", bare)
    without = parse_points(train_command(study, 32, 13, "--init", bare))
    assert abs(without[-2]["loss"] - large[-2]["loss"]) > 1e-4


def test_a_grown_file_starts_a_training_that_can_be_interrupted(trained: Path, study: Path, tmp_path: Path) -> None:
    """The kept state has the weights, so the same command continues from it."""
    out, keep = tmp_path / "grown.pt", tmp_path / "keep.pt"
    run_grow(trained, "--width", 24, "--method", "pad", "--out", out)
    whole = parse_points(train_command(study, 24, 13, "--init", out))
    start = read_grown(out, larger(d_model=24))
    with pytest.raises(ValueError, match="moments alone"):
        train(larger(d_model=24), 13 * SMALL.batch_tokens, moments={})
    part = train(larger(d_model=24), 13 * SMALL.batch_tokens, keep=keep, init=start.weights)
    assert [next(part).tokens for _ in range(3)]
    part.close()
    rest = parse_points(train_command(study, 24, 13, "--init", out, "--keep", keep))
    assert rest[-1]["loss"] == whole[-1]["loss"]
    assert len(rest) == len(whole) - 3


def test_a_state_grown_for_another_configuration_is_refused_with_all_differences(
    trained: Path, study: Path, tmp_path: Path
) -> None:
    out = tmp_path / "grown.pt"
    run_grow(trained, "--width", 32, "--moments", "--method", "duplicate", "--out", out)
    for options, message in (
        (["--init", trained], "got " + str(trained) + " with format 'muscale-proxy-1'"),
        (["--init", tmp_path / "absent.pt"], "no such file"),
        (["--init", out, "--resume", trained], "needed --resume or --init"),
    ):
        result = train_command(study, 32, 13, *options)
        assert result.exit_code == 2
        assert message in result.stderr
    settings = ("vocab=300", "tokenizer=bpe", "alpha_out=2", "n_layers=1", "optimizer=lion")
    result = train_command(study, 24, 13, "--init", out, *(part for s in settings for part in ("--set", s)))
    assert result.exit_code == 2
    for message in (
        "d_model: 32 to 24",
        "n_layers: 2 to 1",
        "vocab: 256 to 300",
        "tokenizer: bytes to bpe",
        "adamw to lion",
    ):
        assert message in result.stderr, message


MEASURE_PEAK = """
import re, sys, warnings
from pathlib import Path
from proxies.config.proxy import ProxyConfig
from proxies.growth.files import open_trained, write_grown

def status(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def once(source, out, d_model, method, moments):
    trained = open_trained(Path(source), "trunk" if moments else "annealed")
    large = trained.config.model_copy(update={"d_model": d_model})
    write_grown(trained, large, Path(out), method=method, moments=moments)

warnings.simplefilter("ignore")
tiny, source, out, width, method, moments = sys.argv[1:]
# The first growth imports modules and allocates what is allocated once.
once(tiny, tiny + "-grown" + Path(out).suffix, 32, method, moments == "True")
before = status("VmRSS")
# The peak is measured from here on.
Path("/proc/self/clear_refs").write_text("5")
once(source, out, int(width), method, moments == "True")
print(status("VmHWM") - before)
"""


def write_finished_run(path: Path, config: ProxyConfig) -> Path:
    """Write what a finished run leaves: the trunk with moments, and the annealed weights."""
    model = build(config)
    optimizer = make_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    weights = model.state_dict()
    trunk = {"model": weights, "optimizer": optimizer.state_dict(), "windows": 8, "step": 1}
    header = {"format": FORMAT, "config": config.model_dump(), "phase": "done", "tokens": 128, "data_sha256": ""}
    write_run(header | {"trunk": trunk, "annealed": {"model": weights}}, path)
    return path


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's account of resident memory")
@pytest.mark.parametrize(
    ("suffix", "width", "method", "moments"),
    [("", 432, "shrink-pad-perturb", False), (".pt", 432, "shrink-pad-perturb", False), ("", 320, "duplicate", True)],
)
def test_growth_holds_the_large_model_once_and_never_all_of_the_small_one(
    tmp_path: Path, suffix: str, width: int, method: str, moments: bool
) -> None:
    """Compare the peak of resident memory above the imports' with the size of the large model.

    Pages of files count, too. N grows 2.2 and 4 times, to 107 MB, three times that with moments. glibc's malloc maps
    every tensor by itself here, as it always does above 32 MB: the memory of smaller ones that it returns late
        (measured: up to
    0.3 of these 107 MB) does not grow with the model.
    """
    small = SMALL.model_copy(update={"d_model": width, "n_layers": 5, "d_head": 16, "q_per_kv": 1})
    source = write_finished_run(tmp_path / f"small{suffix}", small)
    tiny = write_finished_run(tmp_path / f"tiny{suffix}", small.model_copy(update={"d_model": 16}))
    arguments = [tiny, source, tmp_path / f"large{suffix}", 640, method, moments]
    process = subprocess.run(
        [sys.executable, "-c", MEASURE_PEAK, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"},
    )
    large = small.model_copy(update={"d_model": 640})
    size = 4 * large.counts.total * (3 if moments else 1)
    assert 1 <= int(process.stdout) / size < 1.1
