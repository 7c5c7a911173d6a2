"""Trainers that are other programs: what the command gets, what it may report, and how it ends."""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from optuna.distributions import FloatDistribution, IntDistribution

from hpo.study.config import StudyError, load_study
from hpo.worker.job import CheckpointPaths, train_once
from hpo.worker.signals import StopSignals
from proxies.trainers.command import resolve_command, run_command
from proxies.trainers.command_family import CommandFamily
from scaling.common.measurement import Measurement
from scaling.laws.compute import Fidelity
from scaling.tracking.client import connect
from scaling.tracking.experiment import find_or_create_child_run, find_or_create_study_run
from scaling.tracking.log import log_records, read_curve
from scaling.tracking.recorder import Recorder

ROOT = Path(__file__).parents[2]
HEAD = "import json, os, signal, subprocess, sys, time\ndef say(**k): print(json.dumps(k), flush=True)\n"


def program(folder: Path, text: str) -> str:
    """Return a command that runs this text as a program with {tokens} as its argument."""
    (folder / "program.py").write_text(HEAD + text)
    return f"{{python}} {folder / 'program.py'} {{tokens}}"


def run(folder: Path, text: str, tokens: int = 100, **options: Any) -> list[Measurement]:
    return list(run_command(program(folder, text), {"tokens": tokens}, **options))


GOOD = """
print("a line for the log")
say(tokens=50, loss=3.0, lr=0.1, train_loss=3.5)
print("one for stderr", file=sys.stderr)
say(step=7, note="JSON, and no point")
say(tokens=int(sys.argv[1]), loss=2.5, final=True)
"""


def test_points_arrive_and_the_rest_is_kept(tmp_path: Path) -> None:
    first, last = run(tmp_path, GOOD, log=tmp_path / "deep" / "run.log")
    assert (first.tokens, first.loss, first.lr, first.train_loss, first.final) == (50, 3.0, 0.1, 3.5, False)
    assert (last.tokens, last.loss, last.final, last.diverged) == (100, 2.5, True, False)
    assert math.isnan(last.lr)
    assert not last.recorded
    kept = (tmp_path / "deep" / "run.log").read_text().splitlines()
    assert sorted(kept) == sorted(["a line for the log", "one for stderr", '{"step": 7, "note": "JSON, and no point"}'])


def test_without_a_log_the_rest_goes_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, GOOD)
    out, err = capsys.readouterr()
    assert out == ""
    assert {"a line for the log", "one for stderr"} <= set(err.splitlines())


def test_a_value_stays_one_argument_whatever_is_in_it() -> None:
    nasty = "a b; rm -rf / $(x) ' \" --evil {lr}"
    words = resolve_command("go --x={x} '{x} {lr}' --flag {on}", {"x": nasty, "lr": 0.1 + 0.2, "on": True})
    assert words == ["go", f"--x={nasty}", f"{nasty} 0.30000000000000004", "--flag", "true"]
    assert resolve_command("{python} -c 'print({\"a\": 1})' {resume}", {}) == [
        sys.executable,
        "-c",
        'print({"a": 1})',
        "",
    ]


@pytest.mark.parametrize(
    ("command", "match"),
    [
        ("go {lr} {wd}", r"needed a value for \{lr\}, \{wd\}, got values for .*tokens"),
        ("go 'unfinished", "cannot be split"),
        ("  ", "got nothing"),
        ("/no/such/program {tokens}", "cannot be started"),
    ],
)
def test_a_command_that_cannot_be_run_is_refused(command: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        list(run_command(command, {"tokens": 1}))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("say(tokens=100, loss=2.0, final=True); print('why', file=sys.stderr); sys.exit(3)", "(?s)exit code 3.*why"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by signal 9"),
        ("say(tokens=100, loss=2.0)", "without a final point"),
        ("print('no word of it')", "(?s)without a final point.*no word of it"),
        ("say(tokens=90, loss=2.0, final=True)", "ended at 90 tokens, 100 were asked for"),
        ("""print('{"tokens": 5, "loss": ')""", "cannot be read"),
        ("say(tokens=5, loss='low')", "cannot be read"),
        ("say(tokens=5.5, loss=2.0)", "tokens is a whole number"),
        ("say(tokens=5, loss=2.0, final='yes')", "final true or false"),
        ("say(tokens=5, los=2.0)", "cannot be read .KeyError..loss"),
    ],
)
def test_every_bad_end_is_reported(text: str, match: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=match) as failed:
        run(tmp_path, text)
    assert "program.py 100" in str(failed.value), "it names the command"


