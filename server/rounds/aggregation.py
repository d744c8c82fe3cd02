"""The streaming mean of updates: equal, public weights; memory does not grow with the number of sites."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from pixcell_core.contracts.spool import Arrays


class StreamingMean:
    """Adds updates one by one in float64 and forgets each.

    Every site weighs the same. Weights by patient count would tell the count, and so would a weight that depends on
    anything measured at a site.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._sums: dict[str, npt.NDArray[np.float64]] = {
            name: np.zeros(shape, dtype=np.float64) for name, shape in shapes.items()
        }
        self.count = 0

    def add(self, update: Arrays) -> None:
        """Add one screened update; its names and shapes must be those announced."""
        if set(update) != set(self._sums):
            raise ValueError("an update with other tensors reached the sum: screening was left out")
        for name, total in self._sums.items():
            if update[name].shape != total.shape:
                raise ValueError("an update of another shape reached the sum: screening was left out")
            total += update[name]
        self.count += 1

    def applied_to(self, adapter: Arrays) -> Arrays:
        """`adapter` plus the mean update, float32."""
        if self.count == 0:
            raise ValueError("there is no mean of nothing")
        return {
            name: (adapter[name].astype(np.float64) + total / self.count).astype(np.float32)
            for name, total in self._sums.items()
        }
