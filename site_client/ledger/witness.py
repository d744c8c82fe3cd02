"""Heads of the ledger kept outside its folder, so that putting the whole folder back to an earlier day is seen.

A ledger restored together with its own `head.json` verifies by itself: it is a true past. What gives it away is a
head that somebody else remembers. This file is such a memory at the site; the coordinator's is another.

One line per head, ``<sequence> <hash>``, only ever appended. A last line without its newline was cut by a crash and
is not counted: the head it meant is known to the ledger itself.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from pixcell_core.contracts.canonical import read_bounded
from pixcell_core.errors import BadInputError, PixcellError, RefusedError
from pixcell_core.private.ledger_record import LedgerHead
from pixcell_core.trust.durable import sync_folder
from site_client.ledger.view import LedgerView

MAX_WITNESS_BYTES = 64 * 1024 * 1024
_LINE = re.compile(r"(\d{1,15}) (sha256:[0-9a-f]{64})")


class LedgerRewoundError(RefusedError):
    """A head that was seen before is not in the ledger any more: records were taken away or written anew."""

    default_code = "ledger-rewound"


class WitnessedHeads:
    """An append-only file of heads, in another folder than the ledger's."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def heads(self) -> tuple[LedgerHead, ...]:
        """Return every head that was noted, oldest first.

        Raises:
            BadInputError: the file was damaged or edited.
        """
        if not self._path.exists():
            return ()
        data = read_bounded(self._path, MAX_WITNESS_BYTES)
        *lines, _ = data.split(b"\n")
        found = [_LINE.fullmatch(line.decode("ascii", "replace")) for line in lines]
        heads = [LedgerHead(int(m[1]), m[2]) for m in found if m]
        if len(heads) < len(found) or [h.sequence for h in heads] != sorted(h.sequence for h in heads):
            raise BadInputError(
                f"{self._path.name}, which remembers the ledger's heads, was damaged or edited.",
                hint="Restore it from a backup. Compare the ledger's head with the coordinator's before going on.",
                code="witness-broken",
            )
        return tuple(heads)

    def note(self, head: LedgerHead) -> None:
        """Remember `head`; returns when it is on disk. A head that is remembered already is not written again.

        Raises:
            PixcellError: the disk refused; code `witness-unwritten`.
        """
        known = self.heads()
        if known and known[-1] == head:
            return
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            is_new = not self._path.exists()
            descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                self._drop_cut_line(descriptor)
                line = f"{head.sequence} {head.hash}\n".encode("ascii")
                if os.write(descriptor, line) != len(line):
                    raise OSError(28, "No space left on device")
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if is_new:
                sync_folder(self._path.parent)
        except OSError as error:
            raise PixcellError(
                f"The ledger's head could not be noted in {self._path}: {error.strerror or error}.",
                hint="Free some space or mend the folder's permissions, then run again.",
                code="witness-unwritten",
            ) from error

    def require_contains(self, view: LedgerView) -> None:
        """Raise `LedgerRewoundError` unless every head noted here stands in the chain of `view`."""
        for head in reversed(self.heads()):
            if not view.contains(head):
                raise LedgerRewoundError(
                    f"The privacy ledger once had a record {head.sequence} that it does not have any more: it was "
                    "put back to an earlier day, or begun anew. Nothing was drawn and nothing was charged.",
                    hint="Restore the newest copy of the ledger folder. What was spent in between stays spent; ask "
                    "the coordinator for the last head they know.",
                )

    def _drop_cut_line(self, descriptor: int) -> None:
        size = os.fstat(descriptor).st_size
        start = max(0, size - 256)
        end = os.pread(descriptor, 256, start)
        if end and not end.endswith(b"\n"):
            os.ftruncate(descriptor, start + end.rfind(b"\n") + 1)
