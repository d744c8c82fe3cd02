"""The written road: requested, reviewed, signed by role, exported, withdrawn; and what blocks each next step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pixcell_core.contracts.canonical import parse_document
from pixcell_core.contracts.gate import REFUSAL_PAYLOAD_TYPE, Refusal
from pixcell_core.contracts.verdict import VerdictException
from pixcell_core.errors import RefusedError
from pixcell_core.trust.bundle import Known, verify_bundle
from pixcell_core.trust.bundle_files import open_bundle
from pixcell_core.trust.dsse import verify_envelope
from site_client.release.export import export_release
from site_client.release.refuse import refuse_release
from site_client.release.review import review_release
from site_client.release.withdraw import withdraw_release
from site_client.release.withdrawal_list import WithdrawalList
from tests.site_client.release.conftest import OFFICER, set_verdict

if TYPE_CHECKING:
    from tests.site_client.release.conftest import Room


def believe(audit: Path, tiles: Path) -> None:
    """These audits were written by hand; computing them again is tested with the audit."""


def test_every_state_in_order_and_what_blocks_the_next(room: Room, tmp_path: Path) -> None:
    release = room.draft()
    assert room.progress(release).state == "draft"
    release = room.requested(signers_file=room.rule(3))
    assert room.progress(release).state == "sealed"
    assert "no audit" in room.progress(release).blocked_by
    audit = room.audit(release)
    seen = review_release(room.workspace, audit, now=room.now, check_audit=believe)
    assert seen.progress.state == room.workspace.state(release) == "audited"
    assert (seen.progress.blocked_by, seen.progress.next) == ("no auditor signed", "sign")
    room.sign(release, audit)
    assert (room.progress(release).state, room.progress(release).signed) == ("signed", "1 of 3")
    assert "the site has not signed" in room.progress(release).blocked_by
    room.refused("signatures-missing", lambda: export_release(room.workspace, tmp_path / "b", now=room.now))
    room.countersign(release, room.workspace.site_key())
    assert room.progress(release).signed == "2 of 3"
    assert room.progress(release).next != "export"
    room.refused("signatures-missing", lambda: export_release(room.workspace, tmp_path / "b", now=room.now))
    room.countersign(release, OFFICER, "data-protection")
    assert (room.progress(release).signed, room.progress(release).blocked_by) == ("3 of 3", "")
    exported = export_release(room.workspace, tmp_path / "b.zip", now=room.now)
    assert room.progress(release).state == "exported"
    roles = {(signer.role, signer.name) for signer in exported.report.signers}
    assert ("data-protection", "privacy office") in roles and ("site", "release desk") in roles
    withdraw_release(room.workspace, "a patient took back consent", now=room.now, out=tmp_path / "w.json")
    assert room.progress(release).state == room.workspace.state(release) == "withdrawn"
    room.refused("release-withdrawn", lambda: export_release(room.workspace, tmp_path / "c", now=room.now))
    assert [kind for kind in room.kinds() if kind != "release.refused"] == [
        "release.sealed",
        "release.requested",
        "release.audited",
        *["release.signed"] * 3,
        "release.exported",
        "release.withdrawn",
    ]


def test_the_standing_rule_is_the_site_and_one_auditor(room: Room, tmp_path: Path) -> None:
    """Without a signers' document the export is the site's signature, and it stands in the verdict's envelope."""
    release = room.signed()
    assert (room.progress(release).signed, room.progress(release).next) == ("1 of 2", "export")
    exported = export_release(room.workspace, tmp_path / "b", now=room.now)
    signers = {signer.role: signer.key_id for signer in exported.report.signers}
    assert signers == {"auditor": room.auditor.key_id, "site": room.workspace.site_key().key_id}
    assert exported.report.signed == "signed 2 of 2"


