"""Every primitive against published vectors or a closed form."""

from __future__ import annotations

import base64
import hashlib
import hmac
from itertools import combinations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from pixcell_core.contracts.canonical import canonical_bytes
from pixcell_core.masking.keys import (
    MaskingRefusedError,
    derive,
    load_private,
    new_private_key,
    public_key,
    shared_key,
)
from pixcell_core.masking.keystream import BLOCK, Mask, apply_masks
from pixcell_core.masking.sealing import seal, unseal
from pixcell_core.masking.shamir import PRIME, join, lagrange_at_zero, split

# SP 800-38A, appendix F: the key of all its AES-256 examples, and the first block of plaintext.
AES_KEY = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
PLAIN = bytes.fromhex("6bc1bee22e409f96e93d7e117393172a")


def hkdf(secret: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869 written out."""
    extracted, block, out, number = hmac.digest(salt or bytes(32), secret, "sha256"), b"", b"", 1
    while len(out) < length:
        block = hmac.digest(extracted, block + info + bytes([number]), "sha256")
        out, number = out + block, number + 1
    return out[:length]


def aes_block(key: bytes, block: bytes) -> bytes:
    """One block of AES, from which counter mode is written out below."""
    return Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(block)


# Private key, public key of the peer, shared secret: RFC 7748, section 6.1 (Bob) and section 5.2.
X25519_VECTORS = [
    (
        "5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb",
        "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a",
        "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742",
    ),
    (
        "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4",
        "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c",
        "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552",
    ),
]


@pytest.mark.parametrize(("private", "public", "shared"), X25519_VECTORS)
def test_shared_keys_are_hkdf_of_x25519(private: str, public: str, shared: str) -> None:
    purpose = ["share", "a", 3]
    found = shared_key(load_private(bytes.fromhex(private)), bytes.fromhex(public), purpose)
    info = b'["pixcell-masking/v1","share","a",3]'
    assert found == hkdf(bytes.fromhex(shared), b"", info, 32)


def test_public_keys_are_those_of_the_standard() -> None:
    private = bytes.fromhex(X25519_VECTORS[0][0])
    wanted = "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    assert public_key(private).hex() == wanted


def test_the_written_out_hkdf_is_that_of_the_standard() -> None:
    # RFC 5869, test cases 1 and 3.
    salt, info = bytes(range(13)), bytes(range(0xF0, 0xFA))
    assert hkdf(b"\x0b" * 22, salt, info, 42).hex() == (
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    )
    assert hkdf(b"\x0b" * 22, b"", b"", 42).hex() == (
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"
    )
    assert derive(b"\x0b" * 22, ["x"]) == hkdf(b"\x0b" * 22, b"", b'["pixcell-masking/v1","x"]', 32)


@pytest.mark.parametrize("point", [bytes(32), bytes([1, *bytes(31)])])
def test_a_public_key_of_small_order_is_refused(point: bytes) -> None:
    with pytest.raises(MaskingRefusedError) as refused:
        shared_key(load_private(new_private_key()), point, ["share"])
    assert refused.value.code == "weak-key"


def test_masks_are_aes_256_in_counter_mode() -> None:
    # SP 800-38A, F.1.5 and F.5.5: block cipher, and its counter mode, written out.
    assert aes_block(AES_KEY, PLAIN).hex() == "f3eed1bdb5d2a03c064b5a7e3db181f8"
    counter = bytes(range(0xF0, 0x100))
    stream = aes_block(AES_KEY, counter)
    assert (
        bytes(a ^ b for a, b in zip(stream, PLAIN, strict=True)).hex() == "601ec313775789a5b7a7f504bbf3d228"
    )
    vector = np.zeros(BLOCK + 7, dtype="<u4")
    apply_masks(vector, [Mask(AES_KEY)])
    blocks = range(-(-4 * vector.size // 16))
    wanted = b"".join(aes_block(AES_KEY, n.to_bytes(16, "big")) for n in blocks)
    assert vector.tobytes() == wanted[: 4 * vector.size]


def test_many_masks_in_one_walk_are_the_masks_one_by_one() -> None:
    draw = np.random.default_rng(0)
    vector = draw.integers(0, 2**32, 2 * BLOCK + 3, dtype=np.uint32)
    masks = [Mask(draw.bytes(32), bool(i % 2)) for i in range(4)]
    slow = vector.copy()
    for mask in masks:
        stream = np.zeros_like(slow)
        apply_masks(stream, [Mask(mask.key)])
        slow = slow - stream if mask.subtract else slow + stream
    apply_masks(vector, masks)
    assert np.array_equal(vector, slow)
    assert b"key" not in repr(masks[0]).encode()


def test_only_a_contiguous_row_of_uint32_is_masked() -> None:
    for wrong in (np.zeros(4, "<i4"), np.zeros((2, 2), "<u4"), np.zeros(8, "<u4")[::2], np.zeros(4, ">u4")):
        with pytest.raises(ValueError, match="one contiguous row"):
            apply_masks(wrong, [Mask(AES_KEY)])


def test_boxes_are_aes_256_gcm() -> None:
    # The GCM specification's test case 14: zero key, zero nonce, one block of zeros.
    vector = AESGCM(bytes(32)).encrypt(bytes(12), bytes(16), None).hex()
    assert vector == "cea7403d4d606b6e074ec5d3baf39d18d0d1c8a799996bf0265b98b5d48ab919"
    key, text = hashlib.sha256(b"key").digest(), b"two shares"
    box = seal(key, text, ["share", "a", "b"], nonce=bytes(12))
    header = canonical_bytes(["pixcell-masking/v1", "share", "a", "b"])
    assert base64.b64decode(box) == bytes(12) + AESGCM(key).encrypt(bytes(12), text, header)
    assert unseal(key, box, ["share", "a", "b"]) == text
    assert unseal(key, box, ["share", "b", "a"]) is None
    assert unseal(bytes(32), box, ["share", "a", "b"]) is None
    assert seal(key, text, ["x"]) != seal(key, text, ["x"])


def test_shares_are_values_of_the_polynomial() -> None:
    secret = bytes(31) + b"\x07"
    drawn = iter([5, 11])
    shares = split(secret, 3, [1, 2, 10], draw=lambda below: next(drawn))
    assert [int.from_bytes(s, "big") for s in shares.values()] == [7 + 5 + 11, 7 + 10 + 44, 7 + 50 + 1100]
    # Two points of a line through (0, s): s = 2 f(1) - f(2).
    assert lagrange_at_zero([1, 2]) == (2, PRIME - 1)


@given(st.binary(min_size=32, max_size=32), st.integers(1, 6), st.integers(0, 3))
def test_any_threshold_of_shares_is_the_secret(secret: bytes, threshold: int, more: int) -> None:
    places = list(range(1, threshold + more + 1))
    shares = split(secret, threshold, places)
    for chosen in combinations(places, threshold):
        assert join({place: shares[place] for place in chosen}) == secret


def test_fewer_shares_fit_every_secret() -> None:
    """For any other secret there is a polynomial of the same degree through the same shares: they say nothing."""
    shares = split(b"\x01" * 32, 3, [1, 2, 3])
    for other in (bytes(32), b"\xff" * 32):
        # The value at 3 that makes the shares at 1 and 2 those of `other`: solve the equation of the weights.
        weights = lagrange_at_zero([1, 2, 3])
        known = sum(w * int.from_bytes(shares[x], "big") for x, w in zip((1, 2), weights, strict=False))
        third = (int.from_bytes(other, "big") - known) * pow(weights[2], -1, PRIME) % PRIME
        assert join({1: shares[1], 2: shares[2], 3: third.to_bytes(66, "big")}) == other


def test_shares_that_do_not_belong_together_are_noticed() -> None:
    one, two = split(bytes(32), 2, [1, 2, 3]), split(b"\x01" * 32, 2, [1, 2, 3])
    with pytest.raises(ValueError, match="not those of one secret"):
        join({1: one[1], 2: two[2]})
    with pytest.raises(ValueError, match="no element"):
        join({1: one[1], 2: PRIME.to_bytes(66, "big")})


@pytest.mark.parametrize(
    ("secret", "threshold", "places"),
    [(bytes(31), 2, [1, 2]), (bytes(32), 2, [1, 1]), (bytes(32), 2, [0, 1]), (bytes(32), 3, [1, 2])],
)
def test_impossible_sharings_are_refused(secret: bytes, threshold: int, places: list[int]) -> None:
    with pytest.raises(ValueError, match=r"secret|places|threshold"):
        split(secret, threshold, places)
