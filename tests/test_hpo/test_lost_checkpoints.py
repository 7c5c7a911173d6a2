"""Checkpoints that were lost or damaged: their runs are trained again, and everything else goes on."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hpo.search.search import Search
from hpo.search.view import Job
from hpo.storage.trial_attributes import count_resumed_tokens, count_trained_tokens
from hpo.study.config import load_study
from hpo.study.files import StudyFiles
from hpo.study.lifecycle import create_study, open_existing
from hpo.worker.checkpoints import explain_damage, find_starts, measure_checkpoint
from hpo.worker.loop import run_worker
from hpo.worker.results import read_checkpoint_record, read_result, write_result
from tests.test_hpo.toy_study import STUDY

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished study whose largest run has 6,000 tokens."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.setattr("scaling.tracking.experiment.read_git_commit", lambda: "none")
        (folder / "studies").mkdir()
        (folder / "steps").mkdir()
        toml = Path("studies") / "toy.toml"
        text = STUDY.format(pause=0.0, seeds="1", steps="steps")
        toml.write_text(text.replace("high = 1.0", "high = 0.1").replace("18_000", "6_000"))
        files = StudyFiles(toml)
        study, trainer = load_study(toml)
        create_study(files, study, trainer, uri=None)
        assert run_worker(files, in_child_process=False) == 0
    return folder


@pytest.fixture
def files(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyFiles:
    """Return the files of a copy of the finished study."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setattr("scaling.tracking.experiment.read_git_commit", lambda: "none")
    return StudyFiles(tmp_path / "studies" / "toy.toml")


def open_search(files: StudyFiles) -> Search:
    study, trainer = load_study(files.toml)
    return open_existing(files, study, trainer)


def extend(files: StudyFiles) -> Search:
    """Raise the longest run to 18,000 tokens, and return the finished search."""
    open_search(files).extend(18_000)
    assert run_worker(files, in_child_process=False) == 0
    search = open_search(files)
    assert search.finished
    return search


def count_steps(files: StudyFiles) -> int:
    return sum(len(p.read_text().splitlines()) for p in (files.toml.parents[1] / "steps").iterdir())


