"""The consortium's certificate authority: sealed, renewed, over, and interrupted while it is made."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import pytest

from pixcell_core.contracts.canonical import load_document
from pixcell_core.trust.certificates import (
    authority_key,
    read_authority,
    read_certificate,
)
from server.enrolment.authority import Authority
from server.enrolment.pki import hosts_of, initialise, renew_hub
from server.enrolment.revocations import read_revocations
from server.enrolment.sealed_key import SealedKey, read_passphrase
from server.hub.service import check_start
from server.layout import ServerLayout
from tests.server.enrolled import PASSPHRASE, Enrolment, write_passphrase
from tests.server.enrolment.refusals import NOW, code_of


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
