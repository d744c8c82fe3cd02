"""How well features tell tissue apart, with whole patients held out: k nearest neighbours and a linear probe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pixcell_core.errors import BadInputError


@dataclass(frozen=True)
class ProbeScore:
    """Balanced accuracies in 0..1 over held-out groups; `groups` is how many were held out in turn."""

    knn: float
    linear: float
    tiles: int
    groups: int


def probe(
    features: npt.NDArray[np.float32],
    labels: Sequence[str],
    groups: Sequence[str],
    *,
    neighbours: int = 5,
    folds: int = 5,
    seed: int = 0,
) -> ProbeScore:
    """Score features (N, d) by stratified folds that keep every group whole.

    Features are standardised on the training folds; k-NN uses cosine similarity, the linear probe is a logistic
    regression with C = 0.1 and balanced classes. Predictions of all folds are pooled before scoring.

    Raises:
        BadInputError: fewer than two groups or labels.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    target, held = np.asarray(labels), np.asarray(groups)
    splits = min(folds, len(set(groups)))
    if splits < 2 or len(set(labels)) < 2:
        raise BadInputError(
            f"A probe needs two groups and two labels; here are {len(set(groups))} and {len(set(labels))}.",
            hint="Add tiles of another patient or slide, or leave this set out.",
            code="too-few-groups",
        )
    guess_knn, guess_linear = np.empty_like(target), np.empty_like(target)
    for train, test in StratifiedGroupKFold(splits, shuffle=True, random_state=seed).split(
        features, target, held
    ):
        if len(set(target[train])) == 1:  # nothing to learn from: say the only label there is
            guess_knn[test] = guess_linear[test] = target[train][0]
            continue
        near = min(neighbours, len(train))
        knn = make_pipeline(StandardScaler(), KNeighborsClassifier(near, metric="cosine"))
        guess_knn[test] = knn.fit(features[train], target[train]).predict(features[test])
        linear = make_pipeline(
            StandardScaler(),
            LogisticRegression(C=0.1, class_weight="balanced", max_iter=2000, random_state=seed),
        )
        guess_linear[test] = linear.fit(features[train], target[train]).predict(features[test])
    return ProbeScore(
        float(balanced_accuracy_score(target, guess_knn)),
        float(balanced_accuracy_score(target, guess_linear)),
        len(target),
        len(set(groups)),
    )


def colour_histogram(pixels: npt.NDArray[np.uint8], bins: int = 8) -> npt.NDArray[np.float32]:
    """Joint RGB histogram of one tile (H, W, 3), bins³ shares: the baseline that knows colour alone."""
    index = (pixels.reshape(-1, 3).astype(np.int64) * bins) // 256
    flat = (index[:, 0] * bins + index[:, 1]) * bins + index[:, 2]
    counts = np.bincount(flat, minlength=bins**3).astype(np.float32)
    return counts / counts.sum()
