"""A study whose schedule has a horizon: no run goes on from a shorter one, from the study file to the last worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hpo.__main__ import app
from hpo.study.config import StudyError, load_study
from hpo.study.files import StudyFiles
from hpo.study.lifecycle import create, open_search
from hpo.worker.loop import work
from proxies.trainers.proxy_family import ProxyFamily
from proxies.training import loop

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload``")  # of MLflow's, by SQLAlchemy

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
def test_a_promotion_pays_its_full_price_under_a_horizon_and_the_difference_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str
) -> None:
    files = StudyFiles(tmp_path / "s.toml")
    files.toml.write_text(STUDY % schedule)
    said = CliRunner().invoke(app, ["launch", str(files.toml), "--dry-run"])
    assert said.exit_code == 0, said.output
    assert ("promotions start afresh" in said.output) == (schedule == "cosine")

    asked: list[tuple[int, Path | None]] = []
    train = loop.train

    def noting(config: Any, tokens: int, *, resume: Path | None = None, **rest: Any) -> Any:
        asked.append((tokens, resume))
        return train(config, tokens, resume=resume, **rest)

    monkeypatch.setattr(loop, "train", noting)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    study, trainer = load_study(files.toml)
    expected = open_search(study, trainer, None).plan()
    search = create(files, study, trainer, uri=uri)
    assert work(files, uri=uri, apart=False) == 0
    assert search.finished

    levels = [tokens for tokens, _ in asked]
    assert set(levels) == {1_024, 3_072, 9_216}
    promotions = sum(1 for t in search.study.trials if t.user_attrs.get("continues") is not None)
    assert promotions > 0
    assert sum(f.D for f in expected.increments) == search.progress.tokens_spent
    if schedule == "cosine":
        assert [resume for _, resume in asked] == [None] * len(asked)
        assert (search.progress.tokens_spent, search.progress.tokens_saved) == (sum(levels), 0)
    else:
        assert sum(resume is not None for _, resume in asked) == promotions
        assert search.progress.tokens_spent + search.progress.tokens_saved == sum(levels)
        assert search.progress.tokens_saved > 0


def test_a_setting_that_the_schedule_never_reads_is_not_searched(tmp_path: Path) -> None:
    study = tmp_path / "s.toml"
    study.write_text(STUDY.replace("[trainer]", "cooldown = { low = 0.1, high = 0.5 }\n[trainer]") % "cosine")
    with pytest.raises(StudyError, match=r"space\.cooldown: schedule 'cosine' .* never reads it"):
        load_study(study)


def test_a_family_says_whether_its_runs_can_be_gone_on_from() -> None:
    assert [n for n in ("wsd", "power", "inverse-sqrt", "constant") if not ProxyFamily(schedule=n).resumable] == []
    assert [n for n in ("cosine", "linear", "rex") if ProxyFamily(schedule=n).resumable] == []
