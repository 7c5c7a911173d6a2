"""Engines take the same steps: compiled, data parallel, sharded. A run stays the same with any number of processes."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from proxies.config.proxy import ProxyConfig
from proxies.diagnostics.coord_check import coordinate_check
from proxies.diagnostics.coord_probe import ProbeEngine, ProbeResult, ProbeSpec, run_probes
from proxies.training.checkpoints import load_model, load_state, write_run
from proxies.training.distributed import ALONE, Ranks, spawn_ranks
from proxies.training.loop import train
from proxies.training.run_state import Run
from scaling.common.signals import interrupt_on_sigterm

pytestmark = pytest.mark.slow


@pytest.fixture
def probe(tmp_path: Path) -> ProbeSpec:
    text = tmp_path / "text.txt"
    text.write_text("all the world's a stage, and all the men and women merely players " * 400)
    config = ProxyConfig(
        base_width=16,
        d_model=32,
        d_head=8,
        q_per_kv=2,
        qk_norm=True,
        base_layers=1,
        seq_len=16,
        lr=0.02,
        corpus=str(text),
    )
    return ProbeSpec(config, "activations", 4, 4)


def distance(a: ProbeResult, b: ProbeResult) -> float:
    """Return the largest relative difference of any quantity that is not zero, at any step, and of the losses."""
    pairs = [
        (x, y)
        for s, t in zip(a.measurements, b.measurements, strict=True)
        for name in s
        for x, y in zip(s[name], t[name], strict=True)
    ]
    return max(abs(x - y) / y for x, y in [*pairs, *zip(a.losses, b.losses, strict=True)] if y > 1e-6)


# torch's compiler warns when it is loaded.
@pytest.mark.filterwarnings("ignore:.torch.jit.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("engine", ["compile", "ddp", "fsdp2"])
def test_every_engine_has_the_coordinates_of_the_plain_model(probe: ProbeSpec, engine: ProbeEngine) -> None:
    """Parameter groups are made by name after wrapping; under FSDP2 they consist of sharded tensors."""
    # A model takes a minute to compile, mostly for its blocks.
    if engine == "compile":
        probe = replace(probe, config=probe.config.model_copy(update={"n_layers": 1}))
    exact = replace(probe, double=True)
    roles = ("embedding", "hidden", "norm", "qk_norm", "final_norm", "readout")
    stressed = replace(exact, what="eps", scales=dict.fromkeys(roles, 1e-3))
    plain = run_probes([exact, probe, stressed])
    same = run_probes([exact, probe, stressed], engine)
    assert plain[0].measurements[-1]["block 0 stream"][1] > 0.01, "nothing moved"
    # float64; measured 1e-14.
    assert distance(same[0], plain[0]) < 1e-11
    # float32; measured 3e-6.
    assert distance(same[1], plain[1]) < 2e-5
    rows = [(same[2].measurements[0][role][1], plain[2].measurements[0][role][1]) for role in plain[2].measurements[0]]
    assert len(rows) == 6
    assert all(a == pytest.approx(b, rel=1e-11) for a, b in rows)


def test_the_check_itself_runs_on_two_ranks(probe: ProbeSpec) -> None:
    plain = coordinate_check(probe.config, (16, 32, 64), seeds=1, steps=2)
    sharded = coordinate_check(probe.config, (16, 32, 64), seeds=1, steps=2, engine="fsdp2")
    assert [(s.where, s.what) for s in sharded.slopes] == [(s.where, s.what) for s in plain.slopes]
    assert [s.value for s in sharded.slopes] == pytest.approx([s.value for s in plain.slopes], abs=1e-3)


# Runs of 63 steps: 49 of trunk, then a cooldown whose last batch is one window, so most ranks have none of it.
TOKENS = 63 * 64 - 48
# Trunk steps of a run of SHORT tokens.
BRANCH = 10
SHORT = 800
CUTS = {"trunk": 30, "cooldown": 55}
ENGINES = ("ddp", "fsdp2")


def config(**changes: Any) -> ProxyConfig:
    small = {
        "d_model": 32,
        "base_width": 16,
        "d_head": 8,
        "q_per_kv": 2,
        "qk_norm": True,
        "n_layers": 2,
        "base_layers": 1,
        "seq_len": 16,
        "batch_seqs": 4,
        "warmup_tokens": 256,
        "eval_windows": 9,
    }
    return ProxyConfig(**(small | changes))


@contextmanager
def before_steps(do: Callable[[Run], None]) -> Iterator[list[float]]:
    """Call a function before every step, and yield the losses of the steps that are taken."""
    advance, losses = Run.advance, list[float]()

    def watched(run: Run, *args: Any) -> torch.Tensor:
        do(run)
        loss = advance(run, *args)
        losses.append(float(loss))
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "advance", watched)
        yield losses


def compute_all_losses(tokens: int = TOKENS, *, c: ProxyConfig | None = None, **more: Any) -> list[float]:
    """Return the training loss of every step, then that of the annealed weights."""
    with before_steps(lambda _: None) as losses:
        *_, last = train(c or config(), tokens, device="cpu", **more)
    return [*losses, last.loss]


def interrupt_at(step: int, **more: Any) -> None:
    """Interrupt a run before this step, on all ranks alike."""

    def stop(run: Run) -> None:
        if run.step == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), before_steps(stop):
        list(train(config(), TOKENS, device="cpu", **more))


def train_on_two(ranks: Ranks, folder: Path) -> None:
    """Continue the checkpoint of one process with each engine on two ranks, then write checkpoints of two ranks."""
    losses_by_case: dict[str, list[float]] = {}
    for engine in ENGINES:
        with_engine = replace(ranks, engine=engine)
        for micro in (None, 1):
            c = config(micro_seqs=micro)
            losses_by_case[f"{engine}, parts of {micro}"] = compute_all_losses(
                c=c, resume=folder / "one", ranks=with_engine
            )
        losses_by_case[f"{engine} from a file"] = compute_all_losses(resume=folder / "one.pt", ranks=with_engine)
        compute_all_losses(SHORT, save=folder / f"{engine}-done", ranks=with_engine)
        for phase, step in CUTS.items():
            interrupt_at(step, keep=folder / f"{engine}-{phase}", ranks=with_engine)
    torch.save(losses_by_case, folder / f"two-{ranks.rank}.pt")


def continue_all(ranks: Ranks, folder: Path) -> None:
    """Continue every checkpoint of two ranks, with both engines."""
    losses_by_case = {
        (written, phase, engine): compute_all_losses(
            resume=folder / f"{written}-{phase}", ranks=replace(ranks, engine=engine) if ranks.world > 1 else ranks
        )
        for written in ENGINES
        for phase in (*CUTS, "done")
        for engine in (ENGINES if ranks.world > 1 else ("plain",))
    }
    torch.save(losses_by_case, folder / f"{ranks.world}-{ranks.rank}.pt")


def test_losses_are_those_of_one_process_on_any_engine_and_number_of_ranks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It holds at each of 53 steps from one checkpoint, also when 1 and 4 ranks continue a run of 2."""
    for form in ("one", "one.pt"):
        list(train(config(), SHORT, save=tmp_path / form))
    straight = compute_all_losses()
    alone = compute_all_losses(resume=tmp_path / "one")
    assert alone == straight[BRANCH:]
    spawn_ranks(train_on_two, 2, "ddp", tmp_path)
    spawn_ranks(continue_all, 4, "ddp", tmp_path)
    continue_all(ALONE, tmp_path)
    first, second = (torch.load(tmp_path / f"two-{rank}.pt") for rank in range(2))
    assert first == second, "every rank reports the same"
    differences = {name: largest_difference(losses, alone) for name, losses in first.items()}
    for world in (1, 4):
        for (written, phase, engine), losses in torch.load(tmp_path / f"{world}-0.pt").items():
            begin = CUTS.get(phase, BRANCH)
            differences[f"{written} on 2 in its {phase}, {engine} on {world}"] = largest_difference(
                losses, straight[begin:]
            )
    with capsys.disabled():
        print(
            "\nlargest difference of a loss:",
            max(differences.values()),
            max(differences, key=lambda name: differences[name]),
        )
    assert len(differences) == 6 + 6 + 12
    assert max(differences.values()) < 1e-5, differences
    assert straight[0] - straight[-1] > 1, "it learns"


