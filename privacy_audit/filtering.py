"""A filtered release: flagged tiles were withheld after a first audit, and the rest is audited again.

Withholding hides copies, it does not mend a generator that memorises. So it is allowed once, only for what the
holdout explains as chance, and every later reader is told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from pixcell_core.contracts import digest
from privacy_audit.copies import NEAR
from privacy_audit.policy import Policy
from privacy_audit.report import FILTERED, AuditReport
from privacy_audit.result import Status, TestResult


def filtered_release(
    first: AuditReport, first_bytes: bytes, files: Sequence[str], roots: tuple[str, str], policy: Policy
) -> TestResult:
    """Check that a release is what a first audit left over: all its tiles but the flagged ones.

    Args:
        first: the first audit's report.
        first_bytes: its file, whose digest the result names.
        files: digests of the released tiles' files.
        roots: roots over the training and the holdout tiles of this audit.
        policy: the policy of this audit.
    """
    flagged = {flag.synthetic for flag in first.flagged}
    withheld, total = len(flagged), first.subjects.synthetic.tiles
    wrong = _objection(first, files, flagged, roots, policy)
    return TestResult(
        name=FILTERED,
        section="preconditions",
        claim="The tiles withheld after a first audit are few, and all set-level tests were run again on the rest.",
        statistic="share of the first release's tiles that were withheld",
        value=withheld / total,
        threshold=policy.copies.max_flagged_share,
        direction="lower is safer",
        status=Status.INVALID if wrong else Status.PASS,
        why=wrong
        or f"Filtered: {withheld} of {total} tiles, flagged by the first audit no more often than chance allows, were "
        "withheld. Every test here was run again on the rest.",
        cannot_show="That the generator does not memorise: withholding hides copies and mends nothing.",
        details={"withheld": withheld, "of": total, "first_report": digest(first_bytes)},
    )


def withholding_answers(report: AuditReport) -> bool:
    """Whether flagged tiles, no more than chance explains, are all that keeps this release from PASS."""
    doubtful = [test.name for test in report.tests if test.gating and test.status is not Status.PASS]
    filtered = report.test(FILTERED) is not None
    return report.verdict is Status.REVIEW and doubtful == [NEAR] and bool(report.flagged) and not filtered


def _objection(
    first: AuditReport, files: Sequence[str], flagged: set[str], roots: tuple[str, str], policy: Policy
) -> str:
    """The first reason why this is no filtered release of that audit; empty when it is one."""
    left = Counter(file.sha256 for file in first.subjects.synthetic.files if file.name not in flagged)
    doubtful = [test.name for test in first.tests if test.gating and test.status is not Status.PASS]
    if first.verdict is not Status.REVIEW or doubtful != [NEAR]:
        return (
            f"The first audit said {first.verdict} ({', '.join(doubtful) or 'no doubt'}). Withholding tiles answers a "
            "REVIEW by the near-copy screen alone, and nothing else."
        )
    if first.test(FILTERED) is not None:
        return "The first audit was of a filtered release already. A release is filtered once, not until it passes."
    if not flagged:
        return "The first audit flagged no tile, so there is nothing to withhold."
    if Counter(files) != left:
        return "These tiles are not the first audit's tiles without the flagged ones."
    if roots != (first.subjects.train.root, first.subjects.holdout.root):
        return "The first audit compared with other training or holdout tiles."
    if first.policy.digest != policy.digest:
        return "The first audit was run by another policy."
    return ""
