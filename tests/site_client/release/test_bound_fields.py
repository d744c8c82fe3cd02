"""What the verdict binds, field by field: changed without the auditor's key, with it, or beside it, each is refused.

The table is the promise: Merkle root, tiles, model, base, study, policy, code, ledger head, privacy statement, terms,
signers, expiry, verdict and exception. A field of the statement that is in no row fails the first test.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from pixcell_core.contracts.canonical import parse_document
from pixcell_core.contracts.release import Conditioning
from pixcell_core.contracts.verdict import Verdict, VerdictException, VerdictPredicate
from pixcell_core.errors import PixcellError
from pixcell_core.trust.bundle import verify_bundle
from pixcell_core.trust.bundle_files import VERDICT
from pixcell_core.trust.dsse import IN_TOTO_PAYLOAD_TYPE, Envelope, sign_envelope
from pixcell_core.trust.keys import SigningKey
from site_client.release.export import export_release
from tests.pixcell_core.contracts.test_release_documents import PRIVACY, manifest, verdict
from tests.site_client.release.conftest import AUDITOR, NOW, OFFICER, InMemory, Room, Sample
from tests.site_client.release.test_bundle_tampering import resigned
from tests.site_client.release.test_bundle_terms import full

__all__ = ["full"]

OTHER = "sha256:" + "e" * 64
Change = Callable[[VerdictPredicate], dict[str, Any]]

BOUND: dict[str, tuple[Change, str]] = {
    # field: (the change, the refusal where auditor and site both sign the changed statement)
    "verdict": (lambda p: {"verdict": "FAIL"}, "verdict-forbids"),
    "exception": (lambda p: {"verdict": "REVIEW", "exception": None}, "verdict-forbids"),
    "audience": (lambda p: {"audience": "public"}, "wrong-request"),
    "site": (lambda p: {"site": "south"}, "verdict-of-other-tiles"),
    "manifest_digest": (lambda p: {"manifest_digest": OTHER}, "verdict-of-other-tiles"),
    "tile_count": (lambda p: {"tile_count": p.tile_count + 1}, "bad-document"),
    "tiles_root": (lambda p: {"tiles_root": OTHER}, "bad-document"),
    "study_digest": (lambda p: {"study_digest": OTHER}, "verdict-of-other-tiles"),
    "base_digest": (lambda p: {"base_digest": OTHER}, "verdict-of-other-tiles"),
    "adapter_digest": (lambda p: {"adapter_digest": OTHER}, "verdict-of-other-tiles"),
    "conditioning": (
        lambda p: {"conditioning": Conditioning(policy="private", promise="All is covered.")},
        "verdict-of-other-tiles",
    ),
    "privacy": (lambda p: {"privacy": PRIVACY}, "verdict-of-other-tiles"),
    "ledger_head": (lambda p: {"ledger_head": OTHER}, "verdict-of-other-tiles"),
    "auditor": (
        lambda p: {"auditor": p.auditor.model_copy(update={"policy_digest": OTHER})},
        "wrong-request",
    ),
    "audit_report_digest": (lambda p: {"audit_report_digest": OTHER}, "bundle-changed"),
    "audit_page_digest": (lambda p: {"audit_page_digest": OTHER}, "bundle-changed"),
    "proven_kinds": (lambda p: {"proven_kinds": ("everything",)}, "bundle-changed"),
    "signers_digest": (lambda p: {"signers_digest": OTHER}, "wrong-signers"),
    "request_digest": (lambda p: {"request_digest": OTHER}, "wrong-request"),
    "issued_at": (lambda p: {"issued_at": p.issued_at + timedelta(days=2)}, "clock-wrong"),
    "expires_at": (
        lambda p: {"issued_at": NOW - timedelta(days=2), "expires_at": NOW},
        "verdict-expired",
    ),
}


def changed(sample: Sample, change: Change) -> bytes:
    """The statement with one field changed; built without validation, as a forger's program would."""
    envelope = Envelope.from_bytes(sample.files[VERDICT])
    old = parse_document(Verdict, envelope.unsafe_unverified_payload())
    predicate = old.predicate.model_copy(update=change(old.predicate))
    return old.model_copy(update={"predicate": predicate}).to_bytes()


def code_of(sample: Sample, verdict: Envelope) -> str:
    files = resigned(sample, {**sample.files, VERDICT: verdict.to_bytes()}, sample.site_key)
    with pytest.raises(PixcellError) as refused:
        verify_bundle(InMemory(files), trusted_keys=None, now=NOW)
    assert refused.value.hint
    return refused.value.code


def test_every_field_of_the_statement_is_in_the_table() -> None:
    assert BOUND.keys() == VerdictPredicate.model_fields.keys()


