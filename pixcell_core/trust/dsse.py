"""DSSE envelopes with one or several Ed25519 signatures over one payload.

Format and pre-authentication encoding: Dead Simple Signing Envelope v1 (github.com/secure-systems-lab/dsse,
``protocol.md``). What is verified is what is parsed: :func:`verify_envelope` returns the very bytes that were
signed. Stricter than the protocol where it leaves room: sizes are bounded, base64 must be canonical, a key
may sign once, unknown fields are refused.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from pixcell_core.contracts.canonical import (
    Digest,
    DocumentError,
    canonical_bytes,
    parse_document,
    read_bounded,
)
from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.trust.keys import SIGNATURE_BYTES, SigningKey, VerifyKey

MAX_PAYLOAD_BYTES = 16 * 1024 * 1024
MAX_ENVELOPE_BYTES = 24 * 1024 * 1024
MAX_SIGNATURES = 32

IN_TOTO_PAYLOAD_TYPE = "application/vnd.in-toto+json"

PayloadType = Annotated[str, StringConstraints(min_length=1, max_length=255, pattern=r"^[\x21-\x7e]+$")]


class EnvelopeError(RefusedError):
    """An envelope is malformed, or not signed as required. Its payload must not be used."""

    default_code = "bad-envelope"


class SignatureRefusedError(EnvelopeError):
    """Too few of the keys trusted here signed this payload, or a signature is false."""

    default_code = "signature-refused"


class EnvelopeSignature(BaseModel):
    """One signature: the key's identity and the base64 of its 64 bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keyid: Digest
    sig: Annotated[str, StringConstraints(min_length=88, max_length=88)]


