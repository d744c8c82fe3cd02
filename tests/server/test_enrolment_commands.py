"""`pixcell init`, `pixcell kit …` and the site's half, as people type them: results, exit codes, and what is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from server.enrolment import commands as server_commands
from server.enrolment.kit_state import KitShown
from site_client.approvals import commands as site_commands
from tests.server.enrolled import make_enrolment, write_passphrase


class Desk:
    """The commands, a coordinator's folder and a site's."""

    def __init__(self, root: Path) -> None:
        self.root = root
        made = make_enrolment(root)
        self.server, self.ca = made.layout.root, made.ca
        self.secret = ["--passphrase-file", str(write_passphrase(root))]
        self.app = typer.Typer()
        self.app.callback()(lambda: None)
        server_commands.register(self.app)
        site_commands.register(self.app)

    def run(self, *arguments: str | Path, expect: int = 0) -> Any:
        """The data of a command's envelope, or the error."""
        result = CliRunner().invoke(self.app, [*map(str, arguments), "--format", "json"])
        assert result.exit_code == expect, result.output
        body = json.loads(result.stdout)
        assert body["status"] == ("ok" if expect == 0 else "error")
        return body["data"] if expect == 0 else body

    def kit(self, verb: str, *arguments: str | Path, expect: int = 0) -> Any:
        """A `kit` command that opens the CA's key."""
        return self.run("kit", verb, *arguments, "--dir", self.server, *self.secret, expect=expect)

    def enroll(self, name: str = "east", *more: str, expect: int = 0) -> Any:
        """`site enroll`."""
        where = ("--site-dir", self.root / name, "--name", name, "--hub", "h:1", "--ca", self.ca)
        return self.run("site", "enroll", *where, *more, expect=expect)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_the_whole_road_of_a_site(desk: Desk) -> None:
    made = desk.enroll()
    kit = desk.kit("approve", made["request"], "--fingerprint", made["fingerprint"], "--hub", "hub:9443")
    assert (kit["role"], kit["version"], kit["revoked"]) == ("site", 1, False) and kit["days_left"] >= 364
    done = desk.run("site", "install-kit", kit["kit"], "--site-dir", desk.root / "east")
    assert done["hub"] == "hub:9443" and done["version"] == 1
    listed = desk.run("kit", "list", "--dir", desk.server)["kits"]
    assert [(k["party"], k["fingerprint"]) for k in listed] == [("east", made["fingerprint"])]
    renewed = desk.kit("renew", "east", "--days", "20")
    assert renewed["version"] == 2 and "kit renew east" in renewed["warning"]
    shown = desk.run("kit", "show", "east", "--dir", desk.server)
    assert [shown[k] for k in ("serial", "version", "kit")] == [
        renewed[k] for k in ("serial", "version", "kit")
    ]
    assert str(KitShown(**shown)).splitlines()[-1] == f"  {renewed['kit']}"
    desk.run("site", "install-kit", renewed["kit"], "--site-dir", desk.root / "east")
    older = desk.run("site", "install-kit", kit["kit"], "--site-dir", desk.root / "east", expect=1)
    assert older["code"] == "kit-older"
    assert desk.kit("revoke", "east", expect=4)["code"] == "needs-yes"
    assert desk.kit("revoke", "east", "--yes", "--reason", "left")["number"] == 1
    assert desk.run("kit", "show", "east", "--dir", desk.server)["revoked"] is True
    assert desk.kit("renew", "east", expect=1)["code"] == "kit-revoked"


def test_init_asks_for_a_passphrase_and_never_does_without(desk: Desk, tmp_path: Path) -> None:
    fresh = tmp_path / "fresh"
    refused = desk.run("init", "--dir", fresh, expect=4)
    assert refused["code"] == "no-passphrase" and "--passphrase-file" in refused["hint"]
    assert not fresh.exists()
    stick = tmp_path / "stick"
    made = desk.run("init", "--dir", fresh, "--host", "hub.example.org", "--ca-dir", stick, *desk.secret)
    assert made["ca_key"] == str(stick / "ca.key") and not (fresh / "pki" / "ca.key").exists()
    assert desk.run("init", "--dir", fresh, *desk.secret, expect=1)["code"] == "already-initialised"
    missing = desk.run("kit", "renew-hub", "--dir", fresh, *desk.secret, expect=4)
    assert missing["code"] == "no-ca-key" and "--ca-dir" in missing["hint"]
    renewed = desk.run("kit", "renew-hub", "--dir", fresh, "--ca-dir", stick, *desk.secret)
    assert "hub.example.org" in renewed["hosts"]


def test_a_wrong_passphrase_signs_nothing(desk: Desk, tmp_path: Path) -> None:
    made = desk.enroll()
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    desk.secret = ["--passphrase-file", str(write_passphrase(wrong, b"not the right words"))]
    said = desk.kit("approve", made["request"], "--fingerprint", made["fingerprint"], expect=1)
    assert said["code"] == "wrong-passphrase"
    assert desk.run("kit", "list", "--dir", desk.server)["kits"] == []


@pytest.mark.parametrize(
    ("more", "code", "expect"),
    [
        ((), "needs-fingerprint", 4),
        (("--fingerprint", "0000 0000"), "fingerprint-differs", 1),
        (("--fingerprint", "0", "--role", "king"), "unknown-role", 4),
        (("--fingerprint", "0", "--hub", "https://hub"), "bad-hub-address", 4),
    ],
)
def test_what_approve_refuses(desk: Desk, more: tuple[str, ...], code: str, expect: int) -> None:
    made = desk.enroll()
    assert desk.kit("approve", made["request"], *more, expect=expect)["code"] == code
    assert desk.run("kit", "list", "--dir", desk.server)["kits"] == []


def test_unknown_parties_and_missing_kits_are_named(desk: Desk) -> None:
    for verb, more in (("renew", ()), ("revoke", ("--yes",))):
        assert desk.kit(verb, "nobody", *more, expect=4)["code"] == "unknown-party"
    assert desk.run("kit", "show", "../sites", "--dir", desk.server, expect=4)["code"] == "unknown-party"
    desk.enroll()
    nothing = desk.run("site", "install-kit", desk.root / "none", "--site-dir", desk.root / "east", expect=4)
    assert nothing["code"] == "document-unreadable"
    stranger = desk.run("site", "install-kit", desk.root / "none", "--site-dir", desk.root / "x", expect=4)
    assert stranger["code"] == "not-enrolled"


def test_the_site_compares_the_ca_it_was_read(desk: Desk) -> None:
    refused = desk.enroll("east", "--ca-fingerprint", "sha256:" + "0" * 64, expect=1)
    assert refused["code"] == "ca-differs"
    made = desk.enroll("east")
    again = desk.enroll("east", "--ca-fingerprint", made["hub_ca_fingerprint"])
    assert again == made
    assert desk.enroll("east", "--new-tls-key")["fingerprint"] != made["fingerprint"]


def test_people_read_what_to_do_next(desk: Desk) -> None:
    made = desk.enroll()
    runner = CliRunner()
    arguments = ["kit", "approve", made["request"], "--dir", str(desk.server), *desk.secret]
    said = runner.invoke(desk.app, [*arguments, "--fingerprint", made["fingerprint"]])
    assert said.exit_code == 0 and "pixcell site install-kit" in said.stdout
    said = runner.invoke(desk.app, ["kit", "list", "--dir", str(desk.server)])
    assert "east  site  version 1" in said.stdout and "days left" in said.stdout
