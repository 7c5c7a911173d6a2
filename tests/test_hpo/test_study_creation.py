"""New studies: limits of MLflow keep none from starting, and one that cannot be created leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpo.study.config import load_study
from hpo.study.files import StudyFiles
from hpo.study.lifecycle import create_study, delete_study, open_existing
from scaling.tracking.client import connect

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Create the store once, because a fresh one costs two seconds of migrations."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


def write_study(folder: Path, name: str, options: int) -> StudyFiles:
    """Write a study of a command with so many options, all of which are fixed."""
    named = " ".join(f"--option{i} {{o{i}}}" for i in range(options))
    fixed = ", ".join(f"o{i} = {i}" for i in range(options))
    toml = folder / f"{name}.toml"
    toml.write_text(f"""
[search]
tokens = {{ min = 1_000, max = 3_000 }}
[space]
lr = {{ low = 1e-4, high = 1.0, log = true }}
[trainer]
use = "proxies:CommandFamily"
command = "{{python}} program.py --lr {{lr}} --tokens {{tokens}} --width {{width}} {named}"
fixed = {{ {fixed} }}
tokens_per_second = 1e6
sizes = [{{ width = 16, N = 6_144 }}]
[target]
N = 20_000
width = 32
tokens = 100_000
""")
    return StudyFiles(toml)


def test_settings_that_are_longer_than_a_parameter_are_recorded_whole(uri: str, tmp_path: Path) -> None:
    files = write_study(tmp_path, "many-options", 250)
    study, trainer = load_study(files.toml)
    create_study(files, study, trainer, uri=uri)
    client = connect(uri)
    experiment = client.get_experiment_by_name(files.name)
    [run] = client.search_runs([experiment.experiment_id])
    cut = run.data.params["study.trainer"]
    assert len(cut) < 1000
    assert "sha256" in cut
    settings = json.loads(files.settings.read_text())
    assert settings["trainer"]["fixed"]["o249"] == 249
    whole = Path(client.download_artifacts(run.info.run_id, "long_values/study.trainer.txt", str(tmp_path)))
    assert json.loads(whole.read_text()) == settings["trainer"]
    # It is a study like any other.
    assert open_existing(files, study, trainer).progress.done == 0


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("the store went away")])
@pytest.mark.parametrize("existed", [False, True])
def test_a_study_that_cannot_be_created_leaves_nothing_behind(
    error: Exception, existed: bool, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write_study(tmp_path, "cut-short", 2)
    study, trainer = load_study(files.toml)
    if existed:
        files.folder.mkdir()
        (files.folder / "notes.txt").write_text("mine")

    def fail(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("hpo.study.lifecycle.log_file", fail)
        with pytest.raises(ValueError, match=r"study 'cut-short' could not be created .*nothing of it is left"):
            create_study(files, study, trainer, uri=uri)
    assert connect(uri).get_experiment_by_name(files.name) is None
    left = [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    assert left == (["cut-short/notes.txt"] if existed else []) + ["cut-short.toml"]
    create_study(files, study, trainer, uri=uri)
    assert files.settings.exists()
    # For the next case, which has the same store.
    delete_study(files, uri=uri)
