"""Composed events against the library called directly, the closed form and Opacus; grids and merging cost what they say."""

from __future__ import annotations

import math
import time
import warnings

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant

from pixcell_core.private import composition
from pixcell_core.private.closed_form import gaussian_epsilon
from pixcell_core.private.composition import grid_for, merge_full, pld_epsilon, rdp_at_order, rdp_epsilon
from pixcell_core.private.events import GaussianEvent, group_events, total_mu_squared

DELTA = 1e-5
MIXED = [
    GaussianEvent(1.0, 30.0, 20),
    GaussianEvent(0.2, 6.0, 40),
    GaussianEvent(1.0, 25.0, 2),
    GaussianEvent(0.05, 2.0, 60),
    GaussianEvent(0.2, 9.0, 40),
]


def direct(events: list[GaussianEvent], grid: float) -> float:
    """Every event handed to dp-accounting on its own, ungrouped and unmerged."""
    account = PLDAccountant(
        dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=grid
    )
    for event in events:
        gaussian = dp_accounting.GaussianDpEvent(event.noise_multiplier)
        sampled = dp_accounting.PoissonSampledDpEvent(event.sample_rate, gaussian)
        account.compose(gaussian if event.sample_rate == 1.0 else sampled, event.steps)
    return float(account.get_epsilon(DELTA))


def test_heterogeneous_rounds_equal_the_library_called_directly() -> None:
    fine = direct(MIXED, 1e-4)
    found = pld_epsilon(MIXED, DELTA)
    assert fine - 1e-4 <= found <= 1.001 * fine
    assert found == pld_epsilon(list(reversed(MIXED)), DELTA) == pld_epsilon([*MIXED[:2], *MIXED[2:]], DELTA)
    assert rdp_epsilon(MIXED, DELTA) > found


def test_heterogeneous_rounds_lie_below_opacus() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.accountants import RDPAccountant

        rdp = RDPAccountant()
        rdp.history = [(e.noise_multiplier, e.sample_rate, e.steps) for e in MIXED]
        theirs = rdp.get_epsilon(delta=DELTA)
    # Its orders are coarser; ours are a subset of what the bound may be minimised over.
    assert pld_epsilon(MIXED, DELTA) < rdp_epsilon(MIXED, DELTA) <= theirs * 1.01


def test_merging_full_steps_changes_nothing() -> None:
    full = [GaussianEvent(1.0, s, n) for s, n in ((8.0, 10), (20.0, 60), (12.0, 20), (5.0, 1))]
    merged = merge_full(full)
    assert len(merged) == 1 and merged[0].steps == 1
    assert total_mu_squared(merged) == pytest.approx(total_mu_squared(full), rel=1e-14)
    assert pld_epsilon(full, DELTA) == pytest.approx(direct(full, 1e-4), abs=1e-3)
    assert gaussian_epsilon(math.sqrt(total_mu_squared(full)), DELTA) <= pld_epsilon(full, DELTA) + 1e-9
    sampled = [e for e in MIXED if e.sample_rate < 1.0]
    assert merge_full(sampled) == group_events(sampled), (
        "sampled steps must not be merged: they are not Gaussian"
    )


def test_a_wrong_merge_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = direct(MIXED, 1e-4)

    def merged_too_much(events: list[GaussianEvent]) -> list[GaussianEvent]:
        return merge_full([GaussianEvent(1.0, e.noise_multiplier / e.sample_rate, e.steps) for e in events])

    monkeypatch.setattr(composition, "merge_full", merged_too_much)
    assert pld_epsilon(MIXED, DELTA) < exact - 0.05, "sampling as if it divided mu promises too much"


@pytest.mark.parametrize(
    ("q", "sigma", "steps"),
    [(0.01, 10.0, 100_000), (0.001, 10.0, 100_000), (0.05, 10.0, 10_000), (0.2, 4.0, 200), (0.5, 40.0, 3000)],
)
def test_the_grid_costs_less_than_a_thousandth_and_only_upwards(q: float, sigma: float, steps: int) -> None:
    events = [GaussianEvent(q, sigma, steps)]
    grid = grid_for(events)
    finer = pld_epsilon(events, DELTA, max(grid / 10, 2e-6))
    assert finer - 1e-4 <= pld_epsilon(events, DELTA) <= 1.001 * finer + 2e-4
    if steps == 100_000:
        assert pld_epsilon(events, DELTA, 1e-3) > finer + 0.05, "one grid for all would overstate long runs"


def test_many_different_settings_take_a_coarser_grid_and_stay_an_upper_bound() -> None:
    events = [GaussianEvent(0.1 + 0.001 * i, 12.0 + 0.1 * i, 2) for i in range(70)]
    assert grid_for(group_events(events)) > 2 * grid_for(group_events(events[:60]))
    fine = pld_epsilon(events, DELTA, 1e-3)
    assert fine <= pld_epsilon(events, DELTA) <= 1.01 * fine
    assert rdp_epsilon(events, DELTA) > fine


@pytest.mark.parametrize("order", (2.0, 5.5, 40.0))
def test_the_renyi_divergence_of_full_steps_is_linear_in_the_order(order: float) -> None:
    events = [GaussianEvent(1.0, 4.0, 3), GaussianEvent(1.0, 7.0, 5)]
    assert rdp_at_order(events, order) == pytest.approx(order * (3 / 16 + 5 / 49) / 2)


def test_nothing_costs_nothing() -> None:
    assert pld_epsilon([], DELTA) == rdp_epsilon([], DELTA) == rdp_at_order([], 4.0) == 0.0


def test_a_thousand_rounds_of_different_noise_are_added_up_at_once() -> None:
    events = [GaussianEvent(1.0, 60.0 + i / 10, 1 + i % 20) for i in range(1000)]
    pld_epsilon(events[:1], DELTA)
    start = time.process_time()
    found = pld_epsilon(events, DELTA)
    assert time.process_time() - start < 1.0
    assert found == pytest.approx(gaussian_epsilon(math.sqrt(total_mu_squared(events)), DELTA), abs=1e-3)
