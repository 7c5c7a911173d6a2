"""Whether a warm start is worth it: planted gains are recovered, no gain is no advice, nothing is trained twice."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.distributions import FloatDistribution
from typer.testing import CliRunner

from hpo.study.config import load_study
from proxies.__main__ import app
from proxies.cli.grow_plan import format_saving
from proxies.growth import decision as decision_module
from proxies.growth import runs
from proxies.growth.decision import Decision, Ladders, decide
from proxies.growth.question import (
    Pair,
    Question,
    QuestionOptions,
    apply_found_settings,
    choose_small_pair,
    list_possible_starts,
    make_question,
)
from proxies.growth.trainer import GrowthFamily
from proxies.growth.weights import grow
from proxies.trainers.proxy_family import ProxyFamily
from proxies.training.checkpoints import load_model
from proxies.training.loop import train
from scaling.common.measurement import Measurement
from scaling.laws.compute import Fidelity

H = (2.0, 5.0, 10.0, 20.0)
# Slope of ln loss against ln tokens.
SLOPE = 0.13
Curve = Callable[[Any], Any]


def ladders(
    gain: Curve, *, base: float, width: int = 32, arms: int = 1, seeds: int = 3, sd: float = 0.0, generator: Any = None
) -> Ladders:
    """Make losses by a power law.

    Those of a warm arm are lower by `gain`, with noise of `sd`, half of whose variance is common to all run lengths.
    """
    generator = generator or np.random.default_rng(0)
    lengths = (*H, H[-1] + base)
    seed = generator.standard_normal((seeds, 1))
    scratch = 1.1 - SLOPE * np.log(np.array(lengths)) + 0.02 * seed
    warm = {}
    for k in range(arms):
        noise = generator.standard_normal((seeds, 1)) + generator.standard_normal((seeds, len(H)))
        warm[f"arm{k}"] = np.exp(scratch[:, : len(H)] - gain(np.array(H)) - sd * noise / math.sqrt(2))
    return Ladders(width, lengths, np.exp(scratch), H, warm)


@pytest.fixture
def alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every pair gain exactly what another one does."""
    for name in ("LOG_MEAN", "LOG_SD", "OFFSET_SD"):
        monkeypatch.setattr(decision_module, name, 0.0)


def ending_at(length: float, slope: float = 0.06) -> Curve:
    """Return a gain that falls with ln length and ends at this one."""
    return lambda h: slope * np.log(length / np.asarray(h))


def get_gain_at(decision: Decision, length: float) -> decision_module.ArmAt:
    return next(row for row in decision.chosen.at if row.horizon == length)


@pytest.mark.usefixtures("alike")
def test_a_planted_gain_and_its_end_come_back() -> None:
    """With a base worth b, scratch is trained b longer, so its loss is lower by SLOPE ln(1 + b / h)."""
    base = 3.0
    decision = decide(ladders(ending_at(12), base=base), real_width=64, at=5, base=base, horizons=(2, 10, 20))
    for h in (5.0, 10.0, 20.0):
        g = 0.06 * math.log(12 / h)
        row = get_gain_at(decision, h)
        assert row.gain.value == pytest.approx(g)
    assert decision.chosen.break_even.value == pytest.approx(12)
    row = get_gain_at(decision, 20)
    assert row.gain_with_base.value == pytest.approx(0.06 * math.log(12 / 20) - SLOPE * math.log(23 / 20))


@pytest.mark.usefixtures("alike")
@pytest.mark.parametrize("g", [0.03, 0.1])
def test_a_constant_gain_saves_the_same_share_of_the_tokens_everywhere(g: float) -> None:
    """ln L = c - SLOPE ln D - g reaches ln L_scratch(h) at D = h e^(-g / SLOPE), plus the tokens of the base."""
    decision = decide(ladders(lambda h: g + 0 * h, base=1.5), real_width=64, at=20, base=1.5, horizons=(10,))
    for h in (10.0, 20.0):
        needed = h * math.exp(-g / SLOPE)
        assert get_gain_at(decision, h).saving.value == pytest.approx(h / needed)
        assert get_gain_at(decision, h).saving_with_base.value == pytest.approx(h / (needed + 1.5))
    assert decision.chosen.break_even.value == math.inf
    assert decision.chosen.break_even.high == math.inf


