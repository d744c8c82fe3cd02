"""Decisions only go forward, may only narrow, and cannot be faked, reused or widened by whoever carries them."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pixcell_core.cli.main import build
from pixcell_core.contracts.canonical import load_document, parse_document
from pixcell_core.contracts.study import (
    APPROVAL_PAYLOAD_TYPE,
    AggregationSettings,
    Approval,
    MaskingSettings,
    SiteKey,
    Study,
    check_approval,
)
from pixcell_core.errors import BadInputError, PixcellError
from pixcell_core.trust.dsse import Envelope, sign_envelope
from pixcell_core.trust.keys import SigningKey
from site_client.approvals.book import ApprovalBook
from site_client.approvals.enrolment import enrol
from site_client.approvals.site_folder import SiteFolder
from tests.server.consortium import make_study
from tests.site_client.trainer.site_fixture import make_ca

HEX64 = "0" * 64


@pytest.fixture
def site(tmp_path: Path) -> SiteFolder:
    """An enrolled site named east."""
    folder = SiteFolder(tmp_path / "east")
    enrol(folder, "east", "hub.example.org:9443", make_ca(tmp_path / "ca.crt"))
    return folder


@pytest.fixture
def study() -> Study:
    return make_study()


def key_of(site: SiteFolder) -> SigningKey:
    return SigningKey.load(site.approval_key)


def place_of(site: SiteFolder, study: Study) -> Path:
    return site.approvals / f"{study.digest.removeprefix('sha256:')}.json"


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises(PixcellError) as refused:
        call()
    return refused.value.code


# ---- decisions only go forward


@pytest.mark.parametrize("decision", ["revoke", "deny"])
def test_an_old_approval_put_back_after_a_withdrawal_does_not_count(
    site: SiteFolder, study: Study, decision: str
) -> None:
    book = ApprovalBook(site)
    old = book.decide(study, "approve").file.read_bytes()
    book.decide(study, decision)  # type: ignore[arg-type]
    place_of(site, study).write_bytes(old)
    assert code_of(lambda: ApprovalBook(site).require(study)) == "approval-superseded"
    assert ApprovalBook(site).standing(study).code == "approval-superseded"
    # The mutant: without the numbers outside the folder the old approval would be good again.
    (site.root / "private" / "approval-numbers.json").unlink()
    ApprovalBook(site).require(study)


def test_a_wide_approval_put_back_over_a_narrow_one_does_not_count(site: SiteFolder, study: Study) -> None:
    book = ApprovalBook(site)
    wide = book.decide(study, "approve").file.read_bytes()
    book.decide(study, "approve", epsilon_cap=1.0)
    place_of(site, study).write_bytes(wide)
    assert code_of(lambda: ApprovalBook(site).approval(study)) == "approval-superseded"


def test_every_decision_has_a_larger_number_whatever_it_is_about(site: SiteFolder, study: Study) -> None:
    book, other = ApprovalBook(site), make_study(id="other")
    numbers = []
    for about, decision in ((study, "approve"), (other, "approve"), (study, "revoke"), (study, "approve")):
        file = book.decide(about, decision).file  # type: ignore[arg-type]
        numbers.append(parse_document(Approval, Envelope.load(file).unsafe_unverified_payload()).sequence)
    assert numbers == [1, 2, 3, 4]
    assert book.approval(study).sequence == 4 and book.approval(other).sequence == 2


def test_approving_again_after_a_withdrawal_is_possible_for_the_site(site: SiteFolder, study: Study) -> None:
    book = ApprovalBook(site)
    for decision in ("approve", "revoke", "approve"):
        book.decide(study, decision)  # type: ignore[arg-type]
    assert book.standing(study).valid


def test_a_crash_between_the_two_writes_refuses_rather_than_forgets(
    site: SiteFolder, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    from site_client.approvals import book as module

    ApprovalBook(site).decide(study, "approve")
    real = module.write_atomically

    def dies(path: Path, data: bytes) -> None:
        if path.parent == site.approvals:
            raise KeyboardInterrupt
        real(path, data)

    monkeypatch.setattr(module, "write_atomically", dies)
    with pytest.raises(KeyboardInterrupt):
        ApprovalBook(site).decide(study, "revoke")
    monkeypatch.undo()
    assert code_of(lambda: ApprovalBook(site).require(study)) == "approval-superseded"


# ---- narrower, never wider


def test_less_than_the_study_asks_for_may_be_signed(site: SiteFolder, study: Study) -> None:
    book = ApprovalBook(site)
    soon = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)
    book.decide(study, "approve", epsilon_cap=2.5, expires_at=soon)
    approval = book.approval(study)
    assert (approval.epsilon_cap, approval.expires_at) == (2.5, soon)
    assert check_approval(book.require(study), key_of(site).verify_key, study=study, site="east") == approval
    assert code_of(lambda: book.require(study, soon)) == "approval-expired"


@pytest.mark.parametrize("cap", [8.1, 0.0, -1.0, float("inf")])
def test_more_than_the_study_asks_for_is_not_signed(site: SiteFolder, study: Study, cap: float) -> None:
    with pytest.raises(BadInputError) as refused:
        ApprovalBook(site).decide(study, "approve", epsilon_cap=cap)
    assert refused.value.code == "approval-too-wide" and not list(site.approvals.glob("*.json"))


@pytest.mark.parametrize("end", [timedelta(days=2), -timedelta(minutes=1)])
def test_no_end_after_the_studys_and_none_in_the_past(site: SiteFolder, study: Study, end: timedelta) -> None:
    assert (
        code_of(lambda: ApprovalBook(site).decide(study, "approve", expires_at=datetime.now(UTC) + end))
        == "approval-too-wide"
    )


# ---- what a coordinator could try with the envelope it was given


def edited(study: Study, envelope: Envelope, **changes: object) -> Envelope:
    """The envelope with another payload under the same signature."""
    approval = parse_document(Approval, envelope.unsafe_unverified_payload())
    import base64

    payload = approval.model_copy(update=changes).to_bytes()
    return envelope.model_copy(update={"payload": base64.b64encode(payload).decode()})


@pytest.mark.parametrize(
    "changes",
    [
        {"epsilon_cap": 1000.0},
        {"epsilon_cap": 0.1},
        {"expires_at": datetime(2090, 1, 1, tzinfo=UTC)},
        {"decision": "deny"},
        {"site": "west"},
        {"study_digest": "sha256:" + HEX64},
        {"sequence": 99},
        {"study_id": "study-two"},
    ],
)
def test_an_edited_envelope_is_refused(site: SiteFolder, study: Study, changes: dict[str, object]) -> None:
    envelope = Envelope.load(ApprovalBook(site).decide(study, "approve").file)
    forged = edited(study, envelope, **changes)
    assert (
        code_of(lambda: check_approval(forged, key_of(site).verify_key, study=study, site="east"))
        == "signature-refused"
    )


def test_another_sites_key_signs_nothing_here(site: SiteFolder, study: Study, tmp_path: Path) -> None:
    west = SiteFolder(tmp_path / "west")
    enrol(west, "west", "h:1", tmp_path / "ca.crt")
    wests = Envelope.load(ApprovalBook(west).decide(study, "approve").file)
    key = key_of(site).verify_key
    assert code_of(lambda: check_approval(wests, key, study=study, site="east")) == "signature-refused"
    # Signed by the right key but naming another site: a signature given for west is no word of east.
    own = Approval.model_validate(
        parse_document(Approval, wests.unsafe_unverified_payload()).model_dump()
    ).sign(key_of(site))
    assert code_of(lambda: check_approval(own, key, study=study, site="east")) == "approval-of-another-site"


def test_the_approval_of_another_study_is_not_reused(site: SiteFolder, study: Study) -> None:
    other = make_study(id="other")
    envelope = Envelope.load(ApprovalBook(site).decide(other, "approve").file)
    key = key_of(site).verify_key
    assert (
        code_of(lambda: check_approval(envelope, key, study=study, site="east"))
        == "approval-of-another-study"
    )
    place_of(site, study).write_bytes(envelope.to_bytes())
    assert code_of(lambda: ApprovalBook(site).require(study)) == "approval-of-another-study"


@pytest.mark.parametrize("changes", [{"epsilon_cap": 9.0}, {"expires_at": datetime(2090, 1, 1, tzinfo=UTC)}])
def test_even_the_sites_own_signature_cannot_widen_a_study(
    site: SiteFolder, study: Study, changes: dict[str, object]
) -> None:
    approval = parse_document(
        Approval, Envelope.load(ApprovalBook(site).decide(study, "approve").file).unsafe_unverified_payload()
    )
    wide = approval.model_copy(update=changes).sign(key_of(site))
    key = key_of(site).verify_key
    assert code_of(lambda: check_approval(wide, key, study=study, site="east")) == "approval-too-wide"


def test_a_signature_given_for_another_purpose_is_no_approval(site: SiteFolder, study: Study) -> None:
    approval = parse_document(
        Approval, Envelope.load(ApprovalBook(site).decide(study, "approve").file).unsafe_unverified_payload()
    )
    other = sign_envelope(APPROVAL_PAYLOAD_TYPE + "x", approval.to_bytes(), [key_of(site)])
    key = key_of(site).verify_key
    assert code_of(lambda: check_approval(other, key, study=study, site="east")) == "wrong-payload-type"


# ---- what the site sees


def test_the_study_is_kept_beside_its_approval_and_an_edited_one_is_not_believed(
    site: SiteFolder, study: Study
) -> None:
    book = ApprovalBook(site)
    book.decide(study, "approve")
    kept = site.approvals / f"{study.digest.removeprefix('sha256:')}.study.json"
    assert load_document(Study, kept) == study
    kept.write_bytes(study.model_copy(update={"app_digest": "sha256:" + "1" * 64}).to_bytes())
    assert book.studies() == () and book.apps() == frozenset()


def test_studies_are_listed_with_what_holds_now(site: SiteFolder, study: Study, tmp_path: Path) -> None:
    book = ApprovalBook(site)
    book.decide(study, "approve", epsilon_cap=3.0)
    gone = make_study(id="gone")
    book.decide(gone, "approve")
    book.decide(gone, "revoke")
    run = CliRunner().invoke(build(), ["site", "studies", "--site-dir", str(site.root), "--format", "json"])
    lines = json.loads(run.stdout.splitlines()[-1])["data"]["studies"]
    assert [(s["study"], s["standing"], s["epsilon_cap"]) for s in lines] == [
        ("gone", "approval-withdrawn", None),
        ("study-one", "approved", 3.0),
    ]
    shown = CliRunner().invoke(
        build(), ["site", "studies", "study-one", "--site-dir", str(site.root), "--format", "json"]
    )
    assert json.loads(shown.stdout.splitlines()[-1])["data"]["line"]["digest"] == study.digest
    unknown = CliRunner().invoke(build(), ["site", "studies", "nothing", "--site-dir", str(site.root)])
    assert unknown.exit_code == 4


def test_the_command_signs_a_narrower_cap(site: SiteFolder, study: Study, tmp_path: Path) -> None:
    file = tmp_path / "study.json"
    file.write_bytes(study.to_bytes())
    approve = ["site", "approve", str(file), "--site-dir", str(site.root), "--yes"]
    assert CliRunner().invoke(build(), [*approve, "--epsilon-cap", "2"]).exit_code == 0
    assert ApprovalBook(site).approval(study).epsilon_cap == 2.0
    assert CliRunner().invoke(build(), [*approve, "--epsilon-cap", "20"]).exit_code == 4
    assert ApprovalBook(site).approval(study).epsilon_cap == 2.0


def test_who_approves_a_masked_study_reads_the_keys_to_compare_as_their_owners_read_them(
    site: SiteFolder, tmp_path: Path
) -> None:
    peers = {name: SigningKey.generate() for name in ("north", "west")} | {"east": key_of(site)}
    identities = tuple(
        SiteKey(site=name, approval_key=key.verify_key.to_pem().decode())
        for name, key in sorted(peers.items())
    )
    masking = MaskingSettings(threshold=2, coordinate_bound=0.5, identities=identities)
    study = make_study(aggregation=AggregationSettings(masking=masking), sites=tuple(sorted(peers)))
    file = tmp_path / "study.json"
    file.write_bytes(study.to_bytes())
    approve = CliRunner().invoke(
        build(), ["site", "approve", str(file), "--site-dir", str(site.root), "--yes"]
    )
    own = CliRunner().invoke(build(), ["key", "show", str(site.approval_key.with_suffix(".pub"))])
    assert approve.exit_code == own.exit_code == 0
    assert "the sum of at least 3 sites" in approve.stderr, "a threshold of two sums no fewer than three"
    for name, key in peers.items():
        assert f"{name}  {key.verify_key.key_id}" in approve.stderr
    assert own.stdout.splitlines()[0] in approve.stderr
    plain = tmp_path / "plain.json"
    plain.write_bytes(make_study().to_bytes())
    said = CliRunner().invoke(build(), ["site", "approve", str(plain), "--site-dir", str(site.root), "--yes"])
    assert "the coordinator sees each update of this site" in said.stderr
