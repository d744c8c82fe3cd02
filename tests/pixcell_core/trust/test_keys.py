"""Keys: identity, files that others cannot read, and refusal of what is not an Ed25519 key."""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pixcell_core.errors import BadInputError
from pixcell_core.trust.durable import WriteFailedError
from pixcell_core.trust.keys import KeyExistsError, KeyFileError, SigningKey, VerifyKey

# RFC 8032, section 7.1, TEST 2.
RFC8032_SECRET = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
RFC8032_PUBLIC = bytes.fromhex("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c")
RFC8032_SIGNATURE = bytes.fromhex(
    "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
    "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
)


def test_signs_as_the_rfc_says() -> None:
    key = SigningKey(Ed25519PrivateKey.from_private_bytes(RFC8032_SECRET))
    assert key.verify_key.raw == RFC8032_PUBLIC
    assert key.sign(b"\x72") == RFC8032_SIGNATURE
    assert key.key_id == "sha256:" + hashlib.sha256(RFC8032_PUBLIC).hexdigest()
    assert key.verify_key.verify(RFC8032_SIGNATURE, b"\x72")
    assert not key.verify_key.verify(RFC8032_SIGNATURE, b"\x73")
    assert not key.verify_key.verify(RFC8032_SIGNATURE[:-1], b"\x72")


def test_round_trip_through_files(tmp_path: Path) -> None:
    key = SigningKey.generate()
    key.save(tmp_path / "site.key")
    assert (tmp_path / "site.key").stat().st_mode & 0o777 == 0o600
    assert SigningKey.load(tmp_path / "site.key").key_id == key.key_id
    key.verify_key.save(tmp_path / "site.pub")
    assert VerifyKey.load(tmp_path / "site.pub") == key.verify_key
    assert sorted(os.listdir(tmp_path)) == ["site.key", "site.pub"]


def test_load_or_create_keeps_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "site.pem"
    first = SigningKey.load_or_create(path)
    assert SigningKey.load_or_create(path).key_id == first.key_id
    assert VerifyKey.load(tmp_path / "keys" / "site.pem.pub") == first.verify_key


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_exposed_private_key_is_refused(tmp_path: Path, mode: int) -> None:
    SigningKey.generate().save(tmp_path / "k")
    (tmp_path / "k").chmod(mode)
    with pytest.raises(KeyFileError) as refused:
        SigningKey.load(tmp_path / "k")
    assert refused.value.code == "key-file-exposed"
    assert "chmod 600" in refused.value.hint


def test_never_writes_over_a_key_nor_with_an_open_mode(tmp_path: Path) -> None:
    key = SigningKey.generate()
    key.save(tmp_path / "k")
    with pytest.raises(KeyExistsError):
        SigningKey.generate().save(tmp_path / "k")
    assert SigningKey.load(tmp_path / "k").key_id == key.key_id
    with pytest.raises(KeyFileError):
        key.save(tmp_path / "open", 0o644)
    with pytest.raises(WriteFailedError):
        key.save(tmp_path / "no-such-folder" / "k")


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    other = ec.generate_private_key(ec.SECP256R1())
    private = other.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = other.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    for content in (
        private,
        b"",
        b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
        b"x" * 9000,
    ):
        path = tmp_path / "bad"
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(BadInputError, match="bad"):
            SigningKey.load(path)
    for content in (public, private, b"", b"x" * 9000):
        with pytest.raises(KeyFileError, match="bad"):
            VerifyKey.from_pem(content, name="bad")
    with pytest.raises(KeyFileError):
        VerifyKey(b"short")


def test_secret_is_not_shown_nor_pickled() -> None:
    key = SigningKey(Ed25519PrivateKey.from_private_bytes(RFC8032_SECRET))
    assert RFC8032_SECRET.hex() not in repr(key)
    with pytest.raises(TypeError):
        pickle.dumps(key)