def test_a_bundle_carries_its_terms_and_a_recipient_can_pin_them(room: Room, tmp_path: Path) -> None:
    release = room.requested(
        signers_file=room.rule(2), audience="registered", purpose="A benchmark of stain normalisation."
    )
    room.sign(release, room.audit(release))
    room.countersign(release, room.workspace.site_key())
    out = export_release(room.workspace, tmp_path / "b", now=room.now).path
    assert {"signers.json", "request.dsse.json", "datasheet.md", "ro-crate-metadata.json"} <= {
        path.name for path in out.iterdir()
    }
    rule = release.signers()
    assert rule is not None
    with open_bundle(out) as files:
        report = verify_bundle(
            files, trusted_keys=None, now=room.now, known=Known(signers_digest=rule.digest)
        )
        assert (report.audience, report.signed) == ("registered", "signed 2 of 2")
        assert report.trusted and all(signer.trusted for signer in report.signers)
        with pytest.raises(RefusedError) as refused:
            verify_bundle(
                files, trusted_keys=None, now=room.now, known=Known(signers_digest="sha256:" + "0" * 64)
            )
        assert refused.value.code == "wrong-signers"


def test_one_refusal_is_final_and_signed(room: Room, tmp_path: Path) -> None:
    release = room.signed()
    refused = refuse_release(room.workspace, room.auditor, "Tile 3 shows a pen mark.", now=room.now)
    payload = verify_envelope(refused.envelope, [room.auditor.verify_key], payload_type=REFUSAL_PAYLOAD_TYPE)
    said = parse_document(Refusal, payload)
    assert (said.manifest_digest, said.role) == (release.manifest().digest, "auditor")
    assert said.audit_report_digest is not None
    progress = room.progress(release)
    assert progress.state == "refused" and "pen mark" in progress.blocked_by
    audit = room.audit(release)
    for act in (
        lambda: export_release(room.workspace, tmp_path / "b", now=room.now),
        lambda: room.sign(release, audit, room.second),
        lambda: refuse_release(room.workspace, room.second, "again", now=room.now),
        lambda: review_release(room.workspace, audit, now=room.now, check_audit=believe),
    ):
        room.refused("release-refused", act)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(("status", "blocked"), [("FAIL", "never leave"), ("INVALID", "never leave")])
def test_what_failed_is_filed_and_stays(room: Room, status: str, blocked: str) -> None:
    release = room.requested()
    audit = room.audit(release, set_verdict(status))
    seen = review_release(room.workspace, audit, now=room.now, check_audit=believe)
    assert blocked in seen.progress.blocked_by
    exception = VerdictException(reason="because", approver="release board")
    room.refused("verdict-forbids", lambda: room.sign(release, audit, exception=exception))


def test_a_review_asks_for_a_person_before_it_is_signed(room: Room) -> None:
    release = room.requested()
    audit = room.audit(release, set_verdict("REVIEW"))
    seen = review_release(room.workspace, audit, now=room.now, check_audit=believe)
    assert "named person" in seen.progress.blocked_by
    assert review_release(room.workspace, None, now=room.now).evidence is None


def test_the_list_of_withdrawals_only_grows(room: Room, tmp_path: Path) -> None:
    for number in (1, 2):
        release = room.draft().release_id
        room.sign(room.workspace.find(release), room.audit(room.workspace.find(release)))
        export_release(room.workspace, tmp_path / f"b{number}", now=room.now, release_id=release)
        withdraw_release(room.workspace, f"reason {number}", now=room.now, release_id=release)
        room.draw_others()
        workspace = room.workspace
        file = workspace.withdrawals_file
        listed = WithdrawalList(file, "north", workspace.site_key(), workspace.log()).published()
        assert listed is not None and (listed.number, len(listed.withdrawn)) == (number, number)


def test_an_interrupted_withdrawal_is_finished(room: Room, tmp_path: Path) -> None:
    """The list was written and the log was not: doing it again completes it and adds nothing."""
    release = room.exported(tmp_path / "b").release
    withdraw_release(room.workspace, "consent", now=room.now)
    log = room.workspace.site_dir / "log" / "log.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-1]))
    assert "release.withdrawn" not in room.kinds() and room.workspace.state(release) == "withdrawn"
    again = withdraw_release(room.workspace, "consent", now=room.now)
    assert again.withdrawals.number == 1 and room.kinds()[-1] == "release.withdrawn"