@pytest.mark.parametrize("loss", ["float('nan')", "float('inf')", "None"])
def test_a_loss_that_is_not_finite_is_an_outcome_and_ends_the_program(loss: str, tmp_path: Path) -> None:
    began = time.monotonic()
    points = run(tmp_path, f"say(tokens=10, loss=3.0)\nsay(tokens=20, loss={loss})\ntime.sleep(60)")
    assert time.monotonic() - began < 20
    assert [(p.tokens, p.final, p.diverged) for p in points] == [(10, False, False), (20, True, True)]
    assert math.isnan(points[-1].loss)


def test_the_final_point_comes_when_the_program_has_ended(tmp_path: Path) -> None:
    """A checkpoint that it saves after its last evaluation exists when the run counts as done."""
    late = tmp_path / "late"
    text = f"say(tokens=100, loss=2.0, final=True)\ntime.sleep(0.3)\nopen({str(late)!r}, 'w').close()"
    for point in run_command(program(tmp_path, text), {"tokens": 100}):
        assert point.final
        assert late.exists()
        break


FAMILY = """
other = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", other], start_new_session={session})
say(tokens=1, loss=1.0 * child.pid)
time.sleep(60)
"""


@pytest.mark.parametrize("session", [False, True])
def test_closing_ends_the_program_and_its_children(session: bool, tmp_path: Path) -> None:
    """So do children that ignore SIGTERM, and those with a session of their own, as torchrun's workers have."""
    points = run_command(program(tmp_path, FAMILY.format(session=session)), {"tokens": 100})
    child = psutil.Process(int(next(points).loss))
    parent = child.parent()
    assert parent is not None
    # Wait until the child ignores SIGTERM.
    time.sleep(0.3)
    points.close()  # type: ignore[attr-defined]

    def is_alive(process: psutil.Process) -> bool:
        # In a container nothing reaps the children of a process that has ended.
        try:
            return process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    # A signal takes a moment to arrive.
    until = time.monotonic() + 5
    while any(map(is_alive, (child, parent))) and time.monotonic() < until:
        time.sleep(0.01)
    assert not is_alive(child)
    assert not is_alive(parent)


