"""Whether a private update still points where the patients point: expected signal against noise.

The model. Each patient's clipped gradient has length C and shares the direction u with the others to the extent rho, the
consensus: its part along u is rho C, the rest differs from patient to patient and averages out. The mean over the
q N patients of a step then moves rho C along u. The noise of a step is N(0, (sigma C / (q N))^2) in each of d
coordinates. Over T steps signal adds up and noise adds its squares; the mean over S sites divides the noise by sqrt(S)::

    SNR = rho sqrt(T) q N sqrt(S) / (sigma sqrt(d))

With everybody in every step sigma = sqrt(T) / mu for the mu that the budget allows, and T drops out:
SNR = rho mu N sqrt(S) / sqrt(d). The cosine between what is released and what the same steps would release without
noise is SNR / sqrt(1 + SNR^2). Noise outside u does not push the model anywhere in particular, so that a cosine of 0.5
still learns, slowly; below 0.3 the update is noise for all that can be told from it.

What the model leaves out: that gradients shrink as the model learns, that layers differ, and that clipping favours
nobody. It is for planning; the bench measures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

DEFAULT_CONSENSUS = 0.5
"""rho at the start of training. Measured with the shipped base on 20 drawn patients of a laboratory it has not seen
(bench/bench_consensus.py): 0.18 for one tile and one noise draw in a unit gradient, 0.30 for 4 x 1, 0.56 for 4 x 8,
0.77 for 8 x 16. Rows inside one unit gradient cost time, never privacy."""

USEFUL_COSINE = 0.7
WEAK_COSINE = 0.3

Verdict = Literal["useful", "weak", "noise"]


@dataclass(frozen=True)
class UpdateQuality:
    """What the model of this file expects of a plan.

    Attributes:
        noise_per_coordinate: standard deviation of one step's noise in one coordinate, in units of C, at one site.
        noise_length: length of one step's noise vector, in units of C, after averaging over sites.
        signal: length of one step's common part, in units of C: rho.
        snr: over all steps.
        cosine: between the released update and the same update without noise.
    """

    noise_per_coordinate: float
    noise_length: float
    signal: float
    snr: float
    cosine: float

    @property
    def verdict(self) -> Verdict:
        """`useful` from a cosine of 0.7, `weak` from 0.3, else `noise`."""
        return "useful" if self.cosine >= USEFUL_COSINE else "weak" if self.cosine >= WEAK_COSINE else "noise"


def update_quality(
    *,
    noise_multiplier: float,
    steps: int,
    sample_rate: float,
    patients: int,
    parameters: int,
    sites: int = 1,
    consensus: float = DEFAULT_CONSENSUS,
    divisor: float | None = None,
) -> UpdateQuality:
    """Return what to expect of `steps` private steps.

    Args:
        noise_multiplier: sigma.
        steps: T over all rounds.
        sample_rate: q.
        patients: N of one site.
        parameters: d.
        sites: S, alike.
        consensus: rho, in (0, 1].
        divisor: the public divisor of the noisy sum; q N when absent. It scales signal and noise alike.
    """
    taking_part = sample_rate * patients
    by = divisor or taking_part
    noise = noise_multiplier / by
    length = noise * math.sqrt(parameters / sites)
    signal = consensus * taking_part / by
    snr = math.sqrt(steps) * signal / length
    return UpdateQuality(
        noise_per_coordinate=noise,
        noise_length=length,
        signal=signal,
        snr=snr,
        cosine=snr / math.sqrt(1.0 + snr * snr),
    )


def patients_needed(
    *,
    noise_multiplier: float,
    steps: int,
    sample_rate: float,
    parameters: int,
    sites: int = 1,
    consensus: float = DEFAULT_CONSENSUS,
    cosine: float = USEFUL_COSINE,
) -> int:
    """Return the smallest N per site with which `update_quality` reaches `cosine`."""
    snr = cosine / math.sqrt(1.0 - cosine * cosine)
    exact = (
        snr * noise_multiplier * math.sqrt(parameters / sites) / (math.sqrt(steps) * sample_rate * consensus)
    )
    return max(2, math.ceil(exact - 1e-9))
