"""What must hold before any number means anything: disjoint patients, enough of them, a holdout drawn beforehand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixcell_core.contracts.bands import band, band_floor
from pixcell_core.errors import BadInputError
from privacy_audit.geometry import pooled
from privacy_audit.neighbours import product
from privacy_audit.policy import CopyPolicy, PreconditionPolicy
from privacy_audit.result import Status, TestResult, worst
from privacy_audit.subject import Group
from privacy_audit.tiles import TileSource

DISJOINT = "training and holdout disjoint"
SIZES = "enough patients and tiles"
DRAWN_BEFORE = "holdout drawn before training"
SPLIT_FILE = "split.json"
_BLOCK = 512
_COMPONENTS = 31  # of the 256 numbers of a pooled thumbnail
_ROUNDING = 1e-4  # of a product in single precision


def disjoint(train: Group, holdout: Group, policy: PreconditionPolicy) -> TestResult:
    """No patient, no pixel-identical tile and no twin field may stand on both sides."""
    patients = len(set(train.patients) & set(holdout.patients))
    tiles = len(set(train.features.canonical) & set(holdout.features.canonical))
    twins = 0 if tiles else count_twins(train, holdout, policy.twin_correlation)
    clusters = twin_clusters(train, policy.twin_correlation)
    if patients or tiles:
        status = Status.INVALID
        why = (
            f"{'Some patients' if patients else 'No patient'} and {tiles} identical tiles stand on both sides: a "
            "holdout that shares patients hides exactly the leak it should show."
        )
    elif twins:
        status = Status.REVIEW
        why = f"{twins} holdout tiles show nearly the same field as a training tile: one slide under two patients?"
    else:
        status, why = Status.PASS, "No patient and no tile, turned or mirrored, stands on both sides."
    return TestResult(
        name=DISJOINT,
        section="preconditions",
        claim="Training and holdout share no patient and no tile.",
        statistic="identical tiles on both sides",
        value=float(tiles),
        threshold=0.0,
        direction="lower is safer",
        status=status,
        why=why,
        cannot_show="One person under two patient identifiers whose tiles look different.",
        details={"twins_across": twins, "train_tiles": band(len(train)), "train_clusters": band(clusters)},
    )


def sizes(
    train: Group, holdout: Group, synthetic: Group, policy: PreconditionPolicy, copies: CopyPolicy
) -> TestResult:
    """Enough patients on each side, null tiles and released tiles."""
    patients = min(len(train.patient_names), len(holdout.patient_names))
    problems: list[tuple[Status, str]] = []
    if patients < policy.invalid_patients_below:
        problems.append((Status.INVALID, f"fewer than {policy.invalid_patients_below} patients on one side"))
    elif patients < policy.review_patients_below:
        problems.append((Status.REVIEW, f"fewer than {policy.review_patients_below} patients on one side"))
    if len(holdout) < policy.min_null_tiles:
        problems.append((Status.INVALID, f"fewer than {policy.min_null_tiles} holdout tiles"))
    if len(synthetic) < policy.min_synthetic_tiles:
        problems.append(
            (Status.INVALID, f"{len(synthetic)} released tiles, fewer than {policy.min_synthetic_tiles}")
        )
    if len(holdout) < copies.large_release_tiles <= len(synthetic):
        problems.append(
            (
                Status.REVIEW,
                f"a release of {len(synthetic)} tiles is large, and fewer than {copies.large_release_tiles} holdout "
                f"tiles cannot show that at most {copies.large_max_flagged_share:.1%} of it lie near training",
            )
        )
    # From the lower edge of the band: never better than the exact count allows, and it tells no more than the band.
    certified = 1.0 - 0.05 ** (1.0 / max(band_floor(len(holdout)), 1))
    status = worst([problem[0] for problem in problems] or [Status.PASS])
    words = "; ".join(problem[1] for problem in problems)
    return TestResult(
        name=SIZES,
        section="preconditions",
        claim="The sample is large enough to decide.",
        statistic="patients on the smaller side, at least",
        value=_at_least(patients, policy) if patients >= policy.min_count_shown else None,
        threshold=float(policy.review_patients_below),
        direction="higher is safer",
        status=status,
        why=(words[0].upper() + words[1:] + "." if words else "Patients and tiles reach the policy's minima.")
        + f" {band(len(holdout))} holdout tiles can certify a false flag rate of at most {certified:.2%} "
        "(95 %, no false flag).",
        cannot_show="Leaks rarer than the sample can show.",
        details={
            "train_patients": band(len(train.patient_names), policy.min_count_shown),
            "holdout_patients": band(len(holdout.patient_names), policy.min_count_shown),
            "train_tiles": band(len(train)),
            "holdout_tiles": band(len(holdout)),
            "released_tiles": len(synthetic),
            "certified_false_flag_rate": round(certified, 6),
        },
    )


def _at_least(patients: int, policy: PreconditionPolicy) -> float:
    """The highest public edge a count of patients reaches: of its band, or of the policy."""
    edges = (policy.invalid_patients_below, policy.review_patients_below)
    return float(max([band_floor(patients), *(edge for edge in edges if edge <= patients)]))


@dataclass(frozen=True)
class SplitEvidence:
    """What a split file says: when the holdout was drawn, and which patients stand on each side."""

    drawn: datetime | None
    trained: datetime | None
    train: frozenset[str]
    holdout: frozenset[str]


def find_split(*sources: TileSource) -> SplitEvidence | None:
    """Read `split.json` in a source's folder or beside it; None where there is none that can be read."""
    for source in sources:
        for folder in (source.folder, source.folder.resolve().parent):
            path = folder / SPLIT_FILE
            if path.is_file() and path.stat().st_size < 64 * 1024 * 1024:
                found = _parse_split(path)
                if found is not None:
                    return found
    return None


