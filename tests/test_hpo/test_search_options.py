"""Options of a search: several seeds, promotion before a rung is decided, promotion by prediction."""

import heapq
import math
import random
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import RandomSampler
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import TrialState

from hpo.search.hyperband import compute_rung_sizes
from hpo.search.search import Search
from hpo.search.stored import SETTINGS_KEY
from hpo.search.view import Job
from scaling.laws.compute import Fidelity
from tests.test_hpo.test_search import compute_loss, name_dead_worker, open_search, outline, run


@pytest.fixture(autouse=True)
def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


# Seeds


def compute_losses(job: Job) -> list[float]:
    return [compute_loss(job) + 0.01 * i for i in range(job.seeds)]


def train(search: Search, most: int = 10_000) -> list[Job]:
    jobs: list[Job] = []
    while len(jobs) < most and (job := search.ask()) is not None:
        jobs.append(job)
        search.tell(job, compute_losses(job))
    return jobs


def test_each_rung_has_its_seeds_and_a_promotion_resumes_those_of_the_rung_below() -> None:
    search = open_search(seeds=[1, 2, 3])
    jobs = train(search)
    assert {(j.bracket.start, j.rung, j.seeds, j.resume_seeds) for j in jobs} == {
        (0, 0, 1, 0),
        (0, 1, 2, 1),
        (0, 2, 3, 2),
        (1, 1, 2, 0),
        (1, 2, 3, 2),
        (2, 2, 3, 0),
    }
    assert all(search.study.trials[j.number].user_attrs["seeds"] == j.seeds for j in jobs)
    fresh = train(open_search(seeds=[1, 2, 3], resumable=False))
    assert {j.resume_seeds for j in fresh} == {0}
    assert {(j.rung, j.seeds) for j in fresh} == {(0, 1), (1, 2), (2, 3)}


def test_tokens_are_counted_for_every_seed() -> None:
    # by hand, seeds 1, 1, 3 at 100, 300, 900 tokens; brackets of 9-3-1, 5-1 and 3 configurations
    promoted_to_the_top = (900 - 300) + 2 * 900
    by_hand = 9 * 100 + 3 * 200 + promoted_to_the_top + 5 * 300 + promoted_to_the_top + 3 * 3 * 900
    search = open_search(seeds=(1, 1, 3))
    assert search.progress.tokens_planned == sum(f.D for f in search.plan().increments) == by_hand == 15_900
    train(search, most=19)
    job = search.ask()
    assert job is not None
    assert search.progress.tokens_planned == by_hand
    search.tell(job, compute_losses(job))
    train(search)
    after = search.progress
    assert (after.done, after.tokens_spent, after.tokens_planned) == (22, by_hand, by_hand)
    # One seed of each promotion continued from the rung below.
    assert after.tokens_saved == 3 * 100 + 300 + 300
    whole = open_search(seeds=2)
    # Two seeds cost twice as much as one.
    assert whole.progress.tokens_planned == 2 * 6900
    assert open_search(seeds=(1, 1, 3), resumable=False).progress.tokens_planned == by_hand + after.tokens_saved


def test_the_value_is_the_mean_and_the_losses_are_kept() -> None:
    search = open_search(seeds=[1, 3, 3])
    jobs = train(search, most=20)
    for job in jobs:
        trial = search.study.trials[job.number]
        assert trial.value == pytest.approx(sum(compute_losses(job)) / job.seeds)
        assert trial.user_attrs.get("losses") == (compute_losses(job) if job.seeds > 1 else None)


@pytest.mark.parametrize("worst", [math.nan, math.inf, -math.inf])
def test_one_seed_that_diverges_makes_the_configuration_diverge(worst: float) -> None:
    search = open_search(seeds=2)
    job = search.ask()
    assert job is not None
    # An array is accepted, too.
    search.tell(job, np.array([0.5, worst]))  # type: ignore[arg-type]
    trial = search.study.trials[job.number]
    assert trial.state == TrialState.FAIL
    assert trial.user_attrs["diverged"] is True
    assert trial.user_attrs["losses"] == [0.5, None]
    assert search.progress.diverged == 1
    assert job.config not in {j.config for j in train(search)}