@pytest.mark.usefixtures("alike")
def test_what_lies_outside_the_ladder_is_reported_as_a_bound() -> None:
    better = decide(ladders(lambda h: 0.3 + 0 * h, base=1), real_width=64, at=2, base=1)
    assert better.chosen.asked.saving.value == math.inf, "the first rung is already below scratch's loss there"
    paid = better.chosen.asked.saving_with_base
    assert math.isnan(paid.value), "below the first rung, but the base has a cost"
    first = ladders(lambda h: 0.3 + 0 * h, base=1).warm_at[0]
    row = better.json["arms"][0]["at"][0]
    assert row["horizon"] == 2
    assert row["saving_with_base"]["value"] is None
    assert paid.high == pytest.approx(2 / 1)
    assert format_saving(row["saving_with_base"], row["horizon"], (first,), 1.0).startswith(
        f"{2 / (first + 1):.2f} to 2.00 ["
    )
    worse = decide(ladders(lambda h: -0.3 + 0 * h, base=1), real_width=64, at=20, base=1)
    assert worse.chosen.asked.saving.value == 0
    assert worse.chosen.break_even.value == 0
    assert not worse.use
    assert json.loads(json.dumps(better.json, allow_nan=False))["arms"][0]["break_even"]["value"] == "inf"


@pytest.mark.usefixtures("alike")
def test_the_end_of_the_gain_counts_the_base_only_where_asked() -> None:
    """A gain of 0.06 is no gain where scratch gains SLOPE ln(1 + 12/10) = 0.10 with the base's compute."""
    pair = ladders(lambda h: 0.06 + 0 * h, base=12, seeds=6)
    free = decide(pair, real_width=64, at=10, base=12)
    paid = decide(pair, real_width=64, at=10, base=12, count_base=True)
    assert free.use
    assert not paid.use
    # 0.06 = SLOPE ln(1 + 12 / h) at h = 12 / (e^(0.06 / SLOPE) - 1) = 20.5, which is beyond the last rung.
    assert free.chosen.break_even_with_base.value == 0
    assert get_gain_at(paid, 10).gain_with_base.value == pytest.approx(0.06 - SLOPE * math.log(2.2), abs=2e-3)


def test_without_a_gain_the_answer_is_do_not_in_95_of_100_draws() -> None:
    """It holds although the best of three arms is taken, and the small pair has the noise by which pairs differ."""
    generator = np.random.default_rng(1)
    used = 0
    for i in range(100):
        noise = decision_module.OFFSET_SD * generator.standard_normal()
        pair = ladders(lambda h, noise=noise: noise + 0 * h, base=2, arms=3, sd=0.018, generator=generator)
        used += decide(pair, real_width=64, at=20, base=2, seed=i).use
    assert used <= 5


def test_a_clear_gain_is_used() -> None:
    generator = np.random.default_rng(4)
    pairs = [ladders(lambda h: 0.1 + 0 * h, base=2, sd=0.01, generator=generator) for _ in range(20)]
    assert sum(decide(pair, real_width=64, at=20, base=2).use for pair in pairs) >= 19


@pytest.mark.usefixtures("alike")
@pytest.mark.parametrize(("seeds", "least"), [(3, 92), (5, 90)])
def test_intervals_over_seeds_hold_the_planted_gain_and_its_end(seeds: int, least: int) -> None:
    generator = np.random.default_rng(2)
    gains = ends = 0
    for i in range(100):
        pair = ladders(ending_at(9), base=2, sd=0.012, seeds=seeds, generator=generator)
        decision = decide(pair, real_width=64, at=10, base=2, seed=i)
        gains += decision.chosen.asked.gain.low <= 0.06 * math.log(0.9) <= decision.chosen.asked.gain.high
        ends += decision.chosen.break_even.low <= 9 <= decision.chosen.break_even.high
    assert gains >= least
    assert ends >= least


