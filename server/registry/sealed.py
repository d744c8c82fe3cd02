"""A document in a row: its canonical bytes and their digest. What was edited in the database is met when it is read."""

from __future__ import annotations

from typing import TypeVar

from pixcell_core.contracts.canonical import Document, digest, parse_document
from pixcell_core.errors import BadInputError, PixcellError

DocumentT = TypeVar("DocumentT", bound=Document)


def seal(document: Document) -> dict[str, bytes | str]:
    """The columns `document` and `digest` of a row."""
    data = document.to_bytes()
    return {"document": data, "digest": digest(data)}


def unseal(
    cls: type[DocumentT], document: bytes, named: str, *, what: str, code: str = "registry-altered"
) -> DocumentT:
    """The document of a row, parsed strictly. `what` names it for people.

    Raises `BadInputError` where the bytes are not those the digest names, not canonical, or not such a document.
    """
    data = bytes(document)
    if digest(data) != named:
        raise altered(what, code)
    try:
        value = parse_document(cls, data, name=what)
    except PixcellError as error:
        raise altered(what, code) from error
    return value


def altered(what: str, code: str = "registry-altered") -> BadInputError:
    """The error of a row that is not what was written."""
    return BadInputError(
        f"The registry's entry of {what} was altered outside of this program.",
        hint="Restore the registry from a copy, and find out who can write to it. `pixcell registry check` lists all.",
        code=code,
    )
