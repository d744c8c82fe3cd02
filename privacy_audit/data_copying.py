"""C_T, the data-copying statistic of Meehan, Chaudhuri & Dasgupta (AISTATS 2020), with a p-value by patients.

Space is cut into cells by k-means. Inside a cell the distances to the nearest training tile are compared between released
and holdout tiles by a z-scored Mann-Whitney statistic; cells are averaged by their share of the holdout, and cells with
too few released tiles are left out. The paper fits the cells on training tiles; here they are fitted on training and
holdout together, so that swapping the labels of patients leaves them as they are and the permutation is exact.

Legend: s released tiles, m sampled real tiles, P patients, k cells.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from privacy_audit.neighbours import patient_minima

LEAST_RELEASED = 20  # tau of the paper: a cell with fewer released tiles says nothing
_PER_CELL = 100  # released tiles that a cell should hold on average
_MOST_CELLS = 10
_SEED = 0
Labels = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


def cells_for(released: int, real: int) -> int:
    """k: about 100 released and as many real tiles to a cell, at least one and at most ten cells."""
    return int(np.clip(min(released, real) // _PER_CELL, 1, _MOST_CELLS))


def cells(real: Tensor, rows: Tensor, released: int) -> Integers:
    """Cell of each row (n,), by k-means fitted on the sampled real tiles, seeded; k for so many released tiles."""
    from sklearn.cluster import KMeans

    k = cells_for(released, len(real))
    fitted = KMeans(k, n_init=2, random_state=_SEED).fit(real.double().numpy())
    return np.asarray(fitted.predict(rows.double().numpy()), dtype=np.int64)


def distances_in_cells(
    queries: Tensor, cell_of: Integers, real: Tensor, real_cell: Integers, owner: Integers, patients: int
) -> Tensor:
    """Distance of each query to the nearest real tile of each patient in the query's own cell; inf where none; (q, P)."""
    found = torch.full((len(queries), patients), float("inf"))
    owners = torch.from_numpy(owner)
    for cell in np.unique(cell_of).tolist():
        rows, inside = np.flatnonzero(cell_of == cell).tolist(), np.flatnonzero(real_cell == cell).tolist()
        if not inside:
            continue
        present, renumbered = owners[inside].unique(return_inverse=True)
        near = patient_minima(queries[rows], real[inside], renumbered, len(present))
        found[torch.tensor(rows)[:, None], present[None, :]] = near.to(found.dtype)
    return found


def statistic(
    released: Floats,
    released_cell: Integers,
    real: Floats,
    real_cell: Integers,
    owner: Integers,
    sides: Labels,
) -> float:
    """C_T under the labels `sides` (P,): far below 0 where released tiles lie nearer to training than holdout tiles do.

    Args:
        released: (s, P) and real: (m, P), distances inside the cells; see `distances_in_cells`.
        owner: (m,) patient of each real tile; its own distance is not read, for it is on the other side.
    """
    held = ~sides[owner]
    total, weight = 0.0, 0.0
    for cell in usable_cells(released_cell, real_cell):
        theirs = real[held & (real_cell == cell)][:, sides]
        if not len(theirs) or not sides.any():
            continue
        ours = released[released_cell == cell][:, sides].min(axis=1)
        total += len(theirs) * mann_whitney_z(ours, theirs.min(axis=1))
        weight += len(theirs)
    return total / weight if weight else 0.0


def usable_cells(released_cell: Integers, real_cell: Integers) -> list[int]:
    """Cells with enough released tiles."""
    return [
        cell
        for cell in np.unique(real_cell).tolist()
        if np.count_nonzero(released_cell == cell) >= LEAST_RELEASED
    ]


def mann_whitney_z(ours: Floats, theirs: Floats) -> float:
    """z of U(ours > theirs): (U − nm/2) / sqrt(nm(n + m + 1)/12), ties counted half; below 0 where ours are smaller."""
    order = np.sort(theirs)
    below = np.searchsorted(order, ours, side="left") + np.searchsorted(order, ours, side="right")
    n, m = len(ours), len(theirs)
    return float((below.sum() / 2.0 - n * m / 2.0) / np.sqrt(n * m * (n + m + 1) / 12.0))
