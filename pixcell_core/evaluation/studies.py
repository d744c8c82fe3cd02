"""The two studies of synthetic tiles as training data: what they add to real tiles, and whether they can replace them.

- augmentation: a classifier of real tiles against one of real + synthetic tiles;
- replacement: a classifier of synthetic tiles alone against one of real tiles; always tested on real tiles.

Patients are held out: in each fold neither the real tiles of a held-out patient nor the surrogates made from them are
trained on. A surrogate is a variant of its real tile, so training on a held-out patient's surrogates would be training on
the test. Classifiers (on features standardised by the training rows): a logistic regression with balanced classes
and k nearest neighbours by cosine, the same as in `probes`.

An interval is over the held-out patients, the classifiers as they were trained; repeats show the spread over splits. On
simulated cohorts 95 % intervals of the difference held its mean in 0.88 (20 patients) to 0.96 (40 patients) of the cases;
those of a single score are narrower than they should be (0.83 to 0.93), so judge by the difference.
Legend: n rows, R repeats, K classes, P patients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.evaluation.bootstrap import FEW_PATIENTS, Interval, Ints, PatientClusters
from pixcell_core.evaluation.feature_set import UNKNOWN, FeatureSet, Floats, require_comparable

Study = Literal["augmentation", "replacement"]
ARMS: dict[Study, tuple[str, str]] = {
    "augmentation": ("real", "real + synthetic"),
    "replacement": ("real", "synthetic"),
}
CLASSIFIERS = ("linear probe", "k-NN")
# A generator that saw a held-out patient in its own training can carry that patient into the surrogates of others.
ALWAYS_SAID = (
    "surrogates of held-out patients are kept out of training; whether the generator itself was trained on those "
    "patients cannot be seen here"
)


@dataclass(frozen=True)
class StudySettings:
    """How a study is run; all of it is reported.

    Attributes:
        folds: parts the patients are split into, each held out once per repeat.
        repeats: splits with another seed each.
        neighbours: of k-NN.
        regularisation: C of the logistic regression.
        draws, level: of the bootstrap over held-out patients; 0 draws give no interval.
        independent: the person states that no synthetic row was made from a patient of the real set.
    """

    folds: int = 5
    repeats: int = 5
    neighbours: int = 5
    regularisation: float = 0.1
    draws: int = 1000
    level: float = 0.95
    seed: int = 0
    independent: bool = False


@dataclass(frozen=True)
class ArmScore:
    """Balanced accuracy (0..1) of one classifier trained one way, meaned over repeats, with its interval."""

    classifier: str
    trained_on: str
    score: float
    interval: Interval | None
    per_repeat: tuple[float, ...]


@dataclass(frozen=True)
class Difference:
    """Balanced accuracy of the second arm minus the first, on the same held-out tiles."""

    classifier: str
    difference: float
    interval: Interval | None
    per_repeat: tuple[float, ...]


@dataclass(frozen=True)
class StudyResult:
    """What a study found and on how much it rests."""

    study: Study
    encoder: str
    scores: tuple[ArmScore, ...]
    differences: tuple[Difference, ...]
    real_rows: int
    synthetic_rows: int
    patients: int
    labels: tuple[str, ...]
    settings: StudySettings
    warnings: tuple[str, ...]


def run_study(
    study: Study,
    real: FeatureSet,
    synthetic: FeatureSet,
    settings: StudySettings | None = None,
    *,
    on_fit: Callable[[], None] = lambda: None,
) -> StudyResult:
    """Run one of the two studies.

    Args:
        real: features with label and patient of every row.
        synthetic: features with label of every row, and the patient each was conditioned on.
        on_fit: called after each fold, for progress.

    Raises:
        BadInputError: no such study, labels or patients missing, one label or patient only, other features.
        RefusedError: it is not known which patients the synthetic rows were made from.
    """
    chosen = settings or StudySettings()
    warnings = [ALWAYS_SAID, *_check(study, real, synthetic, chosen)]
    classes = sorted({*real.labels})
    target = np.array([classes.index(label) for label in real.labels])
    made = np.array([classes.index(x) if x in classes else -1 for x in synthetic.labels])
    if (made < 0).any():
        warnings.append(
            f"{int((made < 0).sum())} synthetic rows carry labels no real row has; they are left out"
        )
    guesses = np.full((len(ARMS[study]), len(CLASSIFIERS), chosen.repeats, len(real)), -1)
    held = np.array(real.patients)
    made_for = np.array(synthetic.patients)
    for repeat in range(chosen.repeats):
        for train, test in _folds(target, held, chosen, repeat):
            allowed = (made >= 0) & ~np.isin(made_for, held[test])
            sets = {
                "real": (real.features[train], target[train]),
                "synthetic": (synthetic.features[allowed], made[allowed]),
            }
            sets["real + synthetic"] = (
                np.concatenate([sets["real"][0], sets["synthetic"][0]]),
                np.concatenate([sets["real"][1], sets["synthetic"][1]]),
            )
            for arm, name in enumerate(ARMS[study]):
                guesses[arm, :, repeat, test] = _predict(*sets[name], real.features[test], chosen).T
            on_fit()
    warnings += _thin_classes(target, held, classes)
    return _result(study, real, synthetic, chosen, classes, target, guesses, tuple(warnings))


def _check(study: str, real: FeatureSet, synthetic: FeatureSet, chosen: StudySettings) -> list[str]:
    """Refuse what cannot be a fair study; return what a reader must know."""
    if study not in ARMS:
        raise BadInputError(
            f"There is no study {study!r}; {' or '.join(ARMS)} is expected.",
            hint="Choose one.",
            code="no-such-study",
        )
    require_comparable(real, synthetic)
    real.require_labels()
    synthetic.require_labels()
    if not real.knows_patients:
        raise BadInputError(
            f"{real.patients.count(UNKNOWN)} of {len(real)} real rows name no patient; a study holds whole patients out.",
            hint="Give a table with the columns file, patient, label.",
            code="patients-missing",
        )
    counts = {"patients": real.patient_count, "labels": len({*real.labels})}
    for what, number in counts.items():
        if number < 2:
            raise BadInputError(
                f"The real set has {number} {what}; at least two are expected.",
                hint="Add tiles of another patient and label.",
                code="too-few-groups",
            )
    for setting, value, least in (
        ("folds", chosen.folds, 2),
        ("repeats", chosen.repeats, 1),
        ("neighbours", chosen.neighbours, 1),
    ):
        if value < least:
            raise BadInputError(
                f"{value} {setting} were asked for; at least {least} is expected.",
                hint="Use 5.",
                code="bad-setting",
            )
    known = {*real.patients}
    origin = {*synthetic.patients} - {UNKNOWN}
    if not chosen.independent and (not synthetic.knows_patients or not origin & known):
        met = (
            f"{synthetic.patients.count(UNKNOWN)} of {len(synthetic)} synthetic rows do not say which patient they "
            "were conditioned on"
            if not synthetic.knows_patients
            else f"none of the {len(origin)} patients named by the synthetic rows is in the real set"
        )
        raise RefusedError(
            f"{met}: surrogates of held-out patients could enter training, and the study would measure that leak.",
            hint="Give the column `patient` (as the real set writes it) for the synthetic tiles; if they were made from "
            "other people altogether, state it (--independent).",
            code="synthetic-patients-unknown",
        )
    warnings = []
    if chosen.independent and not synthetic.knows_patients:
        warnings.append(
            "that no synthetic row was made from a real patient of this study is stated, not checked"
        )
    elif origin - known:
        warnings.append(
            f"{len(origin - known)} of {len(origin)} synthetic patients are not in the real set; their rows are always "
            "trained on"
        )
    if real.patient_count < FEW_PATIENTS:
        warnings.append(
            f"{real.patient_count} patients: intervals from fewer than {FEW_PATIENTS} are too narrow"
        )
    return warnings


def _thin_classes(target: Ints, held: npt.NDArray[Any], classes: list[str]) -> list[str]:
    thin = [classes[k] for k in range(len(classes)) if len({*held[target == k]}) < 2]
    return [f"label {name!r} has one patient only: it can never be both learned and tested" for name in thin]


def _folds(target: Ints, held: npt.NDArray[Any], chosen: StudySettings, repeat: int) -> Any:
    from sklearn.model_selection import StratifiedGroupKFold

    parts = min(chosen.folds, len(set(held.tolist())))
    split = StratifiedGroupKFold(parts, shuffle=True, random_state=chosen.seed + repeat)
    return split.split(np.zeros((len(target), 1)), target, held)


def _predict(features: Floats, target: Ints, tested: Floats, chosen: StudySettings) -> Ints:
    """Guesses (classifiers, test rows); -1 where nothing could be learned (no training row at all)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.preprocessing import StandardScaler

    if len(set(target.tolist())) < 2:
        return np.full((len(CLASSIFIERS), len(tested)), target[0] if len(target) else -1)
    scale = StandardScaler().fit(features)
    inputs, outputs = scale.transform(features), scale.transform(tested)
    linear = LogisticRegression(
        C=chosen.regularisation, class_weight="balanced", max_iter=2000, random_state=0
    )
    near = KNeighborsClassifier(min(chosen.neighbours, len(features)), metric="cosine")
    return np.stack([model.fit(inputs, target).predict(outputs) for model in (linear, near)])


