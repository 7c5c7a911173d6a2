"""Input that used to be accepted and went wrong: it is refused by name before anything is spent, or reported."""

from __future__ import annotations

import decimal
import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
import typer
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from typer.testing import CliRunner

from hpo.__main__ import app, finish
from hpo.launch.outcome import explain_lack_of_answer
from hpo.search.search import Search
from hpo.study.config import StudyError, load_study
from hpo.study.files import StudyFiles
from hpo.study.lifecycle import create_study, open_existing
from hpo.study.schema import Dimension
from hpo.worker.loop import run_worker
from tests.test_hpo.toy_study import STUDY

COMMAND = """
[search]
tokens = {{ min = 1_000, max = 9_000 }}
[space]
lr = {{ low = 1e-4, high = 1.0, log = true }}
x = {x}
[trainer]
use = "proxies:CommandFamily"
command = "{{python}} -V --lr {{lr}} --tokens {{tokens}} --x {{x}} --w {{width}}"
seq_len = 1
tokens_per_second = 1e6
sizes = [{{ width = 16, N = 6_144 }}]
"""


@pytest.fixture(autouse=True)
def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def write_study(folder: Path, text: str) -> Path:
    (folder / "studies").mkdir(exist_ok=True)
    path = folder / "studies" / "s.toml"
    path.write_text(text)
    return path


# Choices that a study cannot tell apart


@pytest.mark.parametrize(
    ("choices", "named"),
    [
        ("[0, 1, false]", "0 and False"),
        ("[1, 2, 1.0]", "1 and 1.0"),
        ("[true, 2, 1]", "True and 1"),
        ('["a", "b", "a"]', "'a' and 'a'"),
        ("[0.1, 0.2, 0.10, 0.2]", "0.1 and 0.1, 0.2 and 0.2"),
    ],
)
def test_equal_choices_are_the_only_mistake_and_both_are_named(choices: str, named: str, tmp_path: Path) -> None:
    path = write_study(tmp_path, COMMAND.format(x=f"{{ choices = {choices} }}"))
    with pytest.raises(StudyError) as error:
        load_study(path)
    (problem,) = error.value.problems
    assert problem.startswith(f"space.x: the choices {named} are equal")
    assert ("as text" in problem) == ("'a'" not in named)


@pytest.mark.parametrize(
    "choices", [[0, 1, False], [1, 1.0], ["a", "b", "a"], [math.nan, 1.0, math.nan], [None, 1, None]]
)
def test_a_search_refuses_equal_choices(choices: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"parameter 'x': the choices .* are equal"):
        Search({"x": CategoricalDistribution(choices)}, tokens=(1, 9))


@pytest.mark.parametrize("ends", [(1e-4, math.inf), (-math.inf, 1.0), (math.nan, 1.0), (0.0, math.nan)])
def test_a_search_refuses_a_range_that_is_not_finite(ends: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"parameter 'x' needs a finite range, got .* to "):
        Search({"x": FloatDistribution(*ends)}, tokens=(1, 9))


def test_choices_that_differ_are_accepted() -> None:
    for choices in ([0, 1, 2], ["0", 0], ["a", "A"], [True, False], [None, 0]):
        Search({"x": CategoricalDistribution(choices)}, tokens=(1, 9))


# Probes and ranges


@pytest.mark.parametrize(
    ("dimension", "probes"),
    [
        ({"low": 4, "high": 32, "step": 4, "type": "int"}, [4, 20, 32]),
        ({"low": 4, "high": 34, "step": 4, "type": "int"}, [4, 20, 32]),
        ({"low": 1, "high": 2, "step": 1, "type": "int"}, [1, 1, 2]),
        ({"low": 0.0, "high": 1.0, "step": 0.4}, [0.0, 0.4, 0.8]),
        ({"low": 0.0, "high": 1.0}, [0.0, 0.5, 1.0]),
        ({"low": 1e-4, "high": 1e-2, "log": True}, [1e-4, 1e-3, 1e-2]),
        ({"low": 1, "high": 16, "log": True, "type": "int"}, [1, 4, 16]),
        ({"choices": ["a", "b"]}, ["a", "a", "a"]),
    ],
)
def test_probes_are_settings_that_the_search_can_choose(dimension: dict[str, Any], probes: list[Any]) -> None:
    table = Dimension(**dimension)
    assert table.pick_probes() == pytest.approx(probes) if "choices" not in dimension else probes
    distribution = table.distribution()
    for value in table.pick_probes():
        assert distribution._contains(distribution.to_internal_repr(value))


