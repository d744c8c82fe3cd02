"""The generalisation gap of FLD (Jiralerspong et al., NeurIPS 2023), with a p-value by patients.

A mixture of equal Gaussians stands at the released tiles. Its bandwidths, one to each Gaussian, are fitted to the training
tiles; a released tile that repeats a training tile gets a Gaussian so narrow that holdout tiles fall outside it. The gap
is 100 times the negative log-likelihood per dimension of training less that of holdout tiles: far below 0 where training
tiles are known better. Every permutation of the labels fits the bandwidths anew.

Legend: m sampled real tiles, s sampled released tiles, d embedding width.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

REAL, RELEASED = 800, 300  # tiles looked at: every permutation fits the mixture again
PERMUTATIONS = 199  # at most: p down to .005
_STEPS = 10  # of expectation and maximisation: the gap has settled by then to a few per cent
_NARROWEST = 0.05  # of the first bandwidth: one bit-exact copy must not outweigh the rest
Labels = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


def gap(squared: Floats, width: int, train: Labels) -> float:
    """100 · (NLL(training) − NLL(holdout)) per dimension.

    Args:
        squared: (m, s) squared distances between real and released tiles. width: d.
        train: (m,) whether a real tile counts as training.
    """
    if train.all() or not train.any():
        return 0.0
    variance = bandwidths(squared[train], width)
    nll = negative_log_likelihood(squared, variance, width) / width
    return float(100.0 * (nll[train].mean() - nll[~train].mean()))


def bandwidths(squared: Floats, width: int, steps: int = _STEPS) -> Floats:
    """Variance of each Gaussian (s,) after some steps of expectation and maximisation (Dempster et al. 1977).

    Means and weights stay: sigma_j² = Σ_i r_ij d_ij² / (d Σ_i r_ij), with responsibilities r.

    Args:
        squared: (t, s) squared distances of the tiles to fit.
    """
    first = max(float(np.median(squared.min(axis=1))) / width, 1e-12)
    variance = np.full(squared.shape[1], first)
    for _ in range(steps):
        log_density = _log_density(squared, variance, width)
        log_density -= log_density.max(axis=1, keepdims=True)
        share = np.exp(log_density)
        share /= share.sum(axis=1, keepdims=True)
        weight = share.sum(axis=0)
        fitted = (share * squared).sum(axis=0) / (width * np.maximum(weight, 1e-12))
        # A Gaussian that nobody claims keeps its width: there is nothing to fit it to.
        variance = np.where(weight > 1e-6, np.maximum(fitted, _NARROWEST**2 * first), variance)
    return np.asarray(variance)


def negative_log_likelihood(squared: Floats, variance: Floats, width: int) -> Floats:
    """−log of the mean density at each tile, (m,), without the constant (d/2) log 2π, which cancels in a difference."""
    log_density = _log_density(squared, variance, width)
    most = log_density.max(axis=1)
    return np.asarray(-(most + np.log(np.exp(log_density - most[:, None]).mean(axis=1))))


def _log_density(squared: Floats, variance: Floats, width: int) -> Floats:
    return np.asarray(-0.5 * squared / variance - 0.5 * width * np.log(variance))
