"""What guesses about who took part in one run prove about its epsilon (Steinke, Nasr & Jagielski 2023).

Each of m canary patients was put in by a fair coin. From what the run released, r of the coins are guessed and v
guesses are right. Were the run (epsilon, delta)-DP per patient, then (theorem 5.2), with B binomial(r, p) and
p = e^epsilon / (1 + e^epsilon)::

    P[V >= v] <= P[B >= v] + 2 m delta max_i P[v > B >= v - i] / i

The smallest epsilon at which this is no longer below 1 - confidence is a lower bound. How many are guessed, and which by
rank, is fixed before any score is seen; whoever picks the best number afterwards proves nothing.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import binom

from pixcell_core.errors import BadInputError

_LARGEST = 64.0
_BISECTIONS = 60


def guess_probability(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Return the bound on P[at least `correct` of `guesses` right] under (epsilon, delta)-DP; see the module."""
    p = 1.0 / (1.0 + math.exp(-epsilon))
    chance = float(binom.sf(correct - 1, guesses, p))
    if delta > 0.0 and correct > 0:
        steps = np.arange(1, correct + 1)
        below = np.cumsum(binom.pmf(correct - steps, guesses, p))
        chance += 2.0 * canaries * delta * float(np.max(below / steps))
    return min(1.0, chance)


def one_run_lower_bound(
    canaries: int, guesses: int, correct: int, *, delta: float, confidence: float = 0.95
) -> float:
    """Return the epsilon that `correct` of `guesses` right guesses about `canaries` prove at least.

    Args:
        canaries: m, each in or out by a fair coin.
        guesses: r, how many coins were guessed; fixed beforehand.
        correct: v.
        delta: of the statement that is tried.
        confidence: one-sided.

    Raises:
        BadInputError: numbers that cannot be together.
    """
    if (
        not 0 <= correct <= guesses <= canaries
        or guesses < 1
        or not 0.5 < confidence < 1.0
        or not 0.0 <= delta < 1.0
    ):
        raise BadInputError(
            f"{correct} right of {guesses} guesses about {canaries} canaries at confidence {confidence:g} "
            "is no result of an audit.",
            hint="Guess at most as many coins as there are canaries, at a confidence such as 0.95.",
            code="canary-settings",
        )
    alpha = 1.0 - confidence
    if guess_probability(canaries, guesses, correct, 0.0, delta) >= alpha:
        return 0.0
    low, high = 0.0, _LARGEST
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2.0
        refuted = guess_probability(canaries, guesses, correct, middle, delta) < alpha
        low, high = (middle, high) if refuted else (low, middle)
    return low


def one_run_ceiling(canaries: int, guesses: int, *, delta: float, confidence: float = 0.95) -> float:
    """Return the most that so many guesses can prove: the bound when every one of them is right."""
    return one_run_lower_bound(canaries, guesses, guesses, delta=delta, confidence=confidence)