def find_checkpoints(files: StudyFiles) -> list[Path]:
    return sorted((files.folder / "checkpoints").glob("*-6000.pt"))


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_one_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (Path.unlink, "is missing"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (cut_in_half, "is damaged: it has"),
        (change_one_byte, "is damaged: its checksum is wrong"),
        (lambda path: path.write_bytes(path.read_bytes() + b"more"), "is damaged: it has"),
    ],
    ids=["missing", "empty", "half", "flipped", "longer"],
)
def test_a_run_whose_checkpoint_is_lost_is_trained_again_at_its_price(
    files: StudyFiles, damage: Callable[[Path], object], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    for path in find_checkpoints(files):
        damage(path)
    before, known = count_steps(files), {t.number for t in open_search(files).study.trials}
    with caplog.at_level(logging.WARNING):
        search = extend(files)
    new = [t for t in search.study.trials if t.number not in known]
    continued = [t for t in new if t.user_attrs["resumed_tokens"] == 6_000 and t.user_attrs["continues"] in known]
    assert continued
    lines = [r.getMessage() for r in caplog.records if words in r.getMessage()]
    assert len(lines) == len(continued)
    for line, trial in zip(lines, continued, strict=True):
        # The run continues from the shorter run below if there was one. Otherwise, it starts at the beginning.
        (started,) = trial.user_attrs["started_tokens"]
        assert trial.user_attrs["resumed_tokens"] == 6_000
        assert (count_resumed_tokens(trial), count_trained_tokens(trial)) == (started, 18_000 - started)
        assert trial.value is not None
        path = files.checkpoint(trial.user_attrs["config"], 6_000)
        assert line.startswith(f"checkpoint {path} {words}")
        where = "from 2,000 tokens" if started else "from the beginning"
        assert line.endswith(f"trial {trial.number} is trained again {where}")
    # What the study says that it trained is what was trained.
    assert 1000 * (count_steps(files) - before) == sum(count_trained_tokens(t) for t in new)
    assert 1000 * count_steps(files) == search.progress.tokens_spent


def test_a_folder_of_checkpoints_may_be_removed_whole(files: StudyFiles, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(files.folder / "checkpoints")
    with caplog.at_level(logging.WARNING):
        search = extend(files)
    assert "is missing: trial" in caplog.text
    assert "is trained again from the beginning" in caplog.text
    assert search.progress.diverged == 0
    assert "Traceback" not in caplog.text


def test_intact_checkpoints_are_continued_without_a_word(files: StudyFiles, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        search = extend(files)
    assert not [r for r in caplog.records if "checkpoint" in r.getMessage()]
    assert not [t for t in search.study.trials if "started_tokens" in t.user_attrs]
    assert 1000 * count_steps(files) == search.progress.tokens_spent


def test_an_older_study_has_no_record_of_its_checkpoints_and_its_trainer_finds_the_damage(
    files: StudyFiles, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (files.folder / "checkpoints").glob("*.json"):
        write_result(path, read_result(path))

    def read_text(self: Path, *args: object, **options: object) -> str:
        content = self.read_bytes().decode()
        if self.suffix == ".pt" and not content.endswith("}"):
            raise ValueError(f"{self} is no saved run")
        return content

    monkeypatch.setattr(Path, "read_text", read_text)
    victim = find_checkpoints(files)[0]
    for path in find_checkpoints(files):
        cut_in_half(path)
    with caplog.at_level(logging.WARNING):
        search = extend(files)
    assert search.progress.diverged == 0
    assert "is no saved run: it is renamed to" in caplog.text
    assert list(victim.parent.glob("*.pt.damaged"))


@pytest.mark.parametrize("content", [b"", b'{"lr": 0.'])
def test_the_damaged_state_of_an_interrupted_run_is_not_continued(
    files: StudyFiles, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    open_search(files).extend(18_000)
    for config in range(30):
        files.partial(config, 18_000).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        code = run_worker(files, in_child_process=False)
    assert code == 0
    search = open_search(files)
    assert search.progress.diverged == 0
    assert search.finished


def test_a_damaged_result_is_trained_again(files: StudyFiles, caplog: pytest.LogCaptureFixture) -> None:
    open_search(files).extend(18_000)
    for config in range(30):
        files.result(config, 18_000, 0).write_text("{")
    with caplog.at_level(logging.WARNING):
        assert run_worker(files, in_child_process=False) == 0
    assert "is damaged: it is renamed to" in caplog.text
    assert open_search(files).progress.diverged == 0


def test_a_record_tells_a_checkpoint_from_a_damaged_one(tmp_path: Path) -> None:
    path, result = tmp_path / "a.pt", tmp_path / "a.json"
    assert explain_damage(path, result) == "is missing"
    path.write_bytes(b"state")
    write_result(result, 2.0, measure_checkpoint(path))
    assert read_result(result) == 2.0
    assert read_checkpoint_record(result) == measure_checkpoint(path)
    assert explain_damage(path, result) is None
    path.write_bytes(b"stale")
    assert explain_damage(path, result) == "is damaged: its checksum is wrong"
    result.write_text(json.dumps({"loss": 2.0}))
    assert explain_damage(path, result) is None


def test_a_checkpoint_may_be_a_folder(tmp_path: Path) -> None:
    folder, result = tmp_path / "a.pt", tmp_path / "a.json"
    (folder / "shards").mkdir(parents=True)
    (folder / "header").write_bytes(b"head")
    (folder / "shards" / "0").write_bytes(b"weights")
    write_result(result, 2.0, measure_checkpoint(folder))
    assert explain_damage(folder, result) is None
    (folder / "shards" / "0").unlink()
    assert explain_damage(folder, result) == "is damaged: it has 4 bytes, and 11 were written"


def test_each_seed_starts_from_its_own_checkpoint(files: StudyFiles) -> None:
    """Two of three seeds were to continue at 6,000 tokens. Of the second one, only a shorter checkpoint is left."""
    search = open_search(files)
    bracket = next(t for t in search.study.trials).user_attrs["bracket"]
    job = Job({"lr": 0.01}, search.target, 0, 99, 77, 2, bracket, resume_tokens=6_000, seeds=3, resume_seeds=2)
    for repeat, tokens in ((0, 6_000), (1, 2_000)):
        path = files.checkpoint(77, tokens, repeat)
        path.write_text("state")
        write_result(files.result(77, tokens, repeat), 2.0, measure_checkpoint(path))
    assert find_starts(job, files) == [6_000, 2_000, 0]
