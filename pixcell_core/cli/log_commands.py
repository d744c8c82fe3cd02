"""Commands of the logs, for whoever holds one or a proof about one: `pixcell log …`. All of them work offline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pixcell_core.cli.contract import FormatOption, OutputFormat, command
from pixcell_core.cli.main import group

if TYPE_CHECKING:
    from pixcell_core.contracts.log_heads import AnchorReceipt
    from pixcell_core.trust.dsse import Envelope
    from pixcell_core.trust.keys import VerifyKey

FolderArgument = Annotated[
    Path, typer.Argument(metavar="DIR", help="Folder of the log (log.jsonl, log.pub).")
]
OutOption = Annotated[Path, typer.Option("--out", help="The file to write.")]


def register(root: typer.Typer) -> None:
    """Add the `log` commands to the root command."""
    app = group(root, "log")
    app.command("verify")(verify)
    app.command("show")(show)
    app.command("head")(head)
    app.command("prove")(prove)
    app.command("verify-proof")(verify_proof)
    app.command("offer")(offer)
    app.command("accept")(accept)


@command
def verify(
    folder: FolderArgument,
    key: Annotated[
        list[Path] | None,
        typer.Option("--key", help="Public key file the log must be signed with (repeatable)."),
    ] = None,
    head: Annotated[
        list[Path] | None, typer.Option("--head", help="Head of this log seen earlier (repeatable).")
    ] = None,
    receipt: Annotated[
        list[Path] | None,
        typer.Option("--receipt", help="Receipt that names a head of this log, either party's (repeatable)."),
    ] = None,
    format: FormatOption = OutputFormat.TEXT,
) -> object:
    """Check every event, the Merkle tree and the signatures of a log; exit 1 names the first wrong line.

    A receipt accepted before, which lies in the log's own folder, is compared as well.
    """
    from pixcell_core.cli.trust_results import LogVerified
    from pixcell_core.contracts.log_heads import RECEIPT_FILE
    from pixcell_core.trust.dsse import Envelope
    from pixcell_core.trust.keys import VerifyKey
    from pixcell_core.trust.log import KEY_FILE, verify_log

    keys = [VerifyKey.load(path) for path in key] if key else None
    heads = [Envelope.load(path) for path in head or ()]
    receipts = [*(receipt or ()), *(p for p in (folder / RECEIPT_FILE,) if p.is_file())]
    if receipts and (folder / KEY_FILE).is_file():
        owner = VerifyKey.load(folder / KEY_FILE)
        heads += [_head_of(_receipt(path), owner) for path in receipts]
    report = verify_log(folder, trusted_keys=keys, earlier_heads=heads)
    return LogVerified(**report.model_dump())


@command
def show(
    folder: FolderArgument,
    last: Annotated[int, typer.Option("--last", min=1, help="How many of the newest events to show.")] = 20,
    format: FormatOption = OutputFormat.TEXT,
) -> object:
    """Show the newest events of a log, after checking all of it."""
    from pixcell_core.cli.trust_results import LogShown
    from pixcell_core.trust.log import read_entries, verify_log

    report = verify_log(folder)
    return LogShown(total=report.entries, events=read_entries(folder)[-last:])


@command
def head(
    folder: FolderArgument,
    out: Annotated[Path | None, typer.Option("--out", help="Write the signed head to this file.")] = None,
    format: FormatOption = OutputFormat.TEXT,
) -> object:
    """Give the newest signed head, which others keep so that this log's past cannot be rewritten."""
    from pixcell_core.cli.trust_results import LogHead
    from pixcell_core.errors import BadInputError
    from pixcell_core.trust.log import newest_head, verify_log

    report = verify_log(folder)
    envelope = newest_head(folder)
    if envelope is None or report.root is None:
        raise BadInputError(
            "The log is empty: it has no head yet.", hint="Give the folder of a log with events."
        )
    if out is not None:
        from pixcell_core.trust.durable import write_whole

        write_whole(out, envelope.to_bytes())
    return LogHead(tree_size=report.entries, root=report.root, key_id=report.key_id, head=envelope)


