"""Where a site keeps its ledger and the key that signs it."""

from __future__ import annotations

from pathlib import Path

from pixcell_core.contracts.canonical import load_document
from pixcell_core.contracts.round import KnownHead
from pixcell_core.errors import BadInputError
from pixcell_core.private.ledger_record import LedgerHead
from pixcell_core.trust.keys import SigningKey, VerifyKey
from site_client.ledger.journal import LEDGER_FILE
from site_client.ledger.ledger import Ledger
from site_client.ledger.view import BudgetCap
from site_client.ledger.witness import WitnessedHeads


def ledger_folder(site_dir: Path) -> Path:
    """Return the ledger's folder within a site's folder."""
    return Path(site_dir) / "ledger"


def ledger_key_path(site_dir: Path) -> Path:
    """Return where the site's ledger key lies (mode 0600); its public half ends in ``.pub``."""
    return Path(site_dir) / "keys" / "ledger.key"


def ledger_public_key(site_dir: Path) -> VerifyKey | None:
    """Return a site's public ledger key, or None when it has none yet. Never reads the private key."""
    path = ledger_key_path(site_dir)
    public = path.with_name(path.name + ".pub")
    return VerifyKey.load(public) if public.exists() else None


def ledger_witness(site_dir: Path) -> WitnessedHeads:
    """Return the site's own memory of its ledger's heads, in another folder than the ledger."""
    return WitnessedHeads(Path(site_dir) / "private" / "ledger-heads.txt")


def remembered_heads(site_dir: Path) -> tuple[LedgerHead, ...]:
    """Return every head of the ledger that this site keeps outside the ledger's folder.

    Raises:
        BadInputError: one of the files that hold them was damaged or edited.
    """
    passed_on = Path(site_dir) / "agent" / "ledger-head.json"
    heads = ledger_witness(site_dir).heads()
    if not passed_on.is_file():
        return heads
    known = load_document(KnownHead, passed_on)
    return (*heads, LedgerHead(known.sequence, known.hash))


def open_site_ledger(
    site_dir: Path,
    *,
    site: str | None = None,
    cap: BudgetCap | None = None,
    patients: int | None = None,
    wait_seconds: float = 0.0,
    correct_clock: bool = False,
) -> Ledger:
    """Open a site's ledger for charging, making key and ledger on first use. The arguments are `Ledger.open`'s.

    Raises:
        BadInputError: there is a ledger but not the key that signs it; a new key would not be the ledger's.
        LedgerBusyError, LedgerBrokenError, LedgerRewoundError, ForeignLedgerError, ClockBackwardsError,
        LedgerWriteError: see `Ledger.open`.
    """
    folder, key_file = ledger_folder(site_dir), ledger_key_path(site_dir)
    if (folder / LEDGER_FILE).exists() and not key_file.exists():
        raise BadInputError(
            "This site has a privacy ledger, but the key that signs it is missing.",
            hint=f"Restore {key_file.parent.name}/{key_file.name} from a backup. A new key could not go on with it.",
            code="ledger-key-missing",
        )
    try:
        key = SigningKey.load_or_create(key_file)
    except OSError as error:
        raise BadInputError(
            f"Cannot make the ledger's key in {key_file.parent}: {error.strerror or error}.",
            hint="Check the folder, its owner, its permissions and the room on its disk.",
            code="ledger-unreadable",
        ) from error
    return Ledger.open(
        folder,
        key,
        cap,
        site=site,
        patients=patients,
        wait_seconds=wait_seconds,
        correct_clock=correct_clock,
        witness=ledger_witness(site_dir),
    )
