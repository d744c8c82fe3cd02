"""Composed Gaussian mechanisms by dp-accounting: privacy loss distributions, and Renyi divergences beside them.

Both are upper bounds for a sequence whose settings were fixed beforehand: the privacy loss distribution by its
pessimistic discretisation (Doroshenko et al. 2022, "Connect the dots"), the Renyi bound by Mironov 2017 with the
conversion of Canonne, Kamath & Steinke 2020. What holds for settings chosen on the way is `filters.BudgetFilter`'s.

Steps in which everybody takes part are merged before the library sees them: they are one Gaussian mechanism, so that a
thousand rounds of different noise cost one distribution. Steps on a sample cost a distribution for each (q, sigma).
A grid of interval g widens the loss of each of T steps, always upwards, as if T g^2 / 6 were added to the sum of
(q / sigma)^2 (measured; tests hold the consequence). g follows the typical q / sigma of a step, so that epsilon comes
out less than 0.1 % too large, or 1 % where the settings are too many for so fine a grid.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Final

from pixcell_core.private.events import GaussianEvent, group_events, total_mu_squared

COARSEST_GRID: Final = 1e-3
FINEST_GRID: Final = 1e-5
_COARSEST_OF_MANY = 5e-3
_SHARE_OF_STEP = 0.1
_SHARE_OF_STEP_IF_MANY = 0.3
_NEGLIGIBLE = 6e-4
_MANY_GROUPS = 64
_ORDERS_OF_MANY = (*range(2, 13), 16, 24, 32, 64, 128)


def pld_epsilon(events: Sequence[GaussianEvent], delta: float, grid: float | None = None) -> float:
    """Return epsilon at `delta` by privacy loss distributions; 0 for no events.

    Args:
        events: all of them, in any order.
        delta: above 0.
        grid: discretisation interval of the privacy loss; `grid_for` when absent.
    """
    merged = merge_full(events)
    if not merged:
        return 0.0
    interval = grid or grid_for(merged)
    with quiet_library() as library:
        from dp_accounting.pld import PLDAccountant

        account = PLDAccountant(
            library.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=interval
        )
        return float(_composed(account, library, merged).get_epsilon(delta))


def grid_for(merged: Sequence[GaussianEvent]) -> float:
    """Return the discretisation interval of the privacy loss for `merged` events; the module says by which rule."""
    many = len(merged) > _MANY_GROUPS
    coarsest = _COARSEST_OF_MANY if many else COARSEST_GRID
    sampled = [e for e in merged if e.sample_rate < 1.0]
    steps = sum(e.steps for e in sampled)
    if not steps:
        return coarsest
    typical = math.sqrt(sum(e.steps * (e.sample_rate / e.noise_multiplier) ** 2 for e in sampled) / steps)
    share = _SHARE_OF_STEP_IF_MANY if many else _SHARE_OF_STEP
    # Below the second bound the grid itself costs less than an epsilon of 0.001, however little was spent.
    return max(FINEST_GRID, min(coarsest, max(share * typical, _NEGLIGIBLE / math.sqrt(steps))))


def rdp_epsilon(events: Sequence[GaussianEvent], delta: float) -> float:
    """Return epsilon at `delta` by Renyi accounting; fewer orders, hence a looser bound, for many (q, sigma)."""
    merged = merge_full(events)
    if not merged:
        return 0.0
    orders = _ORDERS_OF_MANY if len(merged) > _MANY_GROUPS else None
    return float(_renyi(merged, orders).get_epsilon(delta))


def rdp_at_order(events: Sequence[GaussianEvent], order: float) -> float:
    """Return the Renyi divergence of order `order` of all `events` together; 0 for no events."""
    return rdp_at_orders(events, (order,))[0]


def rdp_at_orders(events: Sequence[GaussianEvent], orders: Sequence[float]) -> list[float]:
    """Return the Renyi divergence of each of `orders`, of all `events` together; 0 for no events."""
    merged = merge_full(events)
    return [float(value) for value in _renyi(merged, orders).rdp] if merged else [0.0] * len(orders)


def merge_full(events: Sequence[GaussianEvent]) -> list[GaussianEvent]:
    """Return equivalent events in which all steps with q = 1 stand as one (q, sigma).

    N(0, s^2 I) and its shift compose exactly: any steps with the same sum of 1 / sigma^2 have one privacy loss.
    """
    grouped = group_events(events)
    full = [e for e in grouped if e.sample_rate == 1.0]
    sampled = [e for e in grouped if e.sample_rate < 1.0]
    if not full:
        return sampled
    return [*sampled, GaussianEvent(1.0, 1.0 / math.sqrt(total_mu_squared(full)), 1)]


@contextmanager
def quiet_library() -> Iterator[ModuleType]:
    """Give dp_accounting, imported when first needed, without its warnings about its own internals."""
    names = ("absl", "dp_accounting")
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            import dp_accounting

            yield dp_accounting
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def _renyi(merged: Sequence[GaussianEvent], orders: Sequence[float] | None) -> Any:
    with quiet_library() as library:
        from dp_accounting.rdp import RdpAccountant

        relation = library.NeighboringRelation.ADD_OR_REMOVE_ONE
        return _composed(RdpAccountant(orders=orders, neighboring_relation=relation), library, merged)


def _composed(account: Any, library: ModuleType, grouped: Sequence[GaussianEvent]) -> Any:
    for event in grouped:
        mechanism: Any = library.GaussianDpEvent(event.noise_multiplier)
        if event.sample_rate < 1.0:
            mechanism = library.PoissonSampledDpEvent(event.sample_rate, mechanism)
        account.compose(library.SelfComposedDpEvent(mechanism, event.steps))
    return account
