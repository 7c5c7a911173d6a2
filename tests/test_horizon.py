"""A study whose schedule has a horizon: no run resumes a shorter one, from the study file to the last worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hpo.__main__ import app
from hpo.study.config import StudyError, load_study
from hpo.study.files import StudyFiles
from hpo.study.lifecycle import create_study, open_search
from hpo.worker.loop import run_worker
from proxies.trainers.proxy_family import ProxyFamily
from proxies.training import loop

# SQLAlchemy warns about what MLflow does.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload``")

STUDY = """
[search]
tokens = { min = 1_024, max = 9_216 }
sampler = "random"
iterations = 1
[space]
lr = { low = 1e-3, high = 1e-1, log = true }
[trainer]
schedule = "%s"
widths = [16]
base_width = 16
n_layers = 1
seq_len = 16
batch_seqs = 4
warmup_tokens = 256
eval_windows = 4
"""


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_a_promotion_costs_all_its_tokens_under_a_horizon_and_the_difference_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str
) -> None:
    files = StudyFiles(tmp_path / "s.toml")
    files.toml.write_text(STUDY % schedule)
    result = CliRunner().invoke(app, ["launch", str(files.toml), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert ("promotions start from scratch" in result.output) == (schedule == "cosine")

    trained: list[tuple[int, Path | None]] = []
    train = loop.train

    def record_train(config: Any, tokens: int, *, resume: Path | None = None, **rest: Any) -> Any:
        trained.append((tokens, resume))
        return train(config, tokens, resume=resume, **rest)

    monkeypatch.setattr(loop, "train", record_train)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    study, trainer = load_study(files.toml)
    expected = open_search(study, trainer, None).plan()
    search = create_study(files, study, trainer, uri=uri)
    assert run_worker(files, uri=uri, in_child_process=False) == 0
    assert search.finished

    levels = [tokens for tokens, _ in trained]
    assert set(levels) == {1_024, 3_072, 9_216}
    promotions = sum(1 for t in search.study.trials if t.user_attrs.get("continues") is not None)
    assert promotions > 0
    assert sum(f.D for f in expected.increments) == search.progress.tokens_spent
    if schedule == "cosine":
        assert [resume for _, resume in trained] == [None] * len(trained)
        assert (search.progress.tokens_spent, search.progress.tokens_saved) == (sum(levels), 0)
    else:
        assert sum(resume is not None for _, resume in trained) == promotions
        assert search.progress.tokens_spent + search.progress.tokens_saved == sum(levels)
        assert search.progress.tokens_saved > 0


def test_a_setting_that_the_schedule_never_reads_is_not_searched(tmp_path: Path) -> None:
    study = tmp_path / "s.toml"
    study.write_text(STUDY.replace("[trainer]", "cooldown = { low = 0.1, high = 0.5 }\n[trainer]") % "cosine")
    with pytest.raises(StudyError, match=r"space\.cooldown: schedule 'cosine' .* never reads it"):
        load_study(study)


def test_a_family_knows_whether_its_runs_can_be_resumed() -> None:
    assert [n for n in ("wsd", "power", "inverse-sqrt", "constant") if not ProxyFamily(schedule=n).resumable] == []
    assert [n for n in ("cosine", "linear", "rex") if ProxyFamily(schedule=n).resumable] == []
