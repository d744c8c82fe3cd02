"""X25519 key pairs, and keys derived from what two parties share.

X25519: RFC 7748. HKDF with SHA-256: RFC 5869. Every derived key names its purpose and everything it is bound to, as
canonical JSON in HKDF's `info`: a key made for one purpose, attempt or pair of sites is never that of another.
"""

from __future__ import annotations

from collections.abc import Sequence

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from pixcell_core.contracts.canonical import canonical_bytes
from pixcell_core.errors import RefusedError

KEY_BYTES = 32
PROTOCOL = "pixcell-masking/v1"


class MaskingRefusedError(RefusedError):
    """A question of the hub, or an answer of a site, that the protocol does not allow."""

    default_code = "masking-refused"


def new_private_key() -> bytes:
    """A fresh X25519 private key, 32 raw bytes, from the operating system's generator."""
    return X25519PrivateKey.generate().private_bytes_raw()


def public_key(private: bytes) -> bytes:
    """The public key of a private one, both 32 raw bytes."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def load_private(private: bytes) -> X25519PrivateKey:
    """A private key ready for many exchanges: reading one costs as much as an exchange."""
    return X25519PrivateKey.from_private_bytes(private)


def shared_key(private: X25519PrivateKey, public: bytes, purpose: Sequence[str | int]) -> bytes:
    """32 bytes that only the holders of the two private keys know, for one `purpose`.

    Raises `MaskingRefusedError` for a public key of small order: with it the shared secret would be known to all.
    """
    try:
        secret = private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise MaskingRefusedError(
            "A public key of a peer is not usable: anybody could know what is shared under it.",
            hint="The peer's software is broken or hostile. Tell the coordinator which round this was.",
            code="weak-key",
        ) from error
    return derive(secret, purpose)


def derive(secret: bytes, purpose: Sequence[str | int]) -> bytes:
    """HKDF-SHA256 of a uniform secret, without salt; `info` is the canonical JSON of protocol and purpose."""
    info = canonical_bytes([PROTOCOL, *purpose])
    return HKDF(hashes.SHA256(), KEY_BYTES, salt=None, info=info).derive(secret)
