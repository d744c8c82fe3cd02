"""Evidence for a claim of differential privacy: what the ledger says, what its charges add up to, what canaries proved.

The audit proves no epsilon. It compares three numbers that must not contradict each other: the claim, the sum of the
charges by our own accountant (each charge verified against the site's key first, see `ledger_export`), and the lower
bound that guesses about canary patients gave (Steinke, Nasr & Jagielski 2023). A bound above its claim is proof that
the mechanism leaks more than was promised.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pixcell_core.contracts.release import ReleaseManifest
from pixcell_core.private.one_run_bound import guess_probability
from privacy_audit.evidence_parts import PrivacyClaimEvidence
from privacy_audit.ledger_export import LedgerTrust, data_of, number, read_ledger_export, unusable
from privacy_audit.policy import Policy
from privacy_audit.result import Status, TestResult, not_tested

NAME = "differential privacy: ledger and canaries"
_CLAIM = "What was promised per patient is not contradicted by the ledger's charges or by canaries."
_STATISTIC = "lower bound of epsilon that canaries proved"
_ROUNDING = 0.01  # statements give epsilon to two places, rounded up
_ALIKE = 0.1  # claims that differ by more than a tenth are of two mechanisms
_ALPHA = 0.05  # `pixcell private audit` proves at 95 %
_FEWEST_GRADIENTS = 16  # with fewer `pixcell private canaries` makes no test
_MOST_CANARIES = 100_000  # a forecast beyond is none


def read(
    ledger: Path | None,
    canaries: Path | None,
    *,
    trust: LedgerTrust | None = None,
    manifest: ReleaseManifest | None = None,
) -> PrivacyClaimEvidence | None:
    """Read an export of `pixcell site budget export` and a report of `pixcell private audit` or `private canaries`.

    Args:
        trust, manifest: what the ledger is held against, see `read_ledger_export`.

    Raises:
        PrivacyEvidenceError: no such document, or numbers that cannot be.
        LedgerRefusedError: the ledger is not shown to be the site's own, whole and as it was signed.
    """
    if ledger is None and canaries is None:
        return None
    found = None if ledger is None else read_ledger_export(ledger, trust or LedgerTrust(), manifest)
    report: dict[str, Any] = {} if canaries is None else _canaries(canaries)
    return PrivacyClaimEvidence(
        unit=None if found is None else found.unit,
        claimed=None if found is None else found.claimed,
        recomputed=None if found is None else found.recomputed,
        delta=None if found is None else found.delta,
        canary_unit=report.get("unit"),
        canary_bound=report.get("bound"),
        canary_claimed=report.get("claimed"),
        canary_delta=report.get("delta"),
        canaries=report.get("canaries", 0),
        canary_guesses=report.get("guesses", 0),
    )


def refutable(canaries: int, guesses: int, claimed: float, delta: float) -> bool:
    """Whether the claim would be refuted had every guess been right; if not, no run of so many canaries could."""
    return guess_probability(canaries, guesses, guesses, claimed, delta) < _ALPHA


def canaries_needed(share: float, claimed: float, delta: float) -> int | None:
    """Canaries, this share of them guessed, that could refute the claim; rounded up, None where too many to make."""
    right = 1.0 / (1.0 + math.exp(-claimed))
    if right >= 1.0:
        return None
    # Without delta right^guesses must fall below alpha; with it a few more are needed.
    count = math.log(_ALPHA) / math.log(right) / share
    while count <= _MOST_CANARIES:
        rounded = math.ceil(count / 10.0) * 10
        if refutable(rounded, max(int(share * rounded), 1), claimed, delta):
            return rounded
        count = rounded * 1.03
    return None


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
    found += _tried(evidence)
    status = max((one[0] for one in found), key=lambda one: one.rank)
    return status, " ".join(words for _, words in found)


def _tried(evidence: PrivacyClaimEvidence) -> list[tuple[Status, str]]:
    """What the canaries proved, what they could have proved at best, and whether they tried what the ledger promises."""
    found: list[tuple[Status, str]] = []
    bound, claimed, delta = evidence.canary_bound, evidence.canary_claimed, evidence.canary_delta
    if bound is None or claimed is None or delta is None:
        return [(Status.REVIEW, "No canaries tried the mechanism: the claim was not tested.")]
    proven = f"{evidence.canaries} canaries prove"
    guesses = evidence.canary_guesses
    if bound > claimed:
        found.append(
            (
                Status.FAIL,
                f"{proven} an epsilon of at least {bound:.2f} for a run that claims {claimed:.2f}.",
            )
        )
    elif guesses and not refutable(evidence.canaries, guesses, claimed, delta):
        needed = canaries_needed(guesses / evidence.canaries, claimed, delta)
        found.append(
            (
                Status.REVIEW,
                f"{proven} no more than {bound:.2f}, and had all of their {guesses} guesses been right they could not have "
                f"refuted the {claimed:.2f} that their run claims: "
                + (
                    f"about {needed} canaries would do."
                    if needed
                    else f"no number up to {_MOST_CANARIES:,} would."
                ),
            )
        )
    else:
        found.append(
            (Status.PASS, f"{proven} no more than {bound:.2f} of the {claimed:.2f} that their run claims.")
        )
    if evidence.claimed is not None and (
        abs(claimed - evidence.claimed) > _ALIKE * evidence.claimed or delta != evidence.delta
    ):
        found.append(
            (
                Status.REVIEW,
                f"The canaries' run claims {claimed:.2f} at delta {delta:g}, the ledger {evidence.claimed:.2f} at "
                f"{evidence.delta:g}: what was tried is not what was promised.",
            )
        )
    return found


def _canaries(path: Path) -> dict[str, Any]:
    value = data_of(path)
    try:
        bound = value["epsilon_lower_bound"]
        claimed, delta, unit, count = (
            value["epsilon_claimed"],
            value["delta"],
            str(value["unit"]),
            value["canaries"],
        )
    except (KeyError, TypeError) as error:
        raise unusable(path, "a report of canaries") from error
    number(path, claimed)
    number(path, delta)
    if bound is None:  # beyond every number: the mechanism was caught without noise
        bound = 1e9
    number(path, bound)
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= 10_000_000:
        raise unusable(path, "a report of canaries")
    # Canaries of gradients are no guesses: their bound has no ceiling, and a least number instead.
    gradients = "measured_mu" in value
    guesses = 0 if gradients else value.get("guesses", count)
    if not isinstance(guesses, int) or isinstance(guesses, bool) or not 0 <= guesses <= count:
        raise unusable(path, "a report of canaries")
    if count < _FEWEST_GRADIENTS if gradients else not guesses:
        raise unusable(path, "a report of canaries")
    return {
        "unit": unit[:40],
        "bound": float(bound),
        "claimed": float(claimed),
        "delta": float(delta),
        "canaries": count,
        "guesses": guesses,
    }
