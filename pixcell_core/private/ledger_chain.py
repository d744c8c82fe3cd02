"""Verifying a chain of lines, wherever they come from: the ledger's own file, or an export in a stranger's hands.

Pure: bytes in, records out. Verification stops at the first line that is not what it should be.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pixcell_core.private.ledger_record import (
    AnyRecord,
    BrokenLineError,
    ChainedRecord,
    LedgerHead,
    OpenedRecord,
    decode_chained,
    public_key_of,
    time_of,
)
from pixcell_core.trust.keys import VerifyKey


@dataclass(frozen=True)
class Chain:
    """The verified beginning of a chain.

    Attributes:
        links: each verified record with the head it makes.
        key: the key they are signed with; the one asked for where no record verified.
        problem: sequence number and reason of the first line that is wrong; None when all are right.
    """

    links: tuple[ChainedRecord, ...]
    key: VerifyKey | None
    problem: tuple[int, str] | None

    @property
    def records(self) -> tuple[AnyRecord, ...]:
        """The verified records, oldest first."""
        return tuple(link.record for link in self.links)

    @property
    def head(self) -> LedgerHead | None:
        """The head of the verified part."""
        return self.links[-1].head if self.links else None


def verify_chain(
    lines: Iterable[bytes], key: VerifyKey | None = None, *, after: Chain | None = None
) -> Chain:
    """Verify `lines` (without newlines) in order.

    Args:
        lines: the lines; each is looked at once.
        key: the key they must be signed with. Without it, the key that the first record names.
        after: an earlier result that these lines go on from, so that nothing is verified twice.
    """
    links = list(after.links) if after else []
    known = after.key if after and after.links else key
    problem: tuple[int, str] | None = after.problem if after else None
    if problem is not None:
        return Chain(tuple(links), known, problem)
    for line in lines:
        try:
            link = decode_chained(line, links[-1].head if links else None, known)
            _check_neighbours(links[-1].record if links else None, link.record)
            if isinstance(link.record, OpenedRecord) and not links:
                known = public_key_of(link.record)
        except BrokenLineError as error:
            problem = (len(links), error.message)
            break
        links.append(link)
    return Chain(tuple(links), known, problem)


def _check_neighbours(before: AnyRecord | None, record: AnyRecord) -> None:
    """Refuse another site's record, and a time that runs backwards without its owner having said so."""
    if before is None:
        return
    if record.site != before.site:
        raise BrokenLineError("it names another site than the records before it", hint=_HINT)
    corrected = isinstance(record, OpenedRecord) and record.reason == "clock-corrected"
    if time_of(record) < time_of(before) and not corrected:
        raise BrokenLineError("it is dated before the record it follows", hint=_HINT)


_HINT = "Restore ledger.jsonl from a backup; deleting it would hide what was spent."
