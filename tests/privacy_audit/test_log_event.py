"""An audit is an event: at a site of the site's log, with a key of one's own log, and nothing private is in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import typer

from pixcell_core.contracts.canonical import file_digest
from pixcell_core.trust.keys import SigningKey
from pixcell_core.trust.log import EventLog, read_entries, verify_log
from privacy_audit.log_event import AuditEvent
from privacy_audit.policy import load_policy
from tests.privacy_audit.conftest import Audited, World
from tests.privacy_audit.test_report_and_commands import _quick_policy, call, cli

__all__ = ["cli"]


@pytest.fixture
def site(world: World, tmp_path: Path) -> Path:
    """A site's folder with the world's patients and a log."""
    folder = tmp_path / "site"
    shutil.copytree(world.train.parent, folder)
    (folder / "keys").mkdir()
    SigningKey.generate().save(folder / "keys" / "release")
    EventLog(folder / "log", SigningKey.load(folder / "keys" / "release")).append("site.enrolled", {})
    return folder


def run(cli: typer.Typer, site: Path, out: Path, *more: str | Path) -> tuple[int, dict[str, object]]:
    policy = out.parent / "policy.yaml"
    policy.write_text(_quick_policy())
    result = call(
        cli, "run", "--train", site / "train", "--holdout", site / "holdout", "--synthetic", site / "dishonest",
        "--out", out, "--policy", policy, "--seed", "1", "--format", "json", *more,
    )  # fmt: skip
    return result.exit_code, json.loads(result.stdout)


def test_a_run_at_a_site_is_in_the_sites_log_and_the_auditors(
    cli: typer.Typer, site: Path, tmp_path: Path
) -> None:
    SigningKey.generate().save(tmp_path / "auditor.key")
    code, _ = run(cli, site, tmp_path / "out", "--key", tmp_path / "auditor.key")
    assert code == 1, "a FAIL is on record like a PASS"
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    events = [read_entries(folder)[-1] for folder in (site / "log", tmp_path / "auditor.key.log")]
    for event in events:
        assert event.kind == "audit.run"
        assert event.data == {
            "verdict": "FAIL",
            "tiles_root": report["subjects"]["synthetic"]["root"],
            "policy": load_policy(str(tmp_path / "policy.yaml")).digest,
            "report": file_digest(tmp_path / "out" / "report.json"),
            "evidence": report["evidence_digest"],
        }
    for folder in (site / "log", tmp_path / "auditor.key.log"):
        verify_log(folder)


def test_a_run_that_cannot_be_recorded_is_refused_before_it_runs(
    cli: typer.Typer, site: Path, tmp_path: Path
) -> None:
    (site / "keys" / "release").unlink()
    code, body = run(cli, site, tmp_path / "out")
    assert (code, body["code"]) == (4, "site-log-closed") and not (tmp_path / "out").exists()
    code, body = run(cli, site, tmp_path / "out", "--log", tmp_path / "log")
    assert (code, body["code"]) == (4, "log-without-key")
    SigningKey.generate().save(tmp_path / "key")
    EventLog(tmp_path / "log", SigningKey.generate())
    code, body = run(cli, site, tmp_path / "out", "--key", tmp_path / "key", "--log", tmp_path / "log")
    assert (code, body["code"]) == (1, "log-of-another-key") and not (tmp_path / "out").exists()
    code, _ = run(cli, site, tmp_path / "out", "--key", tmp_path / "key")
    assert code == 1 and read_entries(tmp_path / "key.log")[-1].kind == "audit.run"
    assert len(read_entries(site / "log")) == 1


def test_the_event_holds_no_name_and_no_count(dishonest: Audited, world: World, tmp_path: Path) -> None:
    SigningKey.generate().save(tmp_path / "key")
    log = EventLog(tmp_path / "log", SigningKey.load(tmp_path / "key"))
    AuditEvent.of(dishonest.report, "sha256:" + "0" * 64, "sha256:" + "1" * 64).append_to(log, None)
    (event,) = log.entries()
    assert event.kind == "audit.decided"
    text = json.dumps(event.data)
    assert not any(folder.name in text for folder in world.train.iterdir())
    values = [value for name, value in event.data.items() if name != "verdict"]
    assert all(isinstance(value, str) and value.startswith("sha256:") for value in values)
