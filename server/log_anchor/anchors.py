"""Heads of the parties' logs in the coordinator's log: taken only where the party's log grew from the one before.

The coordinator's log is the only memory: the last `log.anchored` event of a party is its last head. A head that does
not follow it is refused, and kept as an event too: with the anchored one it is what proves the party's fork.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ValidationError

from pixcell_core.contracts.atomic import write_atomically
from pixcell_core.contracts.canonical import load_document, parse_document
from pixcell_core.contracts.log_heads import (
    ANCHORED,
    MAX_PROOF_BYTES,
    OFFER_PAYLOAD_TYPE,
    AnchorReceipt,
    HeadOffer,
)
from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.trust.dsse import Envelope, SignatureRefusedError, verify_envelope
from pixcell_core.trust.keys import VerifyKey
from pixcell_core.trust.log import LogBrokenError, LogEntry, TreeHead
from pixcell_core.trust.log_proof import (
    ProofRefusedError,
    open_head,
    prove_consistency,
    prove_inclusion,
    require_growth,
)
from server.enrolment.kits import KitBook
from server.layout import ServerLayout
from server.log_anchor.act_log import CoordinatorLog
from server.registry.events import ActLog

RESTARTED = "log.restarted"
"""Kind of the event after which a party begins anew, with the reason that a person gave."""
REFUSED = "log.head-refused"
"""Kind of the event that keeps a head which does not follow the anchored one."""


class AnchorRefusedError(RefusedError):
    """A party's head is not anchored: it does not follow the one before, or the party may not offer it."""

    default_code = "log-forked"


@dataclass(frozen=True)
class AnchoredHead:
    """A party's newest anchored head: what it says, who signed it, and which event of the coordinator's log holds it."""

    party: str
    head: TreeHead
    envelope: Envelope
    log_key: VerifyKey
    index: int
    time: str


class Anchored(BaseModel):
    """What `pixcell log anchor` did."""

    party: str
    tree_size: int
    root: str
    event: int
    receipt: Path
    again: bool

    def __str__(self) -> str:
        word = "was anchored before" if self.again else "is anchored"
        return (
            f"The head of {self.tree_size} events of {self.party} {word}, as event {self.event} of this log.\n"
            f"Send the receipt back: {self.receipt}\n"
            "There: pixcell log accept RECEIPT --log SITE/log --key LOG.pub"
        )