def drawn_before(
    evidence: SplitEvidence | None, train: Group, holdout: Group, policy: PreconditionPolicy
) -> TestResult:
    """The holdout must have been drawn before training, by patient, from one pool."""
    status, why = _judge_split(evidence, train, holdout)
    if status is Status.REVIEW and evidence is None and not policy.require_split_evidence:
        status, why = Status.PASS, "No evidence was asked for by the policy."
    return TestResult(
        name=DRAWN_BEFORE,
        section="preconditions",
        claim="The holdout was drawn by patient from the same pool, and all patients who were drawn are here.",
        statistic="evidence of the split, and that it came first",
        value=1.0 if status is Status.PASS else 0.0,
        threshold=1.0,
        direction="higher is safer",
        status=status,
        why=why,
        cannot_show="Training that happened before and was not recorded.",
    )


def require_time_after(now: datetime, split: SplitEvidence | None, first_audit: datetime | None) -> None:
    """Refuse a clock that lies before what already happened: every expiry and every order of events would be wrong.

    Raises:
        BadInputError: the clock is behind the split, the training, or the first audit.
    """
    moments = [moment for moment in (split and split.drawn, split and split.trained, first_audit) if moment]
    latest = max((m if m.tzinfo else m.replace(tzinfo=UTC) for m in moments), default=None)
    if latest is not None and now < latest:
        raise BadInputError(
            f"The clock says {now:%Y-%m-%d %H:%M} UTC, and the split, the training or the first audit is of "
            f"{latest:%Y-%m-%d %H:%M} UTC.",
            hint="Set the computer's clock, or mend the times in split.json, and run again.",
            code="clock-behind",
        )


def count_twins(left: Group, right: Group, correlation: float) -> int:
    """Tiles of `right` whose haematoxylin thumbnail equals one of `left` up to noise, unturned."""
    base = _pooled(left)
    return sum(
        int((product(block, base).max(dim=1).values >= correlation).sum())
        for block in _pooled(right).split(_BLOCK)
    )


