"""Proof of sensitivity in every run: planted copies the screen must find, innocent tiles it must leave alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pixcell_core.cli.progress import progress
from pixcell_core.contracts.bands import band
from privacy_audit.copies import Conformal
from privacy_audit.duplicates import Duplicates
from privacy_audit.eye import Eye
from privacy_audit.features import TileFeatures, describe, join
from privacy_audit.intervals import clopper_pearson_lower, clopper_pearson_upper
from privacy_audit.plants import KINDS, CopyKind, recolour
from privacy_audit.policy import CopyPolicy, SelfTestPolicy
from privacy_audit.result import Detection, Status, TestResult
from privacy_audit.subject import Group
from privacy_audit.tiles import TileSource

SENSITIVITY = "self-test: planted copies"
SPECIFICITY = "self-test: innocent tiles"
TEXTURE_FLOOR = 0.02  # optical density: the floor of `geometry.evened`
FOLDS = 5
_MAKE_AT_ONCE = 64


@dataclass(frozen=True)
class Planted:
    """Planted tiles: features, kind (index into KINDS) and the training row each was made from."""

    features: TileFeatures
    kind: npt.NDArray[np.int64]
    source: npt.NDArray[np.int64]


def sources_for(
    train: Group, count: int, rng: np.random.Generator, duplicates: Duplicates | None = None
) -> npt.NDArray[np.int64]:
    """Draw training rows to copy, patient by patient in turn, among tiles that show nuclei at all.

    With `duplicates` each field of tissue is represented by one tile, so that sources differ in what they show.
    """
    texture = train.features.texture.numpy()
    usable = np.flatnonzero(texture > TEXTURE_FLOOR)
    if not len(usable):
        usable = np.arange(len(train))
    if duplicates is not None:
        usable = rng.permutation(usable)
        usable = np.sort(usable[np.unique(duplicates.cluster[usable], return_index=True)[1]])
    patients = np.array(train.patients)
    by_patient = {name: rng.permutation(usable[patients[usable] == name]) for name in train.patient_names}
    order = [rows for name in rng.permutation(train.patient_names) if len(rows := by_patient[str(name)])]
    # Every patient once, then every patient again with the next tile: sources differ as long as tiles last.
    turns = [divmod(turn, len(order)) for turn in range(count)]
    return np.array([int(order[who][lap % len(order[who])]) for lap, who in turns], dtype=np.int64)


def plant(
    train: TileSource,
    group: Group,
    holdout: TileSource,
    eye: Eye,
    per_kind: int,
    rng: np.random.Generator,
    duplicates: Duplicates | None = None,
) -> Planted:
    """Make `per_kind` copies of every kind from different training tiles (and fields) and describe them."""
    parts: list[TileFeatures] = []
    kinds: list[int] = []
    sources: list[int] = []
    with progress("planting controls", total=per_kind * len(KINDS), unit="tiles") as bar:
        for number, kind in enumerate(KINDS):
            rows = sources_for(group, per_kind, rng, duplicates)
            for start in range(0, per_kind, _MAKE_AT_ONCE):
                block = rows[start : start + _MAKE_AT_ONCE]
                tiles = [_make(kind, train, holdout, int(row), rng) for row in block]
                parts.append(describe(torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2), eye))
                bar.advance(len(block))
            kinds += [number] * per_kind
            sources += rows.tolist()
    return Planted(join(parts), np.array(kinds, dtype=np.int64), np.array(sources, dtype=np.int64))


def recoloured_holdout(
    holdout: TileSource, train: TileSource, eye: Eye, count: int, rng: np.random.Generator
) -> tuple[TileFeatures, npt.NDArray[np.int64]]:
    """Holdout tiles in the colours of training tiles: a screen that follows colour would flag them.

    Returns their features and the holdout rows they come from.
    """
    rows = np.sort(rng.choice(len(holdout.ids), size=min(count, len(holdout.ids)), replace=False))
    models = rng.choice(len(train.ids), size=len(rows))
    tiles = [
        recolour(_one(holdout, int(row)), _one(train, int(model)))
        for row, model in zip(rows, models, strict=True)
    ]
    return describe(torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2), eye), rows


def sensitivity(
    scores: npt.NDArray[np.float64],
    kinds: npt.NDArray[np.int64],
    same: npt.NDArray[np.bool_],
    right: npt.NDArray[np.bool_],
    conformal: Conformal,
    copies: CopyPolicy,
    policy: SelfTestPolicy,
) -> TestResult:
    """How many planted copies were flagged, kind by kind; short of a gate the audit is INVALID.

    Args:
        scores: (K,) screen scores of the planted tiles. kinds: (K,) index into KINDS.
        same: (K,) found by digest alone. right: (K,) best match shows the field of the source.
        conformal: the null. copies, policy: thresholds.
    """
    flagged = conformal.p_values(scores) <= copies.flag_p
    detections = []
    for number, kind in enumerate(KINDS):
        rows = kinds == number
        # By the screen alone: that an exact copy has a digest is proven elsewhere, and would vouch for a blind screen.
        found = int(flagged[rows].sum())
        lower = clopper_pearson_lower(found, int(rows.sum()))
        gate = policy.gates.get(kind.key)  # type: ignore[call-overload]
        detections.append(
            Detection(
                kind=kind.key,
                words=kind.words,
                planted=int(rows.sum()),
                found=found,
                sensitivity=found / int(rows.sum()) if rows.any() else 0.0,
                lower=lower,
                gate=gate,
                met=gate is None or lower >= gate,
            )
        )
    gated = [d for d in detections if d.gate is not None]
    short = [d for d in gated if not d.met]
    weakest = min(gated, key=lambda d: d.lower)
    return TestResult(
        name=SENSITIVITY,
        section="self-test",
        claim="This run can see the kinds of copy it claims to rule out.",
        statistic="lowest sensitivity among the planted kinds (lower bound)",
        value=weakest.lower,
        interval=(weakest.lower, 1.0),
        interval_kind="Clopper–Pearson 95 %, one-sided",
        null="copies planted among the released tiles, unknown to the screen",
        threshold=weakest.gate,
        direction="higher is safer",
        status=Status.INVALID if short else Status.PASS,
        why=(
            "Not proven for: " + ", ".join(f"{d.words} ({d.found} of {d.planted} found)" for d in short) + "."
            if short
            else f"All {len(gated)} gated kinds were found; the weakest is '{weakest.words}' with "
            f"{weakest.found} of {weakest.planted}."
        ),
        cannot_show=(
            "Kinds of copy that were not planted, kinds without a gate (they are limits, reported as measured), and "
            "copies of tiles without nuclei."
        ),
        detections=tuple(detections),
        details={
            "planted": len(kinds),
            "same_by_digest": int(same.sum()),
            "right_source_among_flagged": round(float(right[flagged].mean()), 4) if flagged.any() else None,
        },
    )


def specificity(
    null_scores: npt.NDArray[np.float64],
    owner: npt.NDArray[np.int64],
    recoloured: npt.NDArray[np.float64],
    recoloured_owner: npt.NDArray[np.int64],
    copies: CopyPolicy,
    policy: SelfTestPolicy,
    rng: np.random.Generator,
) -> TestResult:
    """False flags among innocent tiles: each fifth of the holdout patients judged by the others.

    Args:
        null_scores: (n,) screen scores of the holdout. owner: (n,) patient number of each.
        recoloured: (m,) scores of holdout tiles in training colours. recoloured_owner: (m,) their patient numbers.
    """
    fold = dict(
        zip(rng.permutation(np.unique(owner)).tolist(), np.arange(len(np.unique(owner))) % FOLDS, strict=True)
    )
    folds = np.array([fold[int(patient)] for patient in owner])
    colour_folds = np.array([fold[int(patient)] for patient in recoloured_owner])
    flags = 0
    colour_flags = 0
    for number in range(FOLDS):
        side, colour_side = folds == number, colour_folds == number
        # The others are the null; flag_p must be reachable there, so it is at least one in their number.
        judge = Conformal(null_scores[~side])
        flag_p = max(copies.flag_p, 1.0 / (len(judge.null) + 1))
        flags += int((judge.p_values(null_scores[side]) <= flag_p).sum())
        colour_flags += int((judge.p_values(recoloured[colour_side]) <= flag_p).sum())
    upper = clopper_pearson_upper(flags, len(null_scores))
    colour_upper = clopper_pearson_upper(colour_flags, len(recoloured))
    short = upper > policy.max_null_false_positive or colour_upper > policy.max_recoloured_false_positive
    return TestResult(
        name=SPECIFICITY,
        section="self-test",
        claim="Innocent tiles are not flagged, also not when they wear the training stains.",
        statistic="false flag rate on holdout tiles (upper bound)",
        value=upper,
        interval=(0.0, upper),
        interval_kind="Clopper–Pearson 95 %, one-sided; tiles of a patient are not independent",
        null="each fifth of the holdout patients judged by the others",
        threshold=policy.max_null_false_positive,
        direction="lower is safer",
        status=Status.INVALID if short else Status.PASS,
        why=(
            f"{flags} of {band(len(null_scores))} holdout tiles and {colour_flags} of {len(recoloured)} recoloured ones "
            f"were flagged: at most {upper:.2%} and {colour_upper:.2%} of innocent tiles"
            + (", more than the policy allows." if short else ".")
        ),
        cannot_show="Differences between the hospital's pool and other hospitals.",
        details={
            "flagged_holdout": flags,
            "flagged_recoloured": colour_flags,
            "recoloured": len(recoloured),
            "recoloured_upper": round(colour_upper, 6),
        },
    )


def _make(
    kind: CopyKind, train: TileSource, holdout: TileSource, row: int, rng: np.random.Generator
) -> npt.NDArray[np.uint8]:
    return kind.make(_one(train, row), _one(holdout, int(rng.integers(len(holdout.ids)))), rng)


def _one(source: TileSource, row: int) -> npt.NDArray[np.uint8]:
    return source.read(row, row + 1)[0].permute(1, 2, 0).contiguous().numpy()
