"""The offline commands as a person calls them: output, envelope, exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from pixcell_core.cli.trust_commands import register
from pixcell_core.trust.dsse import Envelope
from pixcell_core.trust.keys import SigningKey, VerifyKey
from pixcell_core.trust.log import EventLog


def run(*arguments: object) -> Result:
    root = typer.Typer()
    register(root)
    return CliRunner().invoke(root, [str(argument) for argument in arguments])


@pytest.fixture
def log(tmp_path: Path) -> EventLog:
    made = EventLog(tmp_path / "log", SigningKey.generate())
    for number in range(3):
        made.append("release.sealed", {"number": number})
    return made


def test_log_verify_show_and_head(log: EventLog, tmp_path: Path) -> None:
    result = run("log", "verify", log.folder)
    assert result.exit_code == 0
    assert "✓ 3 events" in result.stdout
    assert "whose it is was not checked" in result.stdout
    result = run("log", "verify", log.folder, "--key", log.folder / "log.pub", "--format", "json")
    data = json.loads(result.stdout)
    assert (data["status"], data["data"]["entries"], data["data"]["key_trusted"]) == ("ok", 3, True)
    assert "release.sealed" in run("log", "show", log.folder, "--last", 1).stdout
    assert run("log", "head", log.folder, "--out", tmp_path / "head").exit_code == 0
    assert Envelope.load(tmp_path / "head") == log.head()
    log.append("release.sealed", {})
    result = run("log", "verify", log.folder, "--head", tmp_path / "head")
    assert "✓ 1 earlier head(s)" in result.stdout


def test_log_verify_names_the_wrong_line_and_exits_1(log: EventLog) -> None:
    path = log.folder / "log.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"number":1', b'"number":7'))
    result = run("log", "verify", log.folder, "--format", "json")
    assert result.exit_code == 1
    body = json.loads(result.stdout)
    assert (body["status"], body["code"]) == ("error", "log-broken")
    assert "Line 2" in body["message"]
    assert run("log", "show", log.folder).exit_code == 1


def test_bad_input_exits_4(tmp_path: Path) -> None:
    for arguments in (
        ("log", "verify", tmp_path),
        ("release", "verify", tmp_path / "nowhere"),
        ("key", "show", tmp_path / "nowhere"),
    ):
        result = run(*arguments, "--format", "json")
        assert result.exit_code == 4, result.stdout
        assert json.loads(result.stdout)["hint"]
    empty = EventLog(tmp_path / "log", SigningKey.generate())
    assert run("log", "head", empty.folder).exit_code == 4


def test_keys(tmp_path: Path) -> None:
    result = run("key", "new", tmp_path / "auditor")
    assert result.exit_code == 0
    key = SigningKey.load(tmp_path / "auditor")
    assert key.key_id in result.stdout
    assert VerifyKey.load(tmp_path / "auditor.pub") == key.verify_key
    assert run("key", "new", tmp_path / "auditor").exit_code == 1, "never writes over a key"
    assert SigningKey.load(tmp_path / "auditor").key_id == key.key_id
    assert run("key", "show", tmp_path / "auditor.pub", "--format", "json").exit_code == 0
    assert run("key", "show", tmp_path / "auditor").exit_code == 4, "a private key is not shown around"


def test_a_folder_that_is_no_bundle_is_refused_with_the_failed_check(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "README.txt").write_text("hello")
    result = run("release", "verify", tmp_path / "bundle")
    assert result.exit_code == 1
    assert "✗ form" in result.stderr
    shutil.rmtree(tmp_path / "bundle")
    (tmp_path / "bundle.zip").write_bytes(b"PK")
    assert run("release", "verify", tmp_path / "bundle.zip", "--format", "json").exit_code == 1
    assert run("release", "verify", tmp_path / "bundle.zip", "--threshold", 2).exit_code == 4
