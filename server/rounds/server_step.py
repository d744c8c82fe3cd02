"""The server's step: from the aggregate of the updates to the next adapter (Reddi et al. 2021, algorithm 2).

FedAvg adds the aggregate. FedAdam takes it for a gradient of the server's own optimiser, without bias correction as in
the paper, with v starting at zero. Its moments are public: they are functions of released updates.

The moments are kept in float32, as they stand on disk, and every step reads them from there: a study that was stopped
and went on makes exactly the numbers of one that was not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pixcell_core.contracts.spool import Arrays, flatten, unflatten
from pixcell_core.contracts.study import AggregationSettings
from pixcell_core.errors import BadInputError
from server.rounds.aggregation import BLOCK, Aggregate

BETA_1 = 0.9
BETA_2 = 0.99
TAU = 1e-3
"""The degree of adaptivity; the paper's default."""

FIRST, SECOND = "m", "v"
"""Names of the two moments among the tensors of the optimiser; each is flat, shape (d,)."""


@dataclass(frozen=True)
class Stepped:
    """The next adapter, and the optimiser's tensors after the step (None for FedAvg)."""

    adapter: Arrays
    state: Arrays | None


def server_step(
    settings: AggregationSettings, adapter: Arrays, update: Aggregate, state: Arrays | None
) -> Stepped:
    """Take one step from `adapter` along `update`, shape (d,). `state` is what the last committed round left.

    Raises `BadInputError` where the kept moments are not of this adapter.
    """
    shapes = {name: value.shape for name, value in adapter.items()}
    flat = flatten(adapter)
    moments = None
    if settings.server_optimizer == "adam":
        moments = {name: np.zeros_like(flat) for name in (FIRST, SECOND)} if state is None else _own(state)
        if any(moment.shape != flat.shape for moment in moments.values()):
            raise _unfit()
    rate = settings.server_learning_rate
    wide = np.empty(min(BLOCK, flat.size), dtype=np.float64)
    for start in range(0, flat.size, BLOCK):
        part = slice(start, start + BLOCK)
        delta = update[part]
        if moments is None:
            step = wide[: delta.size]
            np.multiply(delta, rate, out=step)
        else:
            first = BETA_1 * moments[FIRST][part].astype(np.float64) + (1.0 - BETA_1) * delta
            second = BETA_2 * moments[SECOND][part].astype(np.float64) + (1.0 - BETA_2) * delta**2
            moments[FIRST][part], moments[SECOND][part] = first, second
            # From the kept numbers, not from those before rounding: a restart has only these.
            step = rate * moments[FIRST][part].astype(np.float64)
            step /= np.sqrt(moments[SECOND][part].astype(np.float64)) + TAU
        step += flat[part]
        flat[part] = step
    return Stepped(unflatten(flat, shapes), moments)


def _own(state: Arrays) -> Arrays:
    if set(state) != {FIRST, SECOND}:
        raise _unfit()
    return {name: value.copy() for name, value in state.items()}


def _unfit() -> BadInputError:
    return BadInputError(
        "The kept tensors of the server's optimiser do not fit the adapter.",
        hint="Restore the run's folder from a copy, or start the study anew under another --id.",
        code="rounds-broken",
    )