def test_a_program_that_listens_may_save_before_it_ends(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    text = f"""
def end(*_):
    time.sleep(0.2)
    open({str(saved)!r}, "w").close()
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
say(tokens=1, loss=1.0)
time.sleep(60)
"""
    points = run_command(program(tmp_path, text), {"tokens": 100})
    next(points)
    points.close()  # type: ignore[attr-defined]
    assert saved.exists()


def test_a_process_that_it_leaves_behind_does_not_hold_the_run(tmp_path: Path) -> None:
    """The process inherits stdout, which is then never closed."""
    text = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    began = time.monotonic()
    assert run(tmp_path, text + "say(tokens=100, loss=2.0, final=True)")[-1].loss == 2.0
    assert time.monotonic() - began < 20


TABLE = {
    "command": "{python} train.py --lr {lr} --tokens {tokens} --width {width} --batch {batch} --wd {wd} --seed {seed}",
    "sizes": [{"N": 3000, "width": 32}, {"N": 1000, "width": 16}],
    "fixed": {"wd": 0.1},
    "seq_len": 64,
    "tokens_per_second": [300, 1000],
}
SPACE = {"lr": FloatDistribution(1e-3, 1.0, log=True), "batch": IntDistribution(1, 16)}
POINT = {"lr": 0.25, "batch": 4}


def test_a_family_describes_what_it_runs_and_records() -> None:
    family = CommandFamily(**TABLE)
    assert family.problems(SPACE, (100, 900)) == []
    assert family.sizes == (1000.0, 3000.0)
    assert (family.resumable, family.repeatable) == (False, True)
    example = family.example(POINT, Fidelity(3000.0, 900.0))
    assert example == f"{sys.executable} train.py --lr 0.25 --tokens 900 --width 32 --batch 4 --wd 0.1 --seed 0"
    assert family.describe(POINT, Fidelity(1000.0, 900.0), repeat=2) == {
        "N": 1000,
        "width": 16,
        "lr": 0.25,
        "batch": 4,
        "wd": 0.1,
        "seed": 2,
        "batch_tokens": 256,
        "seq_len": 64,
        "parametrization": "standard",
        "command": TABLE["command"],
    }
    assert family.seconds(POINT, [Fidelity(1000.0, 500.0), Fidelity(3000.0, 600.0)], threads=1) == [0.5, 2.0]


def test_all_mistakes_of_a_command_are_named_at_once() -> None:
    wrong = {
        "command": "no-such-program --lr {lr} --b {bacth} --s {save}",
        "sizes": [{"N": 1000, "width": 16}, {"N": 3000, "width": 32}],
        "fixed": {"wd": 0.1, "seed": 3},
        "tokens_per_second": [1.0],
        "data": ["/no/such/file"],
        "cwd": "/no/such/folder",
    }
    problems = "\n".join(CommandFamily(**wrong).problems(SPACE, (100, 900)))
    for part in (
        "no program no-such-program",
        "nothing has the name {bacth}; did you mean {batch}?",
        "space.batch: the command never uses it",
        "trainer.fixed: wd: the command never uses it",
        "trainer.fixed: seed: is set for each run already",
        "needed {tokens}",
        "what makes the sizes differ, one of {N}, {width}",
        "{save} and {resume} both",
        "needed one for each of 2 sizes, got 1",
        "trainer.seq_len: missing; batch counts sequences",
        "no file /no/such/file",
        "no folder /no/such/folder",
    ):
        assert part in problems, problems
    assert problems.count("\n") == 11


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"sizes": [{"width": 16}]}, "needed N"),
        ({"sizes": [{"N": True}]}, "needed N"),
        ({"sizes": [{"N": 10, "width": 1}, {"N": 10, "width": 2}]}, "N must differ"),
        ({"sizes": [{"N": 10, "width": 1}, {"N": 20, "depth": 2}]}, "same names in every row"),
        ({"sizes": []}, "at least 1 item"),
        ({"comand": "x"}, "comand"),
    ],
)
def test_a_bad_table_is_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        CommandFamily(**TABLE | change)


def test_a_target_needs_what_the_command_uses() -> None:
    family = CommandFamily(**TABLE)
    assert family.target(N=9000, width=64, tokens=10_000) == Fidelity(9000.0, 10_000.0)
    with pytest.raises(ValueError, match=r"needed tokens, N, width.*it lacks tokens, width"):
        family.target(N=9000)
    with pytest.raises(ValueError, match="depth too many"):
        family.target(N=9000, width=64, tokens=10_000, depth=3)
    with pytest.raises(ValueError, match="tokens: needed a finite positive number, got -1"):
        family.target(N=9000, width=64, tokens=-1)
    table = {"N": 9000, "width": 64, "tokens": 10_000}
    values = family.target_values(table, lr=0.02, batch_tokens=700.0, others={"lr": 9.0, "batch": 1})
    assert resolve_command(TABLE["command"], values)[2:] == (
        ["--lr", "0.02", "--tokens", "10000", "--width", "64", "--batch", "11", "--wd", "0.1", "--seed", "0"]
    )


def test_runs_without_a_seed_are_not_repeated() -> None:
    family = CommandFamily(**TABLE | {"command": TABLE["command"].replace("--seed {seed}", "")})
    assert not family.repeatable
    with pytest.raises(ValueError, match=r"needed \{seed\}"):
        family.describe(POINT, Fidelity(1000.0, 900.0), repeat=1)


SAVES = """
tokens, save, resume = int(sys.argv[1]), sys.argv[2], sys.argv[3]
began = int(open(resume).read()) if resume else 0
if {writes}: open(save, "w").write(str(tokens))
say(tokens=tokens, loss=1.0 + began, final=True)
"""


def saving(folder: Path, writes: bool) -> CommandFamily:
    (folder / "program.py").write_text(HEAD + SAVES.format(writes=writes))
    command = f"{{python}} {folder / 'program.py'} {{tokens}} {{save}} {{resume}}"
    return CommandFamily(command=command, sizes=[{"N": 10}])


