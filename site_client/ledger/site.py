"""Where a site keeps its ledger and the key that signs it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pixcell_core.trust.keys import SigningKey, VerifyKey
from site_client.ledger.journal import no_observer
from site_client.ledger.ledger import Ledger
from site_client.ledger.view import BudgetCap


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


def open_site_ledger(
    site_dir: Path,
    *,
    site: str = "site",
    cap: BudgetCap | None = None,
    wait_seconds: float = 0.0,
    on_point: Callable[[str], None] = no_observer,
) -> Ledger:
    """Open a site's ledger for charging, making key and ledger on first use.

    Raises:
        LedgerBusyError, LedgerBrokenError, BadInputError: see `Ledger.open`.
    """
    key = SigningKey.load_or_create(ledger_key_path(site_dir))
    return Ledger.open(
        ledger_folder(site_dir), key, cap, site=site, wait_seconds=wait_seconds, on_point=on_point
    )
