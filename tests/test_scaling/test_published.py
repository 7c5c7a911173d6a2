import numpy as np
import pytest

from scaling.laws.published import PUBLISHED_LAWS, get_published_law, list_published_laws


def test_step_law_at_a_billion_parameters_and_a_hundred_billion_tokens() -> None:
    lr, batch = get_published_law("step-law")(1e9, 1e11)
    assert lr is not None
    assert batch is not None
    # By hand: ln lr = ln 1.79 - 0.713 * 20.72327 + 0.307 * 25.32844; ln B = ln 0.58 + 0.571 * 25.32844.
    assert float(np.log(lr)) == pytest.approx(0.582216 - 14.775689 + 7.775830, abs=1e-5)
    assert float(np.log(batch)) == pytest.approx(-0.544727 + 14.462538, abs=1e-5)


def test_deepseek_depends_on_compute_alone() -> None:
    law = get_published_law("deepseek")
    one, other = law(1e9, 1e11), law(1e10, 1e10)
    for a, b in zip(one, other, strict=True):
        assert a is not None
        assert b is not None
        assert float(a) == pytest.approx(float(b))
    # C = 1e21, so the powers of ten are easy to compute by hand.
    lr, batch = law(1e9, 1e12 / 6)
    assert lr is not None
    assert batch is not None
    assert float(lr) == pytest.approx(0.3118 * 10**-2.625, rel=1e-6)
    assert float(batch) == pytest.approx(0.2920 * 10**6.8691, rel=1e-6)


def test_kaplan_states_no_batch_and_its_rate_is_never_negative() -> None:
    lr, batch = get_published_law("kaplan")([np.e**16, 1e12], 1e10)
    assert batch is None
    assert lr is not None
    assert lr == pytest.approx([0.003239 - 0.0001395 * 16, 0.0])


@pytest.mark.parametrize("law", PUBLISHED_LAWS, ids=lambda law: law.name)
def test_every_law_broadcasts_and_moves_by_the_exponents_it_states(law: object) -> None:
    assert law in PUBLISHED_LAWS
    known = get_published_law(law.name)  # type: ignore[attr-defined]
    N, D = np.array([1e8, 1e9])[:, None], np.array([1e9, 1e10, 1e11])
    for name, values in zip(("lr", "batch_tokens"), known(N, D), strict=True):
        if values is None:
            continue
        assert values.shape == (2, 3)
        stated = known.exponents.get(name)
        if stated is not None:
            assert np.log10(values[1, 0] / values[0, 0]) == pytest.approx(stated["N"])
            assert np.log10(values[0, 1] / values[0, 0]) == pytest.approx(stated["D"])
    assert known.lr or known.batch_tokens or known.exponents
    assert "arXiv" in known.source
    assert known.confidence


def test_a_range_is_known_or_not() -> None:
    law = get_published_law("step-law")
    assert law.covers(1e9, 1e10) is True
    assert law.covers(7e9, 1e10) is False
    assert get_published_law("power-lines").covers(1e9, 1e10) is None


def test_names_are_unique_and_a_wrong_one_gets_the_nearest() -> None:
    assert len(set(list_published_laws())) == len(list_published_laws()) == len(PUBLISHED_LAWS)
    with pytest.raises(ValueError, match=r"did you mean step-law\? known are step-law, deepseek"):
        get_published_law("steplaw")
    with pytest.raises(ValueError, match="positive finite D"):
        get_published_law("step-law")(1e9, 0.0)
