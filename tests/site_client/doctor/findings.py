"""One check as the visit runs it."""

from __future__ import annotations

from site_client.doctor.finding import Finding
from site_client.doctor.question import Check, Question
from site_client.doctor.visit import visit

HERE = ("127.0.0.1",)


def result(check: Check, asked: Question) -> Finding:
    """A check as the visit runs it, errors and all."""
    return visit(asked, checks=(check,)).checks[0]


def statuses(asked: Question, *checks: Check) -> list[str]:
    return [result(check, asked).status for check in checks]
