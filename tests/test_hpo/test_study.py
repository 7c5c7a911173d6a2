"""Valid study files are read. Invalid ones are refused, with each mistake by field name, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from typer.testing import CliRunner

from hpo.__main__ import app
from hpo.samplers.names import SAMPLERS
from hpo.study.config import StudyError, load_study
from hpo.study.files import StudyFiles
from hpo.study.lifecycle import check_same_settings
from proxies.trainers.proxy_family import ProxyFamily
from scaling.common.studies import find_study_file
from tests.test_hpo.toy_trainer import ToyTrainer

GOOD = """
seed = 3
[search]
tokens = { min = 16_384, max = 147_456 }
[space]
lr = { low = 1e-3, high = 1.0, log = true }
batch_seqs = { low = 2, high = 16, log = true, type = "int" }
beta2 = { choices = [0.95, 0.99] }
[trainer]
widths = [32, 64]
[target]
d_model = 128
tokens = 300_000
"""


def write_study(folder: Path, text: str) -> Path:
    path = folder / "s.toml"
    path.write_text(text)
    return path


def list_problems(folder: Path, text: str) -> list[str]:
    with pytest.raises(StudyError) as error:
        load_study(write_study(folder, text))
    assert [p.name for p in folder.iterdir()] == ["s.toml"], "a refused study writes nothing"
    return error.value.problems


def test_a_valid_study_is_read_into_distributions_and_a_trainer(tmp_path: Path) -> None:
    study, trainer = load_study(write_study(tmp_path, GOOD))
    assert study.distributions == {
        "lr": FloatDistribution(1e-3, 1.0, log=True),
        "batch_seqs": IntDistribution(2, 16, log=True),
        "beta2": CategoricalDistribution((0.95, 0.99)),
    }
    assert isinstance(trainer, ProxyFamily)
    assert list(trainer.sizes) == [float(trainer.member(w).counts.N) for w in (32, 64)]
    assert trainer.target(d_model=128, tokens=300_000).D == 300_000


def test_the_quickstart_is_valid() -> None:
    load_study(Path(__file__).parents[2] / "studies" / "quickstart.toml")


def test_all_mistakes_are_named_at_once(tmp_path: Path) -> None:
    text = """
