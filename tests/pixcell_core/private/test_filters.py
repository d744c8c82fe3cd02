"""The budget filter: exact where it says so, kept by adaptive choices, and where adding up realised settings is not."""

from __future__ import annotations

import math
import time

import hypothesis
import hypothesis.strategies as st
import pytest
from dp_accounting.rdp.rdp_privacy_accountant import compute_epsilon

from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.private import filters
from pixcell_core.private.accounting import GaussianEvent, calibrate_noise
from pixcell_core.private.closed_form import gaussian_epsilon, gaussian_mu
from pixcell_core.private.composition import pld_epsilon, rdp_at_order
from pixcell_core.private.events import total_mu_squared
from pixcell_core.private.filters import BudgetExceededError, BudgetFilter

from .adaptive_trees import adaptive_delta

DELTA = 1e-5
RATES = (1.0, 0.1, 0.001)
QUADRATURE = 1.004
"""Interpolation on the coarse grid of the oracle makes its delta at most this much too large."""


@pytest.mark.parametrize("epsilon", (0.5, 1.0, 8.0, 30.0))
def test_with_everybody_in_every_step_the_filter_is_exact(epsilon: float) -> None:
    # At its class's share of delta, which leaves 99.8 % of what the whole delta would permit.
    budget, mu = BudgetFilter(epsilon, DELTA), gaussian_mu(epsilon, 0.98 * DELTA)
    assert mu > 0.998 * gaussian_mu(epsilon, DELTA)
    assert budget.admits([GaussianEvent(1.0, (1 + 1e-9) / mu, 1)])
    assert not budget.admits([GaussianEvent(1.0, (1 - 1e-9) / mu, 1)])
    # However it is cut up: the same sum of 1 / sigma^2 is the same mechanism.
    parts = [GaussianEvent(1.0, s / mu, n) for s, n in ((3.0, 3), (2.0, 2))]
    assert sum(e.steps / e.noise_multiplier**2 for e in parts) / mu**2 == pytest.approx(5 / 6)
    left = (1 + 1e-9) / (mu * math.sqrt(1 / 6))
    assert budget.admits([*parts, GaussianEvent(1.0, left, 1)])
    assert not budget.admits([*parts, GaussianEvent(1.0, left / (1 + 1e-8), 1)])


@pytest.mark.parametrize(
    ("first", "realised", "filtered"),
    [
        # Second steps of rate 1, 0.1 and 0.001 with the least noise that each rule takes after `first`, epsilon 8.
        (GaussianEvent(1.0, 1.0, 1), (0.7505, 0.4968, 0.2778), (0.7514, 0.6972, 0.4789)),
        (GaussianEvent(0.5, 1.0, 1), (0.6633, 0.464, 0.2707), (0.8088, 0.5449, 0.3765)),
    ],
)
def test_adding_up_realised_settings_overspends_and_the_filter_does_not(
    first: GaussianEvent, realised: tuple[float, ...], filtered: tuple[float, ...]
) -> None:
    budget = BudgetFilter(8.0, DELTA)
    wrong = [GaussianEvent(q, sigma, 1) for q, sigma in zip(RATES, realised, strict=True)]
    for choice in wrong:
        # Fixed beforehand, each choice alone is within the cap and spends it: accountant and quadrature agree.
        assert 7.99 < pld_epsilon([first, choice], DELTA) <= 8.0
        assert adaptive_delta(first, [choice], 8.0) == pytest.approx(DELTA, rel=0.01)
    assert adaptive_delta(first, wrong, 8.0) > 1.65 * DELTA, "choosing on the way breaks the promise"
    assert not all(budget.admits([first, choice]) for choice in wrong)

    right = [GaussianEvent(q, sigma, 1) for q, sigma in zip(RATES, filtered, strict=True)]
    for choice in right:
        less = GaussianEvent(choice.sample_rate, 0.99 * choice.noise_multiplier, 1)
        assert budget.admits([first, choice]) and not budget.admits([first, less])
    assert adaptive_delta(first, right, 8.0) <= QUADRATURE * DELTA


@hypothesis.given(
    q=st.sampled_from((1.0, 0.7, 0.3, 0.05)),
    sigma=st.floats(0.7, 6.0),
    others=st.lists(st.tuples(st.sampled_from(RATES), st.floats(0.3, 8.0)), min_size=1, max_size=4),
    epsilon=st.sampled_from((1.0, 4.0, 8.0)),
)
@hypothesis.settings(max_examples=7, deadline=None, derandomize=True)
def test_no_adaptive_choice_among_admitted_charges_passes_delta(
    q: float, sigma: float, others: list[tuple[float, float]], epsilon: float
) -> None:
    first, budget = GaussianEvent(q, sigma, 1), BudgetFilter(epsilon, DELTA)
    hypothesis.assume(budget.admits([first]))
    choices = [GaussianEvent(*o, 1) for o in others]
    admitted = [c for c in [first, *choices] if budget.admits([first, c])]
    assert adaptive_delta(first, admitted, epsilon) <= QUADRATURE * DELTA


@hypothesis.given(
    events=st.lists(
        st.tuples(
            st.sampled_from((1.0, 0.5, 0.1)), st.sampled_from((1.0, 2.0, 5.0, 20.0)), st.integers(1, 200)
        ),
        min_size=1,
        max_size=5,
    ),
    epsilon=st.sampled_from((0.5, 2.0, 8.0)),
)
@hypothesis.settings(max_examples=7, deadline=None, derandomize=True)
def test_what_is_admitted_is_within_the_cap_and_what_is_refused_stays_refused(
    events: list[tuple[float, float, int]], epsilon: float
) -> None:
    budget, taken, refused = BudgetFilter(epsilon, DELTA), [], False
    for event in (GaussianEvent(*e) for e in events):
        taken.append(event)
        admitted = budget.admits(taken)
        assert not (admitted and refused), "more charges cannot make room"
        refused = refused or not admitted
        if admitted:
            assert pld_epsilon(taken, DELTA) <= epsilon
        if admitted and taken[0].sample_rate == 1.0:
            mu = math.sqrt(sum(e.steps / e.noise_multiplier**2 for e in taken))
            assert gaussian_epsilon(mu, DELTA) <= epsilon * (1 + 1e-9)


