"""The map of a search space to the unit cube and back."""

from __future__ import annotations

import numpy as np
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import create_trial

from hpo.samplers.unit_cube import Cube

EVERY_KIND: dict[str, BaseDistribution] = {
    "float": FloatDistribution(-2.0, 3.0),
    "log": FloatDistribution(1e-5, 1e-1, log=True),
    "stepped": FloatDistribution(0.0, 0.9, step=0.3),
    "int": IntDistribution(-3, 4),
    "stepped int": IntDistribution(0, 14, step=7),
    "log int": IntDistribution(1, 1000, log=True),
    "category": CategoricalDistribution(["adam", "sgd", None]),
    "one category": CategoricalDistribution(["x"]),
    "one float": FloatDistribution(0.5, 0.5),
}


def test_every_kind_of_parameter_survives_the_round_trip() -> None:
    cube, rng = Cube(EVERY_KIND), np.random.default_rng(0)
    raw = np.vstack([rng.random((300, len(EVERY_KIND))), np.zeros((1, len(EVERY_KIND))), np.ones((1, len(EVERY_KIND)))])
    snapped = cube.snap(raw)
    np.testing.assert_allclose(cube.snap(snapped), snapped, atol=1e-12)
    for point, real in zip(raw, snapped, strict=True):
        params = cube.to_params(point)
        for name, value in params.items():
            assert EVERY_KIND[name]._contains(EVERY_KIND[name].to_internal_repr(value)), (name, value)
        # Rounding happens before the model sees a point.
        np.testing.assert_allclose(cube.to_unit(params), real, atol=1e-12)
        back = cube.to_params(real)
        for name, value in params.items():
            assert type(back[name]) is type(value)
            assert back[name] == pytest.approx(value, rel=1e-12) if isinstance(value, float) else back[name] == value
    ends = cube.to_params(np.zeros(len(EVERY_KIND))), cube.to_params(np.ones(len(EVERY_KIND)))
    assert [(e["float"], e["int"], e["stepped int"], e["log int"], e["category"]) for e in ends] == [
        (-2.0, -3, 0, 1, "adam"),
        (3.0, 4, 14, 1000, None),
    ]


def test_values_of_a_discrete_parameter_are_equally_likely() -> None:
    cube = Cube({k: EVERY_KIND[k] for k in ("stepped", "int", "category")})
    u = (np.arange(24) + 0.5) / 24
    drawn = [cube.to_params(np.array([x, x, x])) for x in u]
    for name, count in {"stepped": 6, "int": 3, "category": 8}.items():
        values = [d[name] for d in drawn]
        assert {values.count(v) for v in values} == {count}


def test_a_category_is_a_block_of_columns() -> None:
    cube = Cube({"a": FloatDistribution(0, 1), "b": CategoricalDistribution(["x", "y", "z"])})
    np.testing.assert_array_equal(cube.encode(np.array([[0.2, 0.5], [0.7, 5 / 6]])), [[0.2, 0, 1, 0], [0.7, 0, 0, 1]])
    assert cube.nominal.tolist() == [False, True]


def test_trials_outside_the_space_are_recognised() -> None:
    space: dict[str, BaseDistribution] = {"a": FloatDistribution(0, 1), "b": CategoricalDistribution(["x", 1])}
    cube = Cube(space)

    def is_inside(**params: object) -> bool:
        wide = {"a": FloatDistribution(-9, 9), "b": CategoricalDistribution(["x", 1, "y"])}
        known = {name: wide[name] for name in params}
        return cube.contains(create_trial(params=params, distributions=known, value=0.0))

    assert is_inside(a=0.0, b="x")
    assert is_inside(a=1.0, b=1)
    assert not is_inside(a=1.1, b="x")
    assert not is_inside(a=0.5, b="y")
    assert not is_inside(a=0.5)


def test_a_space_that_is_empty_or_of_an_unknown_kind_is_refused() -> None:
    class Odd(BaseDistribution):
        def single(self) -> bool:
            return False

        def to_internal_repr(self, param_value_in_external_repr: object) -> float:
            return 0.0

        def _contains(self, param_value_in_internal_repr: float) -> bool:
            return True

    with pytest.raises(ValueError, match="at least one parameter"):
        Cube({})
    with pytest.raises(ValueError, match="odd: needed a Float, Int or Categorical distribution, got Odd"):
        Cube({"odd": Odd()})