def twin_clusters(group: Group, correlation: float) -> int:
    """Number of clusters of near-duplicate tiles: overlapping or repeated fields count as one."""
    vectors = _pooled(group)
    parent = list(range(len(vectors)))

    def root(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    bounds = _bounding(vectors)
    for start in range(0, len(vectors), _BLOCK):
        near = product(bounds[start : start + _BLOCK], bounds[start:]) >= correlation - _ROUNDING
        rows, columns = (index + start for index in torch.nonzero(near, as_tuple=True))
        rows, columns = rows[rows < columns], columns[rows < columns]
        alike = (vectors[rows] * vectors[columns]).sum(dim=1) >= correlation
        for row, column in zip(rows[alike].tolist(), columns[alike].tolist(), strict=True):
            parent[root(row)] = root(column)
    return sum(1 for item in range(len(parent)) if parent[item] == item)


def _bounding(vectors: Tensor) -> Tensor:
    """(n, r + 1) vectors whose products are never below those of the (n, d) ones: an eighth of the work for all pairs.

    The first r numbers are the strongest principal components; what is left enters by its length (Cauchy and Schwarz).
    """
    _, axes = torch.linalg.eigh(vectors.T @ vectors)
    kept = vectors @ axes[:, -_COMPONENTS:]
    left = ((vectors**2).sum(dim=1) - (kept**2).sum(dim=1)).clamp_min(0.0).sqrt()
    return torch.cat([kept, left[:, None]], dim=1)


def _pooled(group: Group) -> Tensor:
    return torch.cat([pooled(block.float()) for block in group.features.thumbs.split(_BLOCK)])


def _judge_split(evidence: SplitEvidence | None, train: Group, holdout: Group) -> tuple[Status, str]:
    if evidence is None:
        return Status.REVIEW, (
            f"No {SPLIT_FILE} beside the tiles says when the holdout was drawn: a person has to vouch for it."
        )
    absent = sum(
        len(listed - set(tiles.patients))
        for tiles, listed in ((train, evidence.train), (holdout, evidence.holdout))
    )
    strangers = [
        name
        for name, tiles, listed in (
            ("training", train, evidence.train),
            ("holdout", holdout, evidence.holdout),
        )
        if listed and not set(tiles.patients) <= listed
    ]
    if strangers:
        return (
            Status.INVALID,
            f"The {' and '.join(strangers)} tiles hold patients that {SPLIT_FILE} does not list there.",
        )
    if absent:
        return (
            Status.REVIEW,
            f"{SPLIT_FILE} lists patients of whom no tile is here: nothing of theirs was compared with the release. A "
            "person has to say why.",
        )
    if not evidence.train or not evidence.holdout or evidence.drawn is None:
        return Status.REVIEW, f"{SPLIT_FILE} does not say which patients were drawn and when."
    if evidence.trained is not None and evidence.trained < evidence.drawn:
        return (
            Status.REVIEW,
            "The holdout was drawn after training began: it may differ from what training left out.",
        )
    return (
        Status.PASS,
        f"{SPLIT_FILE} lists both sides, and the holdout was drawn on {evidence.drawn:%Y-%m-%d}"
        + (", before training began." if evidence.trained else "; it does not say when training began."),
    )


def _parse_split(path: Path) -> SplitEvidence | None:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(value, dict):
        return None
    return SplitEvidence(
        _time(value, ("drawn_at", "created_at", "created", "time")),
        _time(value, ("training_started_at", "trained_at")),
        _names(value, ("train", "train_patients", "training")),
        _names(value, ("holdout", "holdout_patients")),
    )


def _time(value: dict[str, Any], keys: Sequence[str]) -> datetime | None:
    for key in keys:
        if isinstance(value.get(key), str):
            try:
                moment = datetime.fromisoformat(value[key])
                return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
            except ValueError:
                return None
    return None


def _names(value: dict[str, Any], keys: Sequence[str]) -> frozenset[str]:
    for key in keys:
        found = value.get(key)
        if isinstance(found, list):
            return frozenset(str(name) for name in found)
    return frozenset()
