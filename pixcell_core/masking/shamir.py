"""Shamir's secret sharing over the field of 2^521 - 1 elements (Shamir 1979).

A secret of 32 bytes is the value at 0 of a random polynomial of degree threshold - 1; a share is its value at a site's
own place. Any `threshold` shares give the secret, fewer say nothing about it.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence

from pixcell_core.contracts.masking import SHARE_BYTES

PRIME = (1 << 521) - 1
"""A Mersenne prime: larger than any secret of 32 bytes, so that a share hides all of it."""

SECRET_BYTES = 32


def split(
    secret: bytes,
    threshold: int,
    places: Sequence[int],
    draw: Callable[[int], int] = secrets.randbelow,
) -> dict[int, bytes]:
    """One share of `SHARE_BYTES` bytes per place (1, 2, ...). `draw(n)` is a uniform number below n.

    Raises `ValueError` for places that are not distinct and positive, or fewer than the threshold.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret has {SECRET_BYTES} bytes")
    if len(set(places)) != len(places) or not all(0 < place < PRIME for place in places):
        raise ValueError("places are distinct and positive: the value at 0 is the secret itself")
    if not 1 <= threshold <= len(places):
        raise ValueError("a threshold is at least 1 and at most the number of places")
    coefficients = [int.from_bytes(secret, "big"), *(draw(PRIME) for _ in range(threshold - 1))]
    shares = {}
    for place in places:
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * place + coefficient) % PRIME
        shares[place] = value.to_bytes(SHARE_BYTES, "big")
    return shares


def lagrange_at_zero(places: Sequence[int]) -> tuple[int, ...]:
    """The weights by which the values at `places` give the value at 0; the same for every polynomial."""
    if len(set(places)) != len(places) or 0 in places:
        raise ValueError("places are distinct and not 0")
    weights = []
    for place in places:
        above = below = 1
        for other in places:
            if other != place:
                above, below = above * other % PRIME, below * (other - place) % PRIME
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(weights)


def join(shares: Mapping[int, bytes], weights: Sequence[int] | None = None) -> bytes:
    """The secret of exactly `threshold` shares by place; `weights` are `lagrange_at_zero` of the places, if known.

    Raises `ValueError` where the shares are not those of one secret of 32 bytes (a wrong share is found with a
    chance of 1 - 2^-265; commitments find it with certainty).
    """
    known = weights if weights is not None else lagrange_at_zero(list(shares))
    value = 0
    for share, weight in zip(shares.values(), known, strict=True):
        number = int.from_bytes(share, "big")
        if len(share) != SHARE_BYTES or number >= PRIME:
            raise ValueError("a share is no element of the field")
        value = (value + number * weight) % PRIME
    if value >> (8 * SECRET_BYTES):
        raise ValueError("the shares are not those of one secret")
    return value.to_bytes(SECRET_BYTES, "big")
