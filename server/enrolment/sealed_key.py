"""The CA's private key at rest: sealed by a passphrase, in a file for the owner alone, on any disk or stick.

scrypt (RFC 7914) stretches the passphrase, AES-256-GCM seals the 32 raw bytes of the Ed25519 key; the header is
authenticated with them.
"""

from __future__ import annotations

import base64
import getpass
import os
import stat
import sys
from pathlib import Path
from typing import Annotated, Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from pydantic import StringConstraints

from pixcell_core.contracts.canonical import Digest, Document, load_document, read_bounded
from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.trust.durable import write_whole
from pixcell_core.trust.keys import KeyFileError, SigningKey

MIN_PASSPHRASE = 12
MAX_PASSPHRASE = 1024
MAX_SEALED_BYTES = 4096
SCRYPT_N, SCRYPT_R, SCRYPT_P = 2**17, 8, 1
"""128 MiB and about a third of a second a guess."""

Base64Text = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/]{16,200}={0,2}$")]


class SealedKey(Document):
    """A sealed Ed25519 key. `key_id` says which public key it is of, so that a wrong file is told from a wrong word."""

    schema_version: Literal["sealed-key/v1"] = "sealed-key/v1"
    kdf: Literal["scrypt-17-8-1"] = "scrypt-17-8-1"
    key_id: Digest
    salt: Base64Text
    nonce: Base64Text
    sealed: Base64Text


def seal(key: Ed25519PrivateKey, passphrase: bytes, path: Path) -> None:
    """Write the sealed key to `path`, mode 0600; never over an existing file."""
    salt, nonce, key_id = os.urandom(32), os.urandom(12), SigningKey(key).key_id
    raw = key.private_bytes(
        serialization.Encoding.Raw, serialization.PrivateFormat.Raw, serialization.NoEncryption()
    )
    sealed = AESGCM(_stretch(passphrase, salt)).encrypt(nonce, raw, _header(key_id))
    document = SealedKey(key_id=key_id, salt=_text(salt), nonce=_text(nonce), sealed=_text(sealed))
    try:
        write_whole(path, document.to_bytes(), mode=0o600, replace=False)
    except FileExistsError as error:
        raise RefusedError(
            f"{path} exists already and is not written over.",
            hint="It may be the key of another consortium. Choose another --ca-dir.",
            code="key-exists",
        ) from error


def unseal(path: Path, passphrase: bytes) -> Ed25519PrivateKey:
    """The key at `path`. Refuses a missing or exposed file, a damaged one, and a wrong passphrase."""
    if not path.exists():
        raise BadInputError(
            f"The CA's key is not at {path}.",
            hint="Bring the medium that holds it, and give its folder: --ca-dir DIR.",
            code="no-ca-key",
        )
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise KeyFileError(
            f"{path} can be read by other users.",
            hint=f"If you are sure nobody copied it: chmod 600 {path}. Otherwise make a new consortium.",
            code="key-file-exposed",
        )
    document = load_document(SealedKey, path, MAX_SEALED_BYTES)
    try:
        salt, nonce, sealed = (
            base64.b64decode(t, validate=True) for t in (document.salt, document.nonce, document.sealed)
        )
        raw = AESGCM(_stretch(passphrase, salt)).decrypt(nonce, sealed, _header(document.key_id))
        return Ed25519PrivateKey.from_private_bytes(raw)
    except InvalidTag as error:
        raise RefusedError(
            "The passphrase does not open the CA's key.",
            hint="Try again; if you are sure of it, the key file was damaged: use its backup.",
            code="wrong-passphrase",
        ) from error
    except ValueError as error:
        raise BadInputError(
            f"{path.name} is damaged.", hint="Use its backup.", code="bad-key-file"
        ) from error


def read_passphrase(file: Path | None, *, new: bool = False) -> bytes:
    """The passphrase from a file for the owner alone, or asked at the terminal (twice for a `new` one)."""
    if file is not None:
        data = read_bounded(file, MAX_PASSPHRASE + 2)
        if stat.S_IMODE(file.stat().st_mode) & 0o077:
            raise BadInputError(
                f"{file} can be read by other users.",
                hint=f"chmod 600 {file}, and choose another passphrase if somebody may have read it.",
                code="passphrase-exposed",
            )
        passphrase = data.rstrip(b"\r\n")
    elif sys.stdin.isatty():
        passphrase = getpass.getpass("Passphrase of the CA's key: ").encode()
        if new and getpass.getpass("Once more: ").encode() != passphrase:
            raise BadInputError(
                "The two passphrases differ.", hint="Run it again.", code="passphrases-differ"
            )
    else:
        raise BadInputError(
            "The CA's key needs a passphrase, and nobody is at the terminal to be asked.",
            hint="Give a file with mode 600: --passphrase-file FILE.",
            code="no-passphrase",
        )
    if new and len(passphrase) < MIN_PASSPHRASE:
        raise BadInputError(
            f"A passphrase has at least {MIN_PASSPHRASE} characters.",
            hint="Take five random words.",
            code="short-passphrase",
        )
    return passphrase


def _stretch(passphrase: bytes, salt: bytes) -> bytes:
    return Scrypt(salt=salt, length=32, n=SCRYPT_N, r=SCRYPT_R, p=SCRYPT_P).derive(passphrase)


def _header(key_id: str) -> bytes:
    return f"pixcell sealed-key/v1 scrypt-17-8-1 {key_id}".encode()


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
