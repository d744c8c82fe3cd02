"""Canonical JSON, digests, and the base class of every document that parties exchange.

The byte form is RFC 8785 (JSON Canonicalization Scheme). Reading is strict: bounded size, UTF-8, no
duplicate keys, no NaN or infinity, no unknown fields. A document that came off a disk or a wire is
hostile until parsed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeVar

import rfc8785
from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, StringConstraints, ValidationError

from pixcell_core.errors import BadInputError

MAX_DOCUMENT_BYTES = 16 * 1024 * 1024
"""Default upper bound for a document read from a file."""

_READ_BLOCK = 1 << 20

Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
"""``sha256:`` followed by 64 lower-case hexadecimal digits."""


class DocumentError(BadInputError):
    """A document is too large, malformed, or does not have the form it claims."""

    default_code = "bad-document"


class Document(BaseModel):
    """Base of every exchanged document: frozen, unknown fields forbidden, identified by its digest.

    Subclasses declare ``schema_version: Literal["<name>/v<n>"]``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)

    @property
    def digest(self) -> str:
        """``sha256:<hex>`` of the canonical bytes."""
        return digest(self)

    def to_bytes(self) -> bytes:
        """The canonical bytes (RFC 8785)."""
        return canonical_bytes(self)


def _within_reach(moment: datetime) -> datetime:
    # Not at the ends of the calendar: a day or an hour more or less must still be a date.
    if not FIRST_YEAR <= moment.year <= LAST_YEAR:
        raise ValueError(f"the year is not between {FIRST_YEAR} and {LAST_YEAR}")
    return moment


FIRST_YEAR, LAST_YEAR = 1970, 9000

Moment = Annotated[AwareDatetime, AfterValidator(_within_reach)]
"""A date and time with its offset from UTC, of a year with which one can reckon."""

DocumentT = TypeVar("DocumentT", bound=BaseModel)


def canonical_bytes(
    value: BaseModel | Mapping[str, Any] | list[Any] | str | int | float | bool | None,
) -> bytes:
    """The RFC 8785 form of a model or of a JSON value.

    Raises :class:`DocumentError` for what JSON cannot hold exactly: NaN, infinity, integers beyond
    ±(2^53 - 1), lone surrogates, keys that are not text.
    """
    plain = value.model_dump(mode="json", by_alias=True) if isinstance(value, BaseModel) else value
    try:
        return rfc8785.dumps(plain)  # type: ignore[arg-type]
    except (rfc8785.CanonicalizationError, UnicodeEncodeError, RecursionError) as error:
        raise DocumentError(
            f"This value has no canonical JSON form: {error}.",
            hint="Use finite numbers, integers within 2^53, and valid Unicode text.",
        ) from error


def digest(value: BaseModel | Mapping[str, Any] | list[Any] | str | bytes) -> str:
    """``sha256:<hex>`` of bytes as they are, or of the canonical bytes of a model or JSON value."""
    data = value if isinstance(value, bytes) else canonical_bytes(value)
    return "sha256:" + hashlib.sha256(data).hexdigest()


def file_digest(path: Path) -> str:
    """``sha256:<hex>`` of a file's bytes, read in blocks."""
    sha = hashlib.sha256()
    with open_for_reading(path) as stream:
        while block := stream.read(_READ_BLOCK):
            sha.update(block)
    return "sha256:" + sha.hexdigest()


def read_bounded(path: Path, max_bytes: int = MAX_DOCUMENT_BYTES) -> bytes:
    """The bytes of a regular file of at most ``max_bytes``; never reads more than that into memory."""
    with open_for_reading(path) as stream:
        data = stream.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise DocumentError(
            f"{path.name} is larger than {max_bytes} bytes.",
            hint="This is not a document of this project, or it was damaged. Fetch it again from its author.",
            code="document-too-large",
        )
    return data


def open_for_reading(path: Path) -> BinaryIO:
    """Open a regular file for binary reading; a missing, unreadable or special file is an input error."""
    try:
        if not path.is_file():
            reason = "it does not exist" if not path.exists() else "it is not a regular file"
            raise DocumentError(
                f"Cannot read {path}: {reason}.", hint="Check the path.", code="document-unreadable"
            )
        return path.open("rb")
    except OSError as error:
        raise DocumentError(
            f"Cannot read {path}: {error.strerror or error}.",
            hint="Check the path and its permissions.",
            code="document-unreadable",
        ) from error


def parse_json(data: bytes, *, name: str = "document", max_bytes: int = MAX_DOCUMENT_BYTES) -> Any:
    """Strict JSON: bounded, UTF-8 without a mark, no duplicate keys, no NaN or infinity."""
    if len(data) > max_bytes:
        raise DocumentError(
            f"{name} is larger than {max_bytes} bytes.",
            hint="This is not a document of this project, or it was damaged.",
            code="document-too-large",
        )
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_no_constant,
            parse_int=_integer,
            parse_float=_float,
        )
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise DocumentError(
            f"{name} is not valid JSON: {error}.",
            hint="The file was damaged or edited. Fetch it again from its author.",
        ) from error


def first_complaint(error: ValidationError, whole: str) -> tuple[str, str]:
    """Where a document fails first, as a dotted path or `whole`, and why; without what was given."""
    first = error.errors(include_url=False, include_input=False)[0]
    return ".".join(str(part) for part in first["loc"]) or whole, str(first["msg"])


def parse_document(cls: type[DocumentT], data: bytes, *, name: str = "document") -> DocumentT:
    """Strictly parse and validate a document from bytes."""
    value = parse_json(data, name=name)
    try:
        return cls.model_validate(value)
    except ValidationError as error:
        where, why = first_complaint(error, "")
        raise DocumentError(
            f"{name} is not a valid {cls.__name__}: {ascii(where)[1:-1][:120] or 'the document'}: {why}.",
            hint="It may come from another version, or it was edited. Ask its author for it again.",
        ) from error


def load_document(cls: type[DocumentT], path: Path, max_bytes: int = MAX_DOCUMENT_BYTES) -> DocumentT:
    """Read, bound, strictly parse and validate a document file."""
    return parse_document(cls, read_bounded(path, max_bytes), name=path.name)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} stands twice in one object")
        result[key] = value
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value


def _integer(text: str) -> int | float:
    """RFC 8785 writes large floats without a point: beyond 2^53 such text is a float again, never an integer."""
    return _float(text) if len(text.lstrip("-")) > 16 or abs(int(text)) >= 2**53 else int(text)
