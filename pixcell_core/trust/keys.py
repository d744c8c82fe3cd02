"""Ed25519 keys: a signing key that stays in one private file, and the public key others verify with.

A key's identity is ``sha256:<hex>`` of its 32 raw public bytes, so that two parties can compare it aloud
and no name has to be trusted. Signatures are RFC 8032 Ed25519.
"""

from __future__ import annotations

import hashlib
import stat
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from pixcell_core.contracts.canonical import read_bounded
from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.trust.durable import write_whole

MAX_KEY_BYTES = 4096
SIGNATURE_BYTES = 64


class KeyFileError(BadInputError):
    """A key file is missing, malformed, of another kind, or readable by others."""

    default_code = "bad-key-file"


class KeyExistsError(RefusedError):
    """A key would be written over an existing file."""

    default_code = "key-exists"


@dataclass(frozen=True)
class VerifyKey:
    """A public Ed25519 key of 32 raw bytes."""

    raw: bytes

    def __post_init__(self) -> None:
        if len(self.raw) != 32:
            raise KeyFileError(
                "A public Ed25519 key has 32 bytes.", hint="Give the PEM file of a public key."
            )

    @property
    def key_id(self) -> str:
        """``sha256:<hex>`` of the raw public bytes."""
        return "sha256:" + hashlib.sha256(self.raw).hexdigest()

    def verify(self, signature: bytes, message: bytes) -> bool:
        """Whether ``signature`` (64 bytes) is this key's signature of ``message``."""
        if len(signature) != SIGNATURE_BYTES:
            return False
        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, message)
        except InvalidSignature:
            return False
        return True

    def to_pem(self) -> bytes:
        """SubjectPublicKeyInfo in PEM: the one byte form in which this key is written."""
        return Ed25519PublicKey.from_public_bytes(self.raw).public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    @classmethod
    def from_pem(cls, data: bytes, *, name: str = "key") -> VerifyKey:
        """Read a public key from PEM. A private key is refused."""
        if len(data) > MAX_KEY_BYTES or b"PRIVATE KEY" in data:
            raise KeyFileError(
                f"{name} is not a public key file.",
                hint="Give the public half ('BEGIN PUBLIC KEY'); keep the private one where it is.",
            )
        try:
            key = serialization.load_pem_public_key(data)
        except (ValueError, UnsupportedAlgorithm) as error:
            raise KeyFileError(
                f"{name} is not a PEM public key.", hint="Ask the owner for their public key file."
            ) from error
        if not isinstance(key, Ed25519PublicKey):
            raise KeyFileError(
                f"{name} holds a key of another kind than Ed25519.", hint="Give an Ed25519 key."
            )
        return cls(key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw))

    @classmethod
    def load(cls, path: Path) -> VerifyKey:
        """Read a public key from a PEM file."""
        return cls.from_pem(read_bounded(path, MAX_KEY_BYTES), name=path.name)

    def save(self, path: Path) -> None:
        """Write the PEM form, atomically; an existing file is replaced."""
        write_whole(path, self.to_pem())


class SigningKey:
    """A private Ed25519 key. Its text form never shows the secret."""

    def __init__(self, private_key: Ed25519PrivateKey) -> None:
        self._private_key = private_key
        self.verify_key = VerifyKey(
            private_key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        )

    def __repr__(self) -> str:
        return f"SigningKey({self.key_id})"

    def __reduce__(self) -> str:
        raise TypeError("a signing key is not copied through pickle; save it to its own file")

    @classmethod
    def generate(cls) -> SigningKey:
        """A new key from the operating system's randomness."""
        return cls(Ed25519PrivateKey.generate())

    @property
    def key_id(self) -> str:
        """The identity of the public half."""
        return self.verify_key.key_id

    def sign(self, message: bytes) -> bytes:
        """The 64-byte Ed25519 signature of ``message``."""
        return self._private_key.sign(message)

    def save(self, path: Path, mode: int = 0o600) -> None:
        """Write PEM PKCS#8, unencrypted, readable by the owner alone. Never writes over an existing file.

        Raises :class:`KeyExistsError` where the file exists, :class:`KeyFileError` for a mode open to others.
        """
        if mode & 0o077:
            raise KeyFileError(
                f"A private key must not be written with mode {mode:o}.", hint="Use 600 or stricter."
            )
        pem = self._private_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        try:
            write_whole(path, pem, mode=mode, replace=False)
        except FileExistsError as error:
            raise KeyExistsError(
                f"{path} exists already and is not written over.",
                hint="Use that key, or move it away first. Signatures by a lost key cannot be made again.",
            ) from error

    @classmethod
    def load(cls, path: Path) -> SigningKey:
        """Read a private key. A file that others can read is refused: its secret may be known."""
        data = read_bounded(path, MAX_KEY_BYTES)
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise KeyFileError(
                f"{path} can be read by other users, so its secret may be known to them.",
                hint=f"If you are sure nobody read it: chmod 600 {path}. Otherwise make a new key.",
                code="key-file-exposed",
            )
        try:
            key = serialization.load_pem_private_key(data, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise KeyFileError(
                f"{path.name} is not an unencrypted PEM private key.", hint="Give an Ed25519 PKCS#8 PEM file."
            ) from error
        if not isinstance(key, Ed25519PrivateKey):
            raise KeyFileError(
                f"{path.name} holds a key of another kind than Ed25519.",
                hint="Only Ed25519 keys are used here.",
            )
        return cls(key)

    @classmethod
    def load_or_create(cls, path: Path) -> SigningKey:
        """Load the key at ``path``, or make one there with its public half beside it (``.pub`` suffix)."""
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                cls.generate().save(path)
            except KeyExistsError:
                # Another process of the same party made it first: theirs is the key.
                return cls.load(path)
        key = cls.load(path)
        public = path.with_name(path.name + ".pub")
        if not public.exists():
            key.verify_key.save(public)
        return key