@command
def prove(
    folder: FolderArgument,
    out: OutOption,
    index: Annotated[
        int | None, typer.Argument(metavar="INDEX", min=0, help="Number of the event to prove.")
    ] = None,
    since: Annotated[
        int | None,
        typer.Option(
            "--since", min=1, help="Prove instead that the log only grew since it had so many events."
        ),
    ] = None,
    format: FormatOption = OutputFormat.TEXT,
) -> object:
    """Write a proof about this log that others check without it: of one event, or of its growth."""
    from pixcell_core.cli.trust_results import ProofWritten
    from pixcell_core.errors import BadInputError
    from pixcell_core.trust.durable import write_whole
    from pixcell_core.trust.log_proof import prove_consistency, prove_inclusion

    if index is not None and since is None:
        proof, what = prove_inclusion(folder, index), f"event {index}"
        size, hashes = _size(proof.head), len(proof.path)
        write_whole(out, proof.to_bytes())
    elif since is not None and index is None:
        grown, what = prove_consistency(folder, since), f"growth since {since} events"
        size, hashes = _size(grown.newer), len(grown.path)
        write_whole(out, grown.to_bytes())
    else:
        raise BadInputError(
            "A proof is about one event or about growth.",
            hint="Give INDEX, or --since SIZE.",
            code="no-question",
        )
    return ProofWritten(proof=out, about=what, tree_size=size, hashes=hashes)


@command
def verify_proof(
    proof: Annotated[Path, typer.Argument(metavar="PROOF", help="File of `log prove` or `log anchor`.")],
    key: Annotated[
        list[Path],
        typer.Option("--key", help="Public key file of the log that is proven (repeatable)."),
    ],
    head: Annotated[
        Path | None, typer.Option("--head", help="Head you hold: the proof must be about it.")
    ] = None,
    older: Annotated[
        Path | None, typer.Option("--older", help="For a proof of growth: the earlier head you hold.")
    ] = None,
    format: FormatOption = OutputFormat.TEXT,
) -> object:
    """Check a proof without the log; exit 1 where it does not show what it claims."""
    from pixcell_core.cli.trust_results import ProofVerified
    from pixcell_core.contracts.log_heads import AnchorReceipt, InclusionProof
    from pixcell_core.errors import BadInputError
    from pixcell_core.trust.dsse import Envelope
    from pixcell_core.trust.keys import VerifyKey
    from pixcell_core.trust.log_proof import check_consistency, check_inclusion, check_receipt, load_proof

    keys = [VerifyKey.load(path) for path in key]
    known = Envelope.load(head) if head else None
    earlier = Envelope.load(older) if older else None
    found = load_proof(proof)
    if isinstance(found, InclusionProof | AnchorReceipt) and earlier is not None:
        raise BadInputError(
            "This proof is not about growth.",
            hint="Leave --older out; a head goes with --head.",
            code="no-question",
        )
    if isinstance(found, AnchorReceipt):
        if known is not None:
            check_inclusion(found.anchored, keys, known=known)
        under = check_receipt(found, keys)
        about = (
            f"the head of {found.party}'s log with {_size(found.head)} events is anchored "
            f"as event {found.anchored.entry.index}"
        )
    elif isinstance(found, InclusionProof):
        under = check_inclusion(found, keys, known=known)
        about = f"event {found.entry.index}, {found.entry.kind} of {found.entry.time}, lies in the log"
    else:
        first, under = check_consistency(found, keys, older=earlier, newer=known)
        about = f"the log only grew since it had {first.tree_size} events"
    compared = known is not None or earlier is not None
    return ProofVerified(about=about, tree_size=under.tree_size, root=under.root, head_compared=compared)


@command
def offer(
    folder: FolderArgument,
    party: Annotated[str, typer.Option("--party", help="Your name in the consortium.")],
    sign_with: Annotated[Path, typer.Option("--sign-with", help="Your approval key (SITE/keys/approval).")],
    out: OutOption,
    since: Annotated[
        int | None,
        typer.Option("--since", min=0, help="Size the coordinator anchored last, where no receipt tells."),
    ] = None,
    format: FormatOption = OutputFormat.TEXT,
) -> object:
    """Offer the newest head of your log to the coordinator: a file for `pixcell log anchor`."""
    from pixcell_core.cli.trust_results import HeadOffered
    from pixcell_core.contracts.canonical import parse_document
    from pixcell_core.contracts.log_heads import RECEIPT_FILE, HeadOffer
    from pixcell_core.trust.durable import write_whole
    from pixcell_core.trust.keys import SigningKey
    from pixcell_core.trust.log_proof import make_offer

    last = _receipt(folder / RECEIPT_FILE) if (folder / RECEIPT_FILE).is_file() else None
    envelope = make_offer(folder, party, SigningKey.load(sign_with), last=last, since=since)
    made = parse_document(HeadOffer, envelope.unsafe_unverified_payload(), name="the offer")
    write_whole(out, envelope.to_bytes())
    return HeadOffered(offer=out, party=party, tree_size=_size(made.head), since=made.since)


