"""Kits: signed for whom was heard on the phone, for keys nobody shares; renewed, revoked, and verified at the site."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID

from pixcell_core.contracts.canonical import load_document
from pixcell_core.contracts.enrolment import EnrolmentRequest, Kit, RevocationList
from pixcell_core.errors import PixcellError
from pixcell_core.trust.certificates import (
    authority_key,
    party_of,
    public_key_digest,
    read_authority,
    read_certificate,
)
from pixcell_core.trust.dsse import Envelope
from pixcell_core.trust.expiry import days_left, expiry_warning
from pixcell_core.trust.keys import SigningKey
from pixcell_core.trust.kits import open_kit, open_revocations, sign_kit, sign_revocations
from server.enrolment import kits as kits_module
from server.enrolment.authority import Authority
from server.enrolment.kits import KitBook, expiry_warnings
from server.enrolment.pki import hosts_of, initialise, renew_hub
from server.enrolment.revocations import RevocationWatch, read_revocations, revocations_file
from server.enrolment.sealed_key import SealedKey, read_passphrase
from server.enrolment.sites import SiteBook
from server.hub.service import check_start
from server.layout import ServerLayout
from site_client.approvals.enrolment import enrol
from site_client.approvals.kit import install_kit, installed_kit
from site_client.approvals.site_folder import SiteFolder
from tests.server.enrolled import PASSPHRASE, Enrolment, make_enrolment, write_passphrase

NOW = datetime.now(UTC).replace(microsecond=0)


@pytest.fixture
def made(tmp_path: Path) -> Enrolment:
    """A new consortium."""
    return make_enrolment(tmp_path)


def code_of(act: Any, *arguments: Any, **more: Any) -> str:
    """The code of the refusal that `act` must meet."""
    with pytest.raises(PixcellError) as refused:
        act(*arguments, **more)
    assert refused.value.hint and refused.value.exit_code in (1, 4)
    return refused.value.code


def read_kit(path: Path, ca: Path) -> Kit:
    """A kit file, verified."""
    return open_kit(Envelope.load(path), read_authority(ca.read_bytes()))


# --- the consortium ---------------------------------------------------------------------------------------------------


def test_the_ca_key_lies_sealed_and_can_live_elsewhere(tmp_path: Path) -> None:
    layout, stick = ServerLayout(tmp_path / "server"), tmp_path / "stick"
    initialise(layout, ["hub.example.org"], PASSPHRASE, ca_dir=stick)
    assert not (layout.pki / "ca.key").exists()
    assert (stick / "ca.key").stat().st_mode & 0o777 == 0o600
    authority = Authority.open(layout.pki / "ca.crt", stick, PASSPHRASE)
    assert authority.signing_key.verify_key == authority_key(authority.certificate)
    text = (stick / "ca.key").read_text()
    assert "PRIVATE" not in text and load_document(SealedKey, stick / "ca.key").kdf == "scrypt-17-8-1"
    assert code_of(Authority.open, layout.pki / "ca.crt", layout.pki, PASSPHRASE) == "no-ca-key"
    assert code_of(Authority.open, layout.pki / "ca.crt", stick, b"another passphrase") == "wrong-passphrase"
    other = ServerLayout(tmp_path / "other")
    assert code_of(initialise, other, ["h"], PASSPHRASE, ca_dir=stick) == "key-exists"
    initialise(other, ["h"], PASSPHRASE)
    assert code_of(Authority.open, layout.pki / "ca.crt", other.pki, PASSPHRASE) == "bad-ca-key"
    (stick / "ca.key").chmod(0o640)
    assert code_of(Authority.open, layout.pki / "ca.crt", stick, PASSPHRASE) == "key-file-exposed"


def test_every_changed_part_of_a_sealed_key_is_noticed(made: Enrolment) -> None:
    path = made.layout.pki / "ca.key"
    document = json.loads(path.read_text())
    for name in ("key_id", "salt", "nonce", "sealed"):
        text = document[name]
        spot = len(text) // 2
        changed = document | {name: text[:spot] + ("1" if text[spot] != "1" else "2") + text[spot + 1 :]}
        path.write_text(json.dumps(changed))
        assert code_of(Authority.open, made.ca, made.layout.pki, PASSPHRASE) == "wrong-passphrase"
    path.write_text("{}")
    assert code_of(Authority.open, made.ca, made.layout.pki, PASSPHRASE) == "bad-document"


def test_an_interrupted_init_is_done_again_and_a_finished_one_never(tmp_path: Path) -> None:
    layout = ServerLayout(tmp_path / "server")
    initialise(layout, ["h"], PASSPHRASE)
    assert code_of(initialise, layout, ["h"], PASSPHRASE) == "already-initialised"
    (layout.pki / "ca.crt").unlink()
    initialise(layout, ["h"], PASSPHRASE)
    Authority.open(layout.pki / "ca.crt", layout.pki, PASSPHRASE)
    assert read_revocations(layout, read_authority((layout.pki / "ca.crt").read_bytes())).number == 0


def test_a_passphrase_comes_by_a_private_file_or_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_passphrase(write_passphrase(tmp_path), new=True) == PASSPHRASE
    assert code_of(read_passphrase, write_passphrase(tmp_path, b"short"), new=True) == "short-passphrase"
    (tmp_path / "passphrase").chmod(0o644)
    assert code_of(read_passphrase, tmp_path / "passphrase") == "passphrase-exposed"
    assert code_of(read_passphrase, tmp_path / "nothing") == "document-unreadable"
    assert code_of(read_passphrase, None) == "no-passphrase"
    answers = iter(["a long passphrase", "another passphrase", "a long passphrase", "a long passphrase"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("getpass.getpass", lambda _: next(answers))
    assert code_of(read_passphrase, None, new=True) == "passphrases-differ"
    assert read_passphrase(None, new=True) == b"a long passphrase"


def test_the_hub_certificate_is_renewed_from_the_same_ca(made: Enrolment) -> None:
    old, ca = (made.layout.pki / "server.crt").read_bytes(), made.ca.read_bytes()
    renewed = renew_hub(made.layout, made.authority)
    fresh = read_certificate((made.layout.pki / "server.crt").read_bytes())
    assert hosts_of(fresh) == hosts_of(read_certificate(old)) == renewed.hosts
    assert fresh.serial_number != read_certificate(old).serial_number and made.ca.read_bytes() == ca
    assert (made.layout.pki / "server.key").stat().st_mode & 0o777 == 0o600
    assert renew_hub(made.layout, made.authority, ["new.example.org"]).hosts == ["new.example.org"]


def test_a_hub_with_an_expired_certificate_says_so_before_it_listens(
    made: Enrolment, capsys: pytest.CaptureFixture[str]
) -> None:
    made.party("east", days=20)
    check_start(made.layout)
    assert "The kit of east expires in" in capsys.readouterr().err
    renew_hub(made.layout, made.authority, now=NOW - timedelta(days=366))
    assert code_of(check_start, made.layout) == "server-certificate-expired"


def test_a_ca_that_is_over_signs_nothing(made: Enrolment) -> None:
    east = made.request("east")
    late = NOW + timedelta(days=3651)
    assert code_of(made.approve, east, now=late) == "ca-expired"
    short = made.approve(east, days=800, now=NOW + timedelta(days=3600))
    assert short.expires_at == made.authority.certificate.not_valid_after_utc, "never beyond the CA's own end"


# --- signing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["site", "auditor", "coordinator"])
def test_a_kit_carries_identity_role_and_node_key(made: Enrolment, role: str) -> None:
    folder = made.request("east")
    signed = made.approve(folder, role, days=100, hub="hub.example.org:9443")
    kit = read_kit(signed.kit, made.ca)
    certificate = read_certificate(kit.certificate.encode())
    named = party_of(certificate)
    assert (named.party, named.role, kit.version, signed.days_left) == ("east", role, 1, 100)
    assert (named.node_key is not None) == (role == "site")
    assert made.book.state("east").revoked is False
    assert SiteBook(made.layout.registry()).names() == (["east"] if role == "site" else [])
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]


def test_approving_the_same_request_again_gives_the_same_kit(made: Enrolment) -> None:
    folder = made.request("east")
    first, second = made.approve(folder), made.approve(folder)
    assert first.kit == second.kit and second.version == 1 and len(made.book.kits("east")) == 1


def test_digits_that_differ_sign_nothing(made: Enrolment) -> None:
    folder = made.request("east")
    true = load_document(EnrolmentRequest, folder.request).fingerprint
    for spoken in ("", true[:-1], "0000 " * 8, true.replace(true[0], "x")):
        assert (
            code_of(made.book.approve, folder.request, spoken, "site", made.authority)
            == "fingerprint-differs"
        )
    assert made.book.parties() == [] and SiteBook(made.layout.registry()).names() == []
    made.book.approve(folder.request, true.upper().replace(" ", ""), "site", made.authority)


def exchanged(request: EnrolmentRequest, **changes: Any) -> EnrolmentRequest:
    """The request with other parts."""
    return EnrolmentRequest.model_validate(request.model_dump() | changes)


def test_two_parties_never_share_a_key_or_a_name(made: Enrolment, tmp_path: Path) -> None:
    east, west = (load_document(EnrolmentRequest, made.request(n).request) for n in ("east", "west"))
    made.approve(SiteFolder(tmp_path / "east"))

    def answer(request: EnrolmentRequest, role: Any = "site") -> str:
        (tmp_path / "request.json").write_bytes(request.to_bytes())
        return code_of(
            made.book.approve, tmp_path / "request.json", request.fingerprint, role, made.authority
        )

    assert answer(exchanged(west, node_key=east.node_key)) == "shared-identity"
    assert answer(exchanged(west, approval_key=east.approval_key)) == "shared-identity"
    # Another's TLS request is signed for another name already.
    assert answer(exchanged(west, tls_request=east.tls_request)) == "bad-request"
    assert answer(exchanged(west, site="east")) == "bad-request"
    imposter = SiteFolder(tmp_path / "imposter")
    enrol(imposter, "east", "h:1", made.ca)
    assert answer(load_document(EnrolmentRequest, imposter.request)) == "site-exists"
    assert answer(east, "auditor") == "role-differs"
    assert made.book.parties() == ["east"]


def test_a_shared_tls_key_is_seen(made: Enrolment, tmp_path: Path) -> None:
    made.party("east")
    copied = SiteFolder(tmp_path / "west")
    copied.keys.mkdir(parents=True)
    copied.tls_key.write_bytes((tmp_path / "east" / "keys" / "tls.key").read_bytes())
    copied.tls_key.chmod(0o600)
    enrol(copied, "west", "h:1", made.ca)
    assert code_of(made.approve, copied) == "shared-identity"


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("tls_request", None, "request-without-tls"),
        (
            "tls_request",
            "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
            "bad-request",
        ),
        ("node_key", "ecdsa-sha2-nistp384 " + "A" * 120, "bad-input"),
        ("approval_key", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "bad-key-file"),
        ("site", "../east", "bad-document"),
        ("surprise", 1, "bad-document"),
    ],
)
def test_a_damaged_request_is_one_clear_error(
    made: Enrolment, tmp_path: Path, field: str, value: Any, code: str
) -> None:
    document = json.loads(made.request("east").request.read_bytes()) | {field: value}
    (tmp_path / "bad.json").write_text(json.dumps(document))
    assert code_of(made.book.approve, tmp_path / "bad.json", "", "site", made.authority) == code
    assert made.book.parties() == []


def test_a_request_whose_proof_of_possession_is_false_is_refused(made: Enrolment, tmp_path: Path) -> None:
    """Mutant: the public key in the PKCS#10 part is exchanged, its signature kept."""
    from cryptography.hazmat.primitives import hashes, serialization

    request = load_document(EnrolmentRequest, made.request("east").request)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "east")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    mine, theirs = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    der = serialization.Encoding.DER
    signed = builder.sign(mine, hashes.SHA384()).public_bytes(der)
    point = (serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    forged = signed.replace(mine.public_key().public_bytes(*point), theirs.public_key().public_bytes(*point))
    assert forged != signed
    text = x509.load_der_x509_csr(forged).public_bytes(serialization.Encoding.PEM).decode()
    (tmp_path / "bad.json").write_bytes(exchanged(request, tls_request=text).to_bytes())
    assert code_of(made.book.approve, tmp_path / "bad.json", "", "site", made.authority) == "bad-request"


# --- at the site ------------------------------------------------------------------------------------------------------


def test_a_site_installs_its_kit_and_what_it_refuses(made: Enrolment, tmp_path: Path) -> None:
    east = made.request("east")
    assert code_of(installed_kit, east) == "no-kit"
    signed = made.approve(east, hub="hub.example.org:9443", days=20)
    done = install_kit(east, signed.kit)
    assert (done.site, done.version, done.hub) == ("east", 1, "hub.example.org:9443")
    assert east.identity().hub == "hub.example.org:9443"
    install_kit(east, signed.kit)
    assert public_key_digest(read_certificate(east.tls_certificate.read_bytes()).public_key())
    assert days_left(installed_kit(east).expires_at, datetime.now(UTC)) == 19

    west = made.request("west")
    assert code_of(install_kit, east, made.approve(west).kit) == "kit-of-another-site"
    other = make_enrolment(tmp_path / "elsewhere", "theirs")
    foreign = other.approve(other.request("east")).kit
    assert code_of(install_kit, east, foreign) == "kit-of-another-consortium"
    assert installed_kit(east).version == 1


def test_expired_wrong_clock_and_older_kits_are_told_apart(made: Enrolment) -> None:
    east = made.request("east")
    first = made.approve(east, days=10, now=NOW).kit
    assert code_of(install_kit, east, first, NOW + timedelta(days=10)) == "kit-expired"
    assert code_of(install_kit, east, first, NOW - timedelta(days=1)) == "clock-wrong"
    assert not east.tls_certificate.exists()
    install_kit(east, first, NOW - timedelta(minutes=4))
    second = made.book.renew("east", made.authority, now=NOW).kit
    assert install_kit(east, second, NOW).version == 2
    before = east.tls_certificate.read_bytes()
    assert code_of(install_kit, east, first, NOW) == "kit-older"
    assert east.tls_certificate.read_bytes() == before


def test_a_kit_for_other_keys_is_refused(made: Enrolment, tmp_path: Path) -> None:
    east = made.request("east")
    kit = made.approve(east).kit
    twin = SiteFolder(tmp_path / "twin")
    enrol(twin, "east", "h:1", made.ca)
    assert code_of(install_kit, twin, kit) == "kit-of-other-keys"
    assert not twin.tls_certificate.exists()


def test_no_changed_kit_is_installed(made: Enrolment, tmp_path: Path) -> None:
    east = made.request("east")
    data = made.approve(east).kit.read_bytes()
    for position in range(0, len(data), 97):
        changed = bytearray(data)
        changed[position] ^= 1
        (tmp_path / "changed").write_bytes(bytes(changed))
        code_of(install_kit, east, tmp_path / "changed")
    assert not east.tls_certificate.exists() and not east.kit.exists()


def test_a_kit_whose_parts_disagree_is_refused_although_the_ca_signed_it(
    made: Enrolment, tmp_path: Path
) -> None:
    east, west = made.request("east"), made.request("west")
    kit = read_kit(made.approve(east).kit, made.ca)
    theirs = read_kit(made.approve(west).kit, made.ca)
    key = made.authority.signing_key
    for change in (
        {"certificate": theirs.certificate},
        {"role": "coordinator"},
        {"party": "west"},
        {"node_key": theirs.node_key},
        {"expires_at": kit.expires_at + timedelta(days=1)},
        {"consortium": "sha256:" + "0" * 64},
    ):
        wrong = Kit.model_validate(kit.model_dump() | change)
        (tmp_path / "wrong").write_bytes(sign_kit(wrong, key).to_bytes())
        assert code_of(install_kit, east, tmp_path / "wrong") == "kit-inconsistent", change
    stranger = sign_kit(kit, SigningKey.generate())
    (tmp_path / "wrong").write_bytes(stranger.to_bytes())
    assert code_of(install_kit, east, tmp_path / "wrong") == "kit-of-another-consortium"
    # A revocation list is no kit, although the same key signs both.
    empty = RevocationList(consortium=kit.consortium, number=1, issued_at=NOW)
    (tmp_path / "wrong").write_bytes(sign_revocations(empty, key).to_bytes())
    assert code_of(install_kit, east, tmp_path / "wrong") == "wrong-payload-type"


def test_the_ca_must_be_the_one_that_was_read_aloud(made: Enrolment, tmp_path: Path) -> None:
    other = make_enrolment(tmp_path / "elsewhere", "theirs")
    spoken = "sha256:" + read_authority(made.ca.read_bytes()).fingerprint(x509_sha256()).hex()
    folder = SiteFolder(tmp_path / "east")
    assert code_of(enrol, folder, "east", "h:1", other.ca, ca_fingerprint=spoken) == "ca-differs"
    assert not folder.root.exists()
    enrol(folder, "east", "h:1", made.ca, ca_fingerprint=spoken.upper())
    install_kit(folder, made.approve(folder).kit)
    assert code_of(enrol, folder, "east", "h:1", other.ca) == "another-consortium"


def x509_sha256() -> Any:
    """The hash of fingerprints."""
    from cryptography.hazmat.primitives import hashes

    return hashes.SHA256()


# --- renewal and revocation -------------------------------------------------------------------------------------------


def test_a_renewed_kit_keeps_the_keys_and_the_old_certificate_lives_on(made: Enrolment) -> None:
    made.party("east")
    old = made.book.kits("east")[0]
    renewed = made.book.renew("east", made.authority, days=29)
    assert renewed.version == 2 and renewed.warning and not renewed.revoked
    kits = made.book.kits("east")
    assert kits[0] == old and kits[1].node_key == old.node_key
    assert code_of(made.book.renew, "nobody", made.authority) == "unknown-party"


def test_revoking_one_party_touches_no_other_and_the_number_only_grows(made: Enrolment) -> None:
    made.party("east")
    made.book.renew("east", made.authority)
    made.party("west")
    done = made.book.revoke("east", made.authority, reason="key lost")
    assert (done.certificates, done.number) == (2, 1)
    assert [s.revoked for s in made.book.states()] == [True, False]
    assert code_of(made.book.revoke, "east", made.authority) == "kit-revoked"
    assert code_of(made.book.renew, "east", made.authority) == "kit-revoked"
    assert made.book.revoke("west", made.authority).number == 2
    listed = read_revocations(made.layout, made.authority.certificate)
    assert len(listed.revoked) == 3 and listed.revoked[0].reason == "key lost"


def test_after_a_revocation_only_a_new_tls_key_comes_back(made: Enrolment) -> None:
    east = made.party("east")
    made.book.revoke("east", made.authority)
    assert code_of(made.approve, east) == "key-revoked"
    enrol(east, "east", "127.0.0.1:1", made.ca, new_tls_key=True)
    assert east.next_tls_key.exists()
    request = east.request.read_bytes()
    enrol(east, "east", "127.0.0.1:1", made.ca)
    assert east.request.read_bytes() == request, "a second run does not lose the new key"
    old = east.tls_key.read_bytes()
    done = install_kit(east, made.approve(east).kit)
    assert done.version == 2 and east.tls_key.read_bytes() != old and not east.next_tls_key.exists()
    assert not made.book.state("east").revoked


def test_the_watch_takes_up_new_lists_and_never_goes_back(made: Enrolment) -> None:
    made.party("east")
    made.party("west")
    file, problems = revocations_file(made.layout), []
    watch = RevocationWatch(made.layout, made.authority.certificate, problems.append)
    empty = file.read_bytes()
    east, west = (state.serial for state in made.book.states())
    assert not watch.is_revoked(east)
    made.book.revoke("east", made.authority)
    assert watch.is_revoked(east) and not watch.is_revoked(west) and watch.number == 1
    for bad, problem in (
        (empty, "revocations-rolled-back"),
        (b"", "bad-envelope"),
        (None, "no-revocations"),
    ):
        file.unlink(missing_ok=True)
        if bad is not None:
            file.write_bytes(bad)
        assert watch.is_revoked(east) and problems[-1] == problem
    forged = RevocationList(consortium=made.book.kits("east")[0].consortium, number=9, issued_at=NOW)
    file.write_bytes(sign_revocations(forged, SigningKey.generate()).to_bytes())
    assert watch.is_revoked(east) and problems[-1] == "signature-refused"
    # Even a list the CA signed lets nobody in again while the hub runs.
    file.write_bytes(sign_revocations(forged, made.authority.signing_key).to_bytes())
    assert watch.is_revoked(east) and watch.number == 9


def test_a_list_of_another_consortium_is_refused(made: Enrolment) -> None:
    foreign = RevocationList(consortium="sha256:" + "1" * 64, number=1, issued_at=NOW)
    envelope = sign_revocations(foreign, made.authority.signing_key)
    assert (
        code_of(open_revocations, envelope, made.authority.certificate) == "revocations-of-another-consortium"
    )


def test_what_an_older_folder_knows_counts_before_anything_is_signed(made: Enrolment, tmp_path: Path) -> None:
    """Sites of before there were kits stand in the book alone."""
    request = load_document(EnrolmentRequest, made.request("east").request)
    old = request.model_copy(update={"schema_version": "enrolment-request/v1", "tls_request": None})
    (tmp_path / "old.json").write_bytes(old.to_bytes())
    SiteBook(made.layout.registry()).add(tmp_path / "old.json")
    imposter = SiteFolder(tmp_path / "imposter")
    enrol(imposter, "east", "h:1", made.ca)
    assert code_of(made.approve, imposter) == "site-exists"
    other = exchanged(load_document(EnrolmentRequest, made.request("west").request), node_key=old.node_key)
    (tmp_path / "west.json").write_bytes(other.to_bytes())
    said = code_of(made.book.approve, tmp_path / "west.json", other.fingerprint, "site", made.authority)
    assert said == "shared-identity" and made.book.parties() == []
    assert made.approve(SiteFolder(tmp_path / "east")).version == 1, "the same site gets its kit"


def test_versions_are_given_once_however_many_sign_at_a_time(made: Enrolment) -> None:
    made.party("east")
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: KitBook(made.layout).renew("east", made.authority), range(6)))
    assert sorted(kit.version for kit in done) == [2, 3, 4, 5, 6, 7]
    assert [kit.version for kit in made.book.kits("east")] == [1, 2, 3, 4, 5, 6, 7]