sede = 3
[search]
tokens = { min = 200_000, max = 100_000 }
sampler = "mbfo"
seeds = [1, 0]
promote = "rnk"
asynchronous = "soon"
eta = "three"
[space]
lr = { low = 1.0, high = 0.1, log = true }
learning_rate = { low = 0.1, high = 1.0 }
batch_seqs = { low = 2, hi = 16 }
[trainer]
widths = [32, 40]
optimizer = "adamv"
corpsu = "stdlib"
[target]
d_model = 128
tokns = 3
"""
    message = "\n".join(list_problems(tmp_path, text))
    for expected in (
        "sede: unknown key; did you mean seed?",
        "search.tokens: min must not exceed max, got min 200,000 > max 100,000",
        "search.sampler: needed one of mfbo, mfbo-deep, mfbo-nngp, random, qmc, tpe, gp",
        "got 'mbfo'; did you mean mfbo?",
        "search.seeds.1: needed a number greater than 0, got 0",
        "search.promote: needed 'rank' or 'predicted', got 'rnk'; did you mean rank?",
        "search.asynchronous: needed true or false, got 'soon'",
        "search.eta: ",
        "space.lr: low must be below high",
        "space.batch_seqs.hi: unknown key; did you mean high?",
        "trainer.optimizer: needed 'adamw', 'adamw8bit', 'ademamix', 'lamb', 'lion'",
        "got 'adamv'; did you mean adamw?",
        "trainer.corpsu: unknown key; did you mean corpus?",
        "trainer.widths: d_model must be a multiple of d_head * q_per_kv = 16",
        "space.learning_rate: unknown parameter; did you mean lr?",
        "target.tokns: unknown key; did you mean tokens?",
    ):
        assert expected in message, f"{expected!r} is not in\n{message}"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("widths = [32, 64]", "widths = [32, 40]", "trainer.widths: d_model must be a multiple of"),
        ("widths = [32, 64]", "widths = [32, 64]\ncorpus = 'no/such/corpus'", "trainer.corpus: "),
        ("lr = { low", "learning_rat = { low", "space.learning_rat: unknown parameter; "),
        ("max = 147_456", "max = 147_000", "the nearest are 49,152 and 147,456"),
        ("min = 16_384, max = 147_456", "min = 1_024, max = 9_216", "search.tokens.min: the smallest run must hold"),
        ("beta2 = { choices = [0.95, 0.99] }", "beta2 = { choices = [0.95, 1.99] }", "space.beta2: "),
        (
            "beta2 = { choices = [0.95, 0.99] }",
            "beta2 = { choices = [0.95] }",
            "space.beta2: needed at least 2 different choices",
        ),
        ("tokens = 300_000", "tokns = 300_000", "target.tokns: "),
        ("d_model = 128", "d_model = 100", "target"),
        ("[trainer]", "[trainer]\nuse = 'nowhere:Nothing'", "trainer.use: cannot import 'nowhere:Nothing'"),
        ("seed = 3", "seed = -3", "seed: "),
        ("[space]", "seeds = [1, 2]\n[space]", "search: seeds needs one number, or one for each of the 3 rungs"),
        ("[space]", "seeds = [3, 2, 2]\n[space]", "search: seeds are whole numbers of at least 1 that never fall"),
        ("[space]", "seeds = 1.5\n[space]", "search.seeds: "),
        ("[space]", "seeds = true\n[space]", "search.seeds: "),
        (
            "[space]",
            "promote = 'predicted'\nsampler = 'random'\n[space]",
            "search: promote = 'predicted' needs a model of the loss, which sampler = 'mfbo' has, got 'random'",
        ),
        ("widths = [32, 64]", "widths = [32, 64]\nseed = -3", "trainer.seed: "),
        ("[space]", "[spaec]", "spaec: unknown key; did you mean space?"),
    ],
)
def test_each_mistake_is_named_by_its_field(old: str, new: str, expected: str, tmp_path: Path) -> None:
    assert old in GOOD
    message = "\n".join(list_problems(tmp_path, GOOD.replace(old, new)))
    assert expected in message, message


def test_several_mistakes_in_one_table_are_all_named(tmp_path: Path) -> None:
    text = GOOD.replace("max = 147_456 }", "max = 147_000 }\nseeds = [2, 1]\npromote = 'predicted'\nsampler = 'qmc'")
    message = "\n".join(list_problems(tmp_path, text))
    for expected in ("the nearest are 49,152 and 147,456", "never fall", "got 'qmc'"):
        assert expected in message, message


@pytest.mark.parametrize(("written", "read"), [("2", (2,)), ("[1, 1, 3]", (1, 1, 3))])
def test_seeds_are_one_number_or_one_per_rung(written: str, read: tuple[int, ...], tmp_path: Path) -> None:
    text = GOOD.replace("[space]", f"seeds = {written}\nasynchronous = true\npromote = 'predicted'\n[space]")
    search = load_study(write_study(tmp_path, text))[0].search
    assert (search.seeds, search.asynchronous, search.promote) == (read, True, "predicted")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_may_be_named(sampler: str, tmp_path: Path) -> None:
    text = GOOD.replace("[space]", f"sampler = '{sampler}'\n[space]")
    assert load_study(write_study(tmp_path, text))[0].search.sampler == sampler


class Unrepeatable(ToyTrainer):
    """A trainer without the keyword `repeat`, as they were written before it existed."""

    def describe(self, params: Any, fidelity: Any) -> dict[str, Any]:  # type: ignore[override]
        return {}


def test_a_trainer_that_takes_no_repeat_is_refused_before_it_is_started(tmp_path: Path) -> None:
    text = "[search]\ntokens = { min = 1_000, max = 9_000 }\n[space]\nlr = { low = 1.0, high = 2.0 }\n[trainer]\nuse = "
    load_study(write_study(tmp_path, text + "'tests.test_hpo.toy_trainer:ToyTrainer'"))
    (problem,) = list_problems(tmp_path, text + "'tests.test_hpo.test_study:Unrepeatable'")
    assert "Unrepeatable's describe needs a keyword `repeat: int = 0`" in problem


def test_a_study_launched_before_a_setting_existed_gets_its_default(tmp_path: Path) -> None:
    files = StudyFiles(write_study(tmp_path, GOOD))
    study = load_study(files.toml)[0]
    launched = study.model_dump(mode="json")
    for name in ("seeds", "promote", "asynchronous"):
        del launched["search"][name]
    files.folder.mkdir()
    files.journal.touch()
    files.settings.write_text(json.dumps(launched))
    check_same_settings(files, study)
    files.toml.write_text(GOOD.replace("[space]", "seeds = 2\n[space]"))
    with pytest.raises(StudyError, match=r"search\.seeds: launched with \[1\], the file now says \[2\]"):
        check_same_settings(files, load_study(files.toml)[0])


def test_an_empty_corpus_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    text = GOOD.replace("widths = [32, 64]", f"widths = [32, 64]\ncorpus = '{tmp_path / 'empty'}'")
    with pytest.raises(StudyError, match=r"trainer\.corpus: "):
        load_study(write_study(tmp_path, text))


@pytest.mark.parametrize("command", ["validate", "launch"])
def test_data_that_cannot_be_read_is_refused_before_anything_is_written(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes are checked with the study file. That a file is not text is known only when it is read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "image.dat").write_bytes(bytes(range(256)) * 400)
    write_study(tmp_path, GOOD.replace("widths = [32, 64]", "widths = [32, 64]\ncorpus = 'image.dat'"))
    result = CliRunner().invoke(app, [command, "s.toml"])
    assert result.exit_code == 2
    assert "needed utf-8 text" in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["image.dat", "s.toml"]


def test_broken_toml_is_refused(tmp_path: Path) -> None:
    assert "not TOML" in list_problems(tmp_path, "seed = = 3")[0]


def test_a_misspelt_name_is_refused_with_the_nearest_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "quickstart.toml").write_text(GOOD)
    assert find_study_file("quickstart") == Path("studies/quickstart.toml")
    with pytest.raises(ValueError, match="did you mean quickstart"):
        find_study_file("quikstart")


@pytest.mark.parametrize("command", ["validate", "launch", "resume"])
def test_a_bad_study_ends_with_exit_code_2_and_nothing_written(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_study(tmp_path, GOOD.replace("min = 16_384", "min = 0"))
    result = CliRunner().invoke(app, [command, "s.toml"])
    assert result.exit_code == 2
    assert "search.tokens.min" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["s.toml"]
