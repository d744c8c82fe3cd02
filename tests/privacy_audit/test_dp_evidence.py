"""The claim of differential privacy against charges and canaries: contradictions fail, absence is said aloud."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pixcell_core.contracts.canonical import digest
from pixcell_core.errors import PixcellError
from pixcell_core.private.accounting import epsilon
from pixcell_core.private.events import GaussianEvent
from pixcell_core.private.ledger_record import (
    FIRST_HASH,
    OpenedRecord,
    ReserveRecord,
    encode_line,
    encode_public_key,
)
from pixcell_core.trust.keys import SigningKey
from privacy_audit import dp_evidence
from privacy_audit.ledger_export import LedgerTrust, read_ledger_export, sealed_manifest
from privacy_audit.policy import load_policy
from privacy_audit.result import Status

POLICY = load_policy("core")
KEY, OTHER = SigningKey.generate(), SigningKey.generate()
TRUST = LedgerTrust(KEY.verify_key)
STATED = (
    '{"schema_version": "budget-export/v1", "lines": [], '
    '"statement": {"unit": "patient", "delta": 1e-5, "epsilon_spent": %s}}'
)
TRUE = epsilon([GaussianEvent(1.0, 6.0, 20)] * 2, 1e-5).value
Change = Callable[[dict[str, Any]], object]


def lines(key: SigningKey = KEY, site: str = "north", rounds: int = 2) -> list[dict[str, Any]]:
    """A ledger as a site writes it: opened, then one charge a round, each chained and signed."""
    found: list[dict[str, Any]] = []
    for number in range(rounds + 1):
        common: dict[str, Any] = {
            "sequence": number,
            "previous_hash": digest_of(found) if found else FIRST_HASH,
            "site": site,
            "time": f"2026-01-0{number + 1}T00:00:00Z",
        }
        record = (
            OpenedRecord(
                reason="created", cap_epsilon=8.0, cap_delta=1e-5,
                public_key=encode_public_key(key.verify_key), **common,
            )
            if number == 0
            else ReserveRecord(
                study="lung", round=number, purpose="training", sample_rate=1.0, noise_multiplier=6.0, steps=20,
                max_grad_norm=0.1, code_digest="sha256:" + "c" * 64, **common,
            )
        )  # fmt: skip
        found.append(json.loads(encode_line(record, key)))
    return found


def digest_of(found: list[dict[str, Any]]) -> str:
    return digest(found[-1]["record"])


def export(change: Change = lambda body: None, **more: Any) -> dict[str, Any]:
    """An export as `pixcell site budget export` writes it."""
    held = lines(**more)
    statement = {
        "site": "north", "unit": "patient", "epsilon_spent": TRUE, "delta": 1e-5, "cohorts": [], "records": len(held),
        "head": f"{len(held) - 1} {digest_of(held)}",
    }  # fmt: skip
    body = {"schema_version": "budget-export/v1", "statement": statement, "public_key": None, "lines": held}
    change(body)
    return body


def ledger(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps(export(lambda body: body["statement"].update(changes))))
    return path


def canaries(path: Path, **changes: Any) -> Path:
    report = {
        "canaries": 600, "epsilon_lower_bound": 1.2, "epsilon_claimed": TRUE, "delta": 1e-5, "unit": "patient", **changes,
    }  # fmt: skip
    path.write_text(json.dumps({"schema_version": "1", "status": "ok", "data": report}))
    return path


def status(tmp_path: Path, in_ledger: dict[str, Any] | None, in_report: dict[str, Any] | None) -> Status:
    evidence = dp_evidence.read(
        None if in_ledger is None else ledger(tmp_path / "l.json", **in_ledger),
        None if in_report is None else canaries(tmp_path / "c.json", **in_report),
        trust=TRUST,
    )
    return dp_evidence.result(evidence, POLICY).status


def test_a_claim_that_nothing_contradicts_passes(tmp_path: Path) -> None:
    assert status(tmp_path, {}, {}) is Status.PASS


@pytest.mark.parametrize(
    ("in_ledger", "in_report", "wanted"),
    [
        ({"epsilon_spent": TRUE - 0.5}, {}, Status.FAIL),  # claims less than it charged
        ({}, {"epsilon_lower_bound": 9.0}, Status.FAIL),  # canaries prove more than their run claims
        ({}, {"epsilon_lower_bound": None}, Status.FAIL),  # beyond every number
        ({}, {"canaries": 1, "epsilon_lower_bound": 0.0}, Status.REVIEW),  # one canary can refute nothing
        ({}, {"canaries": 100, "guesses": 50}, Status.REVIEW),  # nor can a hundred refute this claim
        ({}, {"epsilon_claimed": 50.0, "epsilon_lower_bound": 5.0, "measured_mu": 1.0}, Status.REVIEW),
        ({}, {"epsilon_claimed": TRUE * 1.2}, Status.REVIEW),  # another run than the ledger's
        ({}, {"epsilon_claimed": TRUE * 0.5}, Status.REVIEW),
        ({}, {"delta": 1e-6}, Status.REVIEW),
        ({}, {"epsilon_claimed": TRUE * 1.05}, Status.PASS),
        ({}, {"measured_mu": 1.0, "canaries": 50}, Status.PASS),  # canaries of gradients are no guesses
        ({}, {"unit": "tile"}, Status.REVIEW),  # canaries that protect tiles, not patients
        ({}, None, Status.REVIEW),
        (None, {}, Status.REVIEW),
    ],
)
def test_contradictions_fail_and_gaps_are_reviews(
    tmp_path: Path, in_ledger: dict[str, Any] | None, in_report: dict[str, Any] | None, wanted: Status
) -> None:
    assert status(tmp_path, in_ledger, in_report) is wanted


def test_a_run_that_could_refute_nothing_says_how_many_canaries_would(tmp_path: Path) -> None:
    found = dp_evidence.read(
        ledger(tmp_path / "l.json"), canaries(tmp_path / "c.json", canaries=100, guesses=50), trust=TRUST
    )
    said = dp_evidence.result(found, POLICY).why
    needed = dp_evidence.canaries_needed(0.5, TRUE, 1e-5)
    assert needed is not None and f"about {needed} canaries would do" in said
    assert dp_evidence.refutable(needed, needed // 2, TRUE, 1e-5)
    assert not dp_evidence.refutable(int(0.9 * needed), int(0.45 * needed), TRUE, 1e-5)
    # A thousand, all guessed and all right, prove 5.81 at most where delta is nothing.
    assert dp_evidence.refutable(1000, 1000, 5.8, 0.0) and not dp_evidence.refutable(1000, 1000, 5.82, 0.0)
    assert dp_evidence.canaries_needed(0.5, 50.0, 1e-5) is None


def test_absent_is_not_tested_and_gates_only_where_demanded() -> None:
    assert dp_evidence.read(None, None) is None
    found = dp_evidence.result(None, POLICY)
    assert not found.tested and not found.gating and "--ledger-export" in found.why
    assert dp_evidence.result(None, POLICY.model_copy(update={"required": ("dp",)})).gating


@pytest.mark.parametrize(
    "text",
    [
        "[]", "{}", "{", '{"schema_version": "budget-export/v1"}',
        STATED % "-1",
        '{"schema_version": "budget-export/v1", "lines": [1], "statement": {}}',
        STATED % '"2"', STATED % "null", STATED % "1e999",
    ],
)  # fmt: skip
def test_what_is_no_ledger_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "l.json").write_text(text)
    with pytest.raises(PixcellError) as caught:
        dp_evidence.read(tmp_path / "l.json", None, trust=TRUST)
    assert caught.value.exit_code == 4


def code_of(tmp_path: Path, body: dict[str, Any], **more: Any) -> str:
    (tmp_path / "l.json").write_text(json.dumps(body))
    with pytest.raises(PixcellError) as caught:
        read_ledger_export(tmp_path / "l.json", **{"trust": TRUST, **more})
    assert caught.value.exit_code == 1 and caught.value.hint and "l.json" in caught.value.message
    return caught.value.code


def rewritten(body: dict[str, Any]) -> None:
    """One charge dropped, and the chain written anew by someone without the site's key."""
    body["lines"] = lines(OTHER, rounds=1)


