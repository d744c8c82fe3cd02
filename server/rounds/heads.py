"""What the coordinator remembers of every site's privacy ledger: the newest head it was shown.

A site that puts its ledger back to an earlier day, or begins it anew, cannot also change this book. One row per site,
on disk before the update that came with the head is counted.
"""

from __future__ import annotations

from typing import Literal

from sqlalchemy import Connection, insert, select, update
from sqlalchemy.exc import IntegrityError

from pixcell_core.contracts.canonical import Document
from pixcell_core.contracts.round import KnownHead
from pixcell_core.contracts.study import SiteName
from pixcell_core.errors import RefusedError
from server.registry.registry import Registry
from server.registry.sealed import altered, seal, unseal
from server.registry.tables import HeadRow

BROKEN = "heads-broken"


class SiteHead(Document):
    """The newest head of one site: the name stands in the document, so that two rows cannot change places."""

    schema_version: Literal["site-head/v1"] = "site-head/v1"
    site: SiteName
    head: KnownHead


class HeadBook:
    """The newest heads of all sites, over all studies."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def last(self, site: str) -> KnownHead | None:
        """The newest head of a site; None where it never sent one.

        Raises `BadInputError` where the row was altered: without it a rewound ledger would go unnoticed.
        """
        with self._registry.read() as connection:
            return _read(connection, site)

    def note(self, site: str, head: KnownHead | None) -> None:
        """Remember a head; returns when it is on disk. An older one, come late by way of another run, changes nothing.

        Raises `RefusedError` (`ledger-forked`) where another head at the same place is known.
        """
        if head is None:
            return
        try:
            kept = self._forward(site, head)
        except IntegrityError:
            # Another run's first head of this site came in between: now there is one to move on from.
            kept = self._forward(site, head)
        if kept is not None and kept.sequence == head.sequence and kept != head:
            raise RefusedError(
                f"{site} showed two different heads of its privacy ledger at the same place.",
                hint="Talk to the site: its ledger was written anew, or two of them run.",
                code="ledger-forked",
            )

    def _forward(self, site: str, head: KnownHead) -> KnownHead | None:
        """Write the head where it is the newest; returns the one that stands in its way, if any."""
        row = {"sequence": head.sequence, **seal(SiteHead(site=site, head=head))}
        older = update(HeadRow).where(HeadRow.site == site, HeadRow.sequence < head.sequence)
        with self._registry.write() as connection:
            if connection.execute(older.values(**row)).rowcount:
                return None
            kept = _read(connection, site)
            if kept is None:
                connection.execute(insert(HeadRow).values(site=site, **row))
            return kept


def _read(connection: Connection, site: str) -> KnownHead | None:
    row = connection.execute(select(HeadRow.__table__).where(HeadRow.site == site)).first()
    if row is None:
        return None
    what = f"the last head of {site}'s privacy ledger"
    kept = unseal(SiteHead, row.document, row.digest, what=what, code=BROKEN)
    if (kept.site, kept.head.sequence) != (site, row.sequence):
        raise altered(what, BROKEN)
    return kept.head
