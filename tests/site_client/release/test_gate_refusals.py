"""What the gate refuses on the written road: terms changed, seals broken, the wrong signer, too few, too late."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pixcell_core.errors import BadInputError, PixcellError
from pixcell_core.trust.dsse import Envelope, sign_envelope
from pixcell_core.trust.keys import SigningKey
from site_client.release.export import export_release
from site_client.release.refuse import refuse_release
from site_client.release.request import request_release
from site_client.release.review import review_release
from site_client.release.signing import sign_release
from site_client.release.withdraw import withdraw_release
from site_client.release.workspace import ReleaseFolder
from tests.site_client.release.conftest import OFFICER, set_verdict
from tests.site_client.release.test_gate_road import believe

if TYPE_CHECKING:
    from tests.site_client.release.conftest import Room

Change = Callable[[ReleaseFolder], None]


def append(name: str) -> Change:
    return lambda release: (release.path / name).open("ab").write(b" ") and None


def remove(name: str) -> Change:
    return lambda release: (release.path / name).unlink()


def lenient_policy(release: ReleaseFolder) -> None:
    path = release.path / "policy.yaml"
    text, changed = re.subn(r"( max_flagged_share:\s*)[\d.]+", r"\g<1>0.5", path.read_text())
    assert changed == 1
    path.write_text(text)


def fewer_signers(release: ReleaseFolder) -> None:
    path = release.path / "signers.json"
    rule = json.loads(path.read_text())
    path.write_text(json.dumps(rule | {"needed": 2}))


def other_request(release: ReleaseFolder) -> None:
    """A request that another key signs for the very same tiles."""
    path = release.path / "request.dsse.json"
    envelope = Envelope.load(path)
    forged = sign_envelope(
        envelope.payloadType, envelope.unsafe_unverified_payload(), [SigningKey.generate()]
    )
    path.write_bytes(forged.to_bytes())


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (append("tiles/00002.png"), "sealed-tile-changed"),
        (append("README.txt"), "unsealed"),
        (append("sample-sheet.png"), "unsealed"),
        (append("audit/report.json"), "unsealed"),
        (append("audit/report.html"), "unsealed"),
        (lenient_policy, "unsealed"),
        (fewer_signers, "unsealed"),
        (remove("signers.json"), "unsealed"),
        (remove("request.dsse.json"), "unsealed"),
        (other_request, "signature-refused"),
    ],
)
def test_any_change_unseals_at_every_later_step(
    room: Room, tmp_path: Path, change: Change, code: str
) -> None:
    release = room.requested(signers_file=room.rule(3))
    audit = room.audit(release)
    room.sign(release, audit)
    room.countersign(release, room.workspace.site_key())
    change(release)
    steps: list[Callable[[], object]] = [
        lambda: room.sign(release, audit, room.second),
        lambda: room.countersign(release, OFFICER, "data-protection"),
        lambda: review_release(room.workspace, audit, now=room.now, check_audit=believe),
        lambda: refuse_release(room.workspace, room.auditor, "no", now=room.now),
        lambda: export_release(room.workspace, tmp_path / "b", now=room.now),
    ]
    for step in steps:
        room.refused(code, step)
    assert room.progress(release).state == "damaged"
    assert room.progress(release).blocked_by
    assert not (tmp_path / "b").exists()


def test_evidence_that_was_never_filed(room: Room) -> None:
    release = room.requested()
    release.report.parent.mkdir()
    release.report.write_bytes(b"{}")
    release.page.write_bytes(b"<p>PASS</p>")
    audit = room.audit(release)
    assert room.refusal(lambda: room.sign(release, audit)) == "unsealed"


def test_terms_are_fixed_before_anybody_looks(room: Room, tmp_path: Path) -> None:
    release = room.requested()
    room.refused("already-requested", lambda: request_release(room.workspace, now=room.now))
    audit = room.audit(release)
    room.refused("audience-not-requested", lambda: room.sign(release, audit, audience="public"))
    assert room.sign(release, audit).verdict.predicate.audience == "agreement"
    late = room.draft(terms=None)
    assert late == release, "the same tiles sealed in the same second are the same release"


def test_a_request_after_the_audit(room: Room) -> None:
    release = room.draft()
    review_release(room.workspace, room.audit(release), now=room.now, check_audit=believe)
    assert room.refusal(lambda: request_release(room.workspace, now=room.now)) == "already-requested"


def test_another_policy_than_the_one_asked_for(room: Room) -> None:
    release = room.requested(policy="rehearsal")
    audit = room.audit(release)
    assert room.refusal(lambda: room.sign(release, audit)) == "policy-not-requested"
    assert (
        room.refusal(lambda: room.sign(release, audit, accepted_policy="rehearsal")) == "policy-not-requested"
    )


def expired(signers: list[dict[str, Any]], room: Room) -> None:
    signers[1]["not_after"] = room.now.isoformat()


@pytest.mark.parametrize(
    ("key", "role", "code"),
    [
        ("stranger", "auditor", "unknown-signer"),
        ("auditor", "site", "wrong-role"),
        ("officer", "auditor", "wrong-role"),
        ("site", "auditor", "auditor-is-site"),
    ],
)
def test_who_may_not_sign_by_the_document(room: Room, key: str, role: Any, code: str) -> None:
    release = room.requested(signers_file=room.rule(2))
    audit = room.audit(release)
    room.sign(release, audit, room.second)
    keys = {
        "stranger": SigningKey.generate(),
        "auditor": room.auditor,
        "officer": OFFICER,
        "site": room.workspace.site_key(),
    }
    act = lambda: sign_release(  # noqa: E731
        room.workspace, audit, keys[key], now=room.now, role=role, check_audit=believe
    )
    assert room.refusal(act) == code
    assert (
        room.refusal(lambda: refuse_release(room.workspace, keys[key], "no", now=room.now, role=role)) == code
    )


def test_a_key_that_is_over(room: Room, tmp_path: Path) -> None:
    rule = json.loads(room.rule(2).read_text())
    ends = room.now + timedelta(days=2)
    for signer in rule["signers"]:
        signer["not_after"] = ends.isoformat()
    path = tmp_path / "signers.json"
    path.write_text(json.dumps(rule))
    release = room.requested(signers_file=path)
    audit = room.audit(release)
    assert room.refusal(lambda: room.sign(release, audit, now=ends)) == "signer-key-expired"
    room.sign(release, audit)
    room.countersign(release, room.workspace.site_key())
    assert (
        room.refusal(lambda: export_release(room.workspace, tmp_path / "b", now=ends)) == "signer-key-expired"
    )
    export_release(room.workspace, tmp_path / "b", now=ends - timedelta(seconds=1))


def test_nobody_else_signs_for_the_site_without_a_document(room: Room) -> None:
    release = room.signed()
    room.refused("unknown-signer", lambda: room.countersign(release, SigningKey.generate(), "site"))
    room.refused("unknown-signer", lambda: room.countersign(release, OFFICER, "data-protection"))
    assert room.countersign(release, room.workspace.site_key()).standing.complete


def test_the_site_cannot_sign_first_or_something_else(room: Room) -> None:
    release = room.requested(signers_file=room.rule(2))
    room.refused("no-verdict", lambda: room.countersign(release, room.workspace.site_key()))
    with pytest.raises(BadInputError) as error:
        room.countersign(release, room.auditor, "auditor")
    assert error.value.code == "no-audit"
    room.sign(release, room.audit(release))
    late = room.now + timedelta(days=400)
    room.refused(
        "verdict-expired",
        lambda: sign_release(room.workspace, None, room.workspace.site_key(), now=late, role="site"),
    )
    assert room.workspace.state(release) == "signed"


def test_two_auditors_are_no_site(room: Room, tmp_path: Path) -> None:
    """k signatures are not enough: a site and an auditor must be among them."""
    release = room.requested(signers_file=room.rule(2))
    audit = room.audit(release)
    room.sign(release, audit)
    room.sign(release, audit, room.second)
    assert room.progress(release).signed == "2 of 2"
    error = room.refused(
        "signatures-missing", lambda: export_release(room.workspace, tmp_path / "b", now=room.now)
    )
    assert "the site has not signed" in error.message


@pytest.mark.parametrize(
    "change",
    [
        {"needed": 1},
        {"needed": 9},
        {"signers": []},
        {"unknown": 1},
        {"needed": True},
    ],
)
def test_documents_that_name_no_quorum(room: Room, change: dict[str, Any]) -> None:
    with pytest.raises(BadInputError):
        room.requested(signers_file=room.rule(**{"needed": 2, **change}))


def test_documents_of_the_wrong_people(room: Room) -> None:
    own = room.workspace.site_key().key_id
    people = [
        {"role": "auditor", "name": "ourselves", "key_id": own},
        {"role": "site", "name": "desk", "key_id": room.second.key_id},
    ]
    release = room.draft()
    room.refused(
        "auditor-is-site",
        lambda: request_release(room.workspace, now=room.now, signers_file=room.rule(2, signers=people)),
    )
    with pytest.raises(BadInputError) as error:
        request_release(room.workspace, now=room.now, signers_file=room.rule(2, site="south"))
    assert error.value.code == "signers-of-another-site"
    only_auditors = [people[1] | {"role": "auditor"}, people[0]]
    twice = [people[1], people[1] | {"role": "auditor"}]
    for signers in (only_auditors, twice):
        with pytest.raises(BadInputError):
            request_release(room.workspace, now=room.now, signers_file=room.rule(2, signers=signers))
    assert room.workspace.state(release) == "draft"


def test_what_cannot_be_withdrawn_or_refused(room: Room, tmp_path: Path) -> None:
    release = room.signed()
    room.refused("not-exported", lambda: withdraw_release(room.workspace, "x", now=room.now))
    export_release(room.workspace, tmp_path / "b", now=room.now)
    room.refused(
        "already-exported", lambda: refuse_release(room.workspace, room.auditor, "late", now=room.now)
    )
    (tmp_path / "there").write_text("")
    for out in (tmp_path / "there", tmp_path / "no" / "folder"):
        with pytest.raises(BadInputError):
            withdraw_release(room.workspace, "x", now=room.now, out=out)
    withdraw_release(room.workspace, "x", now=room.now)
    room.refused("release-withdrawn", lambda: withdraw_release(room.workspace, "x", now=room.now))
    audit = room.audit(release)
    room.refused("release-withdrawn", lambda: room.sign(release, audit, room.second))


@pytest.mark.parametrize("reason", ["", "a\x00b", "right\u202eleft", "x" * 4001])
def test_words_that_cannot_be_signed(room: Room, tmp_path: Path, reason: str) -> None:
    room.exported(tmp_path / "b")
    with pytest.raises(BadInputError) as error:
        withdraw_release(room.workspace, reason, now=room.now)
    assert error.value.code == "cannot-be-signed"
    with pytest.raises(PixcellError):
        refuse_release(room.workspace, room.auditor, reason, now=room.now)


def test_a_list_of_withdrawals_that_was_forged(room: Room, tmp_path: Path) -> None:
    room.exported(tmp_path / "b")
    withdraw_release(room.workspace, "x", now=room.now)
    path = room.workspace.withdrawals_file
    envelope = Envelope.load(path)
    path.write_bytes(
        sign_envelope(envelope.payloadType, envelope.unsafe_unverified_payload(), [room.second]).to_bytes()
    )
    room.draw_others()
    second = room.draft()
    room.sign(second, room.audit(second))
    which = second.release_id
    export_release(room.workspace, tmp_path / "c", now=room.now, release_id=which)
    assert (
        room.refusal(lambda: withdraw_release(room.workspace, "y", now=room.now, release_id=which))
        == "signature-refused"
    )


def test_a_review_replaces_no_signed_audit(room: Room) -> None:
    release = room.signed()
    audit = room.audit(release, set_verdict("REVIEW"))
    assert (
        room.refusal(lambda: review_release(room.workspace, audit, now=room.now, check_audit=believe))
        == "already-signed"
    )