def test_intervals_hold_the_gain_of_a_larger_pair_that_differs_as_assumed() -> None:
    """Two doublings of the width have twice the mean of the logarithm, and sqrt(2) times the deviations."""
    generator, held = np.random.default_rng(5), 0
    for i in range(100):
        pair = ladders(lambda h: 0.08 + 0 * h, base=2, sd=0.01, generator=generator)
        factor = math.exp(
            2 * decision_module.LOG_MEAN + math.sqrt(2) * decision_module.LOG_SD * generator.standard_normal()
        )
        real = 0.08 * factor + math.sqrt(2) * decision_module.OFFSET_SD * generator.standard_normal()
        gain = decide(pair, real_width=128, at=20, base=2, seed=i).chosen.asked.gain
        held += gain.low <= real <= gain.high
    assert 90 <= held


@pytest.mark.usefixtures("alike")
def test_more_seeds_narrow_the_interval() -> None:
    def width(seeds: int) -> float:
        pair = ladders(lambda h: 0.05 + 0 * h, base=2, sd=0.02, seeds=seeds, generator=np.random.default_rng(3))
        gain = decide(pair, real_width=64, at=20, base=2).chosen.asked.gain
        return gain.high - gain.low

    assert width(3) > 1.5 * width(8)
    assert width(100) == pytest.approx(2 * 1.98 * 0.02 / 10, rel=0.2)


def test_a_second_pair_that_differs_widens_the_factor_and_one_that_agrees_narrows_it() -> None:
    def planted(g: float, width: int) -> Ladders:
        return ladders(lambda h: g + 0 * h, base=2, width=width)

    def spread(second: Ladders | None, real_width: int = 64) -> float:
        factor = decide(planted(0.1, 32), real_width=real_width, at=20, base=2, second=second).factor
        return math.log(factor.high / factor.low)

    as_assumed = planted(0.1 * math.exp(-decision_module.LOG_MEAN), 16)
    assert spread(as_assumed) == pytest.approx(spread(None) * math.sqrt(4 / 5), rel=0.01)
    assert spread(planted(0.6, 16)) > spread(None)
    assert spread(None, 128) == pytest.approx(spread(None) * math.sqrt(2), rel=0.01)
    assert math.isfinite(spread(planted(-0.05, 16))), "a smaller pair that loses"


def test_ladders_that_cannot_be_compared_are_refused() -> None:
    good = ladders(lambda h: 0 * h, base=2)
    for broken, match in (
        (Ladders(32, good.scratch_at, good.scratch[:1], H, {"a": good.warm["arm0"][:1]}), "two seeds"),
        (Ladders(32, good.scratch_at, good.scratch, H[:3], good.warm), "at 3 run lengths"),
        (Ladders(32, good.scratch_at, good.scratch, H, {}), "at least one warm start"),
        (Ladders(32, good.scratch_at, good.scratch * math.nan, H, good.warm), "finite losses"),
    ):
        with pytest.raises(ValueError, match=match):
            decide(broken, real_width=64, at=10, base=2)
    with pytest.raises(ValueError, match="below width 32"):
        decide(good, real_width=64, at=10, base=2, second=good)


# The question

FAMILY = ProxyFamily(
    widths=(16, 32), d_head=8, n_layers=1, seq_len=32, batch_seqs=4, warmup_tokens=512, eval_windows=8, lr=0.02
)
TOML = """
[search]
tokens = { min = 4096, max = 36_864 }
[space]
lr = { low = 1e-3, high = 0.1, log = true }
[trainer]
widths = [16, 32]
d_head = 8
n_layers = 1
seq_len = 32
batch_seqs = 4
warmup_tokens = 512
eval_windows = 8
lr = 0.02
[target]
d_model = 64
tokens = 200_000
"""


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TOML)
    return path


@pytest.mark.parametrize(
    ("real", "small"),
    [((64, 96), (32, 48)), ((64, 128), (32, 64)), ((48, 96), (16, 32)), ((80, 160), (16, 32)), ((96, 144), (32, 48))],
)
def test_half_the_pair_is_trained_or_the_smallest_of_its_growth(real: tuple[int, int], small: tuple[int, int]) -> None:
    family = ProxyFamily(d_head=16)
    assert choose_small_pair(family, Pair(source=real[0], target=real[1])) == Pair(source=small[0], target=small[1])


def test_a_pair_without_a_smaller_one_is_refused_with_what_would_be_possible() -> None:
    with pytest.raises(ValueError, match=r"a larger pair of this growth, 64 to 96 or larger, or d_head = 8"):
        choose_small_pair(ProxyFamily(d_head=16), Pair(source=32, target=48))


