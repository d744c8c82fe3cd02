"""Composed Gaussian mechanisms by dp-accounting: privacy loss distributions, and Renyi divergences beside them.

Both are upper bounds for a sequence whose settings were fixed beforehand: the privacy loss distribution by its
pessimistic discretisation (Doroshenko et al. 2022, "Connect the dots"), the Renyi bound by Mironov 2017 with the
conversion of Canonne, Kamath & Steinke 2020. What holds for settings chosen on the way is `filters.BudgetFilter`'s.

Steps in which everybody takes part are merged before the library sees them: they are one Gaussian mechanism, so that a
thousand rounds of different noise cost one distribution. Steps on a sample cost a distribution for each (q, sigma).
Each of T such steps on a grid of interval g adds about g^2 to epsilon (measured; tests hold it), always upwards: g is
chosen so that this stays below 0.001, or below 0.05 where the settings are too many for so fine a grid.
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
_EXCESS = 1e-3
_MANY_GROUPS = 64
_COARSEST_OF_MANY = 5e-3
_EXCESS_OF_MANY = 5e-2
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
    """Return the discretisation interval with which `merged` events cost at most 0.001 too much (0.05 where many)."""
    many = len(merged) > _MANY_GROUPS
    steps = max(1, sum(e.steps for e in merged if e.sample_rate < 1.0))
    finest = math.sqrt((_EXCESS_OF_MANY if many else _EXCESS) / steps)
    return max(FINEST_GRID, min(_COARSEST_OF_MANY if many else COARSEST_GRID, finest))


def rdp_epsilon(events: Sequence[GaussianEvent], delta: float) -> float:
    """Return epsilon at `delta` by Renyi accounting; fewer orders, hence a looser bound, for many (q, sigma)."""
    merged = merge_full(events)
    if not merged:
        return 0.0
    orders = _ORDERS_OF_MANY if len(merged) > _MANY_GROUPS else None
    return float(_renyi(merged, orders).get_epsilon(delta))


def rdp_at_order(events: Sequence[GaussianEvent], order: float) -> float:
    """Return the Renyi divergence of order `order` of all `events` together; 0 for no events."""
    merged = merge_full(events)
    return float(_renyi(merged, (order,)).rdp[0]) if merged else 0.0


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