def train_compiled(ranks: Ranks, folder: Path) -> None:
    c = one_shape(compile=True)
    losses_by_case = {
        e: compute_all_losses(FULL, c=c, resume=folder / "one", ranks=replace(ranks, engine=e)) for e in ENGINES
    }
    torch.save(losses_by_case, folder / "compiled.pt")


FULL = 62 * 64


def one_shape(**changes: Any) -> ProxyConfig:
    """Return a model of one layer with as many windows in every forward pass, so that it is compiled once."""
    return config(n_layers=1, eval_windows=4, **changes)


def test_compiled_losses_are_the_same_on_either_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is measured on one rank, which compiles what each of several would."""
    list(train(one_shape(), SHORT, save=tmp_path / "one"))
    alone = compute_all_losses(FULL, c=one_shape(), resume=tmp_path / "one")
    spawn_ranks(train_compiled, 1, "ddp", tmp_path)
    differences = {
        engine: largest_difference(losses, alone) for engine, losses in torch.load(tmp_path / "compiled.pt").items()
    }
    with capsys.disabled():
        print("\ncompiled, largest difference of a loss:", differences)
    assert max(differences.values()) < 1e-5
    assert max(differences.values()) > 0, "not compiled at all"


def largest_difference(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def fail_in_every_way(ranks: Ranks, folder: Path) -> None:
    """Make one of two ranks fail in every way; both have to fail."""
    ranks = replace(ranks, engine="fsdp2")
    second = ranks.rank == 1

    def check_refused(match: str, c: ProxyConfig | None = None, **given: Any) -> None:
        with pytest.raises(ValueError, match=match):
            train(c or config(), TOKENS, device="cpu", ranks=ranks, **given)

    check_refused(r"batch_seqs divisible by 2 ranks, got 5: set 4 or 6", config(batch_seqs=5))
    check_refused(
        r"the same run on every rank, got lr: 0\.01 on rank 0, 0\.02 on rank 1", config(lr=0.01 * (1 + second))
    )
    check_refused(r"run\.pt: give a path that does not end in \.pt", save=folder / "run.pt")
    check_refused(r"foreign, which is something else", resume=folder / "foreign")
    damaged = (
        r"damaged \(__0_0.distcp" if second else r"rank 1: .*damaged-done, which is truncated or damaged \(__0_0.distcp"
    )
    check_refused(damaged, resume=folder / "damaged-done")
    check_refused(
        r"(rank 1: )?needed weights of this configuration's shape, got blocks\.0\.attn_norm: missing",
        init=iter([("readout", torch.zeros(256, 32))]),
    )

    # With no space on one rank both report it, and the previous checkpoint stays.
    path, tree = folder / "full", {"format": "muscale-proxy-1", "weights": torch.arange(60_000.0), "n": 1}
    write_run(tree, path, ranks)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if second:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    whole = torch.distributed.tensor.distribute_tensor(
        torch.arange(60_000.0),
        torch.distributed.device_mesh.init_device_mesh("cpu", (2,)),
        [torch.distributed.tensor.Shard(0)],
    )
    with pytest.raises(OSError, match="the previous one is intact"):
        write_run(tree | {"weights": whole, "n": 2}, path, ranks)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    write_run(tree | {"weights": whole, "n": 3}, path, ranks)

    # If one rank's consumer closes its run, or one rank gets a signal, both stop after the same step.
    run = train(config(), TOKENS, device="cpu", ranks=ranks, keep=folder / "closed")
    next(run)
    if second:
        run.close()
    else:
        with pytest.raises(KeyboardInterrupt, match="closed"):
            next(run)

    def send_signal(run: Run) -> None:
        if second and run.step == 33:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt), interrupt_on_sigterm(), before_steps(send_signal):
        list(train(config(), TOKENS, device="cpu", ranks=ranks, keep=folder / "stopped"))


def test_what_happens_to_one_rank_happens_to_all(tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("mine")
    spawn_ranks(save_and_fail, 2, "fsdp2", tmp_path)
    full = load_state(tmp_path / "full")
    assert full["n"] == 3
    assert torch.equal(full["weights"], torch.arange(60_000.0))
    assert load_state(tmp_path / "stopped")["trunk"]["step"] == 34
    straight = compute_all_losses()
    step = load_state(tmp_path / "closed")["trunk"]["step"]
    assert largest_difference(compute_all_losses(resume=tmp_path / "closed"), straight[step:]) < 1e-5


def save_and_fail(ranks: Ranks, folder: Path) -> None:
    compute_all_losses(SHORT, save=folder / "damaged-done", ranks=ranks)
    if ranks.rank == 0:
        (file,) = (folder / "damaged-done").glob("*/__0_0.distcp")
        file.write_bytes(file.read_bytes()[:-1])
    torch.distributed.barrier()
    fail_in_every_way(ranks, folder)


SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
from proxies.training.distributed import join_ranks
from proxies.training.run_state import Run
from proxies.training.loop import train
from scaling.common.signals import interrupt_on_sigterm
from tests.test_proxies.test_distributed import LONG, config

folder, life = Path(sys.argv[1]), sys.argv[2] + os.environ["TORCHELASTIC_RESTART_COUNT"]
advance = Run.advance

def watched(run, *args):
    if run.ranks.rank == 0:
        with (folder / "steps").open("a") as log:
            log.write(json.dumps([life, run.step, time.monotonic()]) + "\\n")
    if life == "a0" and run.ranks.rank == 1 and run.step == 40:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.02)
    return advance(run, *args)

Run.advance = watched
keep = folder / "keep"
with join_ranks("fsdp2") as ranks, interrupt_on_sigterm():
    *_, last = train(
        config(), LONG, device="cpu", ranks=ranks, resume=keep if keep.exists() else None, keep=keep, keep_every_s=0.3,
        save=folder / "done",
    )
"""
LONG = 120 * 64


