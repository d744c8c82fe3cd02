"""The site's own log, `SITE/log`: enrolment, kits, decisions, the heads of the privacy ledger, releases.

One log of one key for every room of the site, so that one head commits to all of it. Events hold names of studies,
digests and numbers of documents; nothing about patients.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from pixcell_core.contracts.round import KnownHead
from pixcell_core.trust.keys import SigningKey
from pixcell_core.trust.log import EventLog, LogEntry
from site_client.approvals.site_folder import SiteFolder

ENROLLED, KIT_INSTALLED = "site.enrolled", "site.kit-installed"
DECIDED = "approval.decided"
CHARGED = "budget.charged"


def log_folder(folder: SiteFolder) -> Path:
    """Where the log lies."""
    return folder.root / "log"


def site_log(folder: SiteFolder) -> EventLog:
    """The log, open for appending; its key is the site's release key, made on first use."""
    return EventLog(log_folder(folder), SigningKey.load_or_create(folder.keys / "release"))


def note_act(folder: SiteFolder, kind: str, data: dict[str, Any], *, now: datetime | None = None) -> LogEntry:
    """Add one act of this site; on the disk when this returns. Raises `LogBrokenError` for a log changed by hand."""
    return site_log(folder).append(kind, data, now=now)


def note_charge(
    folder: SiteFolder, study_digest: str, round_number: int, head: KnownHead, *, now: datetime | None = None
) -> LogEntry:
    """Add the ledger's head after a charge (round 0: private conditions): whoever holds the log's head holds it too."""
    facts = {
        "study": study_digest,
        "round": round_number,
        "sequence": head.sequence,
        "ledger_head": head.hash,
    }
    return note_act(folder, CHARGED, facts, now=now)
