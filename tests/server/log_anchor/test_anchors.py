"""Heads of the parties' logs: anchored while a log only grows; a fork, a rollback or a new log is refused and kept."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from pixcell_core.contracts.canonical import load_document, parse_document
from pixcell_core.contracts.log_heads import ANCHORED, OFFER_PAYLOAD_TYPE, AnchorReceipt, HeadOffer
from pixcell_core.errors import PixcellError
from pixcell_core.trust.dsse import Envelope, SignatureRefusedError, add_signature, sign_envelope
from pixcell_core.trust.keys import SigningKey, VerifyKey
from pixcell_core.trust.log import (
    HEAD_PAYLOAD_TYPE,
    EventLog,
    LogBrokenError,
    TreeHead,
    head_at,
    newest_head,
    read_entries,
    verify_log,
)
from pixcell_core.trust.log_proof import ProofRefusedError, check_receipt, make_offer, prove_consistency
from server.log_anchor.act_log import CoordinatorLog
from server.log_anchor.anchors import REFUSED, AnchorBook, AnchorRefusedError
from server.registry.events import ActLog
from site_client.approvals.site_folder import SiteFolder
from tests.server.enrolled import Enrolment, make_enrolment

NOW = datetime.now(UTC).replace(microsecond=0)


@pytest.fixture
def made(tmp_path: Path) -> Enrolment:
    """A new consortium."""
    return make_enrolment(tmp_path)


class Party:
    """An enrolled party with a log of its own, and what it keeps of the coordinator's."""

    def __init__(self, made: Enrolment, name: str = "north") -> None:
        self.name, self.folder = name, made.party(name)
        self.book, self.log_key = AnchorBook(made.layout), SigningKey.generate()
        self.coordinator = CoordinatorLog(made.layout).verify_key
        self.log = EventLog(self.folder.root / "its-log", self.log_key)
        self.kept: AnchorReceipt | None = None

    def write(self, *facts: int) -> Party:
        for fact in facts:
            self.log.append("test.event", {"fact": fact})
        return self

    def offer(self, log: EventLog | None = None, since: int | None = None) -> Envelope:
        key = SigningKey.load(self.folder.approval_key)
        return make_offer((log or self.log).folder, self.name, key, last=self.kept, since=since)

    def anchor(self) -> AnchorReceipt:
        """The whole way: offer, anchor, check the receipt, keep it."""
        done = self.book.anchor(self.offer())
        receipt = load_document(AnchorReceipt, done.receipt)
        check_receipt(receipt, [self.coordinator], before=self.kept)
        verify_log(self.log.folder, earlier_heads=[receipt.head])
        self.kept = receipt
        return receipt

    def other_log(self, place: str, *facts: int, key: SigningKey | None = None) -> EventLog:
        other = EventLog(self.folder.root / place, key or self.log_key)
        for fact in facts:
            other.append("test.event", {"fact": fact})
        return other


def code_of(act: Any, *arguments: Any, **more: Any) -> str:
    with pytest.raises(PixcellError) as refused:
        act(*arguments, **more)
    assert refused.value.hint
    return refused.value.code


def kinds(party: Party) -> list[str]:
    return [entry.kind for entry in read_entries(party.book._log.folder)]


def test_a_log_that_grows_is_anchored_again_and_again(made: Enrolment) -> None:
    party = Party(made).write(1, 2, 3)
    first = party.anchor()
    party.write(4)
    second = party.anchor()
    party.write(5, 6, 7, 8)
    third = party.anchor()
    assert (first.grown, second.grown is None, third.grown is None) == (None, False, False)
    last = party.book.last("north")
    assert last is not None and last.head.tree_size == 8 and last.envelope == party.log.head()
    assert kinds(party).count(ANCHORED) == 3
    acts = [act.subject for act in ActLog(made.layout.registry()).since() if act.kind == "log-anchored"]
    assert acts == ["north/3", "north/4", "north/8"]
    assert CoordinatorLog(made.layout).verify().key_trusted