def test_as_many_losses_as_seeds_or_nothing_is_changed() -> None:
    one, three = open_search(), open_search(seeds=3)
    job, jobs = one.ask(), three.ask()
    assert job is not None
    assert jobs is not None
    for bad in ([], [1.0, 2.0]):
        with pytest.raises(ValueError, match=f"is 1 training, got {len(bad)} losses"):
            one.tell(job, bad)
    for told, got in ((1.0, "1 loss:"), ([1.0], "1 loss:"), ([1.0] * 4, "4 losses")):
        with pytest.raises(ValueError, match=f"is 3 trainings, got {got}"):
            three.tell(jobs, told)
    assert three.study.trials[0].state == TrialState.RUNNING
    assert "losses" not in three.study.trials[0].user_attrs
    one.tell(job, [1.0])
    three.tell(jobs, [1.0, 2.0, 6.0])
    assert (one.best(), three.study.trials[0].value) == (job.params, 3.0)


def test_the_last_number_of_seeds_holds_for_rungs_that_are_added() -> None:
    storage = InMemoryStorage()
    search = open_search(seeds=[1, 1, 3], storage=storage)
    train(search)
    search.extend(2700)
    assert {(j.rung, j.seeds) for j in train(search) if j.rung >= 2} == {(2, 3), (3, 3)}
    assert open_search(seeds=[1, 1, 3, 3], tokens=(100, 2700), storage=storage).finished
    with pytest.raises(ValueError, match=r"seeds: the study has \[1, 1, 3\], got \[1, 1, 2\]"):
        open_search(seeds=[1, 1, 2], storage=storage)


def test_new_settings_are_compared_and_old_studies_have_the_defaults() -> None:
    storage = InMemoryStorage()
    search = open_search(storage=storage)
    jobs = train(search, most=18)
    old = {
        k: v for k, v in search.study.user_attrs[SETTINGS_KEY].items() if k not in ("seeds", "promote", "asynchronous")
    }
    search.study.set_user_attr(SETTINGS_KEY, old)
    study_id = storage.get_study_id_from_name("search")
    for trial in storage.get_all_trials(study_id, deepcopy=False):
        for name in ("seeds", "resumed_seeds"):
            # Studies have no such attributes from before there were several seeds.
            trial.user_attrs.pop(name)
    again = open_search(storage=storage, seeds=[1, 1, 1])
    assert outline(jobs + train(again)) == outline(train(open_search()))
    assert again.progress.tokens_spent == 6900
    with pytest.raises(ValueError, match="other settings") as caught:
        open_search(storage=storage, seeds=2, asynchronous=True)
    assert "seeds: the study has [1], got [2]" in str(caught.value)
    assert "asynchronous: the study has False, got True" in str(caught.value)


