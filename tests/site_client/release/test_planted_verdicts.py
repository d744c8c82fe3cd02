"""A verdict that the site laid into its own folder: no auditor's signature is got under words the auditor never chose."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pixcell_core.contracts.verdict import MAX_VERDICT_DAYS, Verdict
from pixcell_core.errors import BadInputError
from pixcell_core.trust.bundle_files import VERDICT
from pixcell_core.trust.dsse import IN_TOTO_PAYLOAD_TYPE, sign_envelope
from pixcell_core.trust.keys import SigningKey
from site_client.release.export import export_release
from site_client.release.workspace import ReleaseFolder
from tests.site_client.release.conftest import OFFICER

if TYPE_CHECKING:
    from tests.site_client.release.conftest import Room


def plant(room: Room, key: SigningKey, **dates: Any) -> tuple[ReleaseFolder, Path]:
    """The words the auditor is going to sign, known beforehand from the audit, with dates of the site's choice."""
    release = room.draft()
    audit = room.audit(release)
    true = room.sign(release, audit, SigningKey.generate()).verdict
    planted = true.predicate.model_copy(update=dates)
    statement = true.model_copy(update={"predicate": planted})
    envelope = sign_envelope(IN_TOTO_PAYLOAD_TYPE, statement.to_bytes(), [key])
    (release.path / VERDICT).write_bytes(envelope.to_bytes())
    return release, audit


def test_words_that_the_site_signed_alone(room: Room) -> None:
    release, audit = plant(room, room.workspace.site_key())
    room.refused("auditor-is-site", lambda: room.sign(release, audit))
    before = (release.path / VERDICT).read_bytes()
    assert room.auditor.key_id.encode() not in before


def test_words_that_a_stranger_signed(room: Room) -> None:
    release, audit = plant(room, OFFICER)
    planted = (release.path / VERDICT).read_bytes()
    room.refused("unknown-auditor", lambda: room.sign(release, audit))
    room.refused("unknown-auditor", lambda: room.countersign(release, room.workspace.site_key()))
    assert (release.path / VERDICT).read_bytes() == planted, "nobody's name was added"


def test_words_under_a_signature_that_is_false(room: Room) -> None:
    release, audit = plant(room, OFFICER)
    room.workspace.record_signer(release, OFFICER.verify_key)
    data = (release.path / VERDICT).read_bytes()
    start = data.index(b'"sig":"') + 7
    false = data[:start] + b"AAAA" + data[start + 4 :]
    (release.path / VERDICT).write_bytes(false)
    room.refused("signature-refused", lambda: room.sign(release, audit))
    assert (release.path / VERDICT).read_bytes() == false, "nobody's name was added"


@pytest.mark.parametrize(
    ("issued", "days", "code"),
    [
        (timedelta(), 366, "holds-too-long"),
        (timedelta(), MAX_VERDICT_DAYS, "holds-too-long"),
        (timedelta(days=1), 300, "clock-wrong"),
        (timedelta(days=-30), 365, "already-signed"),
        (timedelta(days=-30), 20, "verdict-expired"),
    ],
)
def test_dates_the_auditor_did_not_choose(room: Room, issued: timedelta, days: int, code: str) -> None:
    """Even under a signature that this site knows: a second key of its own is easily made."""
    moment = room.now + issued
    release, audit = plant(room, OFFICER, issued_at=moment, expires_at=moment + timedelta(days=days))
    room.workspace.record_signer(release, OFFICER.verify_key)
    room.refused(code, lambda: room.sign(release, audit))
    envelope = release.verdict()
    assert envelope is not None and envelope.key_ids == (OFFICER.key_id,)


def test_a_second_auditor_signs_what_a_first_one_chose(room: Room, tmp_path: Path) -> None:
    release = room.draft()
    audit = room.audit(release)
    room.sign(release, audit, days=400)
    later = room.now + timedelta(days=10)
    room.refused("holds-too-long", lambda: room.sign(release, audit, room.second, now=later))
    signed = room.sign(release, audit, room.second, now=later, days=400)
    assert signed.verdict.predicate.expires_at == room.now + timedelta(days=400)
    assert len(signed.envelope.signatures) == 2
    export_release(room.workspace, tmp_path / "b", now=later)


def test_no_verdict_holds_for_a_century(room: Room) -> None:
    release = room.signed()
    envelope = release.verdict()
    assert envelope is not None
    verdict = Verdict.model_validate_json(envelope.unsafe_unverified_payload())
    longest = verdict.predicate.issued_at + timedelta(days=MAX_VERDICT_DAYS)
    predicate = type(verdict.predicate).model_validate(dict(verdict.predicate) | {"expires_at": longest})
    assert predicate.expires_at == longest
    with pytest.raises(ValueError, match="at most 1095 days"):
        type(predicate).model_validate(dict(predicate) | {"expires_at": longest + timedelta(seconds=1)})
    plant(room, room.auditor, expires_at=room.now + timedelta(days=36_500))
    with pytest.raises(BadInputError, match="1095 days"):
        room.sign(release, room.audit(release), room.second)
