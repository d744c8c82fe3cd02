"""One line of the ledger: a record, chained by hash to the one before it and signed by the site's ledger key.

A line is the canonical JSON (RFC 8785) of ``{"hash", "key_id", "record", "signature"}``. The hash is the
digest of the canonical record, the record holds the hash of its predecessor, and the signature covers the
canonical record under a prefix of its own, so that it can stand for nothing else. A line that is not byte
for byte its own canonical form is broken. Records hold settings and counts of steps: no patient, slide or
tile is ever named.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field, StringConstraints, TypeAdapter, ValidationError

from pixcell_core.contracts.canonical import (
    Digest,
    Document,
    DocumentError,
    digest,
    first_complaint,
    parse_json,
)
from pixcell_core.private.accounting import ADJACENCY, UNIT
from pixcell_core.trust.keys import VerifyKey

SIGNATURE_PREFIX = b"pixcell site ledger record v1\n"
FIRST_HASH = "sha256:" + "0" * 64
"""What the first record names as its predecessor."""

MAX_LINE_BYTES = 16 * 1024

EVERY_PATIENT = "all"
"""The cohort of a charge that used every patient of the site; it counts for each of the other cohorts too."""

PURPOSES = ("training", "conditions")
"""What a charge is for: the weights released by training, or the private conditions drawn by votes."""

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$")]
Time = Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|\+00:00)$")]
Positive = Annotated[float, Field(gt=0.0)]
Steps = Annotated[int, Field(ge=1, le=10_000_000)]


class Signer(Protocol):
    """Signs records: an Ed25519 key, wherever it is kept."""

    @property
    def key_id(self) -> str:
        """``sha256:<hex>`` of the public key."""
        ...

    @property
    def verify_key(self) -> VerifyKey:
        """The public key."""
        ...

    def sign(self, message: bytes) -> bytes:
        """The 64-byte signature of `message`."""
        ...


class BaseRecord(Document):
    """What every record says."""

    schema_version: Literal["ledger-record/v1"] = "ledger-record/v1"
    sequence: Annotated[int, Field(ge=0)]
    previous_hash: Digest
    site: Name
    time: Time


class OpenedRecord(BaseRecord):
    """The ledger was made, its owner changed the cap or set the clock back, or a torn last line was set aside."""

    kind: Literal["opened"] = "opened"
    reason: Literal["created", "cap-changed", "recovered", "clock-corrected"]
    unit: Literal["patient"] = UNIT
    adjacency: Literal["add-or-remove-one"] = ADJACENCY
    cap_epsilon: Positive
    cap_delta: Annotated[float, Field(gt=0.0, le=1e-5)]
    public_key: str


class ReserveRecord(BaseRecord):
    """Steps that were charged before their noise was drawn. This alone counts; it is never taken back."""

    kind: Literal["reserve"] = "reserve"
    study: Name
    round: Annotated[int, Field(ge=0)]
    purpose: Name
    unit: Literal["patient"] = UNIT
    adjacency: Literal["add-or-remove-one"] = ADJACENCY
    sample_rate: Annotated[float, Field(gt=0.0, le=1.0)]
    noise_multiplier: Positive
    steps: Steps
    max_grad_norm: Positive
    code_digest: Digest
    # Written only where it is not every patient, so that records made before there were cohorts keep their hash.
    cohort: Annotated[Name, Field(exclude_if=lambda name: name == EVERY_PATIENT)] = EVERY_PATIENT


class SpentRecord(BaseRecord):
    """How many reserved steps of a round were taken, for the reader; what was reserved stays charged."""

    kind: Literal["spent"] = "spent"
    study: Name
    round: Annotated[int, Field(ge=0)]
    purpose: Name
    first_reserve: Annotated[int, Field(ge=0)]
    steps_reserved: Steps
    steps_taken: Annotated[int, Field(ge=0)]


AnyRecord = OpenedRecord | ReserveRecord | SpentRecord
LedgerRecord = Annotated[AnyRecord, Field(discriminator="kind")]
_RECORD: TypeAdapter[AnyRecord] = TypeAdapter(LedgerRecord)
_PLAIN = re.compile(r"[A-Za-z0-9:+/=_-]{0,200}")


class BrokenLineError(DocumentError):
    """A line is not a record that the site's key signed at this place of the chain."""

    default_code = "ledger-broken"


@dataclass(frozen=True)
class LedgerHead:
    """The last record: sequence number, from 0, and hash. Exchanged, so that no past is rewritten alone."""

    sequence: int
    hash: str


@dataclass(frozen=True)
class ChainedRecord:
    """A record whose form, chain and signature hold, and the head of the chain that ends with it."""

    record: AnyRecord
    head: LedgerHead


