"""The same steps, whatever runs them: compiled, data parallel, sharded; the same run, however many processes go on with it."""

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
from proxies.diagnostics.coord_probe import ProbeEngine, ProbeSpec, ProbeResult, run_probes
from proxies.training.checkpoints import load_model, load_state, write_run
from proxies.training.distributed import ALONE, Ranks, spawn_ranks
from proxies.training.loop import train
from proxies.training.run_state import Run
from scaling.common.signals import interrupt_on_sigterm

pytestmark = pytest.mark.slow


@pytest.fixture
def watch(tmp_path: Path) -> ProbeSpec:
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
    """Largest relative difference of any quantity that is not zero, at any step, and of the losses."""
    pairs = [
        (x, y) for s, t in zip(a.measurements, b.measurements, strict=True) for name in s for x, y in zip(s[name], t[name], strict=True)
    ]
    return max(abs(x - y) / y for x, y in [*pairs, *zip(a.losses, b.losses, strict=True)] if y > 1e-6)


@pytest.mark.filterwarnings("ignore:.torch.jit.*deprecated:DeprecationWarning")  # torch's own, when its compiler loads
@pytest.mark.parametrize("engine", ["compile", "ddp", "fsdp2"])
def test_every_engine_has_the_coordinates_of_the_plain_model(watch: ProbeSpec, engine: ProbeEngine) -> None:
    """Groups are made by name after wrapping; under FSDP2 of sharded tensors."""
    if engine == "compile":  # a model takes a minute to compile, mostly for its blocks
        watch = replace(watch, config=watch.config.model_copy(update={"n_layers": 1}))
    exact = replace(watch, double=True)
    roles = ("embedding", "hidden", "norm", "qk_norm", "final_norm", "readout")
    stressed = replace(exact, what="eps", scales=dict.fromkeys(roles, 1e-3))
    plain = run_probes([exact, watch, stressed])
    same = run_probes([exact, watch, stressed], engine)
    assert plain[0].measurements[-1]["block 0 stream"][1] > 0.01, "nothing moved"
    assert distance(same[0], plain[0]) < 1e-11  # float64; measured 1e-14
    assert distance(same[1], plain[1]) < 2e-5  # float32; measured 3e-6
    rows = [(same[2].measurements[0][role][1], plain[2].measurements[0][role][1]) for role in plain[2].measurements[0]]
    assert len(rows) == 6
    assert all(a == pytest.approx(b, rel=1e-11) for a, b in rows)


def test_the_check_itself_runs_on_two_ranks(watch: ProbeSpec) -> None:
    plain = coordinate_check(watch.config, (16, 32, 64), seeds=1, steps=2)
    sharded = coordinate_check(watch.config, (16, 32, 64), seeds=1, steps=2, engine="fsdp2")
    assert [(s.where, s.what) for s in sharded.slopes] == [(s.where, s.what) for s in plain.slopes]
    assert [s.value for s in sharded.slopes] == pytest.approx([s.value for s in plain.slopes], abs=1e-3)


# Runs of 63 steps: 49 of trunk, then a cooldown whose last batch is one window, so that most ranks have none of it.
TOKENS = 63 * 64 - 48
BRANCH = 10  # steps on the trunk of a run of SHORT tokens
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
    """Call this before every step; the losses of the steps that are taken."""
    advance, losses = Run.advance, list[float]()

    def watched(run: Run, *args: Any) -> torch.Tensor:
        do(run)
        loss = advance(run, *args)
        losses.append(float(loss))
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "advance", watched)
        yield losses


def losses_of(tokens: int = TOKENS, *, c: ProxyConfig | None = None, **more: Any) -> list[float]:
    """The training loss of every step, then that of the annealed weights."""
    with before_steps(lambda _: None) as losses:
        *_, last = train(c or config(), tokens, device="cpu", **more)
    return [*losses, last.loss]