def test_an_interrupted_approval_is_completed_by_the_next(made: Enrolment, monkeypatch: Any) -> None:
    east = made.party("east")
    enrol(east, "east", "h:1", made.ca, new_tls_key=True)
    real = kits_module.write_atomically

    def stops_at_the_request(path: Path, data: bytes, **more: Any) -> None:
        if path.name == "request.json":
            raise OSError("power cut")
        real(path, data, **more)

    monkeypatch.setattr(kits_module, "write_atomically", stops_at_the_request)
    with pytest.raises(OSError):
        made.approve(east)
    monkeypatch.undo()
    assert install_kit(east, made.approve(east).kit).version == 2
    assert made.book.renew("east", made.authority).version == 3
    assert install_kit(east, made.book.state("east").kit).version == 3, "for the new key, not the old one"


# --- expiry -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "days", "warned"),
    [
        (timedelta(days=31), 31, False),
        (timedelta(days=30), 30, False),
        (timedelta(days=30, seconds=-1), 29, True),
        (timedelta(seconds=1), 0, True),
        (timedelta(0), 0, True),
        (timedelta(seconds=-1), -1, True),
    ],
)
def test_expiry_is_warned_of_thirty_days_ahead(left: timedelta, days: int, warned: bool) -> None:
    assert days_left(NOW + left, NOW) == days
    warning = expiry_warning("The kit of east", NOW + left, NOW)
    assert (warning is not None) == warned
    if warning is not None:
        assert warning.expired == (days < 0) and "kit renew" in str(warning)


