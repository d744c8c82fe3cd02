"""Proofs about logs: making them from a log's folder, and checking them offline against a key and heads known before.

A check trusts nothing in the proof but the hashes: every head must be signed by a key the caller names, and a head the
caller holds already must be the very one of the proof.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pixcell_core.contracts.canonical import canonical_bytes, parse_document, parse_json, read_bounded
from pixcell_core.contracts.log_heads import (
    ANCHORED,
    MAX_PROOF_BYTES,
    OFFER_PAYLOAD_TYPE,
    AnchorReceipt,
    ConsistencyProof,
    HeadOffer,
    InclusionProof,
)
from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.trust.dsse import Envelope, sign_envelope, verify_envelope
from pixcell_core.trust.keys import SigningKey, VerifyKey
from pixcell_core.trust.log import HEAD_PAYLOAD_TYPE, KEY_FILE, TreeHead, head_at, read_entries, verify_log
from pixcell_core.trust.merkle import (
    consistency_proof,
    inclusion_proof,
    verify_consistency,
    verify_inclusion,
)

LogProof = InclusionProof | ConsistencyProof | AnchorReceipt


class ProofRefusedError(RefusedError):
    """A proof about a log does not show what it claims. Rely on nothing it says."""

    default_code = "log-proof-refused"


def open_head(envelope: Envelope, keys: Sequence[VerifyKey]) -> TreeHead:
    """The head in an envelope that one of `keys` signed. Raises the errors of `verify_envelope`."""
    payload = verify_envelope(envelope, keys, payload_type=HEAD_PAYLOAD_TYPE)
    return parse_document(TreeHead, payload, name="the head")


def prove_inclusion(folder: Path, index: int) -> InclusionProof:
    """The proof that event `index` lies under the newest head of the log in `folder`, which is verified first."""
    report = verify_log(folder)
    if not 0 <= index < report.entries:
        raise BadInputError(
            f"The log has no event {index}; it has {report.entries}.",
            hint="`pixcell log show` numbers them from 0.",
            code="no-such-event",
        )
    entries = read_entries(folder)[: report.entries]
    path = inclusion_proof([entry.to_bytes() for entry in entries], index)
    return InclusionProof(entry=entries[index], path=_texts(path), head=head_at(folder, report.entries))


def prove_consistency(folder: Path, old_size: int) -> ConsistencyProof:
    """The proof that the newest head of the log in `folder` only appended to its first `old_size` events."""
    report = verify_log(folder)
    if not 0 < old_size <= report.entries:
        raise BadInputError(
            f"The log never had a head of {old_size} events; it has {report.entries} now.",
            hint="Give the size of an earlier head: a number from 1 on.",
            code="no-such-event",
        )
    leaves = [entry.to_bytes() for entry in read_entries(folder)[: report.entries]]
    return ConsistencyProof(
        older=head_at(folder, old_size),
        newer=head_at(folder, report.entries),
        path=_texts(consistency_proof(leaves, old_size)),
    )


def check_inclusion(
    proof: InclusionProof, keys: Sequence[VerifyKey], *, known: Envelope | None = None
) -> TreeHead:
    """The head under which the event lies. `known` is a head the caller holds: the proof must be about that one.

    Raises `ProofRefusedError`, or the errors of a head that none of `keys` signed.
    """
    head = open_head(proof.head, keys)
    if known is not None:
        _require_same(head, open_head(known, keys), "the head you hold")
    leaf, path = proof.entry.to_bytes(), _hashes(proof.path)
    if not verify_inclusion(leaf, proof.entry.index, head.tree_size, path, _hash(head.root)):
        raise ProofRefusedError(
            f"Event {proof.entry.index} of this proof does not lie in the log of {head.tree_size} events.",
            hint="The event, its number or the proof was changed. Ask the log's owner for a new proof.",
        )
    return head


def check_consistency(
    proof: ConsistencyProof,
    keys: Sequence[VerifyKey],
    *,
    older: Envelope | None = None,
    newer: Envelope | None = None,
) -> tuple[TreeHead, TreeHead]:
    """The two heads, the newer of which only appended. Heads the caller holds must be those of the proof.

    Raises `ProofRefusedError`, or the errors of a head that none of `keys` signed.
    """
    first, last = open_head(proof.older, keys), open_head(proof.newer, keys)
    for mine, claimed in ((older, first), (newer, last)):
        if mine is not None:
            _require_same(claimed, open_head(mine, keys), "a head you hold")
    require_growth(first, last, proof.path)
    return first, last


def require_growth(first: TreeHead, last: TreeHead, path: Sequence[str]) -> None:
    """Refuse where `path` does not show that the log of `last` begins with the log of `first`."""
    shown = verify_consistency(
        first.tree_size, last.tree_size, _hash(first.root), _hash(last.root), _hashes(path)
    )
    if not shown:
        raise ProofRefusedError(
            f"The log of {last.tree_size} events does not begin with the log of {first.tree_size} events.",
            hint="Its past was rewritten, or the proof was changed. Keep both heads: they are the evidence.",
        )


def make_offer(
    folder: Path, party: str, key: SigningKey, *, last: AnchorReceipt | None = None, since: int | None = None
) -> Envelope:
    """The newest head of a party's log, signed by the party's approval key, for the coordinator to anchor.

    `last` is the newest receipt the party holds. `since` overrides the size from which growth is proven: what the
    coordinator names where a receipt was lost.
    """
    report = verify_log(folder)
    if not report.entries:
        raise BadInputError(
            "The log is empty: it has no head yet.", hint="Give the folder of a log with events."
        )
    owner = VerifyKey.load(folder / KEY_FILE)
    if last is not None and since is None:
        since = open_head(last.head, [owner]).tree_size
    if since is not None and since > report.entries:
        # A log that is shorter than the anchored one is offered as it is: the coordinator says what that means.
        since = 0
    path = prove_consistency(folder, since).path if since else ()
    offer = HeadOffer(
        party=party,
        log_key=owner.to_pem().decode("ascii"),
        head=head_at(folder, report.entries),
        since=since or 0,
        path=path,
        seen=last.anchored.head if last is not None else None,
    )
    return sign_envelope(OFFER_PAYLOAD_TYPE, offer.to_bytes(), [key])


def check_receipt(
    receipt: AnchorReceipt,
    coordinator: Sequence[VerifyKey],
    *,
    before: AnchorReceipt | None = None,
) -> TreeHead:
    """The coordinator's head under which a party's head is anchored.

    With `before`, an earlier receipt of the same party, the coordinator's log must also have grown from the head of
    that one. Whether `receipt.head` is a head of the party's own log is `verify_log`'s question (`earlier_heads`).
    Raises `ProofRefusedError`, or the errors of a head that none of the coordinator's keys signed.
    """
    head = check_inclusion(receipt.anchored, coordinator)
    entry = receipt.anchored.entry
    told = (entry.kind, entry.data.get("party"), canonical_bytes(entry.data.get("head")))
    if told != (ANCHORED, receipt.party, receipt.head.to_bytes()):
        raise ProofRefusedError(
            "The event in the coordinator's log is not the anchor of this head.",
            hint="Ask the coordinator for the receipt again: pixcell log anchor OFFER --dir DIR",
        )
    if before is None:
        return head
    earlier = open_head(before.anchored.head, coordinator)
    if (earlier.tree_size, earlier.root) == (head.tree_size, head.root):
        return head
    if receipt.grown is None:
        raise ProofRefusedError(
            "The coordinator does not show that its log only grew since the last receipt.",
            hint="Offer the head again; the offer names the log's size that this party saw last.",
        )
    check_consistency(receipt.grown, coordinator, older=before.anchored.head, newer=receipt.anchored.head)
    return head


def load_proof(path: Path) -> LogProof:
    """Read a proof or a receipt from a file, strictly."""
    data = read_bounded(path, MAX_PROOF_BYTES)
    value = parse_json(data, name=path.name)
    version = value.get("schema_version") if isinstance(value, dict) else None
    kinds: tuple[type[LogProof], ...] = (InclusionProof, ConsistencyProof, AnchorReceipt)
    for kind in kinds:
        if version == kind.model_fields["schema_version"].default:
            return parse_document(kind, data, name=path.name)
    raise BadInputError(
        f"{path.name} is not a proof about a log.",
        hint="Give a file that `pixcell log prove` or `pixcell log anchor` wrote.",
        code="not-a-proof",
    )


def _require_same(found: TreeHead, known: TreeHead, whose: str) -> None:
    if (found.tree_size, found.root) != (known.tree_size, known.root):
        raise ProofRefusedError(
            f"The proof is about a log of {found.tree_size} events with another head than {whose}.",
            hint="Ask for a proof for the head you hold. Two heads of one size with two roots show a fork.",
        )


def _texts(path: Sequence[bytes]) -> tuple[str, ...]:
    return tuple(item.hex() for item in path)


def _hashes(path: Sequence[str]) -> list[bytes]:
    return [bytes.fromhex(item) for item in path]


def _hash(root: str) -> bytes:
    return bytes.fromhex(root.removeprefix("sha256:"))