def cut_off(step: int, **more: Any) -> None:
    """A run that is stopped before this step, on all ranks alike."""

    def stop(run: Run) -> None:
        if run.step == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), before_steps(stop):
        list(train(config(), TOKENS, device="cpu", **more))


def two(ranks: Ranks, folder: Path) -> None:
    """On two ranks: each engine from the checkpoint of one process, then checkpoints of their own."""
    seen: dict[str, list[float]] = {}
    for engine in ENGINES:
        those = replace(ranks, engine=engine)
        for micro in (None, 1):
            c = config(micro_seqs=micro)
            seen[f"{engine}, parts of {micro}"] = losses_of(c=c, resume=folder / "one", ranks=those)
        seen[f"{engine} from a file"] = losses_of(resume=folder / "one.pt", ranks=those)
        losses_of(SHORT, save=folder / f"{engine}-done", ranks=those)
        for phase, step in CUTS.items():
            cut_off(step, keep=folder / f"{engine}-{phase}", ranks=those)
    torch.save(seen, folder / f"two-{ranks.rank}.pt")


def more(ranks: Ranks, folder: Path) -> None:
    """Go on from every checkpoint of two ranks, on both engines."""
    seen = {
        (written, phase, engine): losses_of(
            resume=folder / f"{written}-{phase}", ranks=replace(ranks, engine=engine) if ranks.world > 1 else ranks
        )
        for written in ENGINES
        for phase in (*CUTS, "done")
        for engine in (ENGINES if ranks.world > 1 else ("plain",))
    }
    torch.save(seen, folder / f"{ranks.world}-{ranks.rank}.pt")


def test_losses_are_those_of_one_process_on_any_engine_and_number_of_ranks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every step's, over 53 steps from one checkpoint, also after 2 ranks are gone on with by 1 and by 4."""
    for form in ("one", "one.pt"):
        list(train(config(), SHORT, save=tmp_path / form))
    straight = losses_of()
    alone = losses_of(resume=tmp_path / "one")
    assert alone == straight[BRANCH:]
    spawn_ranks(two, 2, "ddp", tmp_path)
    spawn_ranks(more, 4, "ddp", tmp_path)
    more(ALONE, tmp_path)
    first, second = (torch.load(tmp_path / f"two-{rank}.pt") for rank in range(2))
    assert first == second, "every rank says the same"
    off = {name: largest(losses, alone) for name, losses in first.items()}
    for world in (1, 4):
        for (written, phase, engine), losses in torch.load(tmp_path / f"{world}-0.pt").items():
            begin = CUTS.get(phase, BRANCH)
            off[f"{written} on 2 in its {phase}, {engine} on {world}"] = largest(losses, straight[begin:])
    with capsys.disabled():
        print("\nlargest difference of a loss:", max(off.values()), max(off, key=lambda name: off[name]))
    assert len(off) == 6 + 6 + 12
    assert max(off.values()) < 1e-5, off
    assert straight[0] - straight[-1] > 1, "it has learned something meanwhile"


def compiled(ranks: Ranks, folder: Path) -> None:
    c = one_shape(compile=True)
    seen = {e: losses_of(FULL, c=c, resume=folder / "one", ranks=replace(ranks, engine=e)) for e in ENGINES}
    torch.save(seen, folder / "compiled.pt")


FULL = 62 * 64


def one_shape(**changes: Any) -> ProxyConfig:
    """As many windows in every forward pass, so that it is compiled once; one layer."""
    return config(n_layers=1, eval_windows=4, **changes)