def test_the_same_head_again_gives_a_new_receipt_and_no_event(made: Enrolment) -> None:
    party = Party(made).write(1)
    party.anchor()
    before = kinds(party).count(ANCHORED)
    again = party.book.anchor(party.offer())
    assert again.again and kinds(party).count(ANCHORED) == before
    check_receipt(load_document(AnchorReceipt, again.receipt), [party.coordinator], before=party.kept)


def test_forks_and_rollbacks_are_refused_by_name_and_kept_as_evidence(made: Enrolment) -> None:
    party = Party(made).write(1, 2, 3)
    party.anchor()
    same_size = party.other_log("same", 1, 2, 99)
    grown = party.other_log("grown", 1, 98, 3, 4)
    short = party.other_log("short", 1, 2)
    foreign = party.other_log("foreign", 1, 2, 3, 4, key=SigningKey.generate())
    party.kept = None
    cases = [(same_size, 0, "log-forked"), (grown, 3, "log-forked"), (short, 0, "log-rolled-back")]
    for log, since, code in [*cases, (foreign, 3, "log-key-changed")]:
        offer = party.offer(log, since)
        assert code_of(party.book.anchor, offer) == code
        assert code_of(party.book.anchor, offer) == code, "the second time as the first"
    kept = [entry for entry in read_entries(party.book._log.folder) if entry.kind == REFUSED]
    assert [entry.data["code"] for entry in kept] == [
        "log-forked",
        "log-forked",
        "log-rolled-back",
        "log-key-changed",
    ]
    fork = Envelope.model_validate(kept[0].data["head"])
    with pytest.raises(LogBrokenError, match="rewritten"):
        verify_log(party.log.folder, trusted_keys=[party.log_key.verify_key], earlier_heads=[fork])
    last = party.book.last("north")
    assert last is not None and last.envelope == newest_head(party.log.folder)
    party.write(4)
    assert code_of(party.book.anchor, party.offer()) == "log-offer-gap"
    assert not party.book.anchor(party.offer(since=3)).again, "an honest log goes on after the alarm"


def test_one_refused_head_is_one_event_however_it_is_dressed(made: Enrolment) -> None:
    """A party may sign what it likes: strangers' signatures on a head, or its time, make no new evidence of it."""
    party = Party(made).write(1, 2, 3)
    party.anchor()
    fork = party.other_log("fork", 1, 2, 99)
    party.kept = None
    assert code_of(party.book.anchor, party.offer(fork, 0)) == "log-forked"
    approval, offer = SigningKey.load(party.folder.approval_key), party.offer(fork, 0)
    found = parse_document(HeadOffer, offer.unsafe_unverified_payload())
    for _ in range(3):
        junk = found.model_copy(update={"head": add_signature(found.head, SigningKey.generate())})
        dressed = sign_envelope(OFFER_PAYLOAD_TYPE, junk.to_bytes(), [approval])
        assert code_of(party.book.anchor, dressed) == "log-head-signatures"
    head = parse_document(TreeHead, found.head.unsafe_unverified_payload())
    for hour in range(3):
        later = head.model_copy(update={"time": f"2031-01-01T{hour:02d}:00:00Z"})
        again = sign_envelope(HEAD_PAYLOAD_TYPE, later.to_bytes(), [party.log_key])
        timed = found.model_copy(update={"head": again})
        dressed = sign_envelope(OFFER_PAYLOAD_TYPE, timed.to_bytes(), [approval])
        assert code_of(party.book.anchor, dressed) == "log-forked"
    assert kinds(party)[-2:] == [REFUSED, "act.log-head-refused"]
    assert kinds(party).count(REFUSED) == 1


def test_a_true_head_with_another_signature_is_not_anchored(made: Enrolment) -> None:
    party = Party(made).write(1)
    found = parse_document(HeadOffer, party.offer().unsafe_unverified_payload())
    junk = found.model_copy(update={"head": add_signature(found.head, SigningKey.generate())})
    dressed = sign_envelope(OFFER_PAYLOAD_TYPE, junk.to_bytes(), [SigningKey.load(party.folder.approval_key)])
    assert code_of(party.book.anchor, dressed) == "log-head-signatures"
    assert party.book.last("north") is None
    party.anchor()


