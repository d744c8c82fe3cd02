"""Setting right what a crash may leave in a ledger's folder."""

from __future__ import annotations

from site_client.ledger.journal import LEDGER_FILE, Journal, read_lines
from site_client.ledger.view import LedgerView


def mend(journal: Journal, view: LedgerView) -> bool:
    """Complete or drop the last line and bring the head up to it; True when a torn line was dropped.

    The order matters: the file first, the head after it. A crash in between leaves a head that is one behind, which
    is what a crash of any append leaves.

    Args:
        journal: the folder, locked.
        view: what was read under that lock; it has to be whole.
    """
    lines, tail = read_lines(journal.folder)
    dropped = False
    if tail and len(view.records) > len(lines):
        journal.complete_tail()
    elif tail:
        journal.drop_torn_tail((journal.folder / LEDGER_FILE).stat().st_size - len(tail))
        dropped = bool(view.records)
    if view.head is not None and view.head != view.recorded_head:
        journal.restore_head(view.head)
    return dropped