def test_a_longer_run_continues_a_shorter_one(tmp_path: Path) -> None:
    family, size = saving(tmp_path, writes=True), 10.0
    assert family.resumable
    one, two = tmp_path / "a b.pt", tmp_path / "two.pt"
    assert [p.loss for p in family({}, Fidelity(size, 100.0), save=one)] == [1.0]
    assert [p.loss for p in family({}, Fidelity(size, 300.0), save=two, resume=one)] == [101.0]
    assert two.read_text() == "300"


def test_a_checkpoint_that_was_not_written_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="without writing"):
        list(saving(tmp_path, writes=False)({}, Fidelity(10.0, 100.0), save=tmp_path / "x.pt"))


def test_speed_is_measured_once_for_each_size(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="muscale")
    text = f"open({str(tmp_path / 'calls')!r}, 'a').write(sys.argv[1] + '\\n')\ntime.sleep(0.2)\n"
    command = program(tmp_path, text + "say(tokens=int(sys.argv[1]), loss=1.0, final=True)")
    family = CommandFamily(command=f"{command} {{N}}", sizes=[{"N": 10}, {"N": 20}], measure_tokens=100)
    sizes = [Fidelity(n, 1000.0) for n in (10.0, 20.0)]
    first = family.seconds({}, sizes, threads=1)
    assert family.seconds({}, sizes, threads=1) == first
    assert (tmp_path / "calls").read_text() == "100\n100\n"
    assert all(s > 10 * 0.2 for s in first)
    assert "measuring its speed" in caplog.text


MLFLOW = """
from mlflow import MlflowClient
client, run, tokens = MlflowClient(), os.environ["MLFLOW_RUN_ID"], int(sys.argv[1])
for i in range(1, 4):
    client.log_metric(run, "loss", 4.0 - i, step=i * tokens // 4)
client.log_metric(run, "final_loss", 0.5, step=tokens)
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_program_may_report_to_mlflow_and_nothing_is_there_twice(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = connect(uri)
    parent = find_or_create_study_run(client, "external")
    own = find_or_create_child_run(client, parent, "run", role="proxy", params={"N": 10})
    # These are from an earlier rung.
    log_records(client, own, [({"loss": 9.0, "final_loss": 9.0}, 50, 1)], {})
    family = CommandFamily(
        command=program(tmp_path, MLFLOW), sizes=[{"N": 10}], environment={"PYTHONWARNINGS": "ignore"}
    )
    with (
        Recorder(uri, "external", "run", role="proxy", params={"N": 10}, folder=tmp_path) as record,
        StopSignals() as stop,
    ):
        assert record.wait_for_run_id() == own
        ended: list[float] = []
        loss = train_once(
            family,
            {},
            Fidelity(10.0, 100.0),
            0,
            checkpoints=CheckpointPaths(tmp_path / "keep"),
            record=record,
            on_result=lambda *o: ended.extend(o),
            stop=stop,
        )
    assert loss == ended[0] == 0.5
    assert "MLFLOW_RUN_ID" not in os.environ
    assert read_curve(client, own) == ([25.0, 50.0, 50.0, 75.0], [3.0, 9.0, 2.0, 1.0])
    assert read_curve(client, own, "final_loss") == ([50.0, 100.0], [9.0, 0.5])


def test_a_study_that_repeats_needs_a_seed(tmp_path: Path) -> None:
    text = (ROOT / "studies" / "external.toml").read_text()
    study, family = load_study(ROOT / "studies" / "external.toml")
    assert family.target(**study.target or {}) == Fidelity(163_840.0, 393_216.0)
    changed = tmp_path / "changed.toml"
    changed.write_text(text.replace(" --seed {seed}", "").replace("iterations = 2", "iterations = 2\nseeds = 3"))
    with pytest.raises(StudyError, match=r"search\.seeds: this trainer cannot take another random seed"):
        load_study(changed)


@pytest.mark.slow
def test_the_plain_script_trains_for_as_many_tokens_as_asked() -> None:
    _, family = load_study(ROOT / "studies" / "external.toml")
    family.table = family.table.model_copy(update={"cwd": ROOT})  # type: ignore[attr-defined]
    *_, last = family({"lr": 0.02, "batch": 3}, Fidelity(6144.0, 64.0 * 100))
    assert (last.tokens, last.final) == (6400, True)
    assert last.loss < math.log(256) - 0.5, "it learns"
