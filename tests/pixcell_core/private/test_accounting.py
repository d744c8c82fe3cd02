"""The accountant: against the closed form, against two others, and a stop when they contradict each other."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings

import hypothesis
import hypothesis.strategies as st
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from pixcell_core.errors import BadInputError, PixcellError, RefusedError
from pixcell_core.private import accounting
from pixcell_core.private.accounting import (
    AccountantsDisagreeError,
    Epsilon,
    GaussianEvent,
    calibrate_noise,
    epsilon,
    group_events,
    largest_delta,
)
from pixcell_core.private.composition import rdp_epsilon
from pixcell_core.private.filters import BudgetFilter

DELTA = 1e-5


def exact_gaussian(mu: float, delta: float) -> float:
    """Balle & Wang 2018, theorem 8, solved by an independent root finder."""

    def overshoot(eps: float) -> float:
        return float(norm.cdf(mu / 2 - eps / mu) - math.exp(eps + norm.logcdf(-mu / 2 - eps / mu)) - delta)

    return float(brentq(overshoot, 0.0, 500.0))


@pytest.mark.parametrize(
    "events",
    [
        [GaussianEvent(1.0, 8.0, 50)],
        [GaussianEvent(1.0, 4.25, 50)],
        [GaussianEvent(1.0, 50.0, 1)],
        [GaussianEvent(1.0, 1.0, 1)],
        [GaussianEvent(1.0, 20.0, 20), GaussianEvent(1.0, 30.0, 60), GaussianEvent(1.0, 12.0, 20)],
    ],
)
def test_full_participation_equals_the_closed_form_from_above(events: list[GaussianEvent]) -> None:
    mu = math.sqrt(sum(e.steps / e.noise_multiplier**2 for e in events))
    exact = exact_gaussian(mu, DELTA)
    found = epsilon(events, DELTA).value
    assert exact - 1e-6 <= found <= exact + 2e-3


@pytest.mark.parametrize(
    ("q", "sigma", "steps"), [(0.2, 4.0, 200), (0.1, 2.0, 100), (0.5, 8.0, 300), (0.01, 1.0, 1000)]
)
def test_sampled_steps_lie_between_opacus_prv_and_opacus_rdp(q: float, sigma: float, steps: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.accountants import PRVAccountant, RDPAccountant

        prv, rdp = PRVAccountant(), RDPAccountant()
        prv.history = rdp.history = [(sigma, q, steps)]
        prv_value, rdp_value = prv.get_epsilon(delta=DELTA), rdp.get_epsilon(delta=DELTA)
    found = epsilon([GaussianEvent(q, sigma, steps)], DELTA).value
    assert found <= rdp_value
    # Opacus' numerical accountant promises its value within eps_error = 0.01.
    assert found == pytest.approx(prv_value, abs=0.02 + 0.01 * prv_value)


@hypothesis.given(
    q=st.sampled_from([0.05, 0.2, 0.7, 1.0]),
    sigma=st.floats(0.8, 60.0),
    steps=st.integers(1, 300),
    more=st.integers(1, 50),
)
@hypothesis.settings(max_examples=12, deadline=None)
def test_more_steps_cost_more_and_the_cross_check_holds(
    q: float, sigma: float, steps: int, more: int
) -> None:
    less = epsilon([GaussianEvent(q, sigma, steps)], DELTA).value
    both = epsilon([GaussianEvent(q, sigma, steps), GaussianEvent(q, sigma, more)], DELTA).value
    assert 0.0 <= less <= both
    assert both == epsilon([GaussianEvent(q, sigma, steps + more)], DELTA).value


@pytest.mark.parametrize(
    ("q", "steps", "target"), [(1.0, 60, 8.0), (1.0, 3, 1.0), (0.2, 200, 4.0), (0.05, 500, 2.0)]
)
def test_calibration_round_trip(q: float, steps: int, target: float) -> None:
    sigma = calibrate_noise(q, steps, target, DELTA)
    assert epsilon([GaussianEvent(q, sigma, steps)], DELTA).value <= target
    assert BudgetFilter(target, DELTA).admits([GaussianEvent(q, sigma, steps)])
    assert not BudgetFilter(target, DELTA).admits([GaussianEvent(q, sigma * 0.998, steps)])


def test_calibration_counts_what_was_spent() -> None:
    spent = [GaussianEvent(1.0, 10.0, 50)]
    fresh = calibrate_noise(1.0, 50, 4.0, DELTA)
    after = calibrate_noise(1.0, 50, 4.0, DELTA, already_spent=spent)
    assert after > fresh
    assert epsilon([*spent, GaussianEvent(1.0, after, 50)], DELTA).value <= 4.0
    with pytest.raises(RefusedError, match="already spent"):
        calibrate_noise(1.0, 50, 2.0, DELTA, already_spent=spent)


def test_a_renyi_value_below_the_official_one_is_a_bug_and_gives_no_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(accounting, "rdp_epsilon", lambda grouped, delta: 1.0)
    with pytest.raises(AccountantsDisagreeError, match="no number is reported") as caught:
        epsilon([GaussianEvent(1.0, 8.0, 50)], DELTA)
    assert not isinstance(caught.value, PixcellError), (
        "a bug of ours must exit 5, not look like a user's error"
    )


def test_an_epsilon_is_never_read_without_unit_delta_and_limits() -> None:
    statement = str(Epsilon(7.981, 1e-5))
    for part in (
        "7.99",
        "per patient",
        "delta 1e-05",
        "add-or-remove-one",
        "covers",
        "does not cover",
        "PLD",
    ):
        assert part in statement, part
    assert "embeddings" in statement and "another site" in statement


def test_an_absurd_epsilon_is_bounded_from_above_and_says_so() -> None:
    found = epsilon([GaussianEvent(1.0, 0.01, 1000)], DELTA)
    assert found.value > 1e6 and found.accountant == "Renyi upper bound"
    assert "Renyi upper bound" in str(found)
    for target in (0.0, -1.0, math.nan, math.inf, 1e4):
        with pytest.raises(BadInputError, match="target epsilon"):
            calibrate_noise(1.0, 60, target, DELTA)


def test_nothing_spent_is_zero() -> None:
    assert epsilon([], DELTA).value == 0.0


@pytest.mark.parametrize(("delta", "patients"), [(0.0, None), (1e-4, None), (1e-5, 20_000), (-1e-6, None)])
def test_a_delta_that_promises_too_little_is_refused(delta: float, patients: int | None) -> None:
    with pytest.raises(BadInputError, match="delta"):
        epsilon([GaussianEvent(1.0, 8.0, 50)], delta, patients=patients)


@pytest.mark.parametrize("patients", (0, 1))
def test_a_cohort_of_one_has_no_epsilon(patients: int) -> None:
    with pytest.raises(BadInputError, match="about one person"):
        epsilon([GaussianEvent(1.0, 8.0, 50)], DELTA, patients=patients)


def test_a_number_that_is_none_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "pld_epsilon", lambda *events, **settings: math.nan)
    with pytest.raises(AccountantsDisagreeError):
        epsilon([GaussianEvent(1.0, 8.0, 50)], DELTA)
    monkeypatch.undo()
    monkeypatch.setattr(accounting, "rdp_epsilon", lambda *events: math.nan)
    with pytest.raises(AccountantsDisagreeError):
        epsilon([GaussianEvent(1.0, 8.0, 50)], DELTA)


@pytest.mark.parametrize(
    "event",
    [
        GaussianEvent(1e-4, 10.0, 100_000),
        GaussianEvent(1e-4, 1000.0, 3000),
        GaussianEvent(1e-3, 100.0, 100_000),
        GaussianEvent(0.5, 1e5, 100_000),
        GaussianEvent(1.0, 1e5, 1),
    ],
)
def test_next_to_nothing_is_no_contradiction(event: GaussianEvent) -> None:
    """On the usual grid the discretisation of so little outweighs it, and Renyi accounting comes out smaller."""
    found = epsilon([event], DELTA)
    assert found.value <= rdp_epsilon([event], DELTA) + 1e-4
    assert found.accountant == "dp-accounting PLD"


def test_the_largest_delta_is_a_tenth_of_one_over_n() -> None:
    assert largest_delta(60) == 1e-5
    assert largest_delta(100_000) == pytest.approx(1e-6)


def test_events_group_by_rate_and_noise() -> None:
    a, b = GaussianEvent(1.0, 8.0, 20), GaussianEvent(0.5, 8.0, 3)
    assert group_events([a, b, a]) == [b, GaussianEvent(1.0, 8.0, 40)]
    for wrong in ((0.0, 1.0, 1), (1.1, 1.0, 1), (1.0, 0.0, 1), (1.0, math.inf, 1), (1.0, 1.0, 0)):
        with pytest.raises(BadInputError):
            GaussianEvent(*wrong)


def test_the_library_is_imported_late_and_quietly() -> None:
    code = (
        "import sys; from pixcell_core.private import accounting as a\n"
        "assert not any(m in sys.modules for m in ('dp_accounting', 'torch', 'scipy'))\n"
        "print(a.epsilon([a.GaussianEvent(0.2, 4.0, 200)], 1e-5).value)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(3.07, abs=0.01) and done.stderr == ""
