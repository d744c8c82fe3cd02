"""What the coordinator remembers of every site's privacy ledger: the last head it was shown.

A site that puts its ledger back to an earlier day, or begins it anew, cannot also change this book. One file per site,
replaced as a whole, on disk before the update that came with the head is counted.
"""

from __future__ import annotations

from pathlib import Path

from pixcell_core.contracts.atomic import write_atomically
from pixcell_core.contracts.canonical import load_document
from pixcell_core.contracts.round import KnownHead
from pixcell_core.errors import BadInputError


class HeadBook:
    """The last heads of all sites, in one folder, over all studies."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def last(self, site: str) -> KnownHead | None:
        """The newest head of a site; None where it never sent one.

        Raises `BadInputError` where the file was damaged: without it a rewound ledger would go unnoticed.
        """
        path = self._file(site)
        if not path.exists():
            return None
        try:
            return load_document(KnownHead, path)
        except BadInputError as error:
            raise BadInputError(
                f"The last head of {site}'s privacy ledger cannot be read.",
                hint=f"Restore heads/{path.name} from a copy; without it a ledger that was put back goes unnoticed.",
                code="heads-broken",
            ) from error

    def note(self, site: str, head: KnownHead | None) -> None:
        """Remember a head; returns when it is on disk."""
        if head is not None:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomically(self._file(site), head.to_bytes())

    def _file(self, site: str) -> Path:
        return self._folder / f"{site}.json"
