"""Exact intervals and tests for counts."""

from __future__ import annotations

from collections.abc import Mapping

from scipy.stats import beta, betabinom, norm


def clopper_pearson_lower(hits: int, trials: int, confidence: float = 0.95) -> float:
    """One-sided lower bound of a proportion (Clopper & Pearson, Biometrika 26, 1934); 0 without trials."""
    if trials == 0 or hits == 0:
        return 0.0
    return float(beta.ppf(1.0 - confidence, hits, trials - hits + 1))


def clopper_pearson_upper(hits: int, trials: int, confidence: float = 0.95) -> float:
    """One-sided upper bound of a proportion; 1 without trials."""
    if trials == 0 or hits == trials:
        return 1.0
    return float(beta.ppf(confidence, hits + 1, trials - hits))


def two_sided(hits: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided Clopper–Pearson interval."""
    half = 1.0 - (1.0 - confidence) / 2.0
    return clopper_pearson_lower(hits, trials, half), clopper_pearson_upper(hits, trials, half)


def excess_over_null(hits: int, trials: int, allowed: int, null: int) -> float:
    """P(X >= hits): how surprising so many hits are where trials and null scores are exchangeable.

    X counts trials above the `allowed`-th largest of `null` scores. That score is itself drawn, so X is no binomial: it
    is beta-binomial with parameters `allowed` and `null + 1 - allowed` (the negative hypergeometric law of
    ranks, David & Nagaraja, Order Statistics, 2003, 2.4). With as many trials as null scores and `allowed` = 1, five
    hits have probability .031, where the binomial would say .004.

    Raises:
        ValueError: hits without a threshold, which cannot be.
    """
    if hits <= 0:
        return 1.0
    if not 1 <= allowed <= null:
        raise ValueError(f"{hits} hits above a threshold that does not exist")
    return float(betabinom.sf(hits - 1, trials, allowed, null + 1 - allowed))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment (Scand J Statist 6, 1979) of a family of p-values."""
    adjusted: dict[str, float] = {}
    running = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        running = max(running, min(1.0, p * (len(p_values) - rank)))
        adjusted[name] = running
    return adjusted


def wilson(hits: float, trials: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's two-sided interval of a proportion (JASA 22, 1927); whole range without trials.

    `trials` may be an effective number, smaller than the number of attempts where these are clustered.
    """
    if trials <= 0:
        return 0.0, 1.0
    z = float(norm.ppf(1.0 - (1.0 - confidence) / 2.0))
    share, weight = hits / trials, z * z / trials
    centre = (share + weight / 2.0) / (1.0 + weight)
    half = z * (share * (1.0 - share) / trials + weight / (4.0 * trials)) ** 0.5 / (1.0 + weight)
    return max(0.0, centre - half), min(1.0, centre + half)