def head_of(record: BaseRecord) -> LedgerHead:
    """Return the head of a chain that ends with `record`."""
    return LedgerHead(record.sequence, digest(record))


def time_of(record: BaseRecord) -> datetime:
    """Return when a record was written, as its site's clock said."""
    return datetime.fromisoformat(record.time)


def encode_line(record: BaseRecord, signer: Signer) -> bytes:
    """Return the signed line of a record, with its newline."""
    body = record.to_bytes()
    signature = base64.b64encode(signer.sign(SIGNATURE_PREFIX + body)).decode("ascii")
    return _assemble(digest(body), signer.key_id, body, signature) + b"\n"


def decode_chained(line: bytes, expected: LedgerHead | None, key: VerifyKey | None) -> ChainedRecord:
    """Parse one line (without newline), check it, and return it with the head it makes.

    Args:
        line: the bytes of the line.
        expected: head of the chain before it; None for the first line.
        key: the ledger's public key; None for the first line of a ledger whose key is not known yet, which
            then has to be an `OpenedRecord` that names its own key.

    Raises:
        BrokenLineError: with the first thing that is wrong.
    """
    if len(line) > MAX_LINE_BYTES:
        raise _broken("it is longer than any record can be")
    try:
        outer = parse_json(line, name="line")
        if not isinstance(outer, dict) or set(outer) != {"hash", "key_id", "record", "signature"}:
            raise _broken("it does not have the four parts of a ledger line")
        record = _RECORD.validate_python(outer["record"])
    except BrokenLineError:
        raise
    except DocumentError as error:
        raise _broken("it is not valid JSON") from error
    except ValidationError as error:
        raise _broken(f"its record is malformed at {first_complaint(error, 'the top')[0]}") from error
    body = record.to_bytes()
    if _assemble(outer["hash"], outer["key_id"], body, outer["signature"]) != line:
        raise _broken("it is not in canonical form, so it was edited")
    if digest(body) != outer["hash"]:
        raise _broken("its content does not have the hash it states")
    if record.sequence != (0 if expected is None else expected.sequence + 1):
        raise _broken(
            f"it has sequence number {record.sequence}: a record is missing, repeated or out of order"
        )
    if record.previous_hash != (FIRST_HASH if expected is None else expected.hash):
        raise _broken("it does not follow from the record before it")
    if expected is None and not isinstance(record, OpenedRecord):
        raise _broken("a ledger begins with the record that opened it")
    _check_signature(outer, record, body, key if key is not None else _own_key(record))
    return ChainedRecord(record, LedgerHead(record.sequence, outer["hash"]))


def public_key_of(record: OpenedRecord) -> VerifyKey:
    """Return the public key that an opening record names."""
    try:
        return VerifyKey(base64.b64decode(record.public_key, validate=True))
    except (binascii.Error, ValueError, DocumentError) as error:
        raise _broken("the public key it names cannot be read") from error


def encode_public_key(key: VerifyKey) -> str:
    """Return the text form of a public key in an opening record."""
    return base64.b64encode(key.raw).decode("ascii")


def _assemble(hash: object, key_id: object, body: bytes, signature: object) -> bytes:
    """The canonical line around a canonical record: one pass over the record, for writing and for checking."""
    texts = (hash, key_id, signature)
    if not all(isinstance(text, str) and _PLAIN.fullmatch(text) for text in texts):
        raise _broken("its hash, key or signature is not plain text")
    head = f'{{"hash":"{hash}","key_id":"{key_id}","record":'.encode("ascii")
    return head + body + f',"signature":"{signature}"}}'.encode("ascii")


def _own_key(record: BaseRecord) -> VerifyKey:
    if not isinstance(record, OpenedRecord):
        raise _broken("no key is known to check it with")
    return public_key_of(record)


def _check_signature(outer: dict[str, Any], record: BaseRecord, body: bytes, key: VerifyKey) -> None:
    if outer["key_id"] != key.key_id:
        raise _broken("it is signed with another key than this ledger's")
    if isinstance(record, OpenedRecord) and record.public_key != encode_public_key(key):
        raise _broken("it names another key than this ledger's")
    try:
        signature = base64.b64decode(outer["signature"], validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise _broken("its signature is not base64") from error
    if base64.b64encode(signature).decode("ascii") != outer["signature"]:
        raise _broken("its signature is not in canonical base64")
    if not key.verify(signature, SIGNATURE_PREFIX + body):
        raise _broken("its signature does not verify")


def _broken(reason: str) -> BrokenLineError:
    return BrokenLineError(
        reason,
        hint="Restore ledger.jsonl from a backup; deleting it would hide what was spent.",
    )
