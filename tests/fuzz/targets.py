"""What is fuzzed: each parser of a stranger's bytes, with true documents to begin from.

A target returns or raises a `PixcellError`; anything else that comes out, a second of thinking too long, or memory
beyond the limit is a finding.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from pixcell_core.contracts.canonical import canonical_bytes, parse_document, parse_json
from pixcell_core.contracts.enrolment import Kit, RevocationList
from pixcell_core.contracts.gate import Refusal, ReleaseRequest, Signers, Withdrawals
from pixcell_core.contracts.log_heads import AnchorReceipt, ConsistencyProof, HeadOffer, InclusionProof
from pixcell_core.contracts.release import BundleListing, ReleaseManifest
from pixcell_core.contracts.verdict import Verdict
from pixcell_core.errors import PixcellError
from pixcell_core.private.ledger_record import decode_chained
from pixcell_core.trust.bundle import verify_bundle
from pixcell_core.trust.bundle_files import archive_bytes, open_bundle
from pixcell_core.trust.certificates import authority_key, issued_by, read_authority
from pixcell_core.trust.dsse import Envelope, sign_envelope, valid_signers
from pixcell_core.trust.keys import SigningKey, VerifyKey
from pixcell_core.trust.log import EventLog, verify_log
from pixcell_core.trust.log_proof import load_proof
from pixcell_core.trust.tile_jpeg import decode_named
from pixcell_core.trust.tile_png import decode_tile, encode_tile
from privacy_audit.ledger_export import LedgerTrust, read_ledger_export
from privacy_audit.policy import SHIPPED, load_policy
from privacy_audit.policy_signature import sign_policy, signed_policy
from tests.fuzz.names import ROOM

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
DOCUMENTS: tuple[type[Any], ...] = (
    *(ReleaseManifest, BundleListing, Verdict, Signers, ReleaseRequest, Refusal, Withdrawals),
    *(HeadOffer, AnchorReceipt, InclusionProof, ConsistencyProof, Kit, RevocationList),
)


@dataclass(frozen=True)
class Target:
    """One parser: `parse` takes the bytes, `seeds` gives inputs that it accepts or nearly accepts."""

    parse: Callable[[bytes], object]
    seeds: Callable[[], list[bytes]]
    max_bytes: int = 16_384


@functools.cache
def _key() -> SigningKey:
    return SigningKey.generate()


@functools.cache
def _room() -> Path:
    """A private folder that parsers of files read from; the runner names one in memory, and removes it."""
    named = os.environ.get(ROOM)
    made = Path(tempfile.mkdtemp(prefix="pixcell-fuzz-", dir=named))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def _file(name: str, data: bytes) -> Path:
    path = _room() / name
    path.write_bytes(data)
    return path


def _archive(data: bytes) -> object:
    with open_bundle(_file("bundle.zip", data)) as files:
        return verify_bundle(files, trusted_keys=None, now=NOW)


def _archive_seeds() -> list[bytes]:
    """A true bundle of one small tile, the same cut, and hostile ends."""
    from site_client.release.export import export_release
    from site_client.release.workspace import ReleaseWorkspace
    from tests.site_client.release.conftest import Room, write_surrogates

    place = Path(tempfile.mkdtemp(dir=_room()))
    (place / "site").mkdir()
    source = write_surrogates(place / "surrogates", count=1, side=16)
    room = Room(ReleaseWorkspace(place / "site"), source, place / "audits")
    room.signed()
    export_release(room.workspace, place / "b.zip", now=NOW)
    whole = (place / "b.zip").read_bytes()
    return [
        whole,
        whole[:-22],
        archive_bytes([("bundle.dsse.json", _envelope())]),
        b"PK\x05\x06" + b"\0" * 18,
        b"PK\x06\x07" + b"\0" * 16 + b"PK\x05\x06" + b"\0" * 18,
    ]


def _envelope() -> bytes:
    return sign_envelope("application/json", b'{"a":1}', [_key()]).to_bytes()


def _opened(data: bytes) -> object:
    envelope = Envelope.from_bytes(data)
    valid_signers(envelope, [_key().verify_key])
    return envelope.unsafe_unverified_payload()


def _documents(data: bytes) -> object:
    """Every kind of document from the same bytes; the first byte chooses which."""
    kind = DOCUMENTS[data[0] % len(DOCUMENTS)] if data else DOCUMENTS[0]
    document = parse_document(kind, data[1:])
    assert parse_document(kind, canonical_bytes(document)) == document, "what was read is not what is written"
    return document


def _document_seeds() -> list[bytes]:
    withdrawn = {
        "manifest_digest": "sha256:" + "0" * 64,
        "reason": "r",
        "withdrawn_at": "2026-03-01T12:00:00Z",
    }
    listed = {"site": "north", "number": 1, "issued_at": "2026-03-01T12:00:00Z", "withdrawn": [withdrawn]}
    named = [
        {"role": role, "name": "n", "key_id": "sha256:" + one * 64}
        for role, one in (("site", "0"), ("auditor", "1"))
    ]
    signers = {"site": "north", "needed": 2, "signers": named}
    found = [bytes([DOCUMENTS.index(Withdrawals)]) + canonical_bytes(listed)]
    first_day = {**listed, "issued_at": "0001-01-01T00:00:00+14:00"}
    found.append(bytes([DOCUMENTS.index(Withdrawals)]) + canonical_bytes(first_day))
    return [*found, bytes([DOCUMENTS.index(Signers)]) + canonical_bytes(signers)]


def _policy(data: bytes) -> object:
    return load_policy(_file("policy.yaml", data))


def _policy_seeds() -> list[bytes]:
    core = (SHIPPED / "core.yaml").read_bytes()
    laughs = b"a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\nd: [*c,*c]\n"
    return [core, b"name: x\ncopies: {flag_p: 0.001}\n", b"[" * 200, laughs, b"<<: &x {a: *x}\n"]


def _signed_policy(data: bytes) -> object:
    return signed_policy(Envelope.from_bytes(data), _key().verify_key)


def _log(data: bytes) -> object:
    folder = _room() / "log"
    if not folder.is_dir():
        folder.mkdir()
        _key().verify_key.save(folder / "log.pub")
    (folder / "log.jsonl").write_bytes(data)
    return verify_log(folder)


def _log_seeds() -> list[bytes]:
    log = EventLog(Path(tempfile.mkdtemp(dir=_room())), _key())
    log.append("test.event", {"n": 1}, now=NOW)
    log.append("test.event", {"deep": [[[]]]}, now=NOW)
    return [(log.folder / "log.jsonl").read_bytes()]


def _proof(data: bytes) -> object:
    return load_proof(_file("proof.json", data))


def _proof_seeds() -> list[bytes]:
    from pixcell_core.trust.log_proof import prove_consistency, prove_inclusion

    log = EventLog(Path(tempfile.mkdtemp(dir=_room())), _key())
    for number in range(3):
        log.append("test.event", {"n": number}, now=NOW)
    return [prove_inclusion(log.folder, 1).to_bytes(), prove_consistency(log.folder, 2).to_bytes()]


def _ledger_line(data: bytes) -> object:
    return decode_chained(data.removesuffix(b"\n"), None, None)


def _ledger_seeds() -> list[bytes]:
    from pixcell_core.private.ledger_record import FIRST_HASH, OpenedRecord, encode_line, encode_public_key

    record = OpenedRecord(
        sequence=0, previous_hash=FIRST_HASH, site="north", time="2026-01-01T00:00:00Z", reason="created",
        cap_epsilon=8.0, cap_delta=1e-5, public_key=encode_public_key(_key().verify_key),
    )  # fmt: skip
    return [encode_line(record, _key())]


def _export(data: bytes) -> object:
    return read_ledger_export(_file("export.json", data), LedgerTrust(key=_key().verify_key))


def _export_seeds() -> list[bytes]:
    line = json.loads(_ledger_seeds()[0])
    statement = {"site": "north", "unit": "patient", "delta": 1e-5, "epsilon_spent": 0.0, "records": 1}
    body = {"schema_version": "budget-export/v1", "statement": statement, "public_key": None, "lines": [line]}
    return [json.dumps(body).encode(), json.dumps({"status": "ok", "data": body}).encode()]


def _authority(data: bytes) -> object:
    certificate = read_authority(data)
    return issued_by(certificate, certificate), authority_key(certificate)


def _authority_seeds() -> list[bytes]:
    """A true authority, and one whose key usage became a second list of basic constraints."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    from server.enrolment.authority import Authority

    made = Authority.make(NOW).certificate
    twice = made.public_bytes(Encoding.DER).replace(b"\x06\x03\x55\x1d\x0f", b"\x06\x03\x55\x1d\x13")
    return [made.public_bytes(Encoding.PEM), x509.load_der_x509_certificate(twice).public_bytes(Encoding.PEM)]


