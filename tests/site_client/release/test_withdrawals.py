"""Whoever signed can take back: at the site or with the bundle alone. Forged, foreign and replayed lists are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from pixcell_core.contracts.canonical import parse_document
from pixcell_core.contracts.gate import WITHDRAWALS_PAYLOAD_TYPE, Withdrawals, WithdrawnRelease
from pixcell_core.errors import PixcellError
from pixcell_core.trust.bundle import BundleReport, Known, verify_bundle
from pixcell_core.trust.bundle_files import open_bundle
from pixcell_core.trust.dsse import Envelope, sign_envelope
from pixcell_core.trust.keys import SigningKey
from pixcell_core.trust.log import read_entries, verify_log
from pixcell_core.trust.party_log import own_log
from site_client.release.export import export_release
from site_client.release.withdraw import take_up_withdrawals, withdraw_bundle, withdraw_release
from tests.site_client.release.conftest import AUDITOR, NOW, SECOND, Room
from tests.site_client.release.test_release_commands import data, run


@pytest.fixture
def bundle(room: Room, tmp_path: Path) -> Path:
    """One exported release of the room, signed by the first auditor."""
    room.exported(tmp_path / "b.zip")
    AUDITOR.save(tmp_path / "auditor.key")
    return tmp_path / "b.zip"


def again(room: Room, out: Path) -> str:
    """Another release of the same site, exported; its id."""
    room.draw_others()
    release = room.draft()
    room.sign(release, room.audit(release))
    export_release(room.workspace, out, now=NOW, release_id=release.release_id)
    return release.release_id


def verify(bundle: Path, *lists: Envelope, now: Any = NOW) -> BundleReport:
    with open_bundle(bundle) as files:
        return verify_bundle(files, trusted_keys=None, now=now, known=Known(withdrawals=lists))


def code_of(act: Callable[..., object], *arguments: Any, **more: Any) -> str:
    with pytest.raises(PixcellError) as refused:
        act(*arguments, **more)
    assert refused.value.hint
    return refused.value.code


def listed(
    *digests: str, site: str = "north", number: int = 1, key: SigningKey = AUDITOR, at: Any = NOW
) -> Envelope:
    entries = tuple(WithdrawnRelease(manifest_digest=d, reason="consent", withdrawn_at=NOW) for d in digests)
    document = Withdrawals(site=site, number=number, issued_at=at, withdrawn=entries)
    return sign_envelope(WITHDRAWALS_PAYLOAD_TYPE, document.to_bytes(), [key])


def test_an_auditor_takes_back_at_the_site(room: Room, bundle: Path, tmp_path: Path) -> None:
    own = own_log(tmp_path / "auditor.key")
    taken = withdraw_release(room.workspace, "A copy was found.", now=NOW, key=AUDITOR, own_log=own)
    assert taken.role == "auditor" and taken.envelope.key_ids == (AUDITOR.key_id,)
    assert room.workspace.state(room.workspace.find(None)) == "withdrawn"
    for folder in (own.folder, room.workspace.log().folder):
        event = read_entries(folder)[-1]
        assert (event.kind, event.data["key"], event.data["role"]) == (
            "release.withdrawn",
            AUDITOR.key_id,
            "auditor",
        )
        assert "copy" not in json.dumps(event.data)
    with pytest.raises(PixcellError, match=r"by the auditor .*A copy was found") as refused:
        verify(bundle, taken.envelope)
    assert refused.value.code == "release-withdrawn"
    # The site says so on its own list as well; each key once.
    site = withdraw_release(room.workspace, "We agree.", now=NOW)
    assert site.role == "site" and site.withdrawals.number == 1
    with pytest.raises(PixcellError, match="by the site"):
        verify(bundle, site.envelope)
    for key, log in ((AUDITOR, own), (None, None)):
        room.refused(
            "release-withdrawn",
            lambda key=key, log=log: withdraw_release(room.workspace, "x", now=NOW, key=key, own_log=log),
        )
    verify_log(own.folder)
    assert "taken back by the auditor and site" in room.progress(room.workspace.find(None)).blocked_by


def test_an_auditor_takes_back_far_from_the_site(room: Room, bundle: Path, tmp_path: Path) -> None:
    own, out = own_log(tmp_path / "auditor.key"), tmp_path / "list.json"
    later = NOW + timedelta(days=5000)  # the verdict is long over; the tiles are still out there
    taken = withdraw_bundle(bundle, AUDITOR, "An attack got better.", now=later, own_log=own, out=out)
    assert taken.release_id == room.workspace.find(None).release_id
    assert Envelope.load(out) == taken.envelope == Envelope.load(taken.list_file)
    assert read_entries(own.folder)[-1].data["manifest"] == taken.manifest_digest
    assert code_of(verify, bundle, taken.envelope) == "release-withdrawn"
    assert room.workspace.state(room.workspace.find(None)) == "exported", "the site was not told yet"
    assert take_up_withdrawals(room.workspace, taken.envelope, now=later) == (taken.release_id,)
    assert room.workspace.state(room.workspace.find(None)) == "withdrawn"
    assert take_up_withdrawals(room.workspace, taken.envelope, now=later) == (taken.release_id,)
    assert room.kinds().count("release.withdrawn") == 1
    assert code_of(withdraw_bundle, bundle, AUDITOR, "x", now=later, own_log=own) == "release-withdrawn"


def test_who_did_not_sign_takes_nothing_back(room: Room, bundle: Path, tmp_path: Path) -> None:
    SECOND.save(tmp_path / "second.key")
    own = own_log(tmp_path / "second.key")
    room.refused(
        "not-a-signer", lambda: withdraw_release(room.workspace, "x", now=NOW, key=SECOND, own_log=own)
    )
    assert read_entries(own.folder)[-1].kind == "release.refused"
    assert code_of(withdraw_bundle, bundle, SECOND, "x", now=NOW, own_log=own) == "not-a-signer"
    site = room.workspace.site_key()
    code = code_of(withdraw_bundle, bundle, site, "x", now=NOW, own_log=room.workspace.log())
    assert code == "withdrawal-incomplete"
    (tmp_path / "there").write_text("")
    code = code_of(withdraw_bundle, bundle, AUDITOR, "x", now=NOW, own_log=own, out=tmp_path / "there")
    assert code == "out-exists"
    changed = tmp_path / "changed.zip"
    changed.write_bytes(bundle.read_bytes()[:-40])
    with pytest.raises(PixcellError):
        withdraw_bundle(changed, AUDITOR, "x", now=NOW, own_log=own)


def test_forged_foreign_and_replayed_lists(room: Room, bundle: Path) -> None:
    ours, other = room.workspace.find(None).manifest().digest, "sha256:" + "0" * 64
    third = "sha256:" + "1" * 64
    verify(bundle, listed(other), listed(other, third, number=2))
    verify(bundle, listed(other), listed(third, key=room.workspace.site_key()))  # two signers, two lists
    edited = json.loads(listed(other).to_bytes())
    edited["payload"] = json.loads(listed(third).to_bytes())["payload"]
    cases: list[tuple[list[Envelope], str]] = [
        ([listed(ours)], "release-withdrawn"),
        ([listed(other), listed(ours)], "release-withdrawn"),
        ([listed(ours, key=SECOND)], "withdrawals-of-another"),  # a stranger's
        (
            [Envelope.model_validate(edited)],
            "withdrawals-of-another",
        ),  # a signer's signature over other words
        ([listed(ours, site="south")], "withdrawals-of-another"),  # a signer's list about another site
        ([listed(other), listed(third, number=2)], "withdrawals-rolled-back"),  # the newer one forgot
        ([listed(other, third), listed(other)], "withdrawals-rolled-back"),  # two lists of one number
        ([listed(other, at=NOW + timedelta(days=1))], "clock-wrong"),
    ]
    for lists, code in cases:
        assert code_of(verify, bundle, *lists) == code
        assert code_of(verify, bundle, *reversed(lists)) == code


def test_an_older_list_put_back_is_noticed_by_its_author_and_the_site(
    room: Room, bundle: Path, tmp_path: Path
) -> None:
    own, first = own_log(tmp_path / "auditor.key"), room.workspace.find(None).release_id
    one = withdraw_release(room.workspace, "x", now=NOW, key=AUDITOR, own_log=own)
    kept = next(own.folder.glob("withdrawals-*"))
    shutil.copy(kept, tmp_path / "old")
    second = again(room, tmp_path / "c.zip")
    two = withdraw_release(room.workspace, "y", now=NOW, release_id=second, key=AUDITOR, own_log=own)
    assert [entry.manifest_digest for entry in two.withdrawals.withdrawn] == [
        room.workspace.find(which).manifest().digest for which in (first, second)
    ]
    third = again(room, tmp_path / "d.zip")
    shutil.copy(tmp_path / "old", kept)

    def act() -> object:
        return withdraw_release(room.workspace, "z", now=NOW, release_id=third, key=AUDITOR, own_log=own)

    room.refused("withdrawals-rolled-back", act)
    kept.unlink()
    room.refused("withdrawals-rolled-back", act)
    # A recipient who kept the newer list sees the older one for what it is; so does the site.
    old = parse_document(Withdrawals, one.envelope.unsafe_unverified_payload(), name="old")
    assert old.number < two.withdrawals.number
    assert code_of(take_up_withdrawals, room.workspace, one.envelope, now=NOW) == "withdrawals-rolled-back"


def test_the_site_takes_up_no_list_that_says_nothing_of_it(room: Room, bundle: Path) -> None:
    ours = room.workspace.find(None).manifest().digest
    for envelope in (listed("sha256:" + "0" * 64), listed(ours, site="south"), listed(ours, key=SECOND)):
        room.refused(
            "withdrawals-of-another",
            lambda envelope=envelope: take_up_withdrawals(room.workspace, envelope, now=NOW),
        )
    wrong = sign_envelope("text/plain", b"x", [AUDITOR])
    assert code_of(take_up_withdrawals, room.workspace, wrong, now=NOW) == "wrong-payload-type"
    assert room.workspace.state(room.workspace.find(None)) == "exported"


def test_as_people_type_it(room: Room, bundle: Path, tmp_path: Path) -> None:
    site, key = ("--site-dir", room.workspace.site_dir), tmp_path / "auditor.key"
    why = ("--reason", "A copy was found.")
    for arguments in (
        why, site, ("--bundle", bundle, *why), (*site, "--bundle", bundle, "--key", key, *why),
        (*site, "--take-up", bundle, *why),
    ):  # fmt: skip
        result = run("release", "withdraw", *arguments, "--yes", "--format", "json")
        assert (result.exit_code, json.loads(result.stdout)["code"]) == (4, "withdrawal-incomplete")
    by_bundle = ("release", "withdraw", "--bundle", bundle, "--key", key, *why)
    assert json.loads(run(*by_bundle, "--format", "json").stdout)["code"] == "needs-yes"
    out = tmp_path / "list.json"
    taken = data(run(*by_bundle, "--yes", "--out", out, "--format", "json"))
    assert (taken["role"], taken["number"]) == ("auditor", 1)
    checked = run("release", "verify", bundle, "--withdrawals", out, "--format", "json")
    assert json.loads(checked.stdout.splitlines()[-1])["code"] == "release-withdrawn"
    assert run("release", "withdraw", *site, "--take-up", out).exit_code == 0
    assert "withdrawn" in run("release", "show", *site).stdout
    at_site = ("release", "withdraw", *site, "--key", key, *why, "--yes", "--format", "json")
    assert json.loads(run(*at_site).stdout)["code"] == "release-withdrawn"
    assert read_entries(tmp_path / "auditor.key.log")[-1].data["code"] == "release-withdrawn"
