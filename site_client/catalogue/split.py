"""Draws patients into train and holdout, from a seed, independent of the order they were entered."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass

from pixcell_core.errors import BadInputError

TRAIN, HOLDOUT = "train", "holdout"


@dataclass(frozen=True)
class SplitSeed:
    """A seed and where it came from."""

    text: str
    source: str

    @classmethod
    def from_operating_system(cls) -> SplitSeed:
        """256 bits nobody can guess."""
        return cls(secrets.token_hex(32), "operating-system")

    @classmethod
    def given(cls, number: int) -> SplitSeed:
        """A repeatable seed, for demonstrations."""
        return cls(f"given:{number}", "given")


def draw(patients: list[str], holdout_fraction: float, seed: SplitSeed) -> dict[str, str]:
    """Draw a simple random sample of patients into the holdout.

    Patients are ranked by HMAC-SHA256(seed, name); the first `round(fraction * n)` (at least one, at most all
    but one) are the holdout. Every subset of that size is equally likely, which is what the audit's patient
    permutation test assumes, so there is no stratification.

    Returns:
        name -> `train` or `holdout`.

    Raises:
        BadInputError: fewer than two patients, or a fraction outside (0, 1).
    """
    if not 0.0 < holdout_fraction < 1.0:
        raise BadInputError(
            f"A holdout fraction of {holdout_fraction:g} leaves one part empty.",
            hint="Give --holdout-fraction between 0 and 1; 0.5 gives the audit the most power.",
            code="bad-holdout-fraction",
        )
    if len(patients) < 2:
        raise BadInputError(
            "A split by patient needs at least two patients; the catalogue holds "
            f"{len(patients)}. Without a holdout of other people no privacy audit is possible.",
            hint="Add more patients with `pixcell site data add`, then draw the split.",
            code="too-few-patients",
        )
    key = seed.text.encode()
    ranked = sorted(patients, key=lambda name: hmac.new(key, name.encode(), hashlib.sha256).digest())
    count = min(max(round(holdout_fraction * len(patients)), 1), len(patients) - 1)
    return {name: HOLDOUT if rank < count else TRAIN for rank, name in enumerate(ranked)}