@hypothesis.given(
    q=st.sampled_from((1.0, 1.0, 0.3, 0.05)),
    rounds=st.integers(1, 12),
    steps=st.integers(1, 60),
    epsilon=st.floats(0.3, 12.0),
    votes=st.integers(0, 3),
)
@hypothesis.settings(max_examples=6, deadline=None, derandomize=True)
def test_a_calibrated_plan_is_admitted_at_every_round_and_to_its_end(
    q: float, rounds: int, steps: int, epsilon: float, votes: int
) -> None:
    beside = (
        [GaussianEvent(1.0, 4.0 * math.sqrt(votes) / gaussian_mu(epsilon, DELTA), votes)] if votes else []
    )
    sigma = calibrate_noise(q, rounds * steps, epsilon, DELTA, planned_beside=beside)
    budget = BudgetFilter(epsilon, DELTA)
    one_by_one = [GaussianEvent(q, sigma, 1)] * (rounds * steps)
    for done in {1, rounds // 2 + 1, rounds}:
        assert budget.admits([GaussianEvent(q, sigma, steps)] * done)
    assert budget.admits([*one_by_one, *beside])
    assert not budget.admits([*one_by_one, *beside, *beside, *one_by_one])


def test_unlike_charges_have_room_in_either_order() -> None:
    """Votes of everybody before or after sampled training; neither order may use up the budget at a stroke."""
    training, votes = GaussianEvent(0.1, 2.0, 500), GaussianEvent(1.0, 20.0, 2)
    budget = BudgetFilter(8.0, DELTA)
    for events in ([training, votes], [votes, training]):
        assert 5.0 < pld_epsilon(events, DELTA) < 7.0
        assert budget.admits(events)
    assert total_mu_squared([training]) > 20 * budget.mu_squared, "as if everybody took part it would not fit"


def test_the_order_and_its_budget_are_those_of_the_library() -> None:
    for epsilon, q, sigma in (
        (0.2, 1.0, 20.0),
        (1.0, 0.1, 3.0),
        (8.0, 1.0, 1.0),
        (8.0, 0.05, 0.6),
        (40.0, 0.9, 0.5),
    ):
        order = filters._order(epsilon, 0.02 * DELTA, q, sigma)
        budget = filters._renyi_budget(epsilon, 0.02 * DELTA, order)
        assert budget > 0.0
        assert compute_epsilon([order], [budget], 0.02 * DELTA)[0] == pytest.approx(epsilon, rel=1e-9)


@pytest.mark.parametrize(("q", "sigma", "order"), [(1.0, 3.0, 4.0), (0.1, 1.5, 4.0), (0.3, 0.8, 7.0)])
def test_renyi_divergence_at_one_order_is_the_binomial_sum(q: float, sigma: float, order: float) -> None:
    a = int(order)
    terms = [
        math.comb(a, k) * (1 - q) ** (a - k) * q**k * math.exp((k * k - k) / (2 * sigma**2))
        for k in range(a + 1)
    ]
    expected = 5 * math.log(math.fsum(terms)) / (a - 1)  # Mironov, Talwar & Zhang 2019, section 3.3
    assert rdp_at_order([GaussianEvent(q, sigma, 5)], order) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("event", (GaussianEvent(1.0, 300.0, 1), GaussianEvent(0.1, 30.0, 1)))
def test_ten_thousand_charges_are_judged_at_once(event: GaussianEvent) -> None:
    budget = BudgetFilter(8.0, DELTA)
    budget.admits([event])
    start = time.process_time()
    assert budget.admits([event] * 10_000)
    assert time.process_time() - start < 1.0


def test_a_refusal_says_what_is_spent_and_by_which_rule() -> None:
    budget, spent = BudgetFilter(4.0, DELTA), [GaussianEvent(1.0, 10.0, 50)]
    budget.require(spent)
    budget.require([])
    with pytest.raises(BudgetExceededError, match="over its cap of 4") as caught:
        budget.require([*spent, *spent], spent=spent)
    assert caught.value.code == "budget-exceeded" and isinstance(caught.value, RefusedError)
    for part in (
        f"epsilon {math.ceil(pld_epsilon(spent, DELTA) * 100) / 100:.2f} per patient",
        "is spent",
        "1e-05",
    ):
        assert part in caught.value.message, part
    mixed = [GaussianEvent(1.0, 10.0, 50), GaussianEvent(0.1, 1.0, 8)]
    assert pld_epsilon(mixed, DELTA) <= 4.0
    with pytest.raises(BudgetExceededError, match=r"as if planned beforehand.*admits less of unlike charges"):
        budget.require(mixed, spent=mixed[:1])


@pytest.mark.parametrize(
    ("epsilon", "delta"),
    [
        (0.0, DELTA),
        (-1.0, DELTA),
        (math.nan, DELTA),
        (math.inf, DELTA),
        (8.0, 0.0),
        (8.0, -1e-9),
        (8.0, 1e-4),
        (8.0, math.nan),
    ],
)
def test_a_cap_that_promises_nothing_is_refused(epsilon: float, delta: float) -> None:
    with pytest.raises(BadInputError):
        BudgetFilter(epsilon, delta)