def test_compiled_losses_are_the_same_on_either_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On one rank, which compiles what each of several would."""
    list(train(one_shape(), SHORT, save=tmp_path / "one"))
    alone = losses_of(FULL, c=one_shape(), resume=tmp_path / "one")
    spawn_ranks(compiled, 1, "ddp", tmp_path)
    off = {engine: largest(losses, alone) for engine, losses in torch.load(tmp_path / "compiled.pt").items()}
    with capsys.disabled():
        print("\ncompiled, largest difference of a loss:", off)
    assert max(off.values()) < 1e-5
    assert max(off.values()) > 0, "not compiled at all"


def largest(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def failing(ranks: Ranks, folder: Path) -> None:
    """What happens to one of two ranks happens to both."""
    ranks = replace(ranks, engine="fsdp2")
    second = ranks.rank == 1

    def refused(match: str, c: ProxyConfig | None = None, **given: Any) -> None:
        with pytest.raises(ValueError, match=match):
            train(c or config(), TOKENS, device="cpu", ranks=ranks, **given)

    refused(r"batch_seqs that 2 ranks can divide, got 5: set 4 or 6", config(batch_seqs=5))
    refused(r"the same run on every rank, got lr: 0\.01 on rank 0, 0\.02 on rank 1", config(lr=0.01 * (1 + second)))
    refused(r"run\.pt: a path that does not end in \.pt", save=folder / "run.pt")
    refused(r"foreign, which is something else", resume=folder / "foreign")
    damaged = (
        r"damaged \(__0_0.distcp" if second else r"rank 1: .*damaged-done, which is truncated or damaged \(__0_0.distcp"
    )
    refused(damaged, resume=folder / "damaged-done")
    refused(
        r"(rank 1: )?needed weights of this configuration's shape, got blocks\.0\.attn_norm: missing",
        init=iter([("readout", torch.zeros(256, 32))]),
    )

    # no space on one rank: both say so, and the checkpoint before stays
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
    with pytest.raises(OSError, match="the one written before is intact"):
        write_run(tree | {"weights": whole, "n": 2}, path, ranks)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    write_run(tree | {"weights": whole, "n": 3}, path, ranks)

    # one rank's consumer leaves, or one rank gets a signal: both stop after the same step
    run = train(config(), TOKENS, device="cpu", ranks=ranks, keep=folder / "closed")
    next(run)
    if second:
        run.close()
    else:
        with pytest.raises(KeyboardInterrupt, match="closed"):
            next(run)

    def signalled(run: Run) -> None:
        if second and run.step == 33:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt), interrupt_on_sigterm(), before_steps(signalled):
        list(train(config(), TOKENS, device="cpu", ranks=ranks, keep=folder / "told"))


def test_what_happens_to_one_rank_happens_to_all(tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("mine")
    spawn_ranks(failing_after_saving, 2, "fsdp2", tmp_path)
    full = load_state(tmp_path / "full")
    assert full["n"] == 3
    assert torch.equal(full["weights"], torch.arange(60_000.0))
    assert load_state(tmp_path / "told")["trunk"]["step"] == 34
    straight = losses_of()
    step = load_state(tmp_path / "closed")["trunk"]["step"]
    assert largest(losses_of(resume=tmp_path / "closed"), straight[step:]) < 1e-5


def failing_after_saving(ranks: Ranks, folder: Path) -> None:
    losses_of(SHORT, save=folder / "damaged-done", ranks=ranks)
    if ranks.rank == 0:
        (file,) = (folder / "damaged-done").glob("*/__0_0.distcp")
        file.write_bytes(file.read_bytes()[:-1])
    torch.distributed.barrier()
    failing(ranks, folder)


SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
from proxies.training.distributed import joined
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
with joined("fsdp2") as ranks, interrupt_on_sigterm():
    *_, last = train(
        config(), LONG, device="cpu", ranks=ranks, resume=keep if keep.exists() else None, keep=keep, keep_every_s=0.3,
        save=folder / "done",
    )
"""
LONG = 120 * 64


def test_a_killed_rank_and_a_terminated_run_go_on_from_what_was_kept(tmp_path: Path) -> None:
    """With torchrun: one rank of two is killed with -9, torchrun starts both again; then it is told to stop, and started anew."""
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
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0
    kept = load_state(tmp_path / "keep")["trunk"]["step"]
    assert kept == max(steps()["a1"]) + 1, said
    process = torchrun("b")
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
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
