"""What may not be signed: other tiles, edited reports, other thresholds, the wrong key."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pixcell_core.contracts.verdict import VerdictException
from pixcell_core.errors import BadInputError, PixcellError
from pixcell_core.trust.keys import SigningKey
from privacy_audit.request import seed_of
from site_client.release.evidence import recompute_from_evidence
from site_client.release.export import export_release
from tests.site_client.release.conftest import set_verdict

if TYPE_CHECKING:
    from tests.site_client.release.conftest import Room

Change = Callable[[dict[str, Any]], None]


def swap_digest(report: dict[str, Any]) -> None:
    report["subjects"]["synthetic"]["files"][2]["sha256"] = "sha256:" + "0" * 64


def drop_tile(report: dict[str, Any]) -> None:
    report["subjects"]["synthetic"]["files"].pop()


def add_tile(report: dict[str, Any]) -> None:
    files = report["subjects"]["synthetic"]["files"]
    files.append({"name": "extra.png", "sha256": "sha256:" + "0" * 64, "pixel_sha256": "sha256:" + "0" * 64})


def repeat_tile(report: dict[str, Any]) -> None:
    files = report["subjects"]["synthetic"]["files"]
    files.append(files[0])


def other_root(report: dict[str, Any]) -> None:
    report["subjects"]["synthetic"]["root"] = "sha256:" + "0" * 64


def only_the_word(report: dict[str, Any]) -> None:
    report["tests"][0]["status"] = "FAIL"


def no_tests(report: dict[str, Any]) -> None:
    report["tests"] = []


def worse_word(report: dict[str, Any]) -> None:
    report["verdict"] = "REVIEW"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (swap_digest, "audit-of-other-tiles"),
        (drop_tile, "audit-of-other-tiles"),
        (add_tile, "audit-of-other-tiles"),
        (other_root, "audit-of-other-tiles"),
        (repeat_tile, "bad-evidence"),
        (only_the_word, "report-contradicts-itself"),
        (no_tests, "report-contradicts-itself"),
        (worse_word, "report-contradicts-itself"),
        (set_verdict("FAIL"), "verdict-forbids"),
        (set_verdict("INVALID"), "verdict-forbids"),
        (set_verdict("REVIEW"), "review-needs-exception"),
    ],
)
def test_reports_that_carry_no_signature(room: Room, change: Change, code: str) -> None:
    release = room.draft()
    room.refused(code, lambda: room.sign(release, room.audit(release, change)))
    assert release.verdict() is None
    assert not release.report.exists()


def by_policy(report: dict[str, Any], policy: str) -> None:
    """Another policy, and the seed that follows from it."""
    report["policy"]["digest"] = policy
    report["seed"] = seed_of(report["subjects"]["synthetic"]["root"], policy)


def test_thresholds_of_the_sites_own_need_the_signers_word(room: Room) -> None:
    release = room.draft()
    own = "sha256:" + "4" * 64

    def lenient(report: dict[str, Any]) -> None:
        by_policy(report, own)

    audit = room.audit(release, lenient)
    room.refused("unknown-policy", lambda: room.sign(release, audit))
    room.refused("unknown-policy", lambda: room.sign(release, audit, accepted_policy="sha256:" + "5" * 64))
    room.refused("unknown-policy", lambda: room.sign(release, audit, accepted_policy="rehearsal"))
    assert room.sign(release, audit, accepted_policy=own).verdict.predicate.auditor.policy_digest == own


def test_a_policy_is_accepted_by_name_or_file(room: Room, tmp_path: Path) -> None:
    from privacy_audit.policy import load_policy, policy_path

    release = room.draft()

    def rehearsed(report: dict[str, Any]) -> None:
        by_policy(report, load_policy("rehearsal").digest)

    audit = room.audit(release, rehearsed)
    room.refused("unknown-policy", lambda: room.sign(release, audit))
    with pytest.raises(BadInputError):
        room.sign(release, audit, accepted_policy=str(tmp_path / "absent.yaml"))
    copy = shutil.copy(policy_path("rehearsal"), tmp_path / "own.yaml")
    for named in ("rehearsal", str(copy)):
        room.sign(release, audit, accepted_policy=named)


@pytest.mark.parametrize("status", ["FAIL", "INVALID"])
def test_no_exception_opens_fail_or_invalid(room: Room, status: str) -> None:
    release = room.draft()
    exception = VerdictException(reason="because", approver="release board")
    audit = room.audit(release, set_verdict(status))
    assert room.refusal(lambda: room.sign(release, audit, exception=exception)) == "verdict-forbids"


def test_a_pass_takes_no_exception(room: Room) -> None:
    release = room.draft()
    exception = VerdictException(reason="because", approver="release board")
    with pytest.raises(BadInputError):
        room.sign(release, room.audit(release), exception=exception)


def test_a_report_without_its_evidence_is_not_believed(room: Room) -> None:
    release = room.draft()
    audit = room.audit(release)
    with pytest.raises(PixcellError):
        room.sign(release, audit, check_audit=recompute_from_evidence)
    assert release.verdict() is None


def test_the_site_cannot_be_its_own_auditor(room: Room) -> None:
    release = room.draft()
    key = room.workspace.site_key()
    assert room.refusal(lambda: room.sign(release, room.audit(release), key)) == "auditor-is-site"


def test_only_accepted_auditors_sign_where_the_site_names_them(room: Room, tmp_path: Path) -> None:
    room.workspace.auditors.mkdir()
    with pytest.raises(BadInputError, match="names no auditor"):
        room.signed()
    room.second.verify_key.save(room.workspace.auditors / "second.pub")
    release = room.draft()
    room.refused("unknown-auditor", lambda: room.sign(release, room.audit(release)))
    room.sign(release, room.audit(release), room.second)
    (room.workspace.auditors / "second.pub").unlink()
    room.auditor.verify_key.save(room.workspace.auditors / "auditor.pub")
    room.refused("unknown-auditor", lambda: export_release(room.workspace, tmp_path / "out", now=room.now))


def test_another_verdict_over_a_signed_one(room: Room) -> None:
    release = room.signed()

    def other(report: dict[str, Any]) -> None:
        report["summary"] = "Put otherwise."

    assert (
        room.refusal(lambda: room.sign(release, room.audit(release, other), room.second)) == "already-signed"
    )


def test_days_and_exposed_keys(room: Room, tmp_path: Path) -> None:
    release = room.draft()
    for days in (0, -1, 5000):
        with pytest.raises(BadInputError):
            room.sign(release, room.audit(release), days=days)
    room.auditor.save(tmp_path / "key")
    (tmp_path / "key").chmod(0o644)
    with pytest.raises(BadInputError, match="chmod 600"):
        SigningKey.load(tmp_path / "key")


@pytest.mark.parametrize(
    "page",
    [
        b"<p>SITE ONLY \xe2\x80\x93 do not export</p>",
        b'<img src="data:image/png;base64,AAAA">',
        b'<img src="DATA:IMAGE/JPEG;base64,AAAA">',
    ],
)
def test_a_page_with_real_tiles_is_refused(room: Room, page: bytes) -> None:
    release = room.draft()
    audit = room.audit(release)
    (audit / "report.html").write_bytes(page)
    assert room.refusal(lambda: room.sign(release, audit)) == "site-only"