def resealed(body: dict[str, Any]) -> None:
    """A charge made smaller, its hash made to fit; the signature cannot be."""
    line = body["lines"][1]
    line["record"]["steps"] = 1
    line["hash"] = digest(line["record"])


def cut(body: dict[str, Any], honest: bool = False) -> None:
    del body["lines"][-1]
    if honest:
        body["statement"].update(records=2, head=f"1 {digest_of(body['lines'])}")


TAMPERED: list[tuple[str, Change, str]] = [
    ("no key fits", rewritten, "ledger-export-of-another"),
    ("an edited charge", lambda b: b["lines"][1]["record"].update(steps=1), "ledger-export-broken"),
    ("an edited charge with its hash", resealed, "ledger-export-broken"),
    ("unsigned", lambda b: [line.update(signature="") for line in b["lines"]], "ledger-export-broken"),
    ("without signatures", lambda b: [line.pop("signature") for line in b["lines"]], "ledger-export-broken"),
    ("another's signature", lambda b: b["lines"][1].update(signature=b["lines"][2]["signature"]), "ledger-export-broken"),
    ("a record left out", lambda b: b["lines"].pop(1), "ledger-export-broken"),
    ("two records swapped", lambda b: b["lines"].insert(1, b["lines"].pop(2)), "ledger-export-broken"),
    ("a record twice", lambda b: b["lines"].append(b["lines"][-1]), "ledger-export-broken"),
    ("no record", lambda b: b["lines"].clear(), "ledger-export-broken"),
    ("the beginning missing", lambda b: b["lines"].pop(0), "ledger-export-broken"),
    ("the end missing", cut, "ledger-export-cut"),
    ("another last record", lambda b: b["statement"].update(head="2 sha256:" + "0" * 64), "ledger-export-cut"),
    ("fewer counted", lambda b: b["statement"].update(records=2), "ledger-export-broken"),
    ("another site stated", lambda b: b["statement"].update(site="south"), "ledger-export-broken"),
    ("another unit stated", lambda b: b["statement"].update(unit="tile"), "ledger-export-broken"),
    ("a laxer delta stated", lambda b: b["statement"].update(delta=1e-2), "ledger-export-broken"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "code"), [pytest.param(c, code, id=what) for what, c, code in TAMPERED])
