import numpy as np
import pytest

from scaling.laws import HPLaw, LossLaw, PowerLaw

LAW = LossLaw(E=1.8, A=480.0, B=2100.0, alpha=0.35, beta=0.37)


def test_a_power_law_is_its_formula() -> None:
    np.testing.assert_allclose(PowerLaw(3.0, -0.5)([1.0, 4.0, 9.0]), [3.0, 1.5, 1.0])


def test_a_loss_law_is_its_formula_and_broadcasts() -> None:
    by_hand = 1.8 + 480 * 1e9**-0.35 + 2100 * 2e10**-0.37
    assert float(LAW(1e9, 2e10)) == pytest.approx(by_hand, rel=1e-14)
    assert LAW(np.ones((3, 1)), np.ones(4)).shape == (3, 4)


@pytest.mark.parametrize("C", [1e14, 1e19, 1e25])
def test_the_optimum_spends_c_and_every_neighbour_is_worse(C: float) -> None:
    N, D = LAW.optimum(C)
    assert 6 * float(N) * float(D) == pytest.approx(C)
    for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0):
        assert LAW(N * factor, D / factor) > LAW(N, D)


def test_the_optimum_of_equal_terms_is_the_square_root() -> None:
    N, D = LossLaw(E=1, A=5, B=5, alpha=0.3, beta=0.3).optimum([6e10, 6e12])
    np.testing.assert_allclose(N, [1e5, 1e6])
    np.testing.assert_allclose(D, [1e5, 1e6])


def test_a_law_without_a_falling_term_has_no_optimum() -> None:
    with pytest.raises(ValueError, match="above 0"):
        LossLaw(E=1, A=5, B=5, alpha=0.0, beta=0.3).optimum(1e18)
    with pytest.raises(ValueError, match="positive FLOPs"):
        LAW.optimum(-1.0)


def test_an_hp_law_is_two_power_laws() -> None:
    lr, batch = HPLaw(1.79, -0.713, 0.307, 0.58, 0.0, 0.571)(1e9, [1e11, 2e11])
    assert float(lr[0]) == pytest.approx(1.79 * 1e9**-0.713 * 1e11**0.307)
    np.testing.assert_allclose(batch[1] / batch[0], 2**0.571)
