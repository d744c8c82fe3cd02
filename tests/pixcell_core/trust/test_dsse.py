"""Envelopes against securesystemslib (both ways), and every way of tampering that must fail."""

from __future__ import annotations

import base64
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from securesystemslib import dsse as reference
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import CryptoSigner, SSlibKey

from pixcell_core.errors import PixcellError
from pixcell_core.trust.dsse import (
    Envelope,
    EnvelopeError,
    EnvelopeSignature,
    SignatureRefusedError,
    add_signature,
    pre_authentication_encoding,
    sign_envelope,
    valid_signers,
    verify_envelope,
)
from pixcell_core.trust.keys import SigningKey, VerifyKey

TYPE = "application/vnd.pixcell.test+json"
ALICE, BOB, MALLORY = SigningKey.generate(), SigningKey.generate(), SigningKey.generate()


def reference_key(key: VerifyKey) -> SSlibKey:
    return SSlibKey(key.key_id, "ed25519", "ed25519", {"public": key.raw.hex()})


@given(
    st.binary(max_size=300),
    st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=40),
)
@settings(max_examples=60, deadline=None)
def test_encoding_is_the_reference_encoding(payload: bytes, kind: str) -> None:
    assert pre_authentication_encoding(kind, payload) == reference.Envelope(payload, kind, {}).pae()


def test_encoding_vector_of_the_protocol() -> None:
    # DSSE protocol v1, test vector.
    assert (
        pre_authentication_encoding("http://example.com/HelloWorld", b"hello world")
        == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


@given(st.binary(max_size=200))
@settings(max_examples=25, deadline=None)
def test_reference_verifies_ours(payload: bytes) -> None:
    ours = sign_envelope(TYPE, payload, [ALICE, BOB])
    theirs = reference.Envelope.from_dict(json.loads(ours.to_bytes()))
    accepted = theirs.verify([reference_key(ALICE.verify_key), reference_key(BOB.verify_key)], 2)
    assert set(accepted) == {ALICE.key_id, BOB.key_id}
    with pytest.raises(VerificationError):
        theirs.verify([reference_key(MALLORY.verify_key)], 1)


@given(st.binary(max_size=200))
@settings(max_examples=25, deadline=None)
def test_we_verify_the_reference(payload: bytes) -> None:
    signer = CryptoSigner.generate_ed25519()
    public = VerifyKey(bytes.fromhex(signer.public_key.keyval["public"]))
    signer.public_key.keyid = public.key_id
    theirs = reference.Envelope(payload, TYPE, {})
    theirs.sign(signer)
    ours = Envelope.model_validate(theirs.to_dict())
    assert verify_envelope(ours, [public], payload_type=TYPE) == payload


def test_threshold_counts_distinct_keys() -> None:
    envelope = sign_envelope(TYPE, b"x", [ALICE, ALICE])
    keys = [ALICE.verify_key, ALICE.verify_key, BOB.verify_key]
    assert verify_envelope(envelope, keys, payload_type=TYPE) == b"x"
    with pytest.raises(SignatureRefusedError):
        verify_envelope(envelope, keys, 2, payload_type=TYPE)
    doubled = Envelope(payload=envelope.payload, payloadType=TYPE, signatures=envelope.signatures * 2)
    with pytest.raises(EnvelopeError):
        verify_envelope(doubled, keys, 1, payload_type=TYPE)
    both = add_signature(envelope, BOB)
    assert verify_envelope(both, keys, 2, payload_type=TYPE) == b"x"
    assert both == sign_envelope(TYPE, b"x", [BOB, ALICE]), "the order of signing does not change the bytes"
    assert add_signature(both, BOB) == both


def test_another_type_or_key_or_threshold_is_refused() -> None:
    envelope = sign_envelope(TYPE, b"x", [ALICE])
    with pytest.raises(EnvelopeError) as wrong:
        verify_envelope(envelope, [ALICE.verify_key], payload_type="application/other")
    assert wrong.value.code == "wrong-payload-type"
    retyped = envelope.model_copy(update={"payloadType": "application/other"})
    with pytest.raises(SignatureRefusedError):
        verify_envelope(retyped, [ALICE.verify_key], payload_type="application/other")
    with pytest.raises(SignatureRefusedError):
        verify_envelope(envelope, [MALLORY.verify_key], payload_type=TYPE)
    with pytest.raises(SignatureRefusedError):
        verify_envelope(envelope, [], payload_type=TYPE)
    with pytest.raises(PixcellError):
        verify_envelope(envelope, [ALICE.verify_key], 0, payload_type=TYPE)
    with pytest.raises(PixcellError):
        sign_envelope(TYPE, b"x", [])


def test_a_borrowed_key_id_signs_nothing() -> None:
    forged = sign_envelope(TYPE, b"x", [MALLORY])
    forged = forged.model_copy(
        update={"signatures": (EnvelopeSignature(keyid=ALICE.key_id, sig=forged.signatures[0].sig),)}
    )
    assert valid_signers(forged, [ALICE.verify_key, MALLORY.verify_key]) == ()
    with pytest.raises(SignatureRefusedError):
        verify_envelope(forged, [ALICE.verify_key, MALLORY.verify_key], payload_type=TYPE)


def test_base64_has_one_form() -> None:
    envelope = sign_envelope(TYPE, b"x", [ALICE])
    assert envelope.payload == "eA=="
    assert base64.b64decode("eB==") == b"x", "the lax decoder takes it; we must not"
    for payload in ("eB==", "eA", "eA=\n=", "e A==", "eA==\n", "_A=="):
        with pytest.raises(PixcellError):
            verify_envelope(
                envelope.model_copy(update={"payload": payload}), [ALICE.verify_key], payload_type=TYPE
            )


@given(st.data())
@settings(max_examples=250, deadline=None)
def test_any_changed_byte_is_refused(data: st.DataObject) -> None:
    original = sign_envelope(TYPE, b'{"tiles":3}', [ALICE, BOB]).to_bytes()
    offset = data.draw(st.integers(0, len(original) - 1))
    changed = bytearray(original)
    changed[offset] ^= data.draw(st.integers(1, 255))
    with pytest.raises(PixcellError):
        verify_envelope(
            Envelope.from_bytes(bytes(changed)), [ALICE.verify_key, BOB.verify_key], 2, payload_type=TYPE
        )


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{}",
        b"[]",
        b'{"payload":"eA==","payloadType":"t","signatures":[]}',
        b'{"payload":"eA==","payload":"eA==","payloadType":"t","signatures":[]}',
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"payload": NaN}',
    ],
)
def test_malformed_envelopes_are_refused(text: bytes) -> None:
    with pytest.raises(EnvelopeError):
        Envelope.from_bytes(text)


def test_reformatted_envelope_is_refused() -> None:
    envelope = sign_envelope(TYPE, b"x", [ALICE])
    assert Envelope.from_bytes(envelope.to_bytes()) == envelope
    pretty = json.dumps(json.loads(envelope.to_bytes()), indent=1).encode()
    with pytest.raises(EnvelopeError):
        Envelope.from_bytes(pretty)