def _result(
    study: Study,
    real: FeatureSet,
    synthetic: FeatureSet,
    chosen: StudySettings,
    classes: list[str],
    target: Ints,
    guesses: Ints,
    warnings: tuple[str, ...],
) -> StudyResult:
    """Score arms (A) x classifiers (M) x repeats (R); a resample of patients reweights counts per patient and class."""
    clusters = PatientClusters.of(real.patients)
    codes, shape = clusters.codes[0], guesses.shape[:3]
    cell = codes * len(classes) + target
    size = clusters.count * len(classes)
    total = np.bincount(cell, minlength=size).reshape(-1, len(classes))
    right = np.stack(
        [np.bincount(cell, weights=row == target, minlength=size) for row in guesses.reshape(-1, len(target))]
    ).reshape(*shape, clusters.count, len(classes))

    def scored(weights: Ints) -> Floats:
        """Balanced accuracy (A, M, R); NaN for a resample without any tile of a label: it would be another measure."""
        rows = np.where(weights @ total > 0, weights @ total, np.nan)
        recall = np.einsum("p,amrpk->amrk", weights.astype(np.float64), right) / rows
        return np.asarray(recall.mean(axis=-1), dtype=np.float64)

    def statistic(weights: Ints) -> Floats:
        mean = scored(weights).mean(axis=-1)  # (A, M)
        return np.concatenate([mean.ravel(), mean[1] - mean[0]])

    ones = np.ones(clusters.count, dtype=np.int64)
    runs, values = scored(ones), statistic(ones)
    intervals: list[Interval | None] = [None] * len(values)
    if chosen.draws:
        intervals = clusters.bootstrap(statistic, draws=chosen.draws, seed=chosen.seed, level=chosen.level)
        warnings = (*warnings, *_left_out(intervals[0], chosen.draws))
    scores, differences = [], []
    for m, classifier in enumerate(CLASSIFIERS):
        for a, arm in enumerate(ARMS[study]):
            at = a * len(CLASSIFIERS) + m
            scores.append(ArmScore(classifier, arm, float(values[at]), intervals[at], _tuple(runs[a, m])))
        at = len(ARMS[study]) * len(CLASSIFIERS) + m
        differences.append(
            Difference(classifier, float(values[at]), intervals[at], _tuple(runs[1, m] - runs[0, m]))
        )
    return StudyResult(
        study,
        real.encoder,
        tuple(scores),
        tuple(differences),
        len(real),
        len(synthetic),
        real.patient_count,
        tuple(classes),
        chosen,
        warnings,
    )


def _left_out(interval: Interval | None, draws: int) -> list[str]:
    if interval is None:
        return ["no interval: most resamples of patients miss a label; more patients per label are needed"]
    if interval.draws < 0.9 * draws:
        return [f"{draws - interval.draws} of {draws} resamples of patients miss a label and were left out"]
    return []


def _tuple(values: Floats) -> tuple[float, ...]:
    return tuple(float(v) for v in values)