class AnchorBook:
    """The anchored heads of all parties of one consortium."""

    def __init__(self, layout: ServerLayout) -> None:
        self._layout = layout
        self._log = CoordinatorLog(layout)

    def last(self, party: str) -> AnchoredHead | None:
        """The newest anchored head of a party; None where it never offered one."""
        return self.all().get(party)

    def all(self) -> dict[str, AnchoredHead]:
        """The newest anchored head of every party that offered one."""
        found: dict[str, AnchoredHead] = {}
        for entry in self._log.events().entries():
            if entry.kind == ANCHORED:
                found[str(entry.data["party"])] = _read(entry)
            elif entry.kind == RESTARTED:
                found.pop(str(entry.data.get("party")), None)
        return found

    def restart(self, party: str, reason: str, *, now: datetime | None = None) -> AnchoredHead:
        """Let a party begin anew after it explained why its log cannot go on; returns the head that ends here.

        Nothing is forgotten: the old head, what was refused and the reason stay events of this log.
        """
        with self._log.alone():
            self._log.verify()
            last = self.last(party)
            if last is None:
                raise BadInputError(
                    f"No head of {party} is anchored.", hint="See `pixcell log anchors`.", code="not-anchored"
                )
            facts = {"party": party, "tree_size": last.head.tree_size, "root": last.head.root}
            self._log.events().append(RESTARTED, {**facts, "reason": reason[:500]}, now=now)
            self.receipt_file(party).unlink(missing_ok=True)
        ActLog(self._layout.registry()).note("log-restarted", party)
        return last

    def receipt_file(self, party: str) -> Path:
        """Where the newest receipt of a party lies."""
        return self._layout.root / "anchors" / f"{party}.json"

    def anchor(self, offer: Envelope, *, now: datetime | None = None) -> Anchored:
        """Anchor a party's head and write the receipt. The same head again gives a new receipt, no new event.

        Raises `AnchorRefusedError` with the codes `log-forked` (another head of the same size, or no growth from the
        anchored one), `log-rolled-back` (an older size), `log-key-changed`, `log-offer-gap` (growth is shown from
        another size than the anchored one), `kit-revoked`, `kit-expired`, `coordinator-log-rewritten` (this log lacks
        the head the party was shown), `log-head-signatures` (others signed the head too); the errors of a false
        envelope; `unknown-party`.
        """
        moment = now or datetime.now(UTC)
        found = self._opened(offer, moment)
        log_key = VerifyKey.from_pem(found.log_key.encode("ascii"), name="the log's key")
        head = open_head(found.head, [log_key])
        if len(found.head.signatures) != 1:
            raise AnchorRefusedError(
                f"The head of {found.party} carries {len(found.head.signatures)} signatures; a log's key signs alone.",
                hint="The party offers the head as its log holds it: pixcell log offer LOG …",
                code="log-head-signatures",
            )
        self._require_own_past(found)
        # Before the turn is taken: copying takes it as well, and the anchor then also covers every act so far.
        self._log.copy_acts(now=moment)
        with self._log.alone():
            self._log.verify()
            last = self.last(found.party)
            again = last is not None and self._follows(last, found, head, log_key, moment)
            index = last.index if again and last is not None else self._append(found, head, moment)
            receipt = self._receipt(found, index)
        path = self.receipt_file(found.party)
        write_atomically(path, receipt.to_bytes())
        if not again:
            ActLog(self._layout.registry()).note("log-anchored", f"{found.party}/{head.tree_size}")
        return Anchored(
            party=found.party,
            tree_size=head.tree_size,
            root=head.root,
            event=index,
            receipt=path,
            again=again,
        )

    def receipt(self, party: str) -> AnchorReceipt | None:
        """The newest receipt of a party as it was written; None where there is none."""
        path = self.receipt_file(party)
        return load_document(AnchorReceipt, path, MAX_PROOF_BYTES) if path.is_file() else None

    def _opened(self, offer: Envelope, now: datetime) -> HeadOffer:
        """The offer, if the party it names signed it and may still speak."""
        claimed = parse_document(HeadOffer, offer.unsafe_unverified_payload(), name="the offer").party
        book = KitBook(self._layout)
        kit = book.kits(claimed)[-1]
        key = VerifyKey.from_pem(kit.approval_key.encode("ascii"), name=f"the approval key of {claimed}")
        payload = verify_envelope(offer, [key], payload_type=OFFER_PAYLOAD_TYPE)
        if book.state(claimed, now).revoked or kit.expires_at <= now:
            code = "kit-expired" if kit.expires_at <= now else "kit-revoked"
            raise AnchorRefusedError(
                f"The kit of {claimed} is {'over' if code == 'kit-expired' else 'revoked'}: its heads are not taken.",
                hint=f"See `pixcell kit show {claimed}`; renew the kit, or enrol the party again.",
                code=code,
            )
        return parse_document(HeadOffer, payload, name="the offer")

    def _follows(
        self, last: AnchoredHead, found: HeadOffer, head: TreeHead, log_key: VerifyKey, now: datetime
    ) -> bool:
        """Refuse a head that does not follow the last one; True where it is the last one."""
        party, size, before = found.party, head.tree_size, last.head.tree_size
        if log_key != last.log_key:
            raise self._refused(
                found,
                now,
                f"{party} offers a log of another key than the one anchored before: a new log, without its past.",
                hint="Ask the party. A log goes on with its key; one that was lost is a reason to enrol it anew.",
                code="log-key-changed",
            )
        if size == before and head.root == last.head.root:
            return True
        if size == before:
            raise self._refused(
                found,
                now,
                f"{party} showed two different logs of {size} events: one of them was rewritten.",
                hint="Keep both heads: they are signed. The party explains, or is revoked (pixcell kit revoke).",
                code="log-forked",
            )
        if size < before:
            raise self._refused(
                found,
                now,
                f"{party} offers a log of {size} events; one of {before} is anchored: its end was cut off, "
                "or this is an older offer.",
                hint="Ask for an offer of the newest head. Where there is none, the log was put back.",
                code="log-rolled-back",
            )
        if found.since != before:
            raise AnchorRefusedError(
                f"The offer of {party} shows growth from {found.since} events; {before} are anchored.",
                hint=f"The party offers again: pixcell log offer LOG --since {before} …",
                code="log-offer-gap",
            )
        try:
            require_growth(last.head, head, found.path)
        except ProofRefusedError as error:
            raise self._refused(
                found,
                now,
                f"The log of {party} with {size} events does not begin with the {before} that are anchored.",
                hint="Keep both heads: they are signed. The party explains, or is revoked (pixcell kit revoke).",
                code="log-forked",
            ) from error
        return False

    def _require_own_past(self, found: HeadOffer) -> None:
        """The head of this log that the party was shown must lie in this log still: a backup put back is met here."""
        if found.seen is None:
            return
        try:
            self._log.verify(earlier_heads=[found.seen])
        except (LogBrokenError, SignatureRefusedError) as error:
            raise AnchorRefusedError(
                f"{found.party} was shown a head of this log that is not in it any more, or not its own: "
                f"{error.message}",
                hint="The coordinator's log was cut, put back or written anew. Restore DIR/log before going on.",
                code="coordinator-log-rewritten",
            ) from error

    def _append(self, found: HeadOffer, head: TreeHead, now: datetime) -> int:
        data = {
            "party": found.party,
            "tree_size": head.tree_size,
            "root": head.root,
            "log_key": found.log_key,
            "head": found.head.model_dump(mode="json"),
        }
        return self._log.events().append(ANCHORED, data, now=now).index

    def _refused(
        self, found: HeadOffer, now: datetime, message: str, *, hint: str, code: str
    ) -> AnchorRefusedError:
        """Keep the head that was refused, once by its size and root, and give back the error to raise."""
        log = self._log.events()
        head = found.head.model_dump(mode="json")
        data = {"party": found.party, "code": code, "log_key": found.log_key, "head": head}
        refused = (_identity(entry) for entry in log.entries() if entry.kind == REFUSED)
        if _identity_of(found.party, found.head) not in refused:
            log.append(REFUSED, data, now=now)
            ActLog(self._layout.registry()).note("log-head-refused", f"{found.party}/{code}")
        return AnchorRefusedError(message, hint=hint, code=code)

    def _receipt(self, found: HeadOffer, index: int) -> AnchorReceipt:
        folder = self._log.folder
        anchored = prove_inclusion(folder, index)
        seen = open_head(found.seen, [self._log.verify_key]).tree_size if found.seen else 0
        grown = prove_consistency(folder, seen) if seen else None
        held = anchored.entry.data["head"]
        return AnchorReceipt(
            party=found.party, head=Envelope.model_validate(held), anchored=anchored, grown=grown
        )


def _identity(entry: LogEntry) -> tuple[str, int, str]:
    return _identity_of(str(entry.data["party"]), Envelope.model_validate(entry.data["head"]))


def _identity_of(party: str, envelope: Envelope) -> tuple[str, int, str]:
    """What makes a refused head another one: not its time, its signatures, or the rule that it broke."""
    head = parse_document(TreeHead, envelope.unsafe_unverified_payload(), name="a refused head")
    return party, head.tree_size, head.root


def _read(entry: LogEntry) -> AnchoredHead:
    try:
        envelope = Envelope.model_validate(entry.data["head"])
        log_key = VerifyKey.from_pem(str(entry.data["log_key"]).encode("ascii"), name="an anchored log's key")
        party = str(entry.data["party"])
    except (KeyError, ValidationError) as error:
        raise LogBrokenError(
            f"Event {entry.index} of the coordinator's log is no anchored head.",
            hint="Restore DIR/log from a backup; run `pixcell log verify` on it.",
            code="anchor-unreadable",
        ) from error
    head = open_head(envelope, [log_key])
    return AnchoredHead(party, head, envelope, log_key, entry.index, entry.time)
