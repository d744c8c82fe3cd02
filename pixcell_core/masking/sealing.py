"""Sealing of shares from one site to another, past the hub, by AES-256-GCM (NIST SP 800-38D)."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from pixcell_core.contracts.canonical import canonical_bytes
from pixcell_core.masking.keys import PROTOCOL

NONCE_BYTES = 12


def seal(key: bytes, text: bytes, bound_to: Sequence[str | int], nonce: bytes | None = None) -> str:
    """Base64 of nonce, ciphertext and tag. `bound_to` is authenticated and not sent; a key seals once.

    A fixed `nonce` is for known-answer tests alone.
    """
    used = os.urandom(NONCE_BYTES) if nonce is None else nonce
    return base64.b64encode(used + AESGCM(key).encrypt(used, text, _header(bound_to))).decode("ascii")


def unseal(key: bytes, box: str, bound_to: Sequence[str | int]) -> bytes | None:
    """What was sealed, or None where key, box or header is another than the sealer's."""
    data = base64.b64decode(box)
    try:
        return AESGCM(key).decrypt(data[:NONCE_BYTES], data[NONCE_BYTES:], _header(bound_to))
    except InvalidTag:
        return None


def _header(bound_to: Sequence[str | int]) -> bytes:
    return canonical_bytes([PROTOCOL, *bound_to])