@given(data=st.data())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_rewritten_log_is_ever_anchored(made: Enrolment, data: st.DataObject) -> None:
    """The owner signs every line of the forgery and proves growth as well as it can; the anchored head stands."""
    name = f"p{len(list(made.root.iterdir()))}"
    party = Party(made, name)
    facts = data.draw(st.lists(st.integers(0, 99), min_size=1, max_size=6))
    party.write(*facts).anchor()
    changed = data.draw(st.integers(0, len(facts) - 1))
    more = data.draw(st.lists(st.integers(0, 99), max_size=4))
    forged = party.other_log("forged", *facts[:changed], 1000, *facts[changed + 1 :], *more)
    party.kept = None
    since = data.draw(st.sampled_from([len(facts), len(facts), max(1, changed)]))
    assert code_of(party.book.anchor, party.offer(forged, since)) in ("log-forked", "log-offer-gap")
    last = party.book.last(name)
    assert last is not None and last.envelope == newest_head(party.log.folder)


def test_only_an_enrolled_party_in_good_standing_is_heard(made: Enrolment) -> None:
    party, other = Party(made).write(1), Party(made, "south").write(1)
    stolen = make_offer(party.log.folder, "north", SigningKey.load(other.folder.approval_key))
    with pytest.raises(SignatureRefusedError):
        party.book.anchor(stolen)
    nobody = make_offer(party.log.folder, "nobody", SigningKey.generate())
    assert code_of(party.book.anchor, nobody) == "unknown-party"
    offer = party.offer()
    assert code_of(party.book.anchor, offer, now=NOW + timedelta(days=400)) == "kit-expired"
    made.book.revoke("north", made.authority)
    assert code_of(party.book.anchor, offer) == "kit-revoked"
    assert party.book.all() == {}
    raw = bytearray(offer.to_bytes())
    raw[40] ^= 1
    with pytest.raises(PixcellError):
        party.book.anchor(Envelope.from_bytes(bytes(raw)))


def test_an_auditor_may_anchor_as_well(made: Enrolment) -> None:
    folder = made.party("auditor-a", "auditor")
    log = EventLog(folder.root / "its-log", SigningKey.generate())
    log.append("verdict.signed", {"report": "sha256:" + "0" * 64})
    key = SigningKey.load(folder.approval_key)
    done = AnchorBook(made.layout).anchor(make_offer(log.folder, "auditor-a", key))
    assert (done.party, done.tree_size) == ("auditor-a", 1)


def rebuilt(made: Enrolment, skip: str) -> None:
    """The coordinator rewrites its own log with its own key, without one kind of event."""
    own = CoordinatorLog(made.layout)
    entries, path = own.events().entries(), own.folder / "log.jsonl"
    path.unlink()
    log = own.events()
    for entry in entries:
        if entry.kind != skip:
            log.append(entry.kind, entry.data)


def test_a_coordinator_that_rewrites_its_log_meets_the_receipts(made: Enrolment) -> None:
    party = Party(made).write(1, 2)
    first = party.anchor()
    rebuilt(made, "act.kit-signed")
    assert CoordinatorLog(made.layout).verify().entries, "alone it looks whole"
    with pytest.raises(LogBrokenError):
        verify_log(CoordinatorLog(made.layout).folder, earlier_heads=[first.anchored.head])
    party.write(3)
    assert code_of(party.anchor) == "coordinator-log-rewritten"
    # Where the coordinator lies about that as well, the party sees it by itself.
    receipt = party.book.anchor(
        make_offer(party.log.folder, "north", SigningKey.load(party.folder.approval_key), since=2)
    )
    lie = load_document(AnchorReceipt, receipt.receipt)
    check_receipt(lie, [party.coordinator])
    for grown in (None, prove_consistency(CoordinatorLog(made.layout).folder, 2)):
        with pytest.raises(ProofRefusedError):
            check_receipt(lie.model_copy(update={"grown": grown}), [party.coordinator], before=party.kept)


