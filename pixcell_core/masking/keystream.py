"""Masks: AES-256-CTR keystreams as vectors of 32-bit numbers, added or subtracted modulo 2^32.

A vector is walked once, in blocks that stay in the processor's cache, and every stream is applied to a block before
the next one is touched. Counter mode: NIST SP 800-38A, section 6.5; each key is used for one mask, from counter 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

Words = npt.NDArray[np.uint32]

BLOCK = 1 << 16
"""Numbers in a block: 256 KiB, a block and a piece of keystream together fit a second-level cache."""

_ZEROS = memoryview(bytes(4 * BLOCK))

Fill = Callable[[int, Words], None]
"""`fill(start, block)` writes the numbers of a vector from `start` on into `block`."""


@dataclass(frozen=True)
class Mask:
    """One mask: the 32 bytes of its key, and whether it is subtracted."""

    key: bytes = field(repr=False)
    subtract: bool = False


def apply_masks(vector: Words, masks: Sequence[Mask], fill: Fill | None = None) -> None:
    """Add every mask to `vector` (uint32, contiguous) in place; with `fill` its numbers are written first."""
    if vector.dtype != np.dtype("<u4") or vector.ndim != 1 or not vector.flags.c_contiguous:
        raise ValueError("a masked vector is one contiguous row of little-endian uint32")
    streams = [(Cipher(algorithms.AES(m.key), modes.CTR(bytes(16))).encryptor(), m.subtract) for m in masks]
    pad = np.empty(BLOCK, dtype="<u4")
    room = pad.data.cast("B")
    for start in range(0, vector.size, BLOCK):
        block = vector[start : start + BLOCK]
        if fill is not None:
            fill(start, block)
        for stream, subtract in streams:
            stream.update_into(_ZEROS[: 4 * block.size], room[: 4 * block.size])
            (np.subtract if subtract else np.add)(block, pad[: block.size], out=block)
