"""What every test of the audit returns: one typed result, one ladder of statuses, one list of flagged tiles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

Direction = Literal["lower is safer", "higher is safer"]
FlagKind = Literal["exact copy", "confirmed near copy", "near copy"]
Section = Literal[
    "preconditions",
    "self-test",
    "differential privacy",
    "membership",
    "near copies",
    "attribution",
    "coverage",
    "context",
]


class Status(StrEnum):
    """Outcome of a test or of a whole audit; `INVALID` means that the audit may hold no opinion."""

    PASS = "PASS"
    REVIEW = "REVIEW"
    FAIL = "FAIL"
    INVALID = "INVALID"

    @property
    def rank(self) -> int:
        """0 for PASS up to 3 for INVALID: the worst of several statuses is the one of highest rank."""
        return list(Status).index(self)


def worst(statuses: Iterable[Status]) -> Status:
    """The worst status; an empty collection is INVALID, because nothing was tested."""
    found = list(statuses)
    return max(found, key=lambda status: status.rank) if found else Status.INVALID


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SecondBars(_Frozen):
    """Another null of the same drawing: shares in the same bins, and its own threshold."""

    name: str
    shares: tuple[float, ...]
    threshold: float | None


class Histogram(_Frozen):
    """Null distribution of a score in equal bins, the observed scores in the same bins, and the threshold.

    `edges` has one more entry than `null` and `observed`. Counts are shares of each group, so that no
    number of patients or tiles can be read from the drawing.
    """

    axis: str
    edges: tuple[float, ...]
    null: tuple[float, ...]
    observed: tuple[float, ...]
    null_name: str
    observed_name: str
    threshold: float | None = None
    marks: tuple[float, ...] = ()
    seconds: tuple[SecondBars, ...] = ()


class Detection(_Frozen):
    """How many planted copies of one kind the audit found, with a Clopper–Pearson interval (95 %, one-sided)."""

    kind: str
    words: str
    planted: int
    found: int
    sensitivity: float
    lower: float
    gate: float | None
    met: bool


class TestResult(_Frozen):
    """One line of the audit: what was claimed, measured, compared with what, and decided."""

    __test__ = False  # pytest must not collect this class

    name: str
    section: Section
    claim: str
    statistic: str
    value: float | None
    interval: tuple[float, float] | None = None
    interval_kind: str = ""
    null: str = ""
    p: float | None = None
    p_adjusted: float | None = None
    threshold: float | None = None
    direction: Direction
    status: Status
    why: str
    cannot_show: str
    gating: bool = True
    tested: bool = True
    histogram: Histogram | None = None
    detections: tuple[Detection, ...] = ()
    details: dict[str, float | int | str | None] = {}


def not_tested(
    name: str,
    section: Section,
    *,
    claim: str,
    statistic: str,
    threshold: float | None,
    direction: Direction,
    missing: str,
    required: bool,
) -> TestResult:
    """A test that was not run because what it needs was not given: said aloud, and a REVIEW where the policy asks for it.

    Args:
        missing: what was not given, and how to give it.
        required: whether the policy demands this test.
    """
    return TestResult(
        name=name,
        section=section,
        claim=claim,
        statistic=statistic,
        value=None,
        threshold=threshold,
        direction=direction,
        status=Status.REVIEW,
        why=f"Not tested: {missing}"
        + (" The policy demands this test." if required else " The verdict does not rest on it."),
        cannot_show="Anything: it was not run.",
        gating=required,
        tested=False,
    )


class Flag(_Frozen):
    """One synthetic tile that lies nearer to a training tile than the holdout explains.

    `nearest` is the blinded digest of the training tile's pixels (`privacy_audit.blinding`): it names the tile inside
    the hospital and nobody outside, not even somebody who holds that tile.
    """

    synthetic: str
    nearest: str
    score: float
    p_value: float
    kind: FlagKind


@dataclass(frozen=True)
class SecondNull:
    """Scores of a further null that a drawing shows beside the first."""

    name: str
    scores: tuple[float, ...]
    threshold: float | None


def histogram(
    null: npt.NDArray[np.float64],
    observed: npt.NDArray[np.float64],
    *,
    axis: str,
    null_name: str,
    observed_name: str,
    threshold: float | None,
    bins: int = 40,
    marks: Sequence[float] = (),
    seconds: Sequence[SecondNull] = (),
) -> Histogram | None:
    """Bin two groups of scores over their common range, as shares; None when either group is empty."""
    if not len(null) or not len(observed):
        return None
    both = np.concatenate(
        [null, observed, [threshold] if threshold is not None else [], *(second.scores for second in seconds)]
    )
    low, high = float(both.min()), float(both.max())
    if high - low < 1e-4:  # a handful of patients can give one value only; edges are kept to six digits
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, bins + 1)

    def shares(values: npt.NDArray[np.float64]) -> tuple[float, ...]:
        counts, _ = np.histogram(values, bins=edges)
        return tuple(round(float(c) / len(values), 6) for c in counts)

    return Histogram(
        axis=axis,
        edges=tuple(round(float(e), 6) for e in edges),
        null=shares(null),
        observed=shares(observed),
        null_name=null_name,
        observed_name=observed_name,
        threshold=None if threshold is None else round(float(threshold), 6),
        marks=tuple(round(float(m), 6) for m in marks),
        seconds=tuple(
            SecondBars(
                name=second.name,
                shares=shares(np.array(second.scores)),
                threshold=None if second.threshold is None else round(second.threshold, 6),
            )
            for second in seconds
        ),
    )
