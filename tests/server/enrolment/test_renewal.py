"""Kits renewed and revoked, lists that only grow, and everything that ends announced ahead."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pixcell_core.contracts.canonical import load_document
from pixcell_core.contracts.enrolment import EnrolmentRequest, RevocationList
from pixcell_core.trust.certificates import (
    party_of,
)
from pixcell_core.trust.expiry import days_left, expiry_warning
from pixcell_core.trust.keys import SigningKey
from pixcell_core.trust.kits import open_revocations, sign_revocations
from server.enrolment import kits as kits_module
from server.enrolment.kits import KitBook, expiry_warnings
from server.enrolment.revocations import RevocationWatch, read_revocations, revocations_file
from server.enrolment.sites import SiteBook
from server.layout import ServerLayout
from site_client.approvals.enrolment import enrol
from site_client.approvals.kit import install_kit
from site_client.approvals.site_folder import SiteFolder
from tests.server.enrolled import Enrolment
from tests.server.enrolment.refusals import NOW, code_of
from tests.server.enrolment.test_signing import exchanged


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
