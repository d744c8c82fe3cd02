"""Fixed-point numbers in the ring of 32 bits: what is added, and how the sum is read.

With n sites in the study and the bound c on a coordinate, x becomes round(x L / c) with L = floor((2^31 - 1) / (2 n)).
The sum of n such numbers stays within half of the ring, so it cannot overflow, and a sum whose masks did not cancel
falls outside with a chance of one half per coordinate: it is noticed. One number is off by at most c / (2 L).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pixcell_core.masking.keys import MaskingRefusedError
from pixcell_core.masking.keystream import Fill, Words


@dataclass(frozen=True)
class FixedPoint:
    """The grid of a study: `bound` on the absolute value of a coordinate, `sites` that may be summed."""

    bound: float
    sites: int

    @property
    def levels(self) -> int:
        """Steps between 0 and the bound."""
        return (2**31 - 1) // (2 * self.sites)

    @property
    def step(self) -> float:
        """The distance of two neighbouring values, in the units of the update."""
        return self.bound / self.levels

    def filler(self, flat: npt.NDArray[np.float32]) -> Fill:
        """Writes the numbers of `flat`, clipped to the bound, into the blocks of a vector of the same length.

        Raises `MaskingRefusedError` while filling, where a number is not finite.
        """
        scale = self.levels / self.bound

        def fill(start: int, block: Words) -> None:
            part = flat[start : start + block.size].astype(np.float64)
            if not math.isfinite(float(part.sum())):
                raise MaskingRefusedError(
                    "The update holds values that are not finite.",
                    hint="The training diverged: a smaller learning rate, or a larger clipping norm.",
                    code="not-finite",
                )
            part *= scale
            np.rint(part, out=part)
            np.clip(part, -self.levels, self.levels, out=part)
            block[:] = part.astype(np.int32).view("<u4")

        return fill

    def read_sum(self, words: Words, count: int) -> npt.NDArray[np.float64]:
        """The sum of `count` updates, in the units of the update, from the unmasked ring.

        Raises `MaskingRefusedError` where a coordinate is larger than `count` honest sites can make it.
        """
        signed = words.view("<i4")
        largest = count * self.levels
        if signed.size and (int(signed.max()) > largest or int(signed.min()) < -largest):
            raise MaskingRefusedError(
                "The opened sum holds numbers that honest sites cannot send: a mask is left in it.",
                hint="A site masked wrongly or left the protocol. Compare the sites' releases before the next round.",
                code="sum-out-of-range",
            )
        total: npt.NDArray[np.float64] = signed.astype(np.float64)
        total *= self.step
        return total