def test_the_example_of_a_command_is_on_the_grid_and_an_end_off_it_is_named(tmp_path: Path) -> None:
    path = write_study(tmp_path, COMMAND.format(x='{ low = 4, high = 34, step = 4, type = "int" }'))
    with warnings.catch_warnings():
        # Optuna's own warning would be an error here.
        warnings.simplefilter("error")
        result = CliRunner().invoke(app, ["validate", str(path)])
    assert result.exit_code == 0
    assert "--x 20 " in result.stderr
    assert "space.x: high = 34 is not low plus a whole number of steps; the largest value is 32" in result.stderr
    assert "UserWarning" not in result.stderr


def test_a_command_shows_a_warning_as_one_line_once(tmp_path: Path) -> None:
    path = write_study(tmp_path, COMMAND.format(x="{ choices = [1, 2] }").replace("9_000", "1_000"))
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        result = CliRunner().invoke(app, ["launch", str(path), "--dry-run"])
    assert result.exit_code == 0
    lines = [line for line in result.stderr.splitlines() if "one rung only" in line]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("warning: one rung only: 1000 tokens")
    assert "UserWarning" not in result.stderr


def test_a_step_beyond_the_range_is_refused(tmp_path: Path) -> None:
    path = write_study(tmp_path, COMMAND.format(x="{ low = 0.0, high = 1.0, step = 2.0 }"))
    with pytest.raises(StudyError, match=r"space\.x: needed a step of at most high - low = 1, got 2"):
        load_study(path)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("1e6", "inf", "trainer.tokens_per_second: "),
        ("6_144", "nan", "trainer.sizes.0.N: "),
        ("high = 1.0", "high = inf", "space.lr.high: "),
        ("[space]", "budget = inf\n[space]", "search.budget: "),
        ("[trainer]", "[workers]\nlease = inf\n[trainer]", "workers.lease: "),
        ("[trainer]", "[target]\nwidth = 32\nN = inf\ntokens = 100_000\n[trainer]", "target.N: "),
        ("choices = [1.0, 2.0]", "choices = [1.0, -inf]", "space.x.choices.1: "),
    ],
)
def test_a_number_that_is_not_finite_is_named_wherever_it_stands(
    old: str, new: str, problem: str, tmp_path: Path
) -> None:
    text = COMMAND.format(x="{ choices = [1.0, 2.0] }")
    assert old in text
    with pytest.raises(StudyError) as error:
        load_study(write_study(tmp_path, text.replace(old, new)))
    (named,) = [p for p in error.value.problems if p.startswith(problem)]
    assert "finite number" in named
    assert not [p for p in error.value.problems if "cannot convert" in p or "Infinity" in p.split(", got")[0]]


# Enqueued trials and told losses


def open_search(**space: BaseDistribution) -> Search:
    return Search(
        space or {"lr": FloatDistribution(1e-4, 1.0, log=True)}, tokens=(100, 900), iterations=1, sampler="random"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.01}, "'learning_rate' is not searched, did you mean lr?"),
        ({"LR": 0.01}, "'LR' is not searched"),
        ({"lr": 0.01, "layers": 3}, "(searched: lr, heads, kind)"),
        ({"lr": 5.0}, "lr: needed a number from 0.0001 to 1, got 5.0"),
        ({"lr": "0.01"}, "lr: needed a number from 0.0001 to 1, got '0.01'"),
        ({"heads": 6}, "heads: needed a whole number from 4 to 32 in steps of 4, got 6"),
        ({"kind": "c"}, "kind: needed one of 'a', 'b', got 'c'"),
    ],
)
def test_enqueued_settings_that_are_not_in_the_space_are_not_run(settings: dict[str, Any], message: str) -> None:
    search = open_search(
        lr=FloatDistribution(1e-4, 1.0, log=True),
        heads=IntDistribution(4, 32, step=4),
        kind=CategoricalDistribution(["a", "b"]),
    )
    search.study.enqueue_trial(settings)
    with pytest.warns(UserWarning, match="^the enqueued trial 0 is not run: ") as caught:
        job = search.ask()
    said = " ".join(str(w.message) for w in caught)
    assert message in said
    assert job is not None
    assert job.number == 1
    assert search.study.trials[0].state == TrialState.FAIL


@pytest.mark.parametrize(
    "loss",
    [
        "0.5",
        "5",
        b"5",
        None,
        10**400,
        {"loss": 1.0},
        {1.0},
        True,
        np.bool_(True),
        1j,
        ["0.5"],
        [None],
        [[1.0]],
        np.eye(1),
    ],
)
def test_what_is_no_number_is_not_told(loss: Any) -> None:
    search = open_search()
    job = search.ask()
    assert job is not None
    with pytest.raises(ValueError, match=r"^trial 0: needed a number per seed, got ") as error:
        search.tell(job, loss)
    assert len(str(error.value)) < 150
    assert search.study.trials[0].state == TrialState.RUNNING
    with pytest.raises(ValueError, match="trial 0: needed a number per seed"):
        search.report(job, 10, loss)
    search.tell(job, 0.5)