def test_an_export_that_is_not_what_the_site_signed_counts_for_nothing(
    tmp_path: Path, change: Change, code: str
) -> None:
    assert code_of(tmp_path, export(change)) == code


def test_a_true_export_is_read_and_needs_the_sites_key(tmp_path: Path) -> None:
    (tmp_path / "l.json").write_text(json.dumps(export()))
    found = read_ledger_export(tmp_path / "l.json", TRUST)
    assert (found.site, found.unit, len(found.charges)) == ("north", "patient", 2)
    assert found.recomputed == pytest.approx(TRUE)
    assert code_of(tmp_path, export(), trust=LedgerTrust()) == "ledger-export-unproven"
    assert code_of(tmp_path, export(), trust=LedgerTrust(OTHER.verify_key)) == "ledger-export-of-another"
    # Its own key proves nothing: an export that a stranger wrote whole is a stranger's.
    assert code_of(tmp_path, export(key=OTHER)) == "ledger-export-of-another"


def test_the_ledger_is_the_one_the_release_was_sealed_at(tmp_path: Path) -> None:
    from site_client.release.workspace import ReleaseWorkspace
    from tests.site_client.release.conftest import Room, write_surrogates

    site = tmp_path / "site"
    site.mkdir()
    room = Room(ReleaseWorkspace(site), write_surrogates(tmp_path / "surrogates"), tmp_path / "audits")
    release = room.draft()
    found = sealed_manifest(release.tiles)
    assert found is not None and found.site == "north" and sealed_manifest(tmp_path / "surrogates") is None
    body = export()
    manifest = found.model_copy(update={"ledger_head": digest_of(body["lines"])})
    (tmp_path / "l.json").write_text(json.dumps(body))
    read_ledger_export(tmp_path / "l.json", TRUST, manifest)
    # Cut honestly, with a statement to fit: the chain is whole, and only the release knows that it went on.
    shorter = export(lambda body: cut(body, honest=True))
    (tmp_path / "l.json").write_text(json.dumps(shorter))
    assert len(read_ledger_export(tmp_path / "l.json", TRUST).charges) == 1
    assert code_of(tmp_path, shorter, manifest=manifest) == "ledger-export-cut"
    south = manifest.model_copy(update={"site": "south"})
    assert code_of(tmp_path, body, manifest=south) == "ledger-export-of-another"
    # A ledger that went on after the seal is the same ledger.
    (tmp_path / "l.json").write_text(json.dumps(export(rounds=3)))
    read_ledger_export(tmp_path / "l.json", TRUST, manifest)


def test_a_real_ledgers_export_is_evidence(tmp_path: Path) -> None:
    """What `pixcell site budget export` writes, of a ledger that really charged."""
    from site_client.ledger.export import export_of
    from site_client.ledger.ledger import RoundCharge
    from site_client.ledger.site import ledger_folder, ledger_public_key, open_site_ledger
    from site_client.ledger.view import BudgetCap, read_ledger

    with open_site_ledger(tmp_path, site="north", cap=BudgetCap(8.0, 1e-5)) as held:
        charge = RoundCharge("lung", 1, 1.0, 6.0, 3, 0.1, "sha256:" + "c" * 64, "training", "all")
        with held.reserve(charge, at_a_time=3) as steps:
            steps(0)
    key = ledger_public_key(tmp_path)
    body = export_of(ledger_folder(tmp_path), read_ledger(ledger_folder(tmp_path), key)).model_dump_json()
    (tmp_path / "l.json").write_text(body)
    found = read_ledger_export(tmp_path / "l.json", LedgerTrust(key))
    assert found.recomputed == pytest.approx(found.claimed, rel=1e-6) and found.claimed > 0


