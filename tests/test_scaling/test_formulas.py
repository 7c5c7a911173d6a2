import numpy as np
import pytest

from scaling.laws.formulas import DataConstrainedLaw, HPLaw, KaplanLaw, LogLinearLaw, LossLaw, PowerLaw

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


def test_a_log_linear_law_is_its_formula() -> None:
    assert float(LogLinearLaw(50.0, 0.1, 0.05)(1e9, 2e10)) == pytest.approx(50 * 1e9**-0.1 * 2e10**-0.05)


def test_kaplans_law_is_its_formula_and_its_two_limits() -> None:
    law = KaplanLaw(N_c=8.8e13, D_c=5.4e13, alpha_N=0.076, alpha_D=0.095)
    by_hand = ((8.8e13 / 1e9) ** (0.076 / 0.095) + 5.4e13 / 2e10) ** 0.095
    assert float(law(1e9, 2e10)) == pytest.approx(by_hand)
    assert float(law(1e9, 1e30)) == pytest.approx((8.8e13 / 1e9) ** 0.076)
    assert float(law(1e30, 2e10)) == pytest.approx((5.4e13 / 2e10) ** 0.095)


@pytest.mark.parametrize("C", [1e14, 1e19, 1e25])
def test_kaplans_optimum_spends_c_and_every_neighbour_is_worse(C: float) -> None:
    law = KaplanLaw(N_c=8.8e13, D_c=5.4e13, alpha_N=0.076, alpha_D=0.095)
    N, D = law.optimum(C)
    assert 6 * float(N) * float(D) == pytest.approx(C)
    for factor in (0.5, 0.9, 1.1, 2.0):
        assert law(N * factor, D / factor) > law(N, D)


def test_repeated_data_are_worth_less_and_finally_nothing() -> None:
    law = DataConstrainedLaw(E=1.8, A=480.0, B=2100.0, alpha=0.35, beta=0.37, R_D=15.0, R_N=5.0)
    # N is below the optimum for U tokens, so no parameters are in excess.
    N, U = 1e8, 1e10
    assert float(law(N, U)) == pytest.approx(float(LAW(N, U)))
    assert float(law(N, U, unique=2 * U)) == float(law(N, U))
    by_hand = U + U * 15 * (1 - np.exp(-3 / 15))
    assert float(law(N, 4 * U, unique=U)) == pytest.approx(float(LAW(N, by_hand)))
    epochs = law(N, U * np.array([1, 2, 4, 16, 64, 1e4]), unique=U)
    assert np.all(np.diff(epochs) <= 0)
    # U distinct tokens are worth at most U (1 + R_D).
    assert float(epochs[-1]) == pytest.approx(float(LAW(N, 16 * U)))
    # Parameters in excess of the data are worth less, too.
    assert float(law(1e13, U, unique=U)) > float(LAW(1e13, U))
