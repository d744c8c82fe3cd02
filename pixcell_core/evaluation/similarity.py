"""Cosine similarity of synthetic tiles to the real tiles they were made from, against pairs that do not belong together.

A mean cosine alone says little: in many feature spaces any two tiles of tissue have a cosine of 0.6. So it is shown
beside the cosine of mismatched pairs (a synthetic tile and a real tile of another patient), with the gap between both and
the probability that a pair beats a mismatch. All intervals resample patients.
Legend: p pairs, d feature width, C patients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.sparse

from pixcell_core.errors import BadInputError
from pixcell_core.evaluation.bootstrap import Interval, Ints, PatientClusters
from pixcell_core.evaluation.feature_set import (
    UNKNOWN,
    FeatureSet,
    Floats,
    checked_features,
    require_comparable,
)

BLOCK = 1024


@dataclass(frozen=True)
class PairSimilarity:
    """How alike real and synthetic tiles of a pair are.

    Attributes:
        paired: mean cosine of the pairs.
        mismatched: mean cosine of a synthetic tile with real tiles of other patients.
        gap: paired - mismatched.
        beats_mismatch: probability that a pair's cosine is above that of one of its mismatches (ties count half).
        paired_interval, mismatched_interval, gap_interval, beats_interval: intervals by patients; None with fewer than two.
        pairs, patients: what they rest on.
    """

    paired: float
    mismatched: float
    gap: float
    beats_mismatch: float
    pairs: int
    patients: int
    paired_interval: Interval | None = None
    mismatched_interval: Interval | None = None
    gap_interval: Interval | None = None
    beats_interval: Interval | None = None


def pair_rows(real: FeatureSet, synthetic: FeatureSet) -> tuple[Ints, Ints]:
    """Row numbers (p,), (p,) of each pair: by the synthetic tile's `source`, or else by equal names.

    Names are compared without their folder and ending, and without a last `_real`, `_syn` or `_synthetic`.

    Raises:
        BadInputError: no pair can be found, or a bare name that two real tiles share.
    """
    full = {name: i for i, name in enumerate(real.names)}
    bare: dict[str, int] = {}
    shared: set[str] = set()
    for i, name in enumerate(real.names):
        shared |= {_bare(name)} & bare.keys()
        bare[_bare(name)] = i
    pairs = []
    for j, name in enumerate(synthetic.names):
        wanted = synthetic.sources[j] if synthetic.sources[j] != UNKNOWN else name
        if wanted in full:
            pairs.append((full[wanted], j))
            continue
        if _bare(wanted) in shared:
            raise BadInputError(
                f"{real.name} has several tiles called {_bare(wanted)!r}: it is not clear which one {name!r} goes with.",
                hint="Give the real tile's full name in a column `source` of the synthetic table.",
                code="pair-ambiguous",
            )
        if _bare(wanted) in bare:
            pairs.append((bare[_bare(wanted)], j))
    if len(pairs) < 2:
        raise BadInputError(
            f"{len(pairs)} tiles of {synthetic.name} have a partner in {real.name}; at least two pairs are expected.",
            hint="Name both tiles of a pair alike (NAME_real, NAME_syn), or give a column `source`.",
            code="no-pairs",
        )
    first, second = zip(*pairs, strict=True)
    return np.array(first, dtype=np.int64), np.array(second, dtype=np.int64)


def paired_similarity(
    real: npt.ArrayLike,
    synthetic: npt.ArrayLike,
    patients: Sequence[str],
    *,
    draws: int = 0,
    seed: int = 0,
    level: float = 0.95,
) -> PairSimilarity:
    """Cosine similarity of row i of `real` (p, d) with row i of `synthetic` (p, d), and of mismatched rows.

    Args:
        patients: patient of each pair (p,); an unknown patient (empty text) counts as one of its own.
        draws: resamples of patients for the intervals; 0 leaves them out.

    Raises:
        BadInputError: unusable features, shapes that differ, a row of zeros, or one patient only (no mismatch).
    """
    first, second = checked_features(real, "the real set"), checked_features(synthetic, "the synthetic set")
    if first.shape != second.shape or len(patients) != len(first):
        raise BadInputError(
            f"The real features are {first.shape}, the synthetic ones {second.shape}, with {len(patients)} patients; "
            "one row each per pair is expected.",
            hint="Give the pairs in the same order.",
            code="pairs-differ",
        )
    a, b = _unit(first, "real"), _unit(second, "synthetic")
    clusters = PatientClusters.of(patients)
    codes, count = clusters.codes[0], clusters.count
    if count < 2:
        raise BadInputError(
            f"All {len(first)} pairs are of one patient; mismatched pairs need at least two.",
            hint="Give the patient of each tile in a table, and pairs of several patients.",
            code="too-few-patients",
        )
    own = (a * b).sum(axis=1)
    sums, wins = np.zeros((count, count)), np.zeros((count, count))  # [patient of synthetic, patient of real]
    of_all = _membership(codes, count)
    for start in range(0, len(b), BLOCK):
        part = slice(start, start + BLOCK)
        cosines = b[part] @ a.T
        higher = (own[part, None] > cosines) + 0.5 * (own[part, None] == cosines)
        of_rows = _membership(codes[part], count)
        sums += of_rows @ (of_all @ cosines.T).T
        wins += of_rows @ (of_all @ higher.T).T
    rows = np.bincount(codes, minlength=count)
    own_sums = np.bincount(codes, weights=own, minlength=count)
    np.fill_diagonal(sums, 0)
    np.fill_diagonal(wins, 0)

    def statistic(weights: Ints) -> list[float]:
        w = weights.astype(np.float64)
        others = (w @ rows) ** 2 - (w**2) @ (rows**2)  # mismatched pairs: of two different patients
        if others <= 0:
            return [float("nan")] * 4
        paired, mismatched = float(w @ own_sums / (w @ rows)), float(w @ sums @ w / others)
        return [paired, mismatched, paired - mismatched, float(w @ wins @ w / others)]

    paired, mismatched, gap, beats = statistic(np.ones(count, dtype=np.int64))
    named = len({*patients} - {UNKNOWN})
    intervals: list[Interval | None] = [None] * 4
    if draws:
        intervals = clusters.bootstrap(statistic, draws=draws, seed=seed, level=level)
    return PairSimilarity(paired, mismatched, gap, beats, len(first), named, *intervals)


def similarity_of_sets(
    real: FeatureSet, synthetic: FeatureSet, *, draws: int = 0, seed: int = 0, level: float = 0.95
) -> PairSimilarity:
    """Find the pairs of two sets by name and compare them; the patient is the real tile's."""
    require_comparable(real, synthetic)
    first, second = pair_rows(real, synthetic)
    patients = [real.patients[i] for i in first]
    return paired_similarity(
        real.features[first], synthetic.features[second], patients, draws=draws, seed=seed, level=level
    )


def _membership(codes: Ints, count: int) -> scipy.sparse.csr_array:
    """(C, rows) with a one where a row belongs to a patient."""
    return scipy.sparse.csr_array(
        (np.ones(len(codes)), (codes, np.arange(len(codes)))), shape=(count, len(codes))
    )


def _bare(name: str) -> str:
    stem = name.replace("\\", "/").rsplit("/", 1)[-1]
    stem = stem.rsplit(".", 1)[0] if "." in stem else stem
    for ending in ("_real", "_synthetic", "_syn"):
        stem = stem.removesuffix(ending)
    return stem


def _unit(rows: Floats, which: str) -> Floats:
    lengths = np.sqrt((rows**2).sum(axis=1))
    if not lengths.all():
        raise BadInputError(
            f"Row {int(np.argmin(lengths))} of the {which} features is all zeros; a cosine needs a direction.",
            hint="Extract the features again; look at the tile of that row.",
            code="zero-row",
        )
    unit: Floats = rows / lengths[:, None]
    return unit