def test_the_question_of_a_study_is_about_its_target(toml: Path) -> None:
    question = make_question(toml, FAMILY)
    assert (question.real, question.small) == (Pair(source=32, target=64), Pair(source=16, target=32))
    assert question.second == Pair(source=8, target=16)
    N = {w: FAMILY.member(w).counts.N for w in (16, 32, 64)}
    assert question.at == pytest.approx(200_000 / N[64])
    assert question.base == pytest.approx(36_864 / N[32])
    # the base's FLOPs, 6 N D, over those of one token per parameter of the target, 6 N²
    assert question.base_cost == pytest.approx(6 * N[32] * 36_864 / (6 * N[64] ** 2))
    assert question.starts == ("scratch", "shrink-pad-perturb", "duplicate", "hyperclone")
    assert max(question.list_lengths("scratch")) == pytest.approx(
        max(question.list_lengths("duplicate")) + question.base_cost
    )
    least, most = question.searched_tokens
    assert most == 9 * least
    assert most <= question.at * N[32] < most + 9 * 32
    assert question.id == make_question(toml, FAMILY, QuestionOptions(seeds=5, horizons=(3, 7))).id, (
        "more seeds belong to the same question"
    )
    assert question.id != make_question(toml, FAMILY, QuestionOptions(budget=2)).id


def test_copies_need_a_whole_growth() -> None:
    assert list_possible_starts(Pair(source=64, target=96)) == ("scratch", "shrink-pad-perturb")
    assert list_possible_starts(Pair(source=64, target=64)) == ("scratch", "shrink-pad-perturb", "duplicate")


def test_depth_grows_in_the_small_pair_as_in_the_real_one(toml: Path) -> None:
    toml.write_text(TOML + "n_layers = 2\n")
    question = make_question(toml, FAMILY)
    trainer = question.make_trainer("shrink-pad-perturb", question.small)
    assert (trainer.source().n_layers, trainer.n_layers, trainer.base_layers) == (1, 2, 1)
    assert question.find_problems() == []


def test_what_the_study_found_is_what_is_trained_with() -> None:
    family = apply_found_settings(FAMILY, {"weight_decay": 0.3, "lr": 0.5}, {"lr": 0.01, "batch_tokens": 260.0})
    assert (family.lr, family.batch_seqs, family.weight_decay, family.widths) == (0.01, 8, 0.3, FAMILY.widths)


def refuse(toml: Path, *words: str) -> str:
    result = CliRunner().invoke(app, ["grow", "--plan", str(toml), *words])
    assert result.exit_code == 2, result.output
    assert not (toml.parent / "tiny").exists(), "nothing was spent"
    return " ".join(result.output.split())


def test_bad_questions_are_refused_with_all_mistakes_before_anything_is_spent(toml: Path) -> None:
    message = refuse(toml, "--seeds", "1", "--budget", "0", "--base", "-1", "--horizons", "0,5", "--pair", "64,32")
    for name in ("--seeds", "--budget", "--base", "--horizons", "--pair"):
        assert name in message
    message = refuse(toml, "--set", "warmup_tokens=20000")
    assert "pair 16 to 32" in message
    assert "pair 8 to 16" in message
    assert "warm-up" in message
    assert "same growth" in refuse(toml, "--small", "16,24")
    assert "--methods" in refuse(toml, "--methods", "stack")
    assert "smaller pair" in refuse(toml, "--pair", "8,16")
    assert "leave out" in refuse(toml, "some.pt")
    toml.write_text(TOML.split("[target]")[0])
    assert "no [target]" in refuse(toml)


def test_a_dry_run_shows_the_cost_and_writes_nothing(toml: Path) -> None:
    result = CliRunner().invoke(app, ["grow", "--plan", str(toml), "--dry-run"])
    assert result.exit_code == 0, result.output
    for word in ("32 to 64", "16 to 32", "search hyperclone", "FLOPs", "minutes"):
        assert word in result.output
    assert not (toml.parent / "tiny").exists()


# The trainer


