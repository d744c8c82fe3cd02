"""Every reason for which a site may not count has a remedy: the codes are read from the code that gives them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from pixcell_core.contracts.remedies import REMEDIES, UNKNOWN, remedy_of
from pixcell_core.contracts.round import Exclusion

ROOT = Path(__file__).resolve().parents[2]
GIVERS = (
    "server/rounds/exchange.py",
    "server/rounds/readiness.py",
    "server/rounds/screening.py",
    "server/rounds/approvals_seen.py",
    "server/rounds/masked.py",
    "site_client/agent/handlers.py",
    "site_client/agent/masking.py",
    "site_client/trainer/service.py",
    "pixcell_core/contracts/study.py",
    "pixcell_core/masking/fixed_point.py",
    "pixcell_core/masking/hub.py",
    "pixcell_core/masking/keys.py",
    "pixcell_core/masking/roster.py",
    "pixcell_core/masking/site.py",
)
CALLS = {"Rejection": 0, "SeenApproval": 2, "_refusal": 1}
"""Calls whose argument at this place is a code."""

TABLES = {"_PUBLIC", "PUBLIC_REASONS", "_LEDGER_NEEDS_ITS_OWNER", "HOPELESS"}

ENDS_THE_ROUND = {"below-quorum", "shares-not-opened", "sum-out-of-range", "unmasking-incomplete"}
"""Codes for which a masked round has no sum: they stand in the run's own line, with the hint of their error."""

ELSEWHERE = {"budget-cap", "ok"} | ENDS_THE_ROUND
"""Codes in these files that no site is excluded for."""


def texts(node: ast.AST) -> set[str]:
    """Text constants of an expression that can be its value, or all keys of a table."""
    if isinstance(node, ast.Dict):
        return {k.value for k in node.keys if isinstance(k, ast.Constant) and isinstance(k.value, str)}
    if isinstance(node, ast.IfExp):
        return texts(node.body) | texts(node.orelse)
    if isinstance(node, ast.Constant):
        return {node.value} if isinstance(node.value, str) else set()
    return {t for child in ast.iter_child_nodes(node) for t in texts(child)}


def codes_of(source: str) -> set[str]:
    """All codes a file gives: of its calls, of `code=` and of `return "code", "reason"`, of its tables."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name in CALLS and len(node.args) > CALLS[name]:
                found |= texts(node.args[CALLS[name]])
            found |= {t for k in node.keywords if k.arg == "code" for t in texts(k.value)}
        elif isinstance(node, ast.Assign) and any(getattr(t, "id", "") in TABLES for t in node.targets):
            found |= texts(node.value)
        elif isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple) and len(node.value.elts) == 2:
            first = node.value.elts[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                found.add(first.value)
        elif isinstance(node, ast.Assign) and [getattr(t, "id", "") for t in node.targets] == ["code"]:
            found |= texts(node.value)
    return {code for code in found if code and " " not in code} - ELSEWHERE


def test_every_file_of_masked_rounds_that_gives_a_code_is_looked_at() -> None:
    files = {*(ROOT / "pixcell_core/masking").glob("*.py"), *(ROOT / "server/rounds").glob("masked*.py")}
    giving = {str(file.relative_to(ROOT)) for file in files if codes_of(file.read_text(encoding="utf-8"))}
    # What the hub kept of an attempt is read before any site is asked.
    assert giving - set(GIVERS) == {"pixcell_core/masking/saved_attempt.py"}


@pytest.mark.parametrize("file", GIVERS)
def test_every_code_has_a_remedy(file: str) -> None:
    codes = codes_of((ROOT / file).read_text(encoding="utf-8"))
    assert codes, f"no code was found in {file}: the search is broken"
    assert not codes - set(REMEDIES), sorted(codes - set(REMEDIES))


def test_the_search_finds_codes_of_every_kind() -> None:
    exchange = codes_of((ROOT / "server/rounds/exchange.py").read_text())
    assert {"deadline", "straggler", "not-sent"} <= exchange
    assert {"not-connected", "not-enrolled", "no-answer"} <= codes_of(
        (ROOT / "server/rounds/readiness.py").read_text()
    )
    agent = codes_of((ROOT / "site_client/agent/handlers.py").read_text())
    assert {"no-trainer", "trainer-lost", "unknown-study", "approval-withdrawn"} <= agent
    assert {"budget-exceeded", "trainer-failed"} <= codes_of(
        (ROOT / "site_client/trainer/service.py").read_text()
    )
    masked = codes_of((ROOT / "server/rounds/masked.py").read_text())
    assert {"dropped-out", "tensor-dtype"} <= masked and not masked & ENDS_THE_ROUND
    assert {"masking-missing"} <= codes_of((ROOT / "site_client/agent/masking.py").read_text())
    assert codes_of('Rejection("new-code", "why")') == {"new-code"}


def test_a_remedy_is_a_sentence_and_a_code_of_a_newer_peer_has_one_too() -> None:
    for code, text in REMEDIES.items():
        assert text[0].isupper() and text.rstrip().endswith("."), code
    assert remedy_of("from-the-future") == UNKNOWN
    assert Exclusion(site="east", code="norm-bound", reason="x").remedy == REMEDIES["norm-bound"]
