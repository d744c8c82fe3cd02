"""Every party's log has its own acts: what an auditor signs or is refused stands in the auditor's log, and cannot go.

The logs here are made by the real acts of a site, an auditor and a coordinator. Each is then edited, cut, reordered and
rewritten by its own owner.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixcell_core.contracts.canonical import load_document
from pixcell_core.contracts.log_heads import AnchorReceipt
from pixcell_core.errors import PixcellError
from pixcell_core.trust.bundle_files import VERDICT
from pixcell_core.trust.dsse import Envelope
from pixcell_core.trust.durable import write_whole
from pixcell_core.trust.keys import SigningKey, VerifyKey
from pixcell_core.trust.log import EventLog, LogBrokenError, newest_head, read_entries, verify_log
from pixcell_core.trust.log_proof import check_receipt, make_offer
from pixcell_core.trust.party_log import own_log
from server.log_anchor.act_log import CoordinatorLog
from server.log_anchor.anchors import AnchorBook
from site_client.release.refuse import refuse_release
from site_client.release.workspace import ReleaseWorkspace
from tests.server.enrolled import make_enrolment
from tests.site_client.release.conftest import NOW, Room, set_verdict, write_surrogates
from tests.site_client.release.test_release_commands import data, evidence_is_believed, run

if TYPE_CHECKING:
    from pixcell_core.trust.log import LogEntry

__all__ = ["evidence_is_believed"]


@pytest.fixture
def auditor(tmp_path: Path) -> Path:
    """The key file of an auditor who is not enrolled anywhere."""
    SigningKey.generate().save(tmp_path / "auditor.key")
    return tmp_path / "auditor.key"


def last(folder: Path) -> LogEntry:
    return read_entries(folder)[-1]


def test_signature_refusal_and_no_stand_in_the_auditors_log(room: Room, auditor: Path) -> None:
    site, own = ("--site-dir", room.workspace.site_dir), auditor.with_name("auditor.key.log")
    release = room.draft()
    failed = room.audit(release, set_verdict("FAIL"))
    assert run("release", "sign", *site, "--audit", failed, "--key", auditor).exit_code == 1
    assert (last(own).kind, last(own).data["code"]) == ("release.refused", "verdict-forbids")
    passed = room.audit(release)
    assert run("release", "sign", *site, "--audit", passed, "--key", auditor).exit_code == 0
    signed = last(own)
    assert signed.kind == "release.signed" and signed.data == last(room.workspace.log().folder).data
    assert signed.data["tiles_root"] == release.manifest().tiles_root and signed.data["site"] == "north"
    assert {"policy", "report", "manifest", "envelope", "verdict"} <= signed.data.keys()
    assert run("release", "refuse", *site, "--key", auditor, "--reason", "Ink.").exit_code == 0
    assert (last(own).kind, last(own).data["role"]) == ("release.declined", "auditor")
    assert "Ink" not in json.dumps(last(own).data), "the reason is signed, and is no event"
    report = verify_log(own, trusted_keys=[SigningKey.load(auditor).verify_key])
    assert report.entries == 3


def test_an_auditors_log_answers_the_commands_of_the_log(room: Room, auditor: Path, tmp_path: Path) -> None:
    release, own = room.draft(), tmp_path / "its-log"
    sign = ("release", "sign", "--site-dir", room.workspace.site_dir, "--key", auditor, "--log", own)
    assert run(*sign, "--audit", room.audit(release)).exit_code == 0
    assert data(run("log", "verify", own, "--format", "json"))["entries"] == 1
    proof = tmp_path / "proof.json"
    assert run("log", "prove", own, 0, "--out", proof).exit_code == 0
    found = data(run("log", "verify-proof", proof, "--key", own / "log.pub", "--format", "json"))
    assert "release.signed" in found["about"]
    offer = ("log", "offer", own, "--party", "dr-auditor", "--sign-with", auditor, "--out", tmp_path / "o")
    assert data(run(*offer, "--format", "json"))["tree_size"] == 1


def test_the_sites_own_signature_is_one_event_of_one_log(room: Room, tmp_path: Path) -> None:
    release = room.requested(signers_file=room.rule(2))
    room.sign(release, room.audit(release))
    site, key = room.workspace.site_dir, room.workspace.key_path
    assert run("release", "sign", "--site-dir", site, "--role", "site", "--key", key).exit_code == 0
    assert room.kinds().count("release.signed") == 2
    assert not key.with_name("release.log").exists()


def test_nothing_is_signed_that_the_signers_log_cannot_hold(room: Room, auditor: Path) -> None:
    site, own = ("--site-dir", room.workspace.site_dir), auditor.with_name("auditor.key.log")
    release = room.draft()
    EventLog(own, SigningKey.load(auditor)).append("test.event", {})
    lines = (own / "log.jsonl").read_bytes()
    (own / "log.jsonl").write_bytes(lines.replace(b'"index":0', b'"index":7'))
    result = run("release", "sign", *site, "--audit", room.audit(release), "--key", auditor)
    assert result.exit_code == 1 and "log-broken" in result.output + result.stderr
    assert release.verdict() is None
    assert room.workspace.log().entries()[-1].data["code"] == "log-broken"
    # Nothing was left that would break the seal: with a log that can be written the same signature goes on.
    assert not release.report.exists() and room.workspace.recorded_signers(release) == []
    assert room.progress(release).state == "draft"
    (own / "log.jsonl").write_bytes(lines)
    again = run("release", "sign", *site, "--audit", room.audit(release), "--key", auditor)
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize("files", ["report", "both"])
def test_a_signature_that_was_interrupted_after_its_event_is_given_again(
    room: Room, monkeypatch: pytest.MonkeyPatch, files: str
) -> None:
    release = room.draft()
    audit = room.audit(release)
    written: list[Path] = []

    def stop(path: Path, content: bytes, **options: Any) -> None:
        if path.name == VERDICT or (files == "report" and path == release.page):
            raise KeyboardInterrupt
        written.append(path)
        write_whole(path, content, **options)

    with monkeypatch.context() as patched:
        patched.setattr("site_client.release.signing.write_whole", stop)
        with pytest.raises(KeyboardInterrupt):
            room.sign(release, audit)
    assert release.report in written and release.verdict() is None
    assert room.kinds()[-1] == "release.signed"
    room.sign(release, audit)
    assert room.progress(release).state == "signed"


@dataclass
class Parties:
    """Three logs of real acts, the heads that others hold of them, and the key of each owner."""

    folders: dict[str, Path]
    keys: dict[str, SigningKey]
    heads: dict[str, Envelope]


@pytest.fixture(scope="module")
def parties(tmp_path_factory: pytest.TempPathFactory) -> Parties:
    root = tmp_path_factory.mktemp("parties")
    made = make_enrolment(root / "consortium")
    site, auditor = made.party("north"), made.party("dr-auditor", "auditor")
    room = Room(ReleaseWorkspace(site.root), write_surrogates(root / "surrogates"), root / "audits")
    own = own_log(auditor.approval_key)
    assert own.folder == auditor.root / "log"
    release = room.draft()
    with pytest.raises(PixcellError):
        room.sign(release, room.audit(release, set_verdict("FAIL")), own_log=own)
    key = SigningKey.load(auditor.approval_key)
    room.sign(release, room.audit(release), key, own_log=own)
    refuse_release(room.workspace, key, "Too similar.", now=NOW, own_log=own)
    book, coordinator = AnchorBook(made.layout), CoordinatorLog(made.layout)
    for party in (site, auditor):
        name, signer = party.identity().site, SigningKey.load(party.approval_key)
        receipt = load_document(
            AnchorReceipt, book.anchor(make_offer(party.root / "log", name, signer)).receipt
        )
        check_receipt(receipt, [coordinator.verify_key])
    folders = {"site": site.root / "log", "auditor": auditor.root / "log", "coordinator": coordinator.folder}
    heads = {name: newest_head(folder) for name, folder in folders.items()}
    assert book.all().keys() == {"north", "dr-auditor"}
    keys = {
        "site": SigningKey.load(site.keys / "release"),
        "auditor": SigningKey.load(auditor.keys / "release"),
        "coordinator": coordinator.key,
    }
    return Parties(folders, keys, {name: head for name, head in heads.items() if head is not None})


def test_the_three_logs_are_whole_and_hold_their_acts(parties: Parties) -> None:
    kinds = {name: [e.kind for e in read_entries(folder)] for name, folder in parties.folders.items()}
    acts = ["release.refused", "release.signed", "release.declined"]
    assert kinds["auditor"][-3:] == acts and kinds["site"][-3:] == acts
    assert kinds["coordinator"].count("log.anchored") == 2
    for name, folder in parties.folders.items():
        verify_log(folder, trusted_keys=[parties.keys[name].verify_key], earlier_heads=[parties.heads[name]])


def _swapped(lines: list[bytes], draw: Callable[..., Any]) -> list[bytes]:
    first, second = sorted(draw(st.sets(st.integers(0, len(lines) - 1), min_size=2, max_size=2)))
    lines[first], lines[second] = lines[second], lines[first]
    return lines


def _edited(lines: list[bytes], draw: Callable[..., Any]) -> list[bytes]:
    number = draw(st.integers(0, len(lines) - 1))
    line = bytearray(lines[number])
    line[draw(st.integers(0, len(line) - 2))] ^= draw(st.integers(1, 255))
    lines[number] = bytes(line)
    return lines


def _dropped(lines: list[bytes], draw: Callable[..., Any]) -> list[bytes]:
    del lines[draw(st.integers(0, len(lines) - 1))]
    return lines


def _cut(lines: list[bytes], draw: Callable[..., Any]) -> list[bytes]:
    return lines[: draw(st.integers(0, len(lines) - 1))]


def _repeated(lines: list[bytes], draw: Callable[..., Any]) -> list[bytes]:
    lines.insert(draw(st.integers(0, len(lines))), lines[draw(st.integers(0, len(lines) - 1))])
    return lines


@pytest.mark.parametrize("party", ["site", "auditor", "coordinator"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_whatever_is_done_to_the_lines_shows(parties: Parties, party: str, data: st.DataObject) -> None:
    path, key = parties.folders[party] / "log.jsonl", parties.keys[party].verify_key
    original = path.read_bytes()
    act = data.draw(st.sampled_from([_swapped, _edited, _dropped, _cut, _repeated]))
    path.write_bytes(b"".join(act(original.splitlines(keepends=True), data.draw)))
    try:
        with pytest.raises(PixcellError):
            verify_log(path.parent, trusted_keys=[key], earlier_heads=[parties.heads[party]])
    finally:
        path.write_bytes(original)


@pytest.mark.parametrize("party", ["site", "auditor", "coordinator"])
@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_an_owner_who_writes_another_past_is_seen(
    parties: Parties, party: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A fork is whole in itself; whoever holds a head of the true log tells it apart."""
    folder, key = tmp_path_factory.mktemp("fork"), parties.keys[party]
    entries = read_entries(parties.folders[party])
    changed = data.draw(st.integers(0, len(entries) - 1))
    fork = EventLog(folder / "log", key)
    for entry in entries:
        facts = {"another": 1} if entry.index == changed else entry.data
        fork.append(entry.kind, facts)
    for _ in range(data.draw(st.integers(0, 2))):
        fork.append("test.event", {})
    verify_log(fork.folder, trusted_keys=[key.verify_key])
    with pytest.raises(LogBrokenError, match="rewritten"):
        verify_log(fork.folder, earlier_heads=[parties.heads[party]])
    shutil.rmtree(folder)


def test_an_auditors_fork_is_refused_by_the_coordinator(tmp_path: Path) -> None:
    made = make_enrolment(tmp_path)
    auditor = made.party("dr-auditor", "auditor")
    signer, book = SigningKey.load(auditor.approval_key), AnchorBook(made.layout)
    own = own_log(auditor.approval_key)
    own.append("release.declined", {"release": "0" * 16})
    receipt = load_document(AnchorReceipt, book.anchor(make_offer(own.folder, "dr-auditor", signer)).receipt)
    before = read_entries(own.folder)
    shutil.rmtree(own.folder)
    again = EventLog(own.folder, SigningKey.load(auditor.keys / "release"))
    for entry in before:
        again.append(entry.kind, {} if entry.kind == "release.declined" else entry.data)
    again.append("release.signed", {"release": "0" * 16})
    with pytest.raises(PixcellError) as refused:
        book.anchor(make_offer(own.folder, "dr-auditor", signer, last=receipt))
    assert refused.value.code in ("log-forked", "log-broken", "log-proof-refused")
    assert VerifyKey.load(own.folder / "log.pub") == SigningKey.load(auditor.keys / "release").verify_key
