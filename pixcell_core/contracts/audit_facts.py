"""What a bundle's papers repeat of an audit report: outcome, tests and their power, bands of patients, what was left out.

A reading of the report for people, by whoever holds a bundle; the report itself belongs to the audit, which may say more.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class _Facts(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class PowerFacts(_Facts):
    """How many planted copies of one kind the audit found; `lower` bounds its sensitivity from below (95 %)."""

    words: str
    planted: int
    found: int
    lower: float


class TestFacts(_Facts):
    """One test: what was claimed, and what came out."""

    __test__ = False  # pytest must not collect this class

    name: str
    claim: str
    status: str
    cannot_show: str = ""
    gating: bool = True
    tested: bool = True
    detections: tuple[PowerFacts, ...] = ()


class ReferenceFacts(_Facts):
    """Bands of how many real tiles and patients stood behind a reference ("50 to 99")."""

    tiles: str
    patients: str


class SubjectFacts(_Facts):
    """The patients trained on, and those held out to compare with."""

    train: ReferenceFacts
    holdout: ReferenceFacts


class AuditFacts(_Facts):
    """The parts of a report that a person reads first."""

    summary: str
    subjects: SubjectFacts
    tests: tuple[TestFacts, ...]
    not_tested: tuple[str, ...] = ()
