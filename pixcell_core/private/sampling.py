"""Which patients take part in a step: Poisson sampling by a cryptographic source, or everybody.

The amplification that the accountant grants for Poisson sampling holds only if each patient is drawn
independently and the adversary cannot foresee the draw, so the coins come from the same kind of source as
the noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pixcell_core.errors import BadInputError
from pixcell_core.private.noise import NoiseSource


class PatientSampler(Protocol):
    """Chooses the patients of one step. `sample_rate` is the q that the accountant is told."""

    @property
    def sample_rate(self) -> float:
        """The probability with which each patient is drawn."""
        ...

    def sample(self, patients: Sequence[str]) -> list[str]:
        """Return the patients of one step, in the order given; possibly none."""
        ...


class EveryPatient:
    """q = 1: every patient in every step. Needs no sampling assumption; right for up to some 500 patients."""

    sample_rate: float = 1.0

    def sample(self, patients: Sequence[str]) -> list[str]:
        """Return all patients."""
        return list(patients)


class PoissonSampler:
    """Each patient independently with probability q; the number drawn varies and stays at home."""

    def __init__(self, sample_rate: float, source: NoiseSource) -> None:
        if not 0.0 < sample_rate <= 1.0:
            raise BadInputError(
                f"A sample rate of {sample_rate} is not a probability above 0.",
                hint="Give the chance with which a patient takes part in a step, such as 0.2, or 1 for all.",
                code="sample-rate",
            )
        self.sample_rate = sample_rate
        self._source = source

    def sample(self, patients: Sequence[str]) -> list[str]:
        """Return the patients whose coin fell below q."""
        coins = self._source.uniform(len(patients))
        return [patient for patient, coin in zip(patients, coins, strict=True) if coin < self.sample_rate]


def sampler_for(sample_rate: float, source: NoiseSource) -> PatientSampler:
    """Return the sampler for a sample rate: everybody at 1, Poisson below."""
    return EveryPatient() if sample_rate == 1.0 else PoissonSampler(sample_rate, source)
