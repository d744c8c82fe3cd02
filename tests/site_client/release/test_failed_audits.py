"""FAIL sticks: an audit of the same tiles by the same policy is not repeated until it passes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pixcell_core.contracts.canonical import digest, parse_document
from pixcell_core.trust.party_log import own_log
from privacy_audit.log_event import AuditEvent
from privacy_audit.report import AuditReport
from site_client.release.export import export_release
from site_client.release.review import review_release
from tests.site_client.release.conftest import set_verdict
from tests.site_client.release.test_gate_road import believe

if TYPE_CHECKING:
    from tests.site_client.release.conftest import Room


def event_of(audit: Path, decisions: str | None = None) -> AuditEvent:
    """What `pixcell audit run` writes of this audit into the logs it knows."""
    data = (audit / "report.json").read_bytes()
    return AuditEvent.of(parse_document(AuditReport, data, name="report"), digest(data), decisions)


def again(report: dict[str, Any]) -> None:
    """Another run: its report differs from the first."""
    report["summary"] = "Run once more."


@pytest.mark.parametrize("decisions", [None, "sha256:" + "8" * 64])
def test_a_run_that_failed_is_not_repeated_until_it_passes(
    room: Room, tmp_path: Path, decisions: str | None
) -> None:
    release = room.draft()
    event_of(room.audit(release, set_verdict("FAIL")), decisions).append_to(room.workspace.log())
    error = room.refused("failed-before", lambda: room.sign(release, room.audit(release, again)))
    assert "FAIL on 20" in error.message
    assert release.verdict() is None and not release.report.exists()


def test_a_fail_that_was_filed(room: Room) -> None:
    release = room.requested()
    failed = room.audit(release, set_verdict("FAIL"))
    review_release(room.workspace, failed, now=room.now, check_audit=believe)
    passed = room.audit(release, again)
    review_release(room.workspace, passed, now=room.now, check_audit=believe)
    room.refused("failed-before", lambda: room.sign(release, passed))
    assert release.verdict() is None


def test_a_fail_in_the_auditors_own_log(room: Room, tmp_path: Path) -> None:
    release = room.draft()
    room.auditor.save(tmp_path / "auditor.key")
    own = own_log(tmp_path / "auditor.key")
    event_of(room.audit(release, set_verdict("FAIL"))).append_to(own)
    room.refused("failed-before", lambda: room.sign(release, room.audit(release), own_log=own))
    assert release.verdict() is None


def test_a_fail_after_the_first_signature(room: Room, tmp_path: Path) -> None:
    release = room.requested(signers_file=room.rule(2))
    audit = room.audit(release)
    room.sign(release, audit)
    event_of(room.audit(release, set_verdict("FAIL"))).append_to(room.workspace.log())
    room.refused("failed-before", lambda: room.sign(release, audit, room.second))
    room.refused("failed-before", lambda: room.countersign(release, room.workspace.site_key()))
    room.refused("failed-before", lambda: export_release(room.workspace, tmp_path / "b", now=room.now))
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("status", ["INVALID", "REVIEW", "PASS"])
def test_what_did_not_fail_may_be_asked_again(room: Room, status: str) -> None:
    release = room.draft()
    event_of(room.audit(release, set_verdict(status))).append_to(room.workspace.log())
    assert room.sign(release, room.audit(release, again)).verdict.predicate.permits_release


def test_a_fail_of_other_tiles_or_by_another_policy_is_another_question(room: Room) -> None:
    release = room.draft()

    def otherwise(report: dict[str, Any]) -> None:
        set_verdict("FAIL")(report)
        report["policy"]["digest"] = "sha256:" + "4" * 64

    log = room.workspace.log()
    event_of(room.audit(release, otherwise)).append_to(log)
    failed = event_of(room.audit(release, set_verdict("FAIL")))
    failed.model_copy(update={"tiles_root": "sha256:" + "0" * 64}).append_to(log)
    assert room.sign(release, room.audit(release, again)).verdict.predicate.permits_release
