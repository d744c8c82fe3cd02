"""The ledger in a form for others, and how a stranger checks it: offline, without the site's folder.

An export holds every signed line of the ledger and the statement that follows from them. It holds no patient, slide,
tile or path, and no count of patients: the ledger never did. Whoever has an export can verify its chain and its
signatures, add it up again, and hold a later export or the ledger itself against it: what was rewritten, cut or put
back in between shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pixcell_core.contracts.canonical import canonical_bytes, parse_document, read_bounded
from pixcell_core.errors import BadInputError
from pixcell_core.private.ledger_chain import verify_chain
from pixcell_core.private.ledger_record import LedgerHead, head_of
from pixcell_core.trust.dsse import Envelope
from pixcell_core.trust.keys import KeyFileError, VerifyKey
from site_client.ledger.journal import MAX_LEDGER_BYTES, read_lines
from site_client.ledger.statement import BudgetStatement, statement_of
from site_client.ledger.view import LedgerCheck, LedgerView

_CLOSE = 1e-6


class BudgetExport(BaseModel):
    """The ledger in a form for others: every signed line, and their sum. It never held a patient.

    Each of `lines` is ``{"hash", "key_id", "record", "signature"}``; its canonical JSON is the line of the ledger,
    so that anyone with the public key can verify the chain.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal["budget-export/v1"] = "budget-export/v1"
    statement: BudgetStatement
    public_key: str | None
    lines: list[dict[str, Any]]
    certificate: Annotated[Envelope | None, Field(exclude_if=lambda given: given is None)] = None
    """Where the site has a kit: that the consortium's authority stands behind the ledger's key."""

    @classmethod
    def load(cls, path: Path) -> BudgetExport:
        """Read an export, plain or in the envelope that ``--format json`` prints; a hostile file is bad input."""
        from pixcell_core.contracts.canonical import parse_json

        value = parse_json(read_bounded(path, MAX_LEDGER_BYTES), name=path.name, max_bytes=MAX_LEDGER_BYTES)
        if isinstance(value, dict) and value.get("status") == "ok" and "data" in value:
            value = value["data"]
        if not isinstance(value, dict):
            raise BadInputError(
                f"{path.name} is not an export of a privacy ledger.",
                hint="Give the file that `pixcell site budget export --out` wrote.",
                code="bad-document",
            )
        return parse_document(cls, canonical_bytes(value), name=path.name)


def export_of(folder: Path, view: LedgerView, certificate: Envelope | None = None) -> BudgetExport:
    """Return the export of a whole, verified ledger.

    Args:
        folder: the ledger's folder.
        view: what `read_ledger` found in it.
        certificate: what the site's kit says of the ledger's key, if it has one.
    """
    import json

    lines, tail = read_lines(folder)
    return BudgetExport(
        statement=statement_of(view),
        public_key=view.key.to_pem().decode("ascii") if view.key else None,
        lines=[json.loads(line) for line in [*lines, tail][: len(view.records)]],
        certificate=certificate,
    )


def verify_export(export: BudgetExport, key: VerifyKey | None = None) -> LedgerView:
    """Verify an export's chain and signatures, and that its statement follows from its records.

    Args:
        export: what somebody handed over.
        key: the site's public key, from elsewhere. Without it the export's own is used, which proves that nothing
            was changed in between, not whose it is.

    Returns:
        A view whose `check` says what was found.
    """
    problem: tuple[int, str] | None = None
    named: VerifyKey | None = None
    if export.public_key is not None:
        try:
            named = VerifyKey.from_pem(export.public_key.encode("utf-8", "replace"), name="the export's key")
        except KeyFileError:
            problem = (0, "the public key it names cannot be read")
    if problem is None and key is not None and named is not None and named != key:
        problem = (0, "it names another key than the one it should be signed with")
    lines = [canonical_bytes(line) for line in export.lines]
    chain = verify_chain(lines if problem is None else [], key or named)
    problem = problem or chain.problem
    if problem is None:
        check = LedgerCheck(True, len(chain.links), None, "", 0)
        whole = LedgerView(chain.records, check, chain.key, chain.head)
        stated = _difference(export.statement, statement_of(whole))
        if stated is None:
            return whole
        problem = (len(chain.links), f"its statement does not follow from its records: {stated}")
    broken = LedgerCheck(False, len(chain.links), problem[0], problem[1], 0)
    return LedgerView(chain.records, broken, chain.key, chain.head)


def first_rewritten(view: LedgerView, earlier: LedgerView) -> tuple[int, str] | None:
    """Return the first record of an `earlier` state that `view` does not hold as it was, with the reason.

    None where `view` is the earlier ledger or has grown from it. Both must be verified on their own.
    """
    for index, record in enumerate(earlier.records):
        if index >= len(view.records):
            return (
                index,
                f"it stood in the earlier export and is missing now ({len(earlier.records)} records then)",
            )
        if head_of(view.records[index]) != head_of(record):
            return index, "it is not the record that the earlier export has at its place"
    if earlier.records and view.key != earlier.key:
        return 0, "the earlier export is signed with another key"
    return None


def first_forgotten(view: LedgerView, heads: Sequence[LedgerHead]) -> tuple[int, str] | None:
    """Return the first head that was remembered elsewhere and does not stand in `view`, with the reason."""
    for head in sorted(heads, key=lambda head: head.sequence):
        if not view.contains(head):
            return head.sequence, "it is not the record that was remembered outside of the ledger"
    return None


def _difference(stated: BudgetStatement, found: BudgetStatement) -> str | None:
    """Name the first field in which a statement differs from what its records give; numbers within rounding."""
    theirs, ours = stated.model_dump(exclude={"forecast"}), found.model_dump(exclude={"forecast"})
    return next((name for name in ours if not _same(theirs[name], ours[name])), None)


def _same(left: object, right: object) -> bool:
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, int | float) and isinstance(right, int | float):
        return math.isclose(left, right, rel_tol=_CLOSE, abs_tol=_CLOSE)
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[k], right[k]) for k in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(_same(a, b) for a, b in zip(left, right, strict=True))
    return left == right
