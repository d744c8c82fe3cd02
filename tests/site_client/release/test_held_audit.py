"""What is signed is what was recomputed: an audit's output is read once, by the same code, with the seed that counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from privacy_audit.report import REPORT
from site_client.release.evidence import EvidenceError
from site_client.release.signing import sign_release
from tests.site_client.release.conftest import AUDITOR, set_verdict

if TYPE_CHECKING:
    from tests.site_client.release.conftest import Room


def edited(audit: Path, change: Any) -> None:
    body = json.loads((audit / REPORT).read_text())
    change(body)
    (audit / REPORT).write_text(json.dumps(body))


def test_a_report_swapped_while_it_is_examined_changes_nothing(room: Room) -> None:
    """The site serves one report to be signed and another to be recomputed: both are the copy that was taken first."""
    release = room.draft()
    audit = room.audit(release)
    before = (audit / REPORT).read_bytes()
    seen: list[bytes] = []

    def swap(held: Path, tiles: Path) -> None:
        edited(audit, set_verdict("FAIL"))
        seen.append((held / REPORT).read_bytes())
        assert held != audit and held.stat().st_mode & 0o077 == 0

    signed = sign_release(room.workspace, audit, AUDITOR, now=room.now, check_audit=swap)
    assert seen == [before] and signed.release.report.read_bytes() == before
    assert (audit / REPORT).read_bytes() != before


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda body: body["tool"].update(code="sha256:" + "2" * 64), "audited-by-other-code"),
        (lambda body: body["tool"].pop("code"), "audited-by-other-code"),
        (lambda body: body.update(seed=body["seed"] + 1), "seed-chosen"),
    ],
)
def test_audits_of_other_code_or_of_a_chosen_seed_are_not_signed(room: Room, change: Any, code: str) -> None:
    release = room.draft()
    audit = room.audit(release)
    edited(audit, change)
    with pytest.raises(EvidenceError) as refused:
        sign_release(room.workspace, audit, AUDITOR, now=room.now, check_audit=lambda held, tiles: None)
    assert refused.value.code == code
    assert room.workspace.find(None).verdict() is None
