"""Conditioning pairs: is a released tile nearer to the very tile whose embedding steered it than content explains?

A generator that is conditioned on a tile's embedding may redraw the tile. Retrieval by any embedding is biased here, so
each released tile is compared with its own conditioning tiles pair by pair, by the screen's score: correlation and
keypoints of haematoxylin. The null is the holdout tile that looks most like the conditioning tile: the same content,
another patient.

Legend: m pairs.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pixcell_core.contracts import parse_json, read_bounded
from pixcell_core.errors import BadInputError
from privacy_audit.copies import Conformal
from privacy_audit.evidence_parts import ConditioningEvidence
from privacy_audit.neighbours import Standardiser, nearest
from privacy_audit.pairs import pair_scores
from privacy_audit.policy import CopyPolicy, Policy
from privacy_audit.result import Status, TestResult, histogram, not_tested
from privacy_audit.subject import Cohort, Group

NAME = "conditioning pairs"
_CLAIM = "No released tile redraws the very tile it was conditioned on."
_STATISTIC = (
    "share of released tiles nearer to their own conditioning tile than look-alikes of other patients are"
)
_MAX_BYTES = 256 * 1024 * 1024
_FLIPS = 9999


class ConditionsError(BadInputError):
    """The file that says which training tiles steered which released tile cannot be used."""

    default_code = "bad-conditions"


@dataclass(frozen=True)
class Conditions:
    """For each released tile (row) the rows of its conditioning training tiles."""

    rows: dict[int, tuple[int, ...]]


def read_conditions(path: Path, synthetic: Sequence[str], train: Sequence[str]) -> Conditions:
    """Read pairs of a released tile and a training tile.

    Args:
        path: CSV or Parquet with the columns `surrogate` and `tile`, a row per pair; or the JSON object that a site
            keeps of a generation, from the surrogate's name to its tiles.
        synthetic: names of the released tiles. train: names of the training tiles.

    Raises:
        ConditionsError: unreadable, a name that is not among the tiles, or no pair at all.
    """
    released = {name: row for row, name in enumerate(synthetic)}
    known = {name: row for row, name in enumerate(train)}
    found: dict[int, list[int]] = {}
    for surrogate, tile in _pairs(path):
        if tile not in known:
            raise ConditionsError(
                f"{path.name} names the training tile {tile!r}, which is not among the training tiles.",
                hint="Name tiles as the training folder does (patient/tile), and audit against all that were used.",
                code="conditions-unknown-tile",
            )
        if surrogate in released:  # tiles that were drawn and are not released need no audit
            found.setdefault(released[surrogate], []).append(known[tile])
    if len(found) < len(synthetic):
        raise ConditionsError(
            f"{path.name} names the conditions of {len(found)} of {len(synthetic)} released tiles.",
            hint="Every released tile needs at least one row; a release without conditions is audited without the file.",
            code="conditions-incomplete",
        )
    return Conditions({row: tuple(sorted(set(tiles))) for row, tiles in sorted(found.items())})


def gather(
    conditions: Conditions,
    synthetic: Group,
    train: Group,
    holdout: Group,
    cohort: Cohort,
    standardise: Standardiser,
    policy: CopyPolicy,
) -> ConditioningEvidence:
    """Score every released tile with its conditioning tiles, and with as many look-alikes from the holdout."""
    rows = list(conditions.rows)
    used = sorted({tile for tiles in conditions.rows.values() for tile in tiles})
    place = {tile: index for index, tile in enumerate(used)}
    most = max(len(tiles) for tiles in conditions.rows.values())
    alike = nearest(
        standardise(train.features.embeddings[used]), standardise(holdout.features.embeddings), most
    )[1].numpy()
    own = [(row, tile) for row in rows for tile in conditions.rows[row]]
    twin = [
        (row, other)
        for row in rows
        for other in distinct([alike[place[tile]].tolist() for tile in conditions.rows[row]])
    ]
    return ConditioningEvidence(
        released=np.array(rows, dtype=np.int64),
        own=_best(rows, own, pair_scores(synthetic, train, own, policy, "comparing with conditions")),
        other=_best(rows, twin, pair_scores(synthetic, holdout, twin, policy, "comparing with look-alikes")),
        owner=np.array([cohort.of_train[conditions.rows[row][0]] for row in rows], dtype=np.int64),
    )


def distinct(choices: Sequence[Sequence[int]]) -> list[int]:
    """One look-alike for each list of them, best first, none twice while there are others.

    The best of five conditions must be held against the best of five look-alikes: conditions that resemble each other share
    their nearest look-alike, and the best of one is lower by chance.
    """
    taken: list[int] = []
    for likes in choices:
        taken.append(next((one for one in likes if one not in taken), likes[0]))
    return taken


def p_value(evidence: ConditioningEvidence, policy: Policy, rng: np.random.Generator) -> float:
    """Bonferroni over two tests: too many pairs beyond the null pairs, and a mean excess by sign flips of patients.

    If a tile is no nearer to its condition than to a look-alike, the sign of a patient's mean difference is a coin.
    """
    conformal = Conformal(evidence.other)
    excess = conformal.excess(evidence.own, _flag_p(len(evidence.other), policy))
    difference = evidence.own - evidence.other
    patients = np.unique(evidence.owner)
    means = np.array([difference[evidence.owner == patient].mean() for patient in patients])
    signs = rng.choice([-1.0, 1.0], size=(_FLIPS, len(means)))
    flips = (1 + np.count_nonzero((signs * means).mean(axis=1) >= means.mean() - 1e-12)) / (_FLIPS + 1)
    return float(min(1.0, 2.0 * min(excess, flips)))


def result(
    evidence: ConditioningEvidence | None, p: float | None, adjusted: float | None, policy: Policy
) -> TestResult:
    """The test, or what stands in its place where no conditions were given."""
    if evidence is None or p is None or adjusted is None:
        return not_tested(
            NAME,
            "near copies",
            claim=_CLAIM,
            statistic=_STATISTIC,
            threshold=policy.copies.max_flagged_share,
            direction="lower is safer",
            missing="which training tiles steered which released tile was not given (--conditions FILE).",
            required="conditioning" in policy.required,
        )
    conformal = Conformal(evidence.other)
    flag_p = _flag_p(len(evidence.other), policy)
    confirmed = int((evidence.own >= policy.copies.confirm_score).sum())
    share = float((conformal.p_values(evidence.own) <= flag_p).mean())
    excess = conformal.excess(evidence.own, flag_p)
    status, why = _decide(confirmed, len(evidence.own), excess, adjusted, policy)
    low, high = np.quantile(evidence.own - evidence.other, [0.025, 0.975])
    return TestResult(
        name=NAME,
        section="near copies",
        claim=_CLAIM,
        statistic=_STATISTIC,
        value=share,
        interval=(float(low), float(high)),
        interval_kind="central 95 % of the differences own minus look-alike",
        null="the holdout tile that looks most like each conditioning tile",
        p=p,
        p_adjusted=adjusted,
        threshold=policy.copies.max_flagged_share,
        direction="lower is safer",
        status=status,
        why=why,
        cannot_show="What a tile keeps of its condition besides geometry: kind of tissue, grade, stain.",
        histogram=histogram(
            evidence.other,
            evidence.own,
            axis="haematoxylin correlation or matching keypoints, the stronger",
            null_name="look-alikes of other patients",
            observed_name="own conditioning tile",
            threshold=policy.copies.confirm_score,
        ),
        details={
            "pairs": len(evidence.own),
            "confirmed": confirmed,
            "mean_difference": round(float((evidence.own - evidence.other).mean()), 6),
        },
    )


def _decide(confirmed: int, pairs: int, excess: float, adjusted: float, policy: Policy) -> tuple[Status, str]:
    """`excess` is the chance of so many pairs beyond all look-alikes.

    The mean difference alone asks for a person: a tile of the same tissue and stain as its condition may lie a little
    nearer to it than to a look-alike without redrawing anything.
    """
    limits = policy.conditioning
    if confirmed:
        return Status.FAIL, (
            f"{confirmed} of {pairs} released tiles match the tile they were conditioned on with a score of at least "
            f"{policy.copies.confirm_score:g}: they redraw it."
        )
    if adjusted < limits.p_fail and excess < limits.p_fail:
        return Status.FAIL, (
            f"More released tiles than chance explains lie nearer to their own conditioning tiles than any look-alike of "
            f"another patient does (p = {adjusted:.2g} after Holm, FAIL below {limits.p_fail:g})."
        )
    if adjusted < limits.p_review:
        return Status.REVIEW, (
            f"Released tiles lie somewhat nearer to their own conditioning tiles (p = {adjusted:.2g} after Holm, "
            f"REVIEW below {limits.p_review:g})."
        )
    return Status.PASS, (
        f"Released tiles are no nearer to their own conditioning tiles than to look-alikes of other patients "
        f"(p = {adjusted:.2g} after Holm)."
    )


def _flag_p(null: int, policy: Policy) -> float:
    return max(policy.copies.flag_p, 1.0 / (null + 1))


def _best(
    rows: Sequence[int], pairs: Sequence[tuple[int, int]], scores: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    best: dict[int, float] = dict.fromkeys(rows, 0.0)
    for (row, _), score in zip(pairs, scores, strict=True):
        best[row] = max(best[row], float(score))
    return np.array([best[row] for row in rows])


def _pairs(path: Path) -> list[tuple[str, str]]:
    data = read_bounded(path, _MAX_BYTES)
    try:
        if path.suffix.lower() == ".json":
            value = parse_json(data, name=path.name, max_bytes=_MAX_BYTES)
            if not isinstance(value, dict):
                raise ValueError("no object of tiles by surrogate")
            return [(str(name), str(tile)) for name, tiles in value.items() for tile in _tiles(tiles)]
        if path.suffix.lower() == ".parquet":
            import pyarrow.parquet as pq

            table = pq.read_table(io.BytesIO(data), columns=["surrogate", "tile"]).to_pylist()
            return [(str(row["surrogate"]), str(row["tile"])) for row in table]
        reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig")))
        if set(reader.fieldnames or []) != {"surrogate", "tile"}:
            raise ValueError("the columns are not surrogate,tile")
        return [((row["surrogate"] or "").strip(), (row["tile"] or "").strip()) for row in reader]
    except (ValueError, KeyError, OSError, csv.Error, json.JSONDecodeError) as error:
        raise ConditionsError(
            f"{path.name} cannot be read: {str(error).splitlines()[0] if str(error) else 'damaged'}.",
            hint="Give CSV or Parquet with the columns surrogate,tile, or the site's private record of the generation.",
        ) from error


def _tiles(value: object) -> list[object]:
    if isinstance(value, dict):
        value = value.get("sources", value.get("tiles", []))
    return value if isinstance(value, list) else [value]