def test_a_killed_rank_and_a_terminated_run_continue_from_the_kept_state(tmp_path: Path) -> None:
    """Under torchrun one rank of two is killed and both restart; then the run is terminated, and started again."""
    import json
    import time

    script, root = tmp_path / "script.py", Path(__file__).parents[2]
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}

    def torchrun(life: str) -> subprocess.Popen[str]:
        words = ["--standalone", "--nproc-per-node=2", "--max-restarts=1", str(script), str(tmp_path), life]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *words], env=environment, text=True, stderr=pipe, cwd=root
        )

    def steps() -> dict[str, dict[int, float]]:
        lives: dict[str, dict[int, float]] = {}
        for line in (tmp_path / "steps").read_text().splitlines() if (tmp_path / "steps").exists() else []:
            life, step, at = json.loads(line)
            lives.setdefault(life, {})[step] = at
        return lives

    process = torchrun("a")
    until = time.monotonic() + 240
    while max(steps().get("a1", {0: 0.0})) < 60:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0
    kept = load_state(tmp_path / "keep")["trunk"]["step"]
    assert kept == max(steps()["a1"]) + 1, stderr
    process = torchrun("b")
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    killed, again, last = (steps()[life] for life in ("a0", "a1", "b0"))
    times = list(killed.values())
    longest = max(b - a for a, b in pairwise(times))
    assert max(killed) == 40
    assert 0 < min(again) <= 40
    assert killed[40] - killed[min(again)] < 0.3 + 2 * longest, "more than keep_every_s of work was repeated"
    assert (min(last), max(last)) == (kept, 119), "nothing was repeated after SIGTERM"
    assert not (tmp_path / "keep").exists()
    *_, straight = train(config(), LONG, device="cpu")
    assert load_state(tmp_path / "done")["annealed"]["measurement"]["loss"] == pytest.approx(straight.loss, abs=1e-5)
    assert load_model(tmp_path / "done")[0] == config()
