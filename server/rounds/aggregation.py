"""How screened updates become one: mean, trimmed mean or median per coordinate. Every site weighs the same.

Weights by patient count would tell the count, and so would a weight that depends on anything measured at a site.

Results do not depend on the order in which replies arrive, to the last bit: a round that was asked again after a
crash must give the same adapter. The mean adds multiples of a fixed step, and the other two rules read the sites in
order of name.

Memory: the mean holds one number per coordinate, however many sites there are. Trimmed mean and median need all
replies of a coordinate at once; they keep the updates in files and hold a block of coordinates of all sites, at most
`BLOCK_BYTES`, and the result.
"""

from __future__ import annotations

import math
import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pixcell_core.contracts.study import Study

Flat = npt.NDArray[np.float32]
"""All tensors of an update end to end, in the order of their names: shape (d,)."""

Aggregate = npt.NDArray[np.float64]
"""What the updates came to, shape (d,)."""

BLOCK = 1 << 15
"""Coordinates looked at together: 256 KiB of float64, which stays in the cache."""

BLOCK_BYTES = 32 * 1024 * 1024
"""What trimmed mean and median hold of the replies at once."""

_SMALLEST = -148
"""float32 knows nothing below 2^-149: a smaller bound needs no finer grid."""


class Aggregator(Protocol):
    """Takes the screened updates of one round, one by one."""

    @property
    def count(self) -> int:
        """Updates taken."""

    def add(self, site: str, update: Flat) -> None:
        """Take the update of one site."""

    def result(self) -> Aggregate:
        """The aggregate of what was taken. Raises `ValueError` where that is nothing."""

    def close(self) -> None:
        """Let go of files."""


class StreamingMean:
    """Adds updates one by one on a fixed grid and forgets each.

    No coordinate of an update passes `bound`, its public L2 bound. Every value is first rounded to a multiple of
    `step` = 2^(e+k-52), where 2^e is the bound and 2^k the number of sites, both rounded up: the sum of all sites is
    then below 2^52 steps, float64 adds such numbers without an error, and so the order does not matter. A coordinate
    is off by at most half a step: for 8 sites 2^-50 of the bound, where float32 itself is coarser above 2^-26 of it.
    """

    def __init__(self, size: int, bound: float, sites: int) -> None:
        self._sites = sites
        bits = max(1, (sites - 1).bit_length())
        step = math.ldexp(1.0, max(math.frexp(bound)[1], _SMALLEST) + bits - 52)
        # What is below half a step falls off when this is added, and taking it away again is exact.
        self._rounder = 1.5 * 2.0**52 * step
        self._sum = np.zeros(size, dtype=np.float64)
        self._wide = np.empty(min(BLOCK, size), dtype=np.float64)
        self.count = 0

    def add(self, site: str, update: Flat) -> None:
        """Add one screened update; `ValueError` where screening was left out."""
        if update.shape != self._sum.shape:
            raise ValueError("an update of another shape reached the sum: screening was left out")
        if self.count >= self._sites:
            raise ValueError("more updates than the study has sites")
        for start in range(0, update.size, BLOCK):
            part = update[start : start + BLOCK]
            wide, total = self._wide[: part.size], self._sum[start : start + BLOCK]
            np.copyto(wide, part)
            wide += self._rounder
            wide -= self._rounder
            total += wide
        self.count += 1

    def result(self) -> Aggregate:
        """The mean. Nothing can be added afterwards."""
        if self.count == 0:
            raise ValueError("there is no mean of nothing")
        mean, self._sum = self._sum, np.empty(0)
        mean /= self.count
        return mean

    def close(self) -> None:
        """There are no files."""


class _Spill(ABC):
    """Updates in files of their own, read back block by block."""

    def __init__(self, size: int, folder: Path) -> None:
        self._size, self._folder = size, folder
        self._files: dict[str, Path] = {}
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, mode=0o700)

    @property
    def count(self) -> int:
        """Updates taken."""
        return len(self._files)

    def add(self, site: str, update: Flat) -> None:
        """Write one screened update; `ValueError` where screening was left out."""
        if update.shape != (self._size,):
            raise ValueError("an update of another shape reached the sum: screening was left out")
        if site in self._files:
            raise ValueError("a site counts once: screening was left out")
        path = self._folder / f"{site}.f32"
        # Not flushed: after a crash the round is asked again, and what lies here is thrown away.
        update.astype("<f4", copy=False).tofile(path)
        self._files[site] = path

    def result(self) -> Aggregate:
        """The aggregate."""
        if not self._files:
            raise ValueError("there is no middle of nothing")
        out = np.empty(self._size, dtype=np.float64)
        width = max(1, BLOCK_BYTES // (4 * len(self._files)))
        paths = [self._files[site] for site in sorted(self._files)]
        for start in range(0, self._size, width):
            length = min(width, self._size - start)
            block = np.empty((len(paths), length), dtype=np.float32)
            for row, path in enumerate(paths):
                block[row] = np.fromfile(path, dtype="<f4", count=length, offset=4 * start)
            out[start : start + length] = self._middle(block)
        return out

    @abstractmethod
    def _middle(self, block: npt.NDArray[np.float32]) -> Aggregate:
        """What becomes of one block, (sites, coordinates), per coordinate."""

    def close(self) -> None:
        """Remove the files."""
        shutil.rmtree(self._folder, ignore_errors=True)


class CoordinateMedian(_Spill):
    """The median per coordinate; of an even number the mean of the two in the middle (Yin et al. 2018)."""

    def _middle(self, block: npt.NDArray[np.float32]) -> Aggregate:
        block.sort(axis=0)
        lower, upper = block[(len(block) - 1) // 2], block[len(block) // 2]
        return (lower.astype(np.float64) + upper) / 2.0


class TrimmedMean(_Spill):
    """The mean per coordinate without the `trimmed` smallest and largest values (Yin et al. 2018)."""

    def __init__(self, size: int, folder: Path, trim: float) -> None:
        super().__init__(size, folder)
        self._trim = trim

    def _middle(self, block: npt.NDArray[np.float32]) -> Aggregate:
        cut = trimmed(self._trim, len(block))
        # Sorted in full: the sum then runs in the order of the values, whatever the order of the sites.
        block.sort(axis=0)
        return block[cut : len(block) - cut].mean(axis=0, dtype=np.float64)


def trimmed(trim: float, sites: int) -> int:
    """How many values the share `trim` takes away at either end; 0.1 of 10 is 1, whatever binary fractions make of it."""
    return min(math.floor(trim * sites + 1e-9), (sites - 1) // 2)


def make_aggregator(study: Study, size: int, bound: float, spill: Path) -> Aggregator:
    """What the study's rule asks for. `size` is d, `bound` the public L2 bound of an update, `spill` a folder of its own."""
    settings = study.aggregation
    if settings.rule == "median":
        return CoordinateMedian(size, spill)
    if settings.rule == "trimmed-mean":
        return TrimmedMean(size, spill, settings.trim)
    return StreamingMean(size, bound, len(study.sites))