def make_family(tmp_path: Path, start: str = "shrink-pad-perturb", **more: Any) -> GrowthFamily:
    settings = FAMILY.model_dump() | {"widths": (32,), "start": start, "source_width": 16, "source_tokens": 4096}
    return GrowthFamily.model_validate(settings | {"bases": tmp_path / "bases"} | more)


def test_a_growth_family_trains_what_its_settings_say(tmp_path: Path) -> None:
    """The same by hand: a base with the family's settings, grown with the searched shrink and noise, then trained."""
    made = make_family(tmp_path)
    params = {"lr": 0.01, "shrink": 0.9, "noise": 0.3}
    N, D = made.sizes[0], 4096
    *_, last = made(params, Fidelity(N, D), repeat=3)

    source = FAMILY.member(16).model_copy(update={"seed": 3})
    *_, _ = train(source, 4096, save=tmp_path / "base.pt")
    small, model = load_model(tmp_path / "base.pt")
    config = FAMILY.member(32).model_copy(update={"seed": 3, "lr": 0.01})
    init = grow(model.state_dict(), small, config, shrink=0.9, noise=0.3)
    *_, expected = train(config, D, init=init)
    assert last.loss == expected.loss

    scratch = make_family(tmp_path, "scratch")
    *_, cold = scratch({"lr": 0.01}, Fidelity(N, D), repeat=3)
    *_, plain = train(config, D)
    assert cold.loss == plain.loss
    assert last.loss != cold.loss