@pytest.mark.parametrize(
    "change",
    [
        {"canaries": True},
        {"canaries": 0},
        {"epsilon_claimed": "8"},
        {"delta": None},
        {"guesses": 601},
        {"guesses": 0},
        {"guesses": True},
        {"guesses": "9"},
        {"measured_mu": 1.0, "canaries": 15},
    ],
)
def test_what_is_no_canary_report_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(PixcellError) as caught:
        dp_evidence.read(None, canaries(tmp_path / "c.json", **change))
    assert caught.value.exit_code == 4
    with pytest.raises(PixcellError):
        dp_evidence.read(None, tmp_path / "absent.json")


def test_an_enrolled_sites_kit_vouches_for_its_ledger(tmp_path: Path) -> None:
    """From the authority to the charges, without any key compared aloud; over, revoked, missing and foreign are refused."""
    from datetime import timedelta

    from pixcell_core.trust.certificates import read_authority
    from pixcell_core.trust.dsse import Envelope
    from pixcell_core.trust.vouched_keys import vouch
    from server.enrolment.revocations import revocations_file
    from tests.server.enrolled import make_enrolment

    made = make_enrolment(tmp_path)
    site, ca = made.party("north"), read_authority(made.ca.read_bytes())
    kit, approval = Envelope.load(site.kit), SigningKey.load(site.approval_key)
    now = datetime.now(UTC) + timedelta(hours=1)

    def with_certificate(envelope: Envelope) -> dict[str, Any]:
        return export(lambda body: body.update(certificate=envelope.model_dump()))

    true = vouch(kit, "north", KEY.verify_key, approval, now=now, purpose="ledger")
    body, trust = with_certificate(true), LedgerTrust(ca=ca, now=now)
    (tmp_path / "l.json").write_text(json.dumps(body))
    assert len(read_ledger_export(tmp_path / "l.json", trust).charges) == 2
    assert code_of(tmp_path, export(), trust=trust) == "ledger-export-unproven"
    late = LedgerTrust(ca=ca, now=now + timedelta(days=400))
    assert code_of_any(tmp_path, body, late) == "kit-expired"
    south = make_enrolment(tmp_path / "other", "theirs")
    theirs = LedgerTrust(ca=read_authority(south.ca.read_bytes()), now=now)
    assert code_of_any(tmp_path, body, theirs) == "kit-of-another-consortium"
    for envelope, code in (
        (vouch(kit, "north", KEY.verify_key, approval, now=now), "signer-certificate-refused"),
        (
            vouch(kit, "north", OTHER.verify_key, approval, now=now, purpose="ledger"),
            "signer-certificate-key",
        ),
        (vouch(kit, "north", KEY.verify_key, OTHER, now=now, purpose="ledger"), "signature-refused"),
    ):
        assert code_of_any(tmp_path, with_certificate(envelope), trust) == code
    resealed(body)
    assert code_of(tmp_path, body, trust=trust) == "ledger-export-broken"
    made.book.revoke("north", made.authority, reason="broken into")
    lists = (Envelope.load(revocations_file(made.layout)),)
    taken = LedgerTrust(ca=ca, now=now, revocations=lists)
    assert code_of_any(tmp_path, with_certificate(true), taken) == "signer-revoked"


def code_of_any(tmp_path: Path, body: dict[str, Any], trust: LedgerTrust) -> str:
    (tmp_path / "l.json").write_text(json.dumps(body))
    with pytest.raises(PixcellError) as caught:
        read_ledger_export(tmp_path / "l.json", trust)
    assert caught.value.exit_code == 1 and caught.value.hint
    return caught.value.code


def test_the_command_of_an_enrolled_site_puts_its_certificate_in(tmp_path: Path) -> None:
    from pixcell_core.trust.certificates import read_authority
    from site_client.ledger.ledger import RoundCharge
    from site_client.ledger.site import open_site_ledger
    from site_client.ledger.view import BudgetCap
    from tests.server.enrolled import make_enrolment
    from tests.server.processes import pixcell

    made = make_enrolment(tmp_path)
    site = made.party("north")
    with open_site_ledger(site.root, site="north", cap=BudgetCap(8.0, 1e-5)) as held:
        charge = RoundCharge("lung", 1, 1.0, 6.0, 3, 0.1, "sha256:" + "c" * 64, "training", "all")
        with held.reserve(charge, at_a_time=3) as steps:
            steps(0)
    pixcell("site", "budget", "export", "--site-dir", site.root, "--out", tmp_path / "l.json")
    trust = LedgerTrust(ca=read_authority(made.ca.read_bytes()), now=datetime.now(UTC))
    assert len(read_ledger_export(tmp_path / "l.json", trust).charges) == 1
    checked = pixcell("site", "budget", "verify", "--export", tmp_path / "l.json")
    assert checked
