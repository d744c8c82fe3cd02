"""The signed revocation list on disk, as the running hub sees it: taken up when the file changes, never going back."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from cryptography import x509

from pixcell_core.contracts.enrolment import RevocationList
from pixcell_core.errors import PixcellError, RefusedError
from pixcell_core.trust.dsse import Envelope
from pixcell_core.trust.kits import open_revocations
from server.layout import ServerLayout


def revocations_file(layout: ServerLayout) -> Path:
    """Where the consortium's revocation list lies."""
    return layout.pki / "revoked.json"


def read_revocations(layout: ServerLayout, ca: x509.Certificate) -> RevocationList:
    """The verified list. A missing one is refused: without it, whom the hub must keep out is not known."""
    path = revocations_file(layout)
    if not path.is_file():
        raise RefusedError(
            f"The revocation list {path} is missing.",
            hint="Put it back from a backup; `pixcell init` made it and every `pixcell kit revoke` renewed it.",
            code="no-revocations",
        )
    return open_revocations(Envelope.load(path), ca)


class RevocationWatch:
    """Answers whether a certificate is revoked, from a list that it reads again whenever its file changes.

    A list that cannot be read, is not signed by the CA, or has a lower number than the last one is reported once
    and ignored: what was revoked stays revoked.
    """

    def __init__(
        self, layout: ServerLayout, ca: x509.Certificate, report: Callable[[str], None] = lambda _: None
    ) -> None:
        self._layout, self._ca, self._report = layout, ca, report
        self._mark = self._signature()
        self._list = read_revocations(layout, ca)
        self._serials = self._list.serials

    @property
    def number(self) -> int:
        """Number of the list in force."""
        return self._list.number

    def is_revoked(self, serial: str) -> bool:
        """Whether the certificate with this serial number (hexadecimal) was taken back."""
        mark = self._signature()
        if mark != self._mark:
            self._mark = mark
            self._take_up()
        return serial in self._serials

    def _take_up(self) -> None:
        try:
            fresh = read_revocations(self._layout, self._ca)
        except PixcellError as error:
            self._report(error.code)
            return
        if fresh.number < self._list.number:
            self._report("revocations-rolled-back")
            return
        # A union, so that no list, however it came about, lets somebody in again while this hub runs.
        self._list, self._serials = fresh, self._serials | fresh.serials

    def _signature(self) -> tuple[int, int, int] | None:
        try:
            found = os.stat(revocations_file(self._layout))
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size