class Envelope(BaseModel):
    """A signed payload. ``payload`` is base64; the bytes come out of :func:`verify_envelope` alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    payload: Annotated[str, StringConstraints(max_length=MAX_ENVELOPE_BYTES)]
    payloadType: PayloadType  # the wire name of the DSSE protocol
    signatures: Annotated[tuple[EnvelopeSignature, ...], Field(min_length=1, max_length=MAX_SIGNATURES)]

    @property
    def key_ids(self) -> tuple[str, ...]:
        """Identities of the keys that claim to have signed, in the order of the envelope."""
        return tuple(signature.keyid for signature in self.signatures)

    def unsafe_unverified_payload(self) -> bytes:
        """The payload without any check of its signatures: to show what is claimed, never to act on it."""
        return _strict_base64(self.payload, "payload")

    def to_bytes(self) -> bytes:
        """The canonical JSON of the envelope, the only form :meth:`from_bytes` accepts."""
        return canonical_bytes(self)

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str = "envelope") -> Envelope:
        """Parse an envelope; any other bytes than the canonical form of what they say are refused."""
        if len(data) > MAX_ENVELOPE_BYTES:
            raise EnvelopeError(f"{name} is larger than {MAX_ENVELOPE_BYTES} bytes.", hint="Fetch it again.")
        try:
            envelope = parse_document(cls, data, name=name)
        except DocumentError as error:
            raise EnvelopeError(error.message, hint=error.hint) from error
        if envelope.to_bytes() != data:
            raise EnvelopeError(
                f"{name} is not in canonical form: its bytes were changed after signing.",
                hint="Fetch it again from its author; do not reformat it.",
            )
        return envelope

    @classmethod
    def load(cls, path: Path) -> Envelope:
        """Read an envelope file."""
        return cls.from_bytes(read_bounded(path, MAX_ENVELOPE_BYTES), name=path.name)


def pre_authentication_encoding(payload_type: str, payload: bytes) -> bytes:
    """``DSSEv1 SP LEN(type) SP type SP LEN(payload) SP payload`` (DSSE protocol v1, PAE): what keys sign."""
    kind = payload_type.encode("utf-8")
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def sign_envelope(payload_type: str, payload: bytes, keys: Sequence[SigningKey]) -> Envelope:
    """Sign ``payload`` with every key. Signatures stand in the order of their key ids."""
    if not keys:
        raise BadInputError("No key to sign with.", hint="Give a signing key.", code="no-signing-key")
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise EnvelopeError(
            f"The payload has {len(payload)} bytes; an envelope holds at most {MAX_PAYLOAD_BYTES}.",
            hint="Sign digests of large files instead of the files.",
        )
    message = pre_authentication_encoding(payload_type, payload)
    signatures = {key.key_id: _signature(key, message) for key in keys}
    return Envelope(
        payload=base64.b64encode(payload).decode("ascii"),
        payloadType=payload_type,
        signatures=tuple(signatures[key_id] for key_id in sorted(signatures)),
    )


def add_signature(envelope: Envelope, key: SigningKey) -> Envelope:
    """The same payload with one more signature (or the same one again, which changes nothing)."""
    payload = _strict_base64(envelope.payload, "payload")
    signatures = {signature.keyid: signature for signature in envelope.signatures}
    if key.key_id not in signatures and len(signatures) >= MAX_SIGNATURES:
        raise EnvelopeError(
            f"An envelope holds at most {MAX_SIGNATURES} signatures.", hint="Remove one first."
        )
    signatures[key.key_id] = _signature(key, pre_authentication_encoding(envelope.payloadType, payload))
    ordered = tuple(signatures[key_id] for key_id in sorted(signatures))
    return Envelope(payload=envelope.payload, payloadType=envelope.payloadType, signatures=ordered)


def valid_signers(envelope: Envelope, keys: Iterable[VerifyKey]) -> tuple[VerifyKey, ...]:
    """The distinct keys among ``keys`` whose signature in the envelope is true, ordered by key id."""
    payload = _strict_base64(envelope.payload, "payload")
    message = pre_authentication_encoding(envelope.payloadType, payload)
    known = {key.key_id: key for key in keys}
    signers: dict[str, VerifyKey] = {}
    for signature in envelope.signatures:
        key = known.get(signature.keyid)
        if key is not None and key.verify(_strict_base64(signature.sig, "signature"), message):
            signers[key.key_id] = key
    return tuple(signers[key_id] for key_id in sorted(signers))


def verify_envelope(
    envelope: Envelope, trusted_keys: Iterable[VerifyKey], threshold: int = 1, *, payload_type: str
) -> bytes:
    """The signed payload, if at least ``threshold`` distinct trusted keys signed it.

    ``payload_type`` is what the caller expects; an envelope of another type is refused, so that a
    signature given for one purpose is never taken for another. Raises :class:`EnvelopeError`,
    :class:`SignatureRefusedError`.
    """
    if threshold < 1:
        raise BadInputError("The threshold of signatures is at least 1.", hint="Give a positive number.")
    if envelope.payloadType != payload_type:
        raise EnvelopeError(
            f"This envelope holds {envelope.payloadType}, not {payload_type}.",
            hint="It was signed for another purpose. Give the right document.",
            code="wrong-payload-type",
        )
    if len(set(envelope.key_ids)) != len(envelope.key_ids):
        raise EnvelopeError("One key stands twice among the signatures.", hint="Fetch the envelope again.")
    signers = valid_signers(envelope, trusted_keys)
    if len(signers) < threshold:
        raise SignatureRefusedError(
            f"{len(signers)} of the keys trusted here signed this; {threshold} needed.",
            hint="The document was changed after signing, or its signers are not among the keys you trust.",
        )
    return _strict_base64(envelope.payload, "payload")


def _signature(key: SigningKey, message: bytes) -> EnvelopeSignature:
    return EnvelopeSignature(keyid=key.key_id, sig=base64.b64encode(key.sign(message)).decode("ascii"))


def _strict_base64(text: str, what: str) -> bytes:
    """Standard alphabet, padded, and equal to its own re-encoding: one text for one byte string."""
    try:
        data = base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, ValueError) as error:
        raise EnvelopeError(f"The {what} is not base64.", hint="Fetch the envelope again.") from error
    if base64.b64encode(data).decode("ascii") != text:
        raise EnvelopeError(f"The {what} is not canonical base64.", hint="Fetch the envelope again.")
    if what == "payload" and len(data) > MAX_PAYLOAD_BYTES:
        raise EnvelopeError("The payload is too large.", hint="Fetch the envelope again.")
    if what == "signature" and len(data) != SIGNATURE_BYTES:
        raise EnvelopeError("A signature has 64 bytes.", hint="Fetch the envelope again.")
    return data