def test_where_to_start_is_chosen_by_the_cost_of_all_seeds() -> None:
    """With 20 seeds at the upper rung, the small size's upper rung costs more than the large size's lower one."""
    options: dict[str, Any] = {"tokens": (100, 300), "sizes": (1.0, 8.0)}
    one = [(j.bracket.size, j.rung) for j in train(open_search(**options)) if j.config == j.number]
    many = [(j.bracket.size, j.rung) for j in train(open_search(**options, seeds=[1, 20])) if j.config == j.number]
    assert list(dict.fromkeys(one)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert list(dict.fromkeys(many)) == [(0, 0), (1, 0), (0, 1), (1, 1)]


# Promotion by predicted loss


class Contrarian(RandomSampler):
    """Predicts that the worst configuration now will be the best, once it has a few results."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self._seed = seed
        self.asked: list[int] = []

    def propose(
        self, study: optuna.Study, space: dict[str, BaseDistribution], slots: Sequence[Fidelity], *_: Any
    ) -> Any:
        number = len({t.user_attrs["config"] for t in study.get_trials(deepcopy=False)})
        return {name: np.random.default_rng([self._seed, number]).uniform(1e-4, 1e-1) for name in space}, 0

    def best(self, *_: Any) -> dict[str, Any]:
        return {}

    def predict(
        self,
        study: optuna.Study,
        space: dict[str, BaseDistribution],
        params: Sequence[dict[str, Any]],
        target: Fidelity,
    ) -> NDArray[np.float64] | None:
        self.asked.append(len(params))
        assert all(p.keys() == space.keys() for p in params)
        assert target.D == 900
        done = [t for t in study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
        if len(done) < 9:
            return None
        # As in a model, the last result changes all predictions a little.
        return np.array([-p["lr"] + 0.02 * math.sin(1e5 * p["lr"] * float(done[-1].value or 0)) for p in params])


LR: dict[str, BaseDistribution] = {"lr": FloatDistribution(1e-4, 1e-1)}


def open_predicting_search(**options: Any) -> Search:
    return open_search(**({"space": LR, "sampler": Contrarian(), "promote": "predicted"} | options))


def lr_loss(job: Job) -> float:
    return float(job.params["lr"])


def test_the_sampler_decides_which_configurations_are_promoted() -> None:
    ranked, told = open_search(space=LR, sampler=Contrarian()), open_predicting_search()
    by_rank, by_prediction = run(ranked, lr_loss), run(told, lr_loss)
    first = [sorted(lr_loss(j) for j in by_rank[:9]), sorted(lr_loss(j) for j in by_prediction[:9])]
    assert first[0] == first[1]
    up = [sorted(lr_loss(j) for j in jobs if j.bracket.start == 0 and j.rung == 1) for jobs in (by_rank, by_prediction)]
    assert up[0] == first[0][:3]
    assert len(up[1]) == 3
    assert min(up[1]) > max(up[0])
    assert Counter((j.bracket.start, j.rung) for j in by_prediction) == Counter(
        {(k, k + i): n for k in range(3) for i, n in enumerate(compute_rung_sizes(k, 2, 3))}
    )
    assert ranked._sampler.asked == []  # type: ignore[attr-defined]


def test_predictions_are_asked_for_when_they_decide_and_for_nothing_else() -> None:
    search = open_predicting_search()
    asked = search._sampler.asked  # type: ignore[attr-defined]
    for _ in range(22):
        before = len(asked)
        job = search.ask()
        assert job is not None
        # 9 rivals for 3 places, 8 for 2, 7 for 1; 3 for 1 above; then the same 5 for 1 in the second bracket
        assert len(asked) - before == (job.rung > job.bracket.start)
        search.tell(job, lr_loss(job))
        assert search.progress.done + len(search.plan().increments) == 22
        assert search.finished == (search.progress.done == 22)
    assert asked == [9, 8, 7, 3, 5]


def test_ranks_decide_while_there_is_no_model() -> None:
    class Modest(Contrarian):
        def predict(self, *_: Any) -> NDArray[np.float64] | None:
            return None

    by_rank = run(open_search(space=LR, sampler=Contrarian(), variant="efficient"), lr_loss)
    assert outline(run(open_predicting_search(sampler=Modest()), lr_loss)) == outline(by_rank)


def test_a_sampler_that_cannot_predict_is_refused() -> None:
    storage = InMemoryStorage()
    with pytest.raises(ValueError, match='"predicted" needs a sampler that has a method predict, such as "mfbo"'):
        open_predicting_search(sampler="random", storage=storage)
    assert storage.get_all_studies() == []


def test_a_diverged_run_is_never_promoted_however_good_it_is_predicted_to_be() -> None:
    search = open_predicting_search()
    jobs = run(search, lambda j: math.nan if j.params["lr"] > 0.03 else j.params["lr"])
    assert all(j.params["lr"] <= 0.03 for j in jobs if j.rung > j.bracket.start)
    assert search.finished


@pytest.mark.parametrize("variant", ["discarding", "preserving", "efficient"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_predicted_places_are_kept_after_a_raise(variant: Any, asynchronous: bool) -> None:
    search = open_predicting_search(variant=variant, asynchronous=asynchronous)
    search._sampler.predict = lambda study, space, params, target: np.random.default_rng(  # type: ignore[attr-defined]
        len(study.get_trials(deepcopy=False))
    ).random(len(params))
    run(search, lr_loss)
    left = search.plan(2700)
    search.extend(2700)
    assert len(run(search, lr_loss)) == len(left.increments)
    runs = [(t.user_attrs["bracket"][2], t.user_attrs["rung"]) for t in search.study.trials]
    assert Counter(runs) == Counter(
        {(k, k + i): n for k in range(4) for i, n in enumerate(compute_rung_sizes(k, 3, 3))}
    )


# Workers killed at any moment, in every mode


def run_course(
    storage: BaseStorage | Path, *, kills: random.Random | None = None, loss: Any = compute_loss, **options: Any
) -> list[Any]:
    """Return the jobs of three workers, in the order of start, when every run has its own duration.

    With `kills`, a worker sometimes dies after an ask or a tell and is started again.
    """

    def open_worker_search(worker: str) -> Search:
        return open_search(storage=storage, worker=worker, **options)

    def may_die(worker: str) -> bool:
        if kills is None or kills.random() > 0.3:
            return False
        searches[worker] = open_worker_search(worker)
        return True

    searches = {name: open_worker_search(name) for name in ("w0", "w1", "w2")}
    idle, busy, order = list(searches), list[tuple[float, str, Job]](), list[Any]()
    now = 0.0
    while True:
        for worker in list(idle):
            job = searches[worker].ask()
            if job is None:
                continue
            if may_die(worker):
                assert searches[worker].ask() == job
            idle.remove(worker)
            order.append((worker, *outline([job])))
            hours = random.Random(f"{job.config} {job.rung}").uniform(1, 10)
            heapq.heappush(busy, (now + hours, worker, job))
        if not busy:
            assert all(search.finished for search in searches.values())
            return order
        now, worker, job = heapq.heappop(busy)
        searches[worker].tell(job, loss(job))
        idle.append(worker)
        idle.sort()
        may_die(worker)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("variant", ["discarding", "preserving", "efficient"])
def test_a_search_whose_workers_are_killed_decides_the_same(tmp_path: Path, variant: Any, asynchronous: bool) -> None:
    options = {"variant": variant, "asynchronous": asynchronous, "seed": 3}
    expected = run_course(InMemoryStorage(), **options)
    assert run_course(InMemoryStorage(), **options) == expected
    assert run_course(tmp_path / "study.journal", kills=random.Random(0), **options) == expected
    assert run_course(InMemoryStorage(), **(options | {"seed": 4})) != expected


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_search_by_prediction_whose_workers_are_killed_decides_the_same(asynchronous: bool) -> None:
    def go(kills: random.Random | None) -> list[Any]:
        options: dict[str, Any] = {"space": LR, "promote": "predicted", "asynchronous": asynchronous, "iterations": 2}
        return run_course(InMemoryStorage(), kills=kills, loss=lr_loss, sampler=Contrarian(), **options)

    assert go(random.Random(1)) == go(random.Random(2)) == go(None)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_model_based_search_whose_workers_are_killed_decides_the_same(asynchronous: bool) -> None:
    def go(kills: random.Random | None) -> list[Any]:
        options: dict[str, Any] = {"space": LR, "sampler": "mfbo", "tokens": (100, 300), "iterations": 2}
        return run_course(InMemoryStorage(), kills=kills, loss=lr_loss, asynchronous=asynchronous, **options)

    expected = go(None)
    # Settings that a model wants at a rung where they have been run are not run again there.
    assert len(expected) >= 11
    assert go(random.Random(1)) == expected


def test_an_abandoned_guess_is_taken_over_like_any_other_run() -> None:
    storage = InMemoryStorage()
    search = open_search(storage=storage, worker=name_dead_worker(), asynchronous=True)
    run(search, most=3)
    guess = search.ask()
    assert guess is not None
    # One of three is promoted before the other six have started.
    assert guess.rung == 1
    heir = open_search(storage=storage, asynchronous=True)
    assert heir.ask() == guess


@pytest.mark.parametrize("asynchronous", [False, True])
def test_eight_workers_on_one_journal_run_nothing_twice_and_lose_nothing(tmp_path: Path, asynchronous: bool) -> None:
    told: list[tuple[int, int]] = []
    failures: list[BaseException] = []

    def work(worker: str) -> None:
        try:
            search = open_search(storage=tmp_path / "study.journal", worker=worker, asynchronous=asynchronous)
            while not search.finished:
                if (job := search.ask()) is not None:
                    search.tell(job, compute_loss(job))
                    told.append((job.config, job.rung))
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work, args=(f"w{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    search = open_search(storage=tmp_path / "study.journal", asynchronous=asynchronous)
    assert search.finished
    assert len(set(told)) == len(told) == len(search.study.trials) == search.progress.done
    assert {(t.user_attrs["config"], t.user_attrs["rung"]) for t in search.study.trials} == set(told)
    assert len(told) >= 22 if asynchronous else len(told) == 22


# What a raise saves


def test_a_raise_reuses_what_a_new_study_would_train_again() -> None:
    """A raise from (100, 300) to 900 tokens, by hand. Losses grow with the number, so that earlier ones win.

    Before: 3 at 100, the best to 300; 2 at 300. After: the first bracket has 9 at 100 (3 of them known), 3 at 300
    (1 known), 1 at 900; the second 5 at 300 (2 known), 1 at 900; the third 3 at 900.
    """
    search = open_search(tokens=(100, 300))
    run(search, lambda j: float(j.config))
    before = search.progress
    assert (before.done, before.reused, before.tokens_reused) == (6, 0, 0)
    # This is no raise.
    search.extend(300)
    assert search.progress == before
    search.extend(900)
    now = search.progress
    # The rung at 300 tokens of the first bracket is still open.
    assert (now.reused, now.tokens_reused) == (3 + 2, 3 * 100 + 2 * 300)
    run(search, lambda j: float(j.config))
    after = search.progress
    assert (after.reused, after.tokens_reused) == (3 + 1 + 2, 3 * 100 + 200 + 2 * 300)
    fresh = open_search(tokens=(100, 900))
    run(fresh, lambda j: float(j.config))
    assert after.tokens_spent - before.tokens_spent == fresh.progress.tokens_spent - after.tokens_reused


@pytest.mark.parametrize(("variant", "reused"), [("discarding", 5), ("preserving", 5), ("efficient", 6)])
def test_a_place_that_was_lost_is_not_counted_as_reused(variant: Any, reused: int) -> None:
    """In the same search with later ones winning, the promoted one of the first three is not among the best 3 of 9 any
    more, unless places are kept."""
    search = open_search(tokens=(100, 300), variant=variant)
    run(search, lambda j: -float(j.config))
    search.extend(900)
    run(search, lambda j: -float(j.config))
    assert search.progress.reused == reused
    assert search.progress.tokens_reused == 900 + 200 * (reused - 5)


def test_a_run_in_progress_at_the_raise_counts_once_it_has_a_result() -> None:
    search = open_search(tokens=(100, 300))
    run(search, most=2)
    job = search.ask()
    assert job is not None
    search.extend(900)
    assert (search.progress.reused, search.progress.tokens_reused) == (2, 200)
    search.tell(job, compute_loss(job))
    assert (search.progress.reused, search.progress.tokens_reused) == (3, 300)


def test_the_last_raise_counts_and_runs_with_seeds_are_counted_whole() -> None:
    search = open_search(tokens=(100, 300), seeds=2)
    train(search)
    search.extend(900)
    train(search, most=2)
    search.extend(2700)
    assert search.study.user_attrs[SETTINGS_KEY]["raises"] == [[900, 6], [2700, 8]]
    # At the start rungs, all earlier runs have a place: 3 + 2 at 100, 2 at 300, each with 2 seeds.
    assert (search.progress.reused, search.progress.tokens_reused) == (7, 2 * (5 * 100 + 2 * 300))


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 0}, "seeds are whole numbers of at least 1"),
        ({"seeds": -2}, "seeds are whole numbers of at least 1"),
        ({"seeds": 1.5}, "seeds are whole numbers of at least 1"),
        ({"seeds": True}, "seeds are whole numbers of at least 1"),
        ({"seeds": [3, 1, 1]}, "never fall"),
        ({"seeds": [1, 2]}, r"one for each of the 3 rungs \(100, 300, 900\)"),
        ({"seeds": []}, "seeds needs one number"),
        ({"seeds": "3"}, "seeds needs one number"),
        ({"promote": "predict"}, "did you mean predicted"),
        ({"asynchronous": 1}, "asynchronous is True or False"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(options: dict[str, Any], message: str) -> None:
    storage = InMemoryStorage()
    with pytest.raises(ValueError, match=message):
        open_search(**options, storage=storage)
    assert storage.get_all_studies() == []


@pytest.mark.parametrize("asynchronous", [False, True])
def test_when_all_diverge_there_is_no_best_and_asking_goes_on(asynchronous: bool) -> None:
    search = open_search(iterations=None, asynchronous=asynchronous)
    jobs = run(search, lambda _: math.nan, most=40)
    assert len(jobs) == 40
    assert all(j.rung == j.bracket.start for j in jobs)
    assert search.progress.diverged == 40
    with pytest.raises(ValueError, match="no run has finished with a finite loss"):
        search.best()
    ended = open_search(asynchronous=asynchronous)
    assert len(run(ended, lambda _: math.inf)) == 9 + 5 + 3
    assert ended.finished


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_violated_constraint_is_never_promoted_and_never_the_answer(sampler: str) -> None:
    """Losses are lowest where the constraint is violated."""
    search = Search({"x": FloatDistribution(0.0, 1.0)}, tokens=(100, 900), sampler=sampler, iterations=1)
    while (job := search.ask()) is not None:
        trial = search.study.trials[job.number]
        if job.params["x"] < 0.5:
            optuna.trial.Trial(search.study, trial._trial_id).set_constraint("memory", 1.0)
        search.tell(job, job.params["x"])
    infeasible = [t for t in search.study.trials if t.params["x"] < 0.5]
    assert infeasible
    assert {t.user_attrs["continues"] for t in infeasible} == {None}, "only configurations that start at a rung"
    assert search.best()["x"] >= 0.5
