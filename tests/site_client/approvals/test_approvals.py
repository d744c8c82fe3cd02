"""Consent: keys stay at the site, a decision covers exactly one study, and nobody else can make one."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixcell_core.contracts.canonical import load_document
from pixcell_core.contracts.enrolment import EnrolmentRequest
from pixcell_core.contracts.study import Approval, ApprovalError, Study, check_approval
from pixcell_core.errors import PixcellError, RefusedError
from pixcell_core.trust.dsse import Envelope
from pixcell_core.trust.keys import SigningKey
from site_client.approvals.book import ApprovalBook
from site_client.approvals.enrolment import enrol
from site_client.approvals.site_folder import SiteFolder
from tests.server.consortium import make_study
from tests.site_client.trainer.site_fixture import make_ca


@pytest.fixture
def site(tmp_path: Path) -> SiteFolder:
    """An enrolled site named east."""
    folder = SiteFolder(tmp_path / "east")
    enrol(folder, "east", "hub.example.org:9443", make_ca(tmp_path / "ca.crt"))
    return folder


def test_enrolment_makes_private_files_and_a_public_request(site: SiteFolder) -> None:
    assert site.keys.stat().st_mode & 0o077 == 0
    for private in (site.node_key, site.approval_key):
        assert private.stat().st_mode & 0o777 == 0o600
    text = site.request.read_text()
    assert "PRIVATE" not in text
    request = load_document(EnrolmentRequest, site.request)
    assert request.verify_key() == SigningKey.load(site.approval_key).verify_key
    assert len(request.fingerprint.replace(" ", "")) == 32


def test_enrolling_again_keeps_keys_and_fingerprint(site: SiteFolder, tmp_path: Path) -> None:
    before = site.request.read_bytes()
    enrol(site, "east", "hub.example.org:9443", tmp_path / "ca.crt")
    assert site.request.read_bytes() == before
    with pytest.raises(RefusedError, match="already the site east"):
        enrol(site, "west", "hub.example.org:9443", tmp_path / "ca.crt")


@pytest.mark.parametrize(
    ("name", "hub"),
    [
        ("East", "h:1"),
        ("../east", "h:1"),
        ("", "h:1"),
        ("east", "h"),
        ("east", "https://h:1"),
        ("east", "h:1 --insecure"),
    ],
)
def test_unusable_names_and_addresses_are_one_clear_error(tmp_path: Path, name: str, hub: str) -> None:
    with pytest.raises(PixcellError) as error:
        enrol(SiteFolder(tmp_path / "s"), name, hub, make_ca(tmp_path / "ca.crt"))
    assert error.value.exit_code == 4
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "content", [b"", b"nonsense", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_a_file_that_is_no_authority_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ca.crt").write_bytes(content)
    with pytest.raises(PixcellError) as error:
        enrol(SiteFolder(tmp_path / "s"), "east", "h:1", tmp_path / "ca.crt")
    assert error.value.exit_code == 4


def test_a_decision_is_signed_and_the_last_one_counts(site: SiteFolder) -> None:
    study, book = make_study(), ApprovalBook(site)
    with pytest.raises(ApprovalError, match="has not approved"):
        book.require(study)
    book.decide(study, "approve")
    key = SigningKey.load(site.approval_key).verify_key
    assert check_approval(book.require(study), key, study=study, site="east").decision == "approve"
    book.decide(study, "revoke")
    with pytest.raises(ApprovalError) as withdrawn:
        book.require(study)
    assert withdrawn.value.code == "approval-withdrawn"


def test_only_a_study_that_names_the_site_can_be_decided(site: SiteFolder) -> None:
    with pytest.raises(RefusedError, match="does not name east"):
        ApprovalBook(site).decide(make_study(sites=("north", "west")), "approve")


def test_an_expired_study_is_not_approved_any_more(site: SiteFolder) -> None:
    study, book = make_study(), ApprovalBook(site)
    book.decide(study, "approve")
    with pytest.raises(ApprovalError) as expired:
        book.require(study, study.expires_at + timedelta(seconds=1))
    assert expired.value.code == "approval-expired"


CHANGES: dict[str, Any] = {
    "id": "study-two",
    "rounds": 4,
    "noise_multiplier": 0.5,
    "epsilon_cap": 9.0,
    "max_grad_norm": 2.0,
    "sample_rate": 0.5,
    "steps_per_round": 3,
    "delta": 1e-6,
    "expected_patients": 11,
    "tiles_per_patient": 3,
    "noise_draws": 2,
    "learning_rate": 0.2,
    "optimizer": "adam",
    "tile_size": 128,
    "mpp": 0.5,
    "base_digest": "sha256:" + "1" * 64,
    "code_digest": "sha256:" + "1" * 64,
    "quorum": 3,
    "round_timeout_s": 6.0,
    "reply_grid_s": 1.0,
    "ema_decay": 0.5,
    "gradient_checkpointing": True,
    "precision": "bfloat16",
    "conditioning": {"mode": "own", "k": 1},
    "audit_policy_digest": "sha256:" + "1" * 64,
    "sites": ("east", "north"),
    "max_update_norm": 5.0,
    "title": "another",
    "aggregation": {"rule": "median"},
    "app_digest": "sha256:" + "1" * 64,
    "straggler_rule": "grace",
    "straggler_grace_s": 5.0,
    "adapter": {"rank": 3, "targets": ("block", "other")},
    "created_at": datetime(2020, 1, 1, tzinfo=UTC),
    "expires_at": datetime(2090, 1, 1, tzinfo=UTC),
}


@pytest.mark.parametrize("field", sorted(set(Study.model_fields) - {"schema_version", "unit", "adjacency"}))
def test_an_approval_covers_no_study_that_differs_in_any_field(site: SiteFolder, field: str) -> None:
    study, book = make_study(), ApprovalBook(site)
    envelope_of_first = Envelope.load(book.decide(study, "approve").file)
    changed = make_study(**{field: CHANGES[field]})
    assert changed.digest != study.digest
    key = SigningKey.load(site.approval_key).verify_key
    with pytest.raises(PixcellError):
        check_approval(envelope_of_first, key, study=changed, site="east")
    with pytest.raises(PixcellError):
        book.require(changed)


def test_nobody_else_can_sign_for_the_site(site: SiteFolder) -> None:
    study = make_study()
    stranger = SigningKey.generate()
    forged = Approval(
        study_id=study.id,
        study_digest=study.digest,
        site="east",
        decision="approve",
        epsilon_cap=study.epsilon_cap,
        decided_at=datetime.now(UTC),
        expires_at=study.expires_at,
    ).sign(stranger)
    (site.approvals / f"{study.digest.removeprefix('sha256:')}.json").write_bytes(forged.to_bytes())
    with pytest.raises(PixcellError) as refused:
        ApprovalBook(site).require(study)
    assert refused.value.code == "signature-refused"


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
def test_no_changed_byte_of_a_signed_approval_is_accepted(position: int, value: int) -> None:
    study, key = make_study(), SigningKey.generate()
    data = bytearray(
        Approval(
            study_id=study.id,
            study_digest=study.digest,
            site="east",
            decision="approve",
            epsilon_cap=study.epsilon_cap,
            decided_at=datetime.now(UTC),
            expires_at=study.expires_at,
        )
        .sign(key)
        .to_bytes()
    )
    position %= len(data)
    if data[position] == value:
        value ^= 1
    data[position] = value
    with pytest.raises(PixcellError):
        check_approval(Envelope.from_bytes(bytes(data)), key.verify_key, study=study, site="east")


@pytest.mark.parametrize(
    "change",
    [
        {"quorum": 4},
        {"sites": ("east", "east")},
        {"sample_rate": 0.0},
        {"sample_rate": 1.5},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": float("inf")},
        {"delta": 1e-3},
        {"expires_at": datetime(2020, 1, 1, tzinfo=UTC)},
        {"conditioning": {"mode": "blend", "k": 2}},
        {"unit": "tile"},
        {"rounds": 0},
        {"surprise": 1},
    ],
)
def test_an_impossible_study_cannot_be_written(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        make_study(**change)


def test_a_study_reads_back_to_the_same_digest(tmp_path: Path) -> None:
    study = make_study()
    (tmp_path / "study.json").write_bytes(study.to_bytes())
    assert load_document(Study, tmp_path / "study.json").digest == study.digest
    pretty = tmp_path / "pretty.json"
    pretty.write_text(json.dumps(json.loads(study.to_bytes()), indent=2))
    assert load_document(Study, pretty).digest == study.digest
