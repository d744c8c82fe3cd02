"""The Gaussian mechanism in closed form: delta, epsilon and mu of any number of steps in which all patients take part.

T steps of noise multiplier sigma on everybody are together one Gaussian mechanism with mu = sqrt(T) / sigma, and steps
of different noise add their mu squared. For it the exact trade between epsilon and delta is known (Balle & Wang 2018,
theorem 8; Dong, Roth & Su 2022, corollary 2.13)::

    delta(epsilon) = Phi(mu / 2 - epsilon / mu) - exp(epsilon) Phi(-mu / 2 - epsilon / mu)

The two terms nearly cancel where delta is small, so that they are taken as products with one density: with
x = mu / 2 - epsilon / mu and y = mu / 2 + epsilon / mu, exp(epsilon) phi(y) = phi(x), hence
delta = Phi(x) - phi(x) m(y), where m(y) = Phi(-y) / phi(y) is Mills' ratio.
"""

from __future__ import annotations

import math

_ROOT_TWO_PI = math.sqrt(2.0 * math.pi)
_ASYMPTOTIC_FROM = 25.0
_BISECTIONS = 200
_LARGEST_MU = 1e4


def gaussian_delta(epsilon: float, mu: float) -> float:
    """Return the smallest delta at which a Gaussian mechanism of `mu` (sensitivity / standard deviation) has `epsilon`.

    Args:
        epsilon: at least 0.
        mu: at least 0; 0 releases nothing.
    """
    if mu <= 0.0:
        return 0.0
    x, y = mu / 2.0 - epsilon / mu, mu / 2.0 + epsilon / mu
    density = math.exp(-0.5 * x * x) / _ROOT_TWO_PI
    if x >= 0.0:
        return max(0.0, 0.5 * math.erfc(-x / math.sqrt(2.0)) - density * _mills(y))
    return max(0.0, density * (_mills(-x) - _mills(y)))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the epsilon of a Gaussian mechanism of `mu` at `delta`, exact to rounding and never below it."""
    if gaussian_delta(0.0, mu) <= delta:
        return 0.0
    low, high = 0.0, mu * mu / 2.0 + mu * (math.sqrt(2.0 * math.log(1.0 / delta)) + 1.0) + 1.0
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        if not low < middle < high:
            break
        low, high = (low, middle) if gaussian_delta(middle, mu) <= delta else (middle, high)
    return high


def gaussian_mu(epsilon: float, delta: float) -> float:
    """Return the largest mu with which a Gaussian mechanism keeps `epsilon` at `delta`, exact to rounding, never above."""
    low, high = 0.0, 1.0
    while gaussian_delta(epsilon, high) <= delta and high < _LARGEST_MU:
        low, high = high, 2.0 * high
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        if not low < middle < high:
            break
        low, high = (middle, high) if gaussian_delta(epsilon, middle) <= delta else (low, middle)
    return low


def _mills(y: float) -> float:
    """Phi(-y) / phi(y) for y >= 0, relative error below 1e-12 (asymptotic series where erfc would underflow)."""
    if y < _ASYMPTOTIC_FROM:
        return 0.5 * math.erfc(y / math.sqrt(2.0)) * math.exp(0.5 * y * y) * _ROOT_TWO_PI
    inverse = 1.0 / (y * y)
    return (1.0 - inverse * (1.0 - 3.0 * inverse * (1.0 - 5.0 * inverse * (1.0 - 7.0 * inverse)))) / y
