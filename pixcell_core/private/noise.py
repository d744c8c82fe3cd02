"""Gaussian noise from a cryptographic source.

Differential privacy is a statement about a random variable nobody can predict. `torch.normal` and NumPy's
generators have a small internal state that can be recovered from their output, so they are no sources for
it. Here a keystream of AES-256 in counter mode, keyed by the operating system, becomes uniform numbers,
those become Gaussian numbers in float64, and four of them make each released number.

Why four: a single float64 Gaussian can only take the values its formula reaches, and the pattern of
reachable values around two neighbouring sums tells them apart (Mironov 2012). Summing four independent
draws, each scaled by one half, keeps the distribution and makes that attack computationally out of reach
(Holohan & Braghin 2021, "Secure random sampling in differential privacy", section 4).
"""

from __future__ import annotations

import os
from typing import NoReturn, Protocol

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

KEY_BYTES = 32
COUNTER_BYTES = 16
HALVES = 4
"""Gaussian draws summed into one released number; their scale is 1/sqrt(HALVES) = one half."""

_BLOCK = 1 << 18
"""Numbers made at a time, so that noise for a large model needs little memory beside its result."""


class NoiseSource(Protocol):
    """Where the random numbers of the mechanism come from."""

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        """Return `count` numbers, uniform on the multiples of 2**-53 in [0, 1)."""
        ...

    def gaussian(self, count: int) -> npt.NDArray[np.float64]:
        """Return `count` independent standard normal numbers in float64."""
        ...


class AesCtrSource:
    """Random numbers from an AES-256-CTR keystream. `SystemNoiseSource` is the one for real use."""

    def __init__(self, key: bytes, counter: bytes) -> None:
        if len(key) != KEY_BYTES or len(counter) != COUNTER_BYTES:
            raise ValueError(f"AES-256-CTR takes a key of {KEY_BYTES} and a counter of {COUNTER_BYTES} bytes")
        self._stream: CipherContext = Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor()

    def keystream(self, count: int) -> bytes:
        """Return the next `count` bytes of the keystream (NIST SP 800-38A, section 6.5)."""
        return self._stream.update(bytes(count))

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        """Return `count` numbers, uniform on the multiples of 2**-53 in [0, 1)."""
        return self._words(count).astype(np.float64) * 2.0**-53

    def gaussian(self, count: int) -> npt.NDArray[np.float64]:
        """Return `count` independent standard normal numbers, each the sum of four halves, in float64."""
        out = np.empty(count, dtype=np.float64)
        for start in range(0, count, _BLOCK):
            size = min(_BLOCK, count - start)
            total = self._box_muller(size)
            for _ in range(HALVES - 1):
                total += self._box_muller(size)
            out[start : start + size] = total / np.sqrt(HALVES)
        return out

    def _words(self, count: int) -> npt.NDArray[np.uint64]:
        """Return `count` integers of 53 random bits."""
        return np.frombuffer(self.keystream(8 * count), dtype="<u8").astype(np.uint64) >> np.uint64(11)

    def _box_muller(self, count: int) -> npt.NDArray[np.float64]:
        """Box & Muller 1958. The half-step keeps the logarithm off zero: no draw passes 8.7 sigma."""
        pairs = (count + 1) // 2
        radius_u = (self._words(pairs).astype(np.float64) + 0.5) * 2.0**-53
        angle = self._words(pairs).astype(np.float64) * (2.0 * np.pi * 2.0**-53)
        radius = np.sqrt(-2.0 * np.log(radius_u))
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]

    def __copy__(self) -> NoReturn:
        raise TypeError("a noise source cannot be copied: the copy would draw the same noise a second time")

    def __deepcopy__(self, memo: object) -> NoReturn:
        self.__copy__()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a noise source cannot be stored or sent: whoever holds it can subtract the noise")


class SystemNoiseSource(AesCtrSource):
    """The source for real use: keyed by the operating system, keyed anew after a fork, never stored."""

    def __init__(self) -> None:
        self._rekey()

    def _rekey(self) -> None:
        super().__init__(os.urandom(KEY_BYTES), os.urandom(COUNTER_BYTES))
        self._owner = os.getpid()

    def keystream(self, count: int) -> bytes:
        """Return the next `count` bytes. A forked child never continues its parent's stream."""
        if os.getpid() != self._owner:
            self._rekey()
        return super().keystream(count)


class UnsafeFixedKeySource(AesCtrSource):
    """For known-answer tests alone: its noise can be computed by anyone who reads the key."""

    def __init__(self, key: bytes = bytes(KEY_BYTES), counter: bytes = bytes(COUNTER_BYTES)) -> None:
        super().__init__(key, counter)


def gaussian_like(source: NoiseSource, tensor: torch.Tensor, standard_deviation: float) -> torch.Tensor:
    """Return float64 noise like `tensor` in shape and device; the caller rounds once, after adding it.

    Args:
        source: where the noise comes from.
        tensor: gives shape and device.
        standard_deviation: in the units of `tensor`; noise multiplier times clipping norm.
    """
    draws = source.gaussian(tensor.numel())
    noise = torch.from_numpy(draws * standard_deviation).reshape(tensor.shape)
    return noise.to(tensor.device)