@pytest.mark.parametrize("field", BOUND)
def test_no_field_changes_without_the_auditors_key(full: Sample, field: str) -> None:
    """The site has its own key and every file of the bundle; the auditor's true signature is over other words."""
    payload = changed(full, BOUND[field][0])
    mine = sign_envelope(IN_TOTO_PAYLOAD_TYPE, payload, [full.site_key])
    true = Envelope.from_bytes(full.files[VERDICT])
    kept = tuple(one for one in true.signatures if one.keyid == AUDITOR.key_id)
    both = tuple(sorted((*mine.signatures, *kept), key=lambda one: one.keyid))
    assert code_of(full, mine.model_copy(update={"signatures": both})) == "signature-refused"
    assert code_of(full, mine) in ("signatures-missing", "foreign-file", BOUND[field][1])
    stranger = SigningKey.generate()
    forged = sign_envelope(IN_TOTO_PAYLOAD_TYPE, payload, [full.site_key, stranger])
    with pytest.raises(PixcellError):
        verify_bundle(
            InMemory({**full.files, VERDICT: forged.to_bytes()}), trusted_keys=[AUDITOR.verify_key], now=NOW
        )


@pytest.mark.parametrize("field", BOUND)
def test_no_field_changes_apart_from_what_it_is_about(full: Sample, field: str) -> None:
    """Even where auditor and site both sign: the statement must be about what lies in the bundle."""
    change, code = BOUND[field]
    again = sign_envelope(IN_TOTO_PAYLOAD_TYPE, changed(full, change), [AUDITOR, full.site_key])
    assert code_of(full, again) == code


def test_the_code_that_judged_is_named_and_is_the_code_of_this_place(room: Room, tmp_path: Path) -> None:
    release = room.draft()
    signed = room.sign(release, room.audit(release))
    digest = signed.verdict.predicate.auditor.code_digest
    assert digest is not None and digest.startswith("sha256:")
    unnamed = signed.verdict.model_copy(
        update={
            "predicate": signed.verdict.predicate.model_copy(
                update={"auditor": signed.verdict.predicate.auditor.model_copy(update={"code_digest": None})}
            )
        }
    )
    envelope = sign_envelope(IN_TOTO_PAYLOAD_TYPE, unnamed.to_bytes(), [room.auditor])
    (release.path / VERDICT).write_bytes(envelope.to_bytes())
    room.refused("code-not-named", lambda: export_release(room.workspace, tmp_path / "b", now=NOW))


def test_the_export_writes_nothing_without_each_of_what_it_needs(room: Room, tmp_path: Path) -> None:
    """No verdict, FAIL, too few signatures, an ended verdict: no file appears where the bundle would be."""
    release, out = room.requested(signers_file=room.rule(3)), tmp_path / "b"

    def export(now: Any = NOW) -> object:
        return export_release(room.workspace, out, now=now)

    room.refused("no-verdict", export)
    room.sign(release, room.audit(release))
    room.refused("signatures-missing", export)
    room.countersign(release, room.workspace.site_key())
    room.refused("signatures-missing", export)
    room.countersign(release, OFFICER, "data-protection")
    room.refused("verdict-expired", lambda: export(NOW + timedelta(days=366)))
    room.refused("clock-wrong", lambda: export(NOW - timedelta(days=2)))
    assert not out.exists() and [p.name for p in tmp_path.iterdir() if p.name.startswith(".b")] == []
    export()
    assert out.is_dir() and room.kinds()[-1] == "release.exported"


def test_an_exception_is_only_for_review() -> None:
    reason = VerdictException(reason="r", approver="a")
    for status in ("PASS", "FAIL", "INVALID"):
        with pytest.raises(ValueError, match="exception"):
            VerdictPredicate.model_validate(
                {**dict(verdict(manifest()).predicate), "verdict": status, "exception": reason}
            )


def test_the_export_is_the_only_code_that_writes_a_bundle() -> None:
    """A bundle is a listing under the site's signature: one place in the whole source signs one."""
    root = Path(__file__).resolve().parents[3]
    packages = ("pixcell_core", "privacy_audit", "site_client", "server", "deploy")
    sources = [path for package in packages for path in (root / package).rglob("*.py")]
    signing = re.compile(r"sign_envelope\(\s*LISTING_PAYLOAD_TYPE")
    writers = {
        path.relative_to(root).as_posix() for path in sources if signing.search(path.read_text("utf-8"))
    }
    assert writers == {"site_client/release/export.py"}
    kind = "application/vnd.pixcell.bundle.v1+json"
    named = {path.relative_to(root).as_posix() for path in sources if kind in path.read_text("utf-8")}
    assert named == {"pixcell_core/trust/bundle.py"}, "nobody signs one under the plain words either"