@pytest.mark.parametrize(
    "loss",
    [0.5, np.float32(0.5), np.array(0.5), np.array([0.5]), torch.tensor(0.5), [0.5], (0.5,), decimal.Decimal("0.5")],
)
def test_every_kind_of_number_is_told(loss: Any) -> None:
    search = open_search()
    job = search.ask()
    assert job is not None
    search.report(job, np.int64(10), 3)  # type: ignore[arg-type]
    search.tell(job, loss)
    assert search.study.trials[0].value == 0.5
    assert search.study.trials[0].intermediate_values == {10: 3.0}


@pytest.mark.parametrize("tokens", [-1, 1.5, "10", None, True])
def test_tokens_of_a_reported_point_are_a_whole_number(tokens: Any) -> None:
    search = open_search()
    job = search.ask()
    assert job is not None
    with pytest.raises(ValueError, match="trial 0: needed a whole number of tokens"):
        search.report(job, tokens, 1.0)


# Studies without an answer


def launch_toy(folder: Path, monkeypatch: pytest.MonkeyPatch, *changes: tuple[str, str]) -> StudyFiles:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    monkeypatch.setattr("scaling.tracking.experiment.read_git_commit", lambda: "none")
    text = STUDY.format(pause=0.0, seeds="1", steps=folder / "steps").replace("18_000", "6_000")
    (folder / "steps").mkdir()
    for old, new in (("pause", "sizes = [1000.0]\npause"), *changes):
        assert old in text
        text = text.replace(old, new)
    files = StudyFiles(write_study(folder, text))
    study, trainer = load_study(files.toml)
    create_study(files, study, trainer, uri=None)
    return files


def reopen(files: StudyFiles) -> Search:
    study, trainer = load_study(files.toml)
    return open_existing(files, study, trainer)


@pytest.mark.filterwarnings("ignore")
def test_a_study_whose_runs_all_diverged_is_reported_and_ends_with_exit_code_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The toy trainer diverges above 0.5.
    files = launch_toy(tmp_path, monkeypatch, ("low = 1e-4", "low = 0.6"))
    assert explain_lack_of_answer(reopen(files), files) is None, "nothing has run yet"
    assert run_worker(files, in_child_process=False) == 0
    search = reopen(files)
    done = search.progress.done
    expected = f"all {done} runs of study 's' diverged"
    for words in (["best", "s", "--json"], ["resume", "s"], ["confirm", "s"]):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 3, (words, result.output)
        assert expected in result.stderr
        assert "lower the range of lr (now 0.6 to 1) under [space]" in result.stderr
        assert result.stdout == ""
    status = CliRunner().invoke(app, ["status", "s"])
    assert status.exit_code == 0
    assert expected in status.stdout
    assert json.loads(CliRunner().invoke(app, ["status", "s", "--json"]).stdout)["diverged"] == done
    with pytest.raises(typer.Exit) as end:
        finish(0, search, files)
    assert end.value.exit_code == 3
    # A command without {seed} cannot be confirmed, whatever its runs gave.
    monkeypatch.setattr("tests.test_hpo.toy_trainer.ToyTrainer.repeatable", False, raising=False)
    result = CliRunner().invoke(app, ["confirm", "s"])
    assert result.exit_code == 2
    assert "cannot be confirmed" in result.stderr
    assert "put {seed} into the command in a copy of studies/s.toml" in result.stderr
    assert not (files.folder / "confirm").exists()


def test_one_run_with_a_loss_is_an_answer(tmp_path: Path) -> None:
    search = open_search()
    while (job := search.ask()) is not None:
        search.tell(job, math.nan if job.number else 2.0)
    assert explain_lack_of_answer(search, StudyFiles(tmp_path / "s.toml")) is None


def test_runs_that_crashed_are_told_from_runs_that_diverged(tmp_path: Path) -> None:
    search = open_search()
    while (job := search.ask()) is not None:
        search.crashed(job, "Traceback\nModuleNotFoundError: no module named flash_attn", attempts=1)
    text = explain_lack_of_answer(search, StudyFiles(tmp_path / "s.toml"))
    assert text is not None
    assert "crashed, the last one because of: ModuleNotFoundError: no module named flash_attn" in text
