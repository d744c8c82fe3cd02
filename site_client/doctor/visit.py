"""Asks every check, one after the other, and never stops at one that fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pixcell_core.errors import PixcellError
from site_client.doctor.data_checks import DATA_CHECKS
from site_client.doctor.finding import DoctorReport, Finding
from site_client.doctor.machine_checks import MACHINE_CHECKS
from site_client.doctor.network_checks import NETWORK_CHECKS
from site_client.doctor.question import Check, Question

NAMES: dict[Check, str] = {
    check: name
    for check, name in zip(
        (*NETWORK_CHECKS, *MACHINE_CHECKS, *DATA_CHECKS),
        (
            *("kit", "kit-version", "authority", "proxy", "dns", "tcp", "tls", "hub", "clock", "firewall"),
            *(
                "user",
                "keys",
                "scratch",
                "disk",
                "lock",
                "release",
                "telemetry",
                "accelerator",
                "shared-memory",
            ),
            *("slides", "patients", "tiles", "trainer", "heartbeat", "approvals", "ledger", "budget"),
        ),
        strict=True,
    )
}
"""Every check and the name under which it answers, in the order asked."""

PRIVATE = frozenset({"slides", "patients", "tiles"})
ABSENT = frozenset({"no-catalogue"})
"""Codes of what need not be there: the check is skipped, and says so."""


def visit(
    asked: Question,
    say: Callable[[str], None] = lambda text: None,
    checks: Sequence[Check] = tuple(NAMES),
    *,
    shareable: bool = False,
) -> DoctorReport:
    """Run the checks; `say` gets a line for each as it ends."""
    findings = []
    for number, check in enumerate(checks, start=1):
        finding = _ask(check, asked)
        findings.append(finding)
        say(f"[{number}/{len(checks)}] {finding.name}: {finding.status}")
    return DoctorReport.of(asked.identity.site, tuple(findings), shareable=shareable)


def _ask(check: Check, asked: Question) -> Finding:
    name = NAMES.get(check, "check")
    try:
        return check(asked)
    except PixcellError as error:
        absent = error.code in ABSENT
        return Finding(
            name=name,
            status="skip" if absent else "fail",
            found=f"[{error.code}] {error.message}",
            remedy="" if absent else error.hint,
            private=name in PRIVATE,
        )
    except Exception as error:
        # One check that breaks must not hide the others; it is no pass either.
        return Finding(
            name=name,
            status="fail",
            found=f"the check itself failed: {type(error).__name__}",
            remedy="This is our fault; tell the authors which check it was.",
            private=name in PRIVATE,
        )