def test_the_board_hears_of_everything_that_ends_soon(made: Enrolment) -> None:
    made.party("east", days=400)
    made.party("west", days=20)
    made.party("north", days=10)
    made.book.revoke("north", made.authority)

    def named(days: int) -> list[str]:
        return [w.what for w in expiry_warnings(made.layout, NOW + timedelta(days=days))]

    assert named(0) == ["The kit of west"]
    assert named(340) == ["The hub's certificate", "The kit of west"]
    assert len(named(3640)) == 4


def test_a_certificate_that_names_nobody_or_two_is_no_party(made: Enrolment) -> None:
    def certify(*uris: str) -> x509.Certificate:
        key = Ed25519PrivateKey.generate()
        name = x509.Name([])
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(7)
            .not_valid_before(NOW)
            .not_valid_after(NOW + timedelta(days=1))
        )
        if uris:
            names = [x509.UniformResourceIdentifier(uri) for uri in uris]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(key, None)

    assert party_of(certify("urn:pixcell:site:east")).serial == "7"
    for uris in (
        (),
        ("urn:pixcell:king:east",),
        ("urn:pixcell:site:../x",),
        ("urn:pixcell:site:east", "urn:pixcell:coordinator:east"),
        ("urn:pixcell:site:east", "https://east.example.org"),
        ("urn:pixcell:site:east", "urn:pixcell:node-key:12"),
        ("urn:pixcell:site:east\n",),
    ):
        assert code_of(party_of, certify(*uris)) == "bad-certificate", uris


def test_a_book_of_a_folder_that_is_none_says_so(tmp_path: Path) -> None:
    assert code_of(KitBook, ServerLayout(tmp_path)) == "document-unreadable"