def test_a_base_that_many_threads_need_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counting_train(config: Any, tokens: int, **more: Any) -> Iterator[Measurement]:
        calls.append(tokens)
        return train(config, tokens, **more)

    monkeypatch.setattr("proxies.training.loop.train", counting_train)
    made = make_family(tmp_path)
    threads = [threading.Thread(target=made.train_base) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [4096]
    assert made.train_base().exists()
    assert made.get_base_path() != made.get_base_path(repeat=1), "each seed has its own"
    assert made.get_base_path() != make_family(tmp_path, source_tokens=8192).get_base_path()


def test_a_base_that_diverges_is_refused_and_not_kept(tmp_path: Path) -> None:
    made = make_family(tmp_path, lr=1e6)
    with pytest.raises(ValueError, match="the base of width 16 diverged"):
        made.train_base()
    assert not made.get_base_path().exists()


def test_a_growth_familys_mistakes_are_all_named(tmp_path: Path) -> None:
    made = make_family(tmp_path, "hyperclone", widths=(24,), source_tokens=64)
    space = {"shrink": FloatDistribution(0.1, 1.0), "noise": FloatDistribution(-1.0, 1.0)}
    problems = "\n".join(made.problems(space, (4096, 4096)))
    assert "space.shrink: unknown parameter" in problems
    assert "space.noise: needed from 0" in problems
    assert "at least" in problems
    assert "source_width" in problems
    grown = make_family(tmp_path, "hyperclone", widths=(24,))
    assert "whole growth factor" in "\n".join(grown.problems({}, None))
    assert make_family(tmp_path).problems({"shrink": FloatDistribution(0.1, 1.0)}, (4096, 4096)) == []


# The runs


@pytest.fixture
def question(toml: Path) -> Question:
    return make_question(
        toml,
        FAMILY,
        QuestionOptions(at=2, horizons=(1.5,), base=1.0, seeds=2, budget=1, starts=("scratch", "shrink-pad-perturb")),
    )


def test_the_study_files_are_valid_studies_of_the_right_trainer(toml: Path) -> None:
    question = make_question(toml, FAMILY)
    question.home.mkdir(parents=True)
    for start in question.starts:
        path = runs.get_study_path(question, start)
        path.write_text(runs.format_study(question, start))
        study, trainer = load_study(path)
        assert isinstance(trainer, GrowthFamily)
        assert trainer == question.make_trainer(start, question.small)
        assert set(study.space) == {"lr", *runs.RANGES[start]}
        assert (study.search.tokens.min, study.search.tokens.max) == question.searched_tokens


def fake_hpo(calls: list[str]) -> Callable[..., str]:
    def hpo(command: str, toml: Path, *options: str, uri: str | None = None) -> str:
        calls.append(command)
        (toml.with_suffix("")).mkdir(exist_ok=True)
        (toml.with_suffix("") / "study.journal").touch()
        return json.dumps({"lr": 0.02} if "scratch" in toml.stem else {"lr": 0.02, "shrink": 0.9, "noise": 0.5})

    return hpo


def test_a_second_call_trains_and_searches_nothing_again(question: Question, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is interrupted within the ladders, run to the end, run again, and run with one more seed."""
    commands: list[str] = []
    # Width, seed, tokens, resumed from.
    trained: list[tuple[int, int, int, Path | None]] = []
    stop_after = 6

    def fake_train(config: Any, tokens: int, *, resume: Path | None, save: Path, **more: Any) -> Iterator[Measurement]:
        if len(trained) == stop_after:
            raise KeyboardInterrupt
        trained.append((config.d_model, config.seed, tokens, resume))
        save.touch()
        yield Measurement(tokens, 2.0 + 1e3 / tokens + 1e-3 * config.seed, final=True)

    def fake_grow(self: GrowthFamily, config: Any, params: Any, repeat: int) -> dict[str, Any]:
        self.train_base(repeat=repeat)
        return {}

    monkeypatch.setattr(runs, "run_hpo", fake_hpo(commands))
    monkeypatch.setattr("proxies.training.loop.train", fake_train)
    monkeypatch.setattr(GrowthFamily, "_grow_base", fake_grow)
    with pytest.raises(KeyboardInterrupt):
        runs.plan_growth(question)
    stop_after = -1
    first = runs.plan_growth(question)
    assert commands == ["launch", "best"] * 2
    lengths = [len(question.list_lengths(start)) for start in question.starts]
    trunks, bases = len(question.pairs) * question.seeds, len(question.pairs) * question.seeds
    assert len(trained) == bases + trunks * sum(lengths)
    assert sum(resume is not None for *_, resume in trained) == trunks * sum(n - 1 for n in lengths)
    assert runs.plan_growth(question) == first
    assert len(trained) == bases + trunks * sum(lengths)
    last = runs.plan_growth(question.model_copy(update={"seeds": 3}))
    assert len(trained) == (bases + trunks * sum(lengths)) * 3 // 2
    assert last["because"]["runs"] == trunks * sum(lengths) * 3 // 2
    assert json.loads((question.home / "decision.json").read_text()) == last


def test_a_rung_is_the_run_planned_for_its_length(question: Question) -> None:
    trainer = question.make_trainer("shrink-pad-perturb", question.small)
    params, tokens = {"lr": 0.02, "shrink": 0.9, "noise": 0.5}, [2048, 4096]
    question.home.mkdir(parents=True)
    runs.train_ladder(runs.LadderJob(trainer, params, tokens, runs.FIRST_TEST_REPEAT, question.home))
    rows = runs.read_rows(runs.get_rows_path(question))
    name = runs.hash_run(trainer, params, runs.FIRST_TEST_REPEAT)
    assert set(rows) == {(name, 2048), (name, 4096)}
    *_, alone = trainer(params, Fidelity(trainer.sizes[0], 4096), repeat=runs.FIRST_TEST_REPEAT)
    assert rows[name, 4096]["loss"] == alone.loss


def test_an_interrupted_search_is_resumed(question: Question, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(runs, "run_hpo", fake_hpo(calls))
    question.home.mkdir(parents=True)
    toml = runs.get_study_path(question, "scratch")
    (toml.with_suffix("")).mkdir()
    (toml.with_suffix("") / "study.journal").touch()
    runs.search_settings(question, "scratch", workers=1, uri=None)
    assert calls == ["resume", "best"]


def test_a_start_that_diverges_is_left_out_but_scratch_must_not(question: Question) -> None:
    settings: dict[Any, Any] = {"scratch": {"lr": 0.02}, "shrink-pad-perturb": {"lr": 0.02}, "duplicate": {"lr": 9.0}}
    wide = question.model_copy(update={"starts": tuple(settings)})

    def make_rows(lost: str) -> dict[tuple[str, int], Any]:
        rows: dict[tuple[str, int], Any] = {}
        for start, params in settings.items():
            for r in range(wide.seeds):
                name = runs.hash_run(wide.make_trainer(start, wide.small), params, runs.FIRST_TEST_REPEAT + r)
                for D in wide.compute_ladder(wide.small, start):
                    rows[name, D] = {"loss": None if start == lost else 2.0 + 1e4 / D, "seconds": 1.0}
        return rows

    assert set(runs.collect_ladders(wide, wide.small, settings, make_rows("duplicate")).warm) == {"shrink-pad-perturb"}
    with pytest.raises(ValueError, match="scratch diverged"):
        runs.collect_ladders(wide, wide.small, settings, make_rows("scratch"))


def test_a_broken_row_is_named_by_its_line(question: Question) -> None:
    question.home.mkdir(parents=True)
    runs.get_rows_path(question).write_text('{"run": "a", "tokens": 5, "loss": 2.0}\n{"run": "b", "tok\n')
    with pytest.raises(ValueError, match="line 2 of"):
        runs.read_rows(runs.get_rows_path(question))


@pytest.mark.parametrize("words", [(), ("--json",), ("--count-base",)])
def test_the_command_answers(toml: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]) -> None:
    """With planted losses: warm starts are 12 % lower at every run length, so they are used, base counted or not."""

    def fake_train(config: Any, tokens: int, *, save: Path, init: Any, **more: Any) -> Iterator[Measurement]:
        save.touch()
        loss = 3 * (tokens / config.counts.N) ** -SLOPE * (0.88 if init else 1.0)
        yield Measurement(tokens, loss * (1 + 1e-3 * (config.seed % 7)), final=True)

    def fake_grow(self: GrowthFamily, config: Any, params: Any, repeat: int) -> dict[str, Any]:
        return {"grown": True}

    monkeypatch.setattr(runs, "run_hpo", fake_hpo([]))
    monkeypatch.setattr("proxies.training.loop.train", fake_train)
    monkeypatch.setattr(GrowthFamily, "_grow_base", fake_grow)
    monkeypatch.setattr(GrowthFamily, "resumable", False)
    arguments = [
        "grow",
        "--plan",
        str(toml),
        "--horizons",
        "2,8",
        "--at",
        "4",
        "--base",
        "2",
        "--methods",
        "shrink-pad-perturb",
    ]
    result = CliRunner().invoke(app, [*arguments, *words])
    assert result.exit_code == 0, result.output
    if words == ("--json",):
        answer = json.loads(result.stdout)
        assert answer["use"]
        assert answer["settings"] == {"lr": 0.02, "shrink": 0.9, "noise": 0.5}
        assert answer["decision"]["arms"][0]["at"][-1]["measured"] == pytest.approx(-math.log(0.88))
        return
    assert "use it: shrink-pad-perturb\n  settings: lr 0.02, shrink 0.9, noise 0.5\n" in result.stdout
    assert ("the base's cost counted" in result.stdout) == (words == ("--count-base",))
    assert "the gain ends beyond 8" in result.stdout


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_search_and_ladders_run_for_real(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """hpo searches one start in child processes; then two processes train ladders, and each base is trained once."""
    question = make_question(
        toml,
        FAMILY,
        QuestionOptions(
            at=0.5, horizons=(0.4,), base=0.5, seeds=2, budget=0.2, starts=("scratch", "shrink-pad-perturb")
        ),
    ).model_copy(update={"second": None})
    question.home.mkdir(parents=True)
    uri = f"sqlite:///{question.folder.parent}/mlflow.db"
    found_settings = runs.search_settings(question, "shrink-pad-perturb", workers=1, uri=uri)
    assert set(found_settings) == {"lr", "shrink", "noise"}
    monkeypatch.setattr(runs, "run_hpo", fake_hpo([]))
    assert runs.search_settings(question, "shrink-pad-perturb", workers=1, uri=uri) == found_settings, (
        "kept, not searched again"
    )
    settings: dict[Any, Any] = {"scratch": {"lr": 0.02}, "shrink-pad-perturb": found_settings}
    runs.train_ladders(question, settings, 2)
    rows = runs.read_rows(runs.get_rows_path(question))
    assert len(rows) == question.seeds * (2 + 3)
    assert len(list((question.home / "bases").glob("16-*.pt"))) == 1 + question.seeds, (
        "one for the search and one for each seed"
    )
    answer = runs.conclude(question, settings, rows, count_base=False)
    assert answer["use"] == (answer["decision"]["arms"][0]["at"][-1]["gain"]["low"] > 0)