@command
def accept(
    receipt: Annotated[Path, typer.Argument(metavar="RECEIPT", help="What the coordinator sent back.")],
    folder: Annotated[Path, typer.Option("--log", metavar="DIR", help="Folder of your own log.")],
    key: Annotated[
        Path | None,
        typer.Option("--key", help="Public key of the coordinator's log; kept at the first time."),
    ] = None,
    format: FormatOption = OutputFormat.TEXT,
) -> object:
    """Check the coordinator's receipt for your head, and that its log only grew since the last; then keep it."""
    from pixcell_core.cli.trust_results import ReceiptAccepted
    from pixcell_core.contracts.log_heads import COORDINATOR_KEY_FILE, RECEIPT_FILE
    from pixcell_core.trust.durable import write_whole
    from pixcell_core.trust.keys import VerifyKey
    from pixcell_core.trust.log import KEY_FILE, verify_log
    from pixcell_core.trust.log_proof import check_receipt

    fresh, coordinator = _receipt(receipt), _coordinator_key(folder, key)
    before = _receipt(folder / RECEIPT_FILE) if (folder / RECEIPT_FILE).is_file() else None
    under = check_receipt(fresh, [coordinator], before=before)
    verify_log(folder, earlier_heads=[_head_of(fresh, VerifyKey.load(folder / KEY_FILE))])
    coordinator.save(folder / COORDINATOR_KEY_FILE)
    write_whole(folder / RECEIPT_FILE, fresh.to_bytes())
    return ReceiptAccepted(
        party=fresh.party,
        anchored_size=_size(fresh.head),
        coordinator_size=under.tree_size,
        coordinator_key=coordinator.key_id,
        grown_since_last=before is not None,
    )


def _coordinator_key(folder: Path, given: Path | None) -> VerifyKey:
    """The key given, or the one kept; another key than the one kept is refused."""
    from pixcell_core.contracts.log_heads import COORDINATOR_KEY_FILE
    from pixcell_core.errors import BadInputError, RefusedError
    from pixcell_core.trust.keys import VerifyKey
    from pixcell_core.trust.log import KEY_FILE

    if not (folder / KEY_FILE).is_file():
        raise BadInputError(
            f"{folder} holds no log.", hint="Give the folder with log.jsonl and log.pub.", code="no-log"
        )
    kept = folder / COORDINATOR_KEY_FILE
    if given is None and not kept.is_file():
        raise BadInputError(
            "The key of the coordinator's log is not known here yet.",
            hint="Get DIR/log/log.pub from the coordinator, compare it aloud (pixcell key show), and add --key FILE.",
            code="no-coordinator-key",
        )
    key = VerifyKey.load(given or kept)
    if kept.is_file() and key != VerifyKey.load(kept):
        raise RefusedError(
            f"The coordinator's log was signed by another key before than {key.key_id}.",
            hint=f"Talk to the coordinator. A new log needs a reason; then remove {kept.name} and the receipt.",
            code="coordinator-key-changed",
        )
    return key


def _receipt(path: Path) -> AnchorReceipt:
    from pixcell_core.contracts.canonical import load_document
    from pixcell_core.contracts.log_heads import MAX_PROOF_BYTES, AnchorReceipt

    return load_document(AnchorReceipt, path, MAX_PROOF_BYTES)


def _head_of(receipt: AnchorReceipt, owner: VerifyKey) -> Envelope:
    """Of the two heads a receipt names, the one this log's owner signed."""
    return receipt.head if owner.key_id in receipt.head.key_ids else receipt.anchored.head


def _size(head: Envelope) -> int:
    """The size a head claims; for showing, after it was checked."""
    from pixcell_core.contracts.canonical import parse_document
    from pixcell_core.trust.log import TreeHead

    return parse_document(TreeHead, head.unsafe_unverified_payload(), name="the head").tree_size
