"""Which tiles a step trains on: every epoch is a permutation without replacement, and the place in it is kept.

The order depends on the seed and the epoch alone, so it is the same on every process and after every resume.
"""

from __future__ import annotations

import hashlib

import torch


class EpochSampler:
    """Gives rows 0..count-1 in a new order each epoch; a batch may reach over the end of an epoch.

    A permutation of N rows takes 8 N bytes (240 MB at 30 M tiles).
    """

    def __init__(self, count: int, seed: int) -> None:
        if count < 1:
            raise ValueError("nothing to sample from")
        self.count, self.seed, self.position = count, seed, 0
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return self.position // self.count

    def _permutation(self, epoch: int) -> torch.Tensor:
        if epoch != self._epoch:
            # Hashed, because torch's CPU generator heeds the lower 32 bits of a seed only.
            mixed = int.from_bytes(hashlib.sha256(f"{self.seed}:{epoch}".encode()).digest()[:4], "big")
            generator = torch.Generator().manual_seed(mixed)
            self._order, self._epoch = torch.randperm(self.count, generator=generator), epoch
        return self._order

    def take(self, amount: int) -> list[int]:
        """The next `amount` rows."""
        rows: list[int] = []
        while len(rows) < amount:
            epoch, start = divmod(self.position, self.count)
            part = self._permutation(epoch)[start : start + amount - len(rows)].tolist()
            rows += part
            self.position += len(part)
        return rows


def shard_of(whole: list[int], *, rank: int, world: int, part: int, parts: int) -> list[int]:
    """The slice of a step's rows that process `rank` of `world` trains on in accumulation `part` of `parts`.

    The slices of all ranks and parts are disjoint and make up the whole, in an order that a single process with the
    whole batch would follow.
    """
    size = len(whole) // (world * parts)
    first = (part * world + rank) * size
    return whole[first : first + size]
