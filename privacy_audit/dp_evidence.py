"""Evidence for a claim of differential privacy: what the ledger says, what its charges add up to, what canaries proved.

The audit proves no epsilon. It compares three numbers that must not contradict each other: the claim, the sum of the
charges by our own accountant, and the lower bound that guesses about canary patients gave (Steinke, Nasr & Jagielski
2023). A bound above its claim is proof that the mechanism leaks more than was promised.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pixcell_core.contracts import parse_json, read_bounded
from pixcell_core.errors import BadInputError
from privacy_audit.evidence_parts import PrivacyClaimEvidence
from privacy_audit.policy import Policy
from privacy_audit.result import Status, TestResult, not_tested

NAME = "differential privacy: ledger and canaries"
_CLAIM = "What was promised per patient is not contradicted by the ledger's charges or by canaries."
_STATISTIC = "lower bound of epsilon that canaries proved"
_MAX_BYTES = 256 * 1024 * 1024
_ROUNDING = 0.01  # statements give epsilon to two places, rounded up


class PrivacyEvidenceError(BadInputError):
    """A ledger's export or a canary report cannot be used as evidence."""

    default_code = "bad-privacy-evidence"


def read(ledger: Path | None, canaries: Path | None) -> PrivacyClaimEvidence | None:
    """Read an export of `pixcell site budget export` and a report of `pixcell private audit` or `private canaries`.

    Raises:
        PrivacyEvidenceError: no such document, or numbers that cannot be.
    """
    if ledger is None and canaries is None:
        return None
    unit, claimed, recomputed, delta = (None,) * 4 if ledger is None else _ledger(ledger)
    report: dict[str, Any] = {} if canaries is None else _canaries(canaries)
    return PrivacyClaimEvidence(
        unit=unit,
        claimed=claimed,
        recomputed=recomputed,
        delta=delta,
        canary_unit=report.get("unit"),
        canary_bound=report.get("bound"),
        canary_claimed=report.get("claimed"),
        canary_delta=report.get("delta"),
        canaries=report.get("canaries", 0),
    )


def result(evidence: PrivacyClaimEvidence | None, policy: Policy) -> TestResult:
    """The test, or what stands in its place where neither document was given."""
    if evidence is None:
        return not_tested(
            NAME,
            "differential privacy",
            claim=_CLAIM,
            statistic=_STATISTIC,
            threshold=0.0,
            direction="lower is safer",
            missing="neither a ledger's export nor a canary report was given (--ledger-export, --canary-report).",
            required="dp" in policy.required,
        )
    status, why = _decide(evidence)
    limit = evidence.canary_claimed if evidence.canary_claimed is not None else evidence.claimed
    return TestResult(
        name=NAME,
        section="differential privacy",
        claim=_CLAIM,
        statistic=_STATISTIC,
        value=evidence.canary_bound,
        null="the epsilon claimed for the canaries' own run",
        threshold=limit,
        direction="lower is safer",
        status=status,
        why=why,
        cannot_show=(
            "That the claim holds: canaries can refute a promise and never prove it; and nothing of what the conditions "
            "of a release carry past the mechanism."
        ),
        details={
            "unit": evidence.unit or evidence.canary_unit,
            "claimed_epsilon": evidence.claimed,
            "recomputed_epsilon": evidence.recomputed,
            "delta": evidence.delta if evidence.delta is not None else evidence.canary_delta,
            "canaries": evidence.canaries,
        },
    )


def _decide(evidence: PrivacyClaimEvidence) -> tuple[Status, str]:
    found: list[tuple[Status, str]] = []
    units = {unit for unit in (evidence.unit, evidence.canary_unit) if unit is not None}
    if units != {"patient"}:
        found.append(
            (Status.REVIEW, f"The unit of protection is {' and '.join(sorted(units))}, not the patient.")
        )
    if evidence.claimed is None:
        found.append((Status.REVIEW, "No ledger says what was spent: the canaries speak of the code alone."))
    else:
        said = f"The ledger claims epsilon {evidence.claimed:.2f} per patient at delta {evidence.delta:g}"
        if evidence.recomputed is not None and evidence.recomputed > evidence.claimed + _ROUNDING:
            found.append(
                (
                    Status.FAIL,
                    f"{said}, and its charges add up to {evidence.recomputed:.2f}: more than it says.",
                )
            )
        else:
            found.append((Status.PASS, f"{said}, and its charges add up to no more."))
    if evidence.canary_bound is None or evidence.canary_claimed is None:
        found.append((Status.REVIEW, "No canaries tried the mechanism: the claim was not tested."))
    elif evidence.canary_bound > evidence.canary_claimed:
        found.append(
            (
                Status.FAIL,
                f"{evidence.canaries} canaries prove an epsilon of at least {evidence.canary_bound:.2f} for a run that "
                f"claims {evidence.canary_claimed:.2f}.",
            )
        )
    else:
        found.append(
            (
                Status.PASS,
                f"{evidence.canaries} canaries prove no more than {evidence.canary_bound:.2f} of the "
                f"{evidence.canary_claimed:.2f} that their run claims.",
            )
        )
    status = max((one[0] for one in found), key=lambda one: one.rank)
    return status, " ".join(words for _, words in found)


def _ledger(path: Path) -> tuple[str, float, float, float]:
    from pixcell_core.private.accounting import epsilon
    from pixcell_core.private.spent_before import spent_before

    value = _data(path)
    events = spent_before(path)
    try:
        statement = value["statement"]
        unit, claimed, delta = str(statement["unit"]), statement["epsilon_spent"], statement["delta"]
        cohorts = [str(one["cohort"]) for one in statement.get("cohorts", [])]
    except (KeyError, TypeError, AttributeError) as error:
        raise _unusable(path, "an export of a ledger") from error
    _number(path, claimed)
    _number(path, delta)
    # What a patient of the dearest cohort paid; where no cohort is named, every charge counts.
    lists = [spent_before(path, cohort) for cohort in cohorts] or [events]
    recomputed = max(epsilon(charges, float(delta)).value for charges in lists)
    return unit, float(claimed), float(recomputed), float(delta)


def _canaries(path: Path) -> dict[str, Any]:
    value = _data(path)
    try:
        bound = value["epsilon_lower_bound"]
        claimed, delta, unit, count = (
            value["epsilon_claimed"],
            value["delta"],
            str(value["unit"]),
            value["canaries"],
        )
    except (KeyError, TypeError) as error:
        raise _unusable(path, "a report of canaries") from error
    _number(path, claimed)
    _number(path, delta)
    if bound is None:  # beyond every number: the mechanism was caught without noise
        bound = 1e9
    _number(path, bound)
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= 10_000_000:
        raise _unusable(path, "a report of canaries")
    return {
        "unit": unit[:40],
        "bound": float(bound),
        "claimed": float(claimed),
        "delta": float(delta),
        "canaries": count,
    }


def _data(path: Path) -> dict[str, Any]:
    value = parse_json(read_bounded(path, _MAX_BYTES), name=path.name, max_bytes=_MAX_BYTES)
    if isinstance(value, dict) and value.get("status") == "ok" and "data" in value:
        value = value["data"]
    if not isinstance(value, dict):
        raise _unusable(path, "a document of this platform")
    return value


def _number(path: Path, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise _unusable(path, "numbers that can be")


def _unusable(path: Path, what: str) -> PrivacyEvidenceError:
    return PrivacyEvidenceError(
        f"{path.name} does not hold {what}.",
        hint="Give the files that `pixcell site budget export --out` and `pixcell private audit --format json` wrote.",
    )
