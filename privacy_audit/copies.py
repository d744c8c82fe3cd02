"""Exact and near copies: is a released tile a training tile, up to turns, stain, noise, compression and shifts?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pixcell_core.contracts.bands import band
from privacy_audit.intervals import excess_over_null, two_sided
from privacy_audit.policy import CopyPolicy
from privacy_audit.result import Flag, FlagKind, SecondNull, Status, TestResult, histogram
from privacy_audit.subject import Group

EXACT = "exact copies"
NEAR = "near copies"


def exact_matches(synthetic: Group, train: Group) -> dict[int, int]:
    """Synthetic row → training row whose pixels are the same under one of the eight symmetries."""
    known = {digest: row for row, digest in reversed(list(enumerate(train.features.canonical)))}
    return {row: known[digest] for row, digest in enumerate(synthetic.features.canonical) if digest in known}


def exact_copies(exact: npt.NDArray[np.bool_]) -> TestResult:
    """Test of bit-identical pixels under turns and mirrors; one is enough to refuse a release.

    Args:
        exact: (S,) whether each released tile is a training tile.
    """
    found, count = int(exact.sum()), len(exact)
    return TestResult(
        name=EXACT,
        section="near copies",
        claim="No released tile is a training tile, also not turned or mirrored.",
        statistic="released tiles with the pixels of a training tile",
        value=float(found),
        interval=None,
        threshold=0.0,
        direction="lower is safer",
        status=Status.FAIL if found else Status.PASS,
        why=(
            f"{found} of {count} released tiles are training tiles, pixel for pixel, as they are or turned or mirrored."
            if found
            else f"None of the {count} released tiles has the pixels of a training tile in any of the "
            "eight turns and mirrors."
        ),
        cannot_show="A copy that was compressed, recoloured, blurred or shifted by one pixel: see near copies.",
    )


@dataclass(frozen=True)
class Conformal:
    """Null scores and what they say about any other score."""

    null: npt.NDArray[np.float64]

    def p_values(self, scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """p = (1 + #null >= s) / (n_null + 1): valid when null and scores are exchangeable (Vovk et al. 2005)."""
        ordered = np.sort(self.null)
        at_least = len(ordered) - np.searchsorted(ordered, scores, side="left")
        return np.asarray((1.0 + at_least) / (len(ordered) + 1.0), dtype=np.float64)

    def threshold(self, flag_p: float) -> float | None:
        """Scores strictly above this value have p <= flag_p; None when the null is too small for any to."""
        allowed = self._allowed(flag_p)
        return float(np.sort(self.null)[::-1][allowed - 1]) if allowed else None

    def excess(self, scores: npt.NDArray[np.float64], flag_p: float) -> float:
        """Chance that as many of as many innocent tiles, or more, would be flagged."""
        return self.chance_of(int((self.p_values(scores) <= flag_p).sum()), len(scores), flag_p)

    def chance_of(self, flagged: int, count: int, flag_p: float) -> float:
        """Chance that `flagged` or more of `count` innocent tiles are flagged; see `intervals.excess_over_null`."""
        return excess_over_null(flagged, count, self._allowed(flag_p), len(self.null))

    def _allowed(self, flag_p: float) -> int:
        """Rank of the threshold among the null scores, largest first; 0 when the null is too small for one."""
        return min(int(np.floor(flag_p * (len(self.null) + 1) + 1e-9)), len(self.null))


@dataclass(frozen=True)
class Nulls:
    """Several nulls at once: the holdout, and for example same-seed twins from the base model.

    The base model never saw a private slide, so its tiles from the same seeds and conditions are as near to training
    as chance and conditioning bring them. A tile is flagged when it stands out from ANY null: a second null can only
    add suspicion. By the union bound the rate of false flags is at most the sum of the rates.
    """

    parts: tuple[tuple[str, Conformal], ...]  # name and scores; the first is the holdout

    @property
    def first(self) -> Conformal:
        """The first null: the holdout."""
        return self.parts[0][1]

    @property
    def null(self) -> npt.NDArray[np.float64]:
        """Scores of the first null, for drawings and medians."""
        return self.first.null

    @property
    def seconds(self) -> tuple[tuple[str, Conformal], ...]:
        """All nulls but the first."""
        return self.parts[1:]

    @property
    def words(self) -> str:
        """What the nulls are, with sizes in bands."""
        return " and ".join(f"{band(len(part.null))} {name}" for name, part in self.parts)

    def p_values(self, scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The smallest conformal p over the nulls."""
        return np.asarray(np.min([part.p_values(scores) for _, part in self.parts], axis=0))

    def threshold(self, flag_p: float) -> float | None:
        """The lowest threshold of any null that is large enough to have one."""
        found = [t for _, part in self.parts if (t := part.threshold(flag_p)) is not None]
        return min(found) if found else None

    def excess(self, scores: npt.NDArray[np.float64], flag_p: float) -> float:
        """Chance of so many flags among innocent tiles: by the holdout, or by a further null at twice its p and more.

        A further null can only add suspicion, so it never raises what the holdout says; one without a threshold says
        nothing.
        """
        further = [
            part.excess(scores, flag_p) for _, part in self.parts[1:] if part.threshold(flag_p) is not None
        ]
        return min([self.first.excess(scores, flag_p), *(len(further) * 2.0 * one for one in further)])

    def chance_over(self, share: float, count: int, flag_p: float) -> float:
        """Upper bound on the chance that more than `share` of `count` innocent tiles are flagged."""
        most = int(np.floor(share * count + 1e-9))
        parts = [part for _, part in self.parts if part.threshold(flag_p) is not None]
        # With several nulls one of them flags its part of any number.
        least = most // max(len(parts), 1) + 1
        return min(1.0, sum(part.chance_of(least, count, flag_p) for part in parts))


@dataclass(frozen=True)
class NearCopies:
    """Result of the screen over the release."""

    result: TestResult
    p_values: npt.NDArray[np.float64]
    flagged: npt.NDArray[np.int64]
    confirmed: npt.NDArray[np.int64]
    excess_p: float


def near_copies(
    scores: npt.NDArray[np.float64],
    nulls: Nulls,
    policy: CopyPolicy,
    *,
    unrecognisable: float,
    proven: Sequence[str] = (),
    unproven: Sequence[str] = (),
) -> NearCopies:
    """Test of near copies.

    Args:
        scores: (S,) screen scores of the released tiles against training.
        nulls: screen scores of the holdout tiles against the same training tiles, and of further nulls.
        policy: thresholds.
        unrecognisable: share of training tiles with too little haematoxylin texture to be recognised.
        proven: kinds of copy that this run has shown that it sees. unproven: all others that were planted.
    """
    count = len(scores)
    p_values = nulls.p_values(scores)
    flags = p_values <= policy.flag_p
    flagged = np.flatnonzero(flags)
    confirmed = np.flatnonzero(flags & (scores >= policy.confirm_score))
    share = len(flagged) / count
    excess = nulls.excess(scores, policy.flag_p)
    over_limit = nulls.chance_over(policy.max_flagged_share, count, policy.flag_p)
    status, why = _decide(
        len(flagged), len(confirmed), count, excess, over_limit, float(nulls.null.max()), policy
    )
    why += _about_seconds(nulls, scores, policy)
    threshold = nulls.first.threshold(policy.flag_p)
    result = TestResult(
        name=NEAR,
        section="near copies",
        claim=(
            f"No released tile is a training tile in one of these disguises: {'; '.join(proven)}."
            if proven
            else "No released tile is a training tile in disguise; this run has proven none that it would see."
        ),
        statistic="share of released tiles nearer to training than the holdout explains",
        value=share,
        interval=two_sided(len(flagged), count),
        interval_kind="Clopper–Pearson 95 %",
        null=f"{nulls.words} against the same training tiles; tiles taken as exchangeable",
        p=excess,
        threshold=policy.max_flagged_share,
        direction="lower is safer",
        status=status,
        why=why,
        cannot_show=(
            "".join(f"{words}; " for words in unproven)
            + "zooms beyond a factor of two; blends in which the training tile has less than half of the weight; copies "
            f"of the {unrecognisable:.1%} of training tiles that show almost no nuclei."
        ),
        histogram=histogram(
            nulls.null,
            scores,
            axis="haematoxylin correlation or matching keypoints, the stronger",
            null_name="holdout",
            observed_name="released",
            threshold=threshold,
            marks=[float(s) for s in scores[flagged]],
            seconds=[
                SecondNull(
                    name=name, scores=tuple(part.null.tolist()), threshold=part.threshold(policy.flag_p)
                )
                for name, part in nulls.seconds
            ],
        ),
        details={
            "flagged": len(flagged),
            "confirmed": len(confirmed),
            "flag_p": policy.flag_p,
            "flag_threshold": threshold,
            "chance_over_limit": round(over_limit, 8),
            "confirm_score": policy.confirm_score,
            "null_median": float(np.median(nulls.null)) if len(nulls.null) else None,
            "null_maximum": float(nulls.null.max()) if len(nulls.null) else None,
            "released_maximum": float(scores.max()),
            **_second_details(nulls, scores, policy),
        },
    )
    return NearCopies(result, p_values, flagged, confirmed, excess)


def flags_of(
    ids: Sequence[str],
    nearest: Sequence[str],
    scores: npt.NDArray[np.float64],
    exact: npt.NDArray[np.bool_],
    near: NearCopies,
) -> list[Flag]:
    """Every flagged released tile with the blinded digest of its nearest training tile, worst first."""
    confirmed = set(near.confirmed.tolist())
    rows = set(np.flatnonzero(exact).tolist()) | set(near.flagged.tolist())
    out = []
    for row in sorted(rows, key=lambda row: (-scores[row], ids[row])):
        kind: FlagKind = (
            "exact copy" if exact[row] else "confirmed near copy" if row in confirmed else "near copy"
        )
        out.append(
            Flag(
                synthetic=ids[row],
                nearest=nearest[row],
                score=round(float(scores[row]), 6),
                p_value=round(float(near.p_values[row]), 8),
                kind=kind,
            )
        )
    return out


def _about_seconds(nulls: Nulls, scores: npt.NDArray[np.float64], policy: CopyPolicy) -> str:
    """What the further nulls added, in words; that one is too small for any threshold is said aloud."""
    words = ""
    for name, part in nulls.seconds:
        threshold = part.threshold(policy.flag_p)
        if threshold is None:
            words += (
                f" The {len(part.null)} {name} are too few to have a threshold at p = {policy.flag_p:g}, for which "
                f"{least_null(policy.flag_p)} are needed: they flagged nothing."
            )
            continue
        own = part.p_values(scores) <= policy.flag_p
        alone = int((own & (nulls.first.p_values(scores) > policy.flag_p)).sum())
        words += (
            f" Against the {len(part.null)} {name}, none of which came above {part.null.max():.2f}, "
            f"{int(own.sum())} stand out, {alone} of them not against the holdout."
        )
    return words


def least_null(flag_p: float) -> int:
    """The fewest null tiles of which a score above all of them is flagged at this p."""
    return int(np.ceil(1.0 / flag_p - 1e-9)) - 1


def _second_details(
    nulls: Nulls, scores: npt.NDArray[np.float64], policy: CopyPolicy
) -> dict[str, float | int | str | None]:
    details: dict[str, float | int | str | None] = {}
    for name, part in nulls.seconds:
        details |= {
            name: len(part.null),
            f"{name}: flag_threshold": part.threshold(policy.flag_p),
            f"{name}: median": float(np.median(part.null)),
            f"{name}: maximum": float(part.null.max()),
            f"{name}: flagged": int((part.p_values(scores) <= policy.flag_p).sum()),
        }
    return details


def _decide(
    flagged: int,
    confirmed: int,
    count: int,
    excess: float,
    over_limit: float,
    highest: float,
    policy: CopyPolicy,
) -> tuple[Status, str]:
    if confirmed:
        return Status.FAIL, (
            f"{confirmed} of {count} released tiles match a training tile with a score of at least "
            f"{policy.confirm_score:g}; no holdout tile came above {highest:.2f}."
        )
    if excess < policy.excess_p_fail or flagged > policy.max_flagged_share * count:
        return Status.FAIL, (
            f"{flagged} of {count} released tiles lie nearer to training than the holdout explains "
            f"(chance of so many: {excess:.2g}; of exceeding the limit of {policy.max_flagged_share:.2%}: "
            f"{over_limit:.2g})."
        )
    if flagged:
        return Status.REVIEW, (
            f"{flagged} of {count} released tiles lie beyond what they are compared with, no more than chance allows; "
            "a person has to look at each pair."
        )
    if excess < policy.excess_p_review:
        return Status.REVIEW, f"More released tiles than expected lie near training tiles (p = {excess:.2g})."
    return (
        Status.PASS,
        f"None of the {count} released tiles lies nearer to a training tile than the holdout does.",
    )
