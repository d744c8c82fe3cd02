"""The Gaussian closed form against arbitrary precision and another library, on both sides of every rounding."""

from __future__ import annotations

import math

import mpmath
import pytest
from dp_accounting import gaussian_mechanism

from pixcell_core.private import closed_form
from pixcell_core.private.closed_form import gaussian_delta, gaussian_epsilon, gaussian_mu

MUS = (1e-3, 0.02, 0.3, 1.0, 1.67, 4.0, 14.0, 40.0)


def precise_delta(epsilon: float, mu: float) -> float:
    """Balle & Wang 2018, theorem 8, with 60 digits."""
    with mpmath.workdps(60):
        e, m = mpmath.mpf(epsilon), mpmath.mpf(mu)
        return float(mpmath.ncdf(m / 2 - e / m) - mpmath.exp(e) * mpmath.ncdf(-m / 2 - e / m))


@pytest.mark.parametrize("mu", MUS)
@pytest.mark.parametrize("share", (0.0, 0.1, 0.5, 1.0, 2.0))
def test_delta_to_eleven_digits(mu: float, share: float) -> None:
    epsilon = share * (mu * mu / 2 + 4 * mu)
    expected = precise_delta(epsilon, mu)
    assert gaussian_delta(epsilon, mu) == pytest.approx(expected, rel=1e-9, abs=1e-18)


@pytest.mark.parametrize("mu", MUS)
@pytest.mark.parametrize("delta", (1e-5, 1e-8))
def test_epsilon_and_mu_invert_each_other_on_the_safe_side(mu: float, delta: float) -> None:
    epsilon = gaussian_epsilon(mu, delta)
    assert precise_delta(epsilon, mu) <= delta * (1 + 1e-8)
    back = gaussian_mu(epsilon, delta)
    if epsilon > 0.0:
        assert back == pytest.approx(mu, rel=1e-7)
    assert gaussian_epsilon(gaussian_mu(8.0, delta), delta) <= 8.0 * (1 + 1e-12)


@pytest.mark.parametrize("sigma", (0.5, 1.0, 3.0, 20.0))
def test_epsilon_equals_dp_accounting(sigma: float) -> None:
    theirs = gaussian_mechanism.get_epsilon_gaussian(sigma, 1e-5)
    assert gaussian_epsilon(1.0 / sigma, 1e-5) == pytest.approx(theirs, rel=1e-6)


def test_nothing_released_costs_nothing() -> None:
    assert gaussian_delta(0.0, 0.0) == 0.0
    assert gaussian_epsilon(1e-9, 1e-5) == 0.0


def test_a_wrong_formula_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = precise_delta(4.0, 1.0)
    monkeypatch.setattr(closed_form, "_mills", lambda y: 1.0 / y)  # the first term of the series alone
    assert abs(gaussian_delta(4.0, 1.0) / right - 1.0) > 0.05
    assert math.isfinite(gaussian_mu(8.0, 1e-5))