def test_a_coordinator_whose_log_was_cut_is_told_so(made: Enrolment) -> None:
    party = Party(made).write(1)
    party.anchor()
    path = CoordinatorLog(made.layout).folder / "log.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:1]))
    assert CoordinatorLog(made.layout).verify().entries == 1, "alone it looks whole"
    assert code_of(party.book.anchor, party.offer()) == "coordinator-log-rewritten"
    assert code_of(party.book.anchor, party.offer()) == "coordinator-log-rewritten"
    assert CoordinatorLog(made.layout).verify().entries == 1, "nothing was written on top of the gap"


def test_every_part_of_a_receipt_counts(made: Enrolment) -> None:
    party = Party(made).write(1)
    first = party.anchor()
    other = Party(made, "south").write(5)
    foreign = other.anchor()
    party.write(2)
    second = party.anchor()
    keys = [party.coordinator]
    for mutant in (
        second.model_copy(update={"head": first.head}),
        second.model_copy(update={"party": "south"}),
        second.model_copy(update={"anchored": first.anchored}),
        second.model_copy(update={"anchored": foreign.anchored}),
        second.model_copy(update={"grown": None}),
    ):
        with pytest.raises(ProofRefusedError):
            check_receipt(mutant, keys, before=first)
    with pytest.raises(SignatureRefusedError):
        check_receipt(second, [SigningKey.generate().verify_key], before=first)
    check_receipt(second, keys, before=first)


def test_acts_are_copied_once_with_the_digest_they_are_about(made: Enrolment) -> None:
    made.party("north")
    own = CoordinatorLog(made.layout)
    first = own.copy_acts()
    assert first.added == first.logged == len(own.events().entries())
    assert (own.copy_acts().added, own.copy_acts().exit_code) == (0, 0)
    made.book.revoke("north", made.authority)
    own.tick()
    own.tick()
    told = {entry.kind: entry.data for entry in own.events().entries()}
    assert set(told) == {"act.site-enrolled", "act.kit-signed", "act.kit-revoked"}
    assert told["act.site-enrolled"]["digest"] == made.book.request("north").digest
    assert told["act.kit-signed"]["subject"].startswith("north/1 sha256:")
    assert own.verify().entries == 3


def test_an_act_taken_out_of_the_database_is_missed(made: Enrolment) -> None:
    made.party("north")
    own = CoordinatorLog(made.layout)
    own.copy_acts()
    registry = made.layout.registry()
    with registry.write() as connection:
        for rule in ("events_update_refused", "events_delete_refused"):
            connection.execute(text(f"DROP TRIGGER {rule}"))
        connection.execute(text("UPDATE events SET subject = 'elsewhere' WHERE kind = 'site-enrolled'"))
    told: list[str] = []
    hub = CoordinatorLog(made.layout)
    hub.tick(told.append)
    hub.tick(told.append)
    assert told == ["logged-acts-missing"], "the hub says it once and goes on"
    found = own.copy_acts()
    assert (found.exit_code, found.added) == (1, 0)
    assert [(lost["kind"], lost["subject"]) for lost in found.missing] == [("site-enrolled", "north")]


def test_a_broken_log_is_reported_once_and_stops_nothing(made: Enrolment) -> None:
    made.party("north")
    hub, told = CoordinatorLog(made.layout), list[str]()
    hub.tick(told.append)
    path = hub.folder / "log.jsonl"
    path.write_bytes(path.read_bytes().replace(b"north", b"south"))
    made.party("west")
    fresh = CoordinatorLog(made.layout)
    path.write_bytes(path.read_bytes() + b"{}\n")
    fresh.tick(told.append)
    fresh.tick(told.append)
    assert told == ["log-broken"]


def test_the_offer_holds_hashes_and_no_event(made: Enrolment) -> None:
    party = Party(made).write(123456789)
    envelope = party.offer()
    assert b"123456789" not in envelope.unsafe_unverified_payload()
    found = HeadOffer.model_validate_json(envelope.unsafe_unverified_payload())
    assert VerifyKey.from_pem(found.log_key.encode()) == party.log_key.verify_key
    assert found.head == head_at(party.log.folder, 1)
    assert isinstance(party.folder, SiteFolder) and issubclass(AnchorRefusedError, PixcellError)