def _tile_seeds() -> list[bytes]:
    return [encode_tile(np.zeros((side, side, 3), np.uint8)) for side in (1, 8)]


def _jpeg(data: bytes) -> object:
    return decode_named(data, name="tile-000001.jpg")


def _jpeg_seeds() -> list[bytes]:
    from pixcell_core.trust.tile_jpeg import encode_as

    return [encode_as(np.zeros((16, 16, 3), np.uint8), "jpg")]


def _public_key(data: bytes) -> object:
    return VerifyKey.from_pem(data)


TARGETS: dict[str, Target] = {
    "archive": Target(_archive, functools.cache(_archive_seeds), 65_536),
    "envelope": Target(_opened, lambda: [_envelope()]),
    "documents": Target(_documents, _document_seeds),
    "json": Target(
        parse_json, lambda: [b'{"a":[1,2.5e3,null,true,"\\u00e9"]}', b"[" * 64, b"1e999", b"9" * 400]
    ),
    "policy": Target(_policy, _policy_seeds),
    "signed-policy": Target(_signed_policy, lambda: [sign_policy(load_policy("core"), _key()).to_bytes()]),
    "log": Target(_log, _log_seeds),
    "proof": Target(_proof, _proof_seeds),
    "ledger-line": Target(_ledger_line, _ledger_seeds),
    "ledger-export": Target(_export, _export_seeds),
    "tile-png": Target(decode_tile, _tile_seeds, 4096),
    "tile-jpeg": Target(_jpeg, _jpeg_seeds, 4096),
    "authority": Target(_authority, functools.cache(_authority_seeds), 4096),
    "public-key": Target(_public_key, lambda: [_key().verify_key.to_pem()], 4096),
}


def attempt(name: str, data: bytes) -> bool:
    """Whether a target accepted the bytes; a declared refusal is no finding, anything else comes out."""
    try:
        TARGETS[name].parse(data)
    except PixcellError as error:
        assert error.code and error.message and error.hint, "a refusal without a name or a remedy"
        return False
    return True
