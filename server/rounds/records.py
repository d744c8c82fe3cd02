"""Rows of committed rounds, read back as the records they are."""

from __future__ import annotations

from sqlalchemy import Connection, select

from pixcell_core.contracts.round import RoundRecord
from server.registry.sealed import altered, unseal
from server.registry.tables import RoundRow

BROKEN = "rounds-broken"


def read_records(connection: Connection, study_id: str) -> list[RoundRecord]:
    """Records of a study in the order of their rounds; each row checked by itself, not yet as a chain.

    Raises `BadInputError` (`rounds-broken`) where a row is not what was written.
    """
    wanted = select(RoundRow.__table__).where(RoundRow.study_id == study_id).order_by(RoundRow.round)
    records = []
    for row in connection.execute(wanted):
        what = f"round {row.round} of {study_id}"
        record = unseal(RoundRecord, row.document, row.digest, what=what, code=BROKEN)
        if (record.study_id, record.round, record.previous) != (study_id, row.round, row.previous):
            raise altered(what, BROKEN)
        records.append(record)
    return records
