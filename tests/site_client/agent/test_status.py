"""Status and link state: what counts as healthy, what is shown, and what a damaged file does."""

from __future__ import annotations

import json
import os
import signal
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pixcell_core.cli.main import build
from pixcell_core.errors import RefusedError
from pixcell_core.flower.processes import Child
from site_client.agent.link_record import LinkRecorder, read_link
from site_client.agent.link_trouble import LinkTrouble
from site_client.agent.status import site_status
from site_client.agent.supervisor import FRESH_S, Supervisor, SupervisorSettings, lock_agent
from site_client.approvals.book import ApprovalBook
from site_client.approvals.site_folder import SiteFolder
from tests.server.consortium import make_study
from tests.site_client.agent.peers import DAY, Authority, install_kit, make_site
from tests.site_client.agent.test_handlers import write_beat

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("pki") / "ours")


@pytest.fixture
def site(tmp_path: Path, authority: Authority) -> SiteFolder:
    return make_site(tmp_path, authority)


def recorder(site: SiteFolder, at: datetime) -> LinkRecorder:
    return LinkRecorder(site.agent, 1, lambda: at)


def test_a_site_that_was_never_started_is_not_healthy(site: SiteFolder) -> None:
    status = site_status(site)
    assert (status.healthy, status.state, status.last_heartbeat_at) == (False, "never-started", None)
    assert status.exit_code == 1


@pytest.mark.parametrize(
    ("age_s", "healthy"),
    [(0.0, True), (FRESH_S, True), (FRESH_S + 1, False), (86_400.0, False), (-2.0, True), (-60.0, False)],
)
def test_only_a_fresh_accepted_heartbeat_is_health(site: SiteFolder, age_s: float, healthy: bool) -> None:
    recorder(site, NOW - timedelta(seconds=age_s)).accepted()
    status = site_status(site, now=NOW)
    assert status.healthy is healthy and status.heartbeat_age_s == age_s
    assert status.exit_code == (0 if healthy else 1)


def test_a_state_file_that_says_connected_is_not_believed(site: SiteFolder) -> None:
    """The supervisor may hang too: what it wrote last is no proof of anything now."""
    (site.agent / "state.json").write_text(json.dumps({"state": "connected", "reason": ""}))
    recorder(site, NOW - timedelta(minutes=5)).accepted()
    assert site_status(site, now=NOW).state == "silent" and not site_status(site, now=NOW).healthy


def test_a_started_process_that_was_not_heard_is_not_healthy(site: SiteFolder) -> None:
    """The mutant `healthy = the process lives` would pass here: it just wrote its file."""
    recorder(site, NOW)
    assert not site_status(site, now=NOW).healthy


def test_the_trouble_is_shown_with_its_remedy_until_a_heartbeat_passes(site: SiteFolder) -> None:
    link = recorder(site, NOW)
    assert link.failed(LinkTrouble("proxy-refused")) and not link.failed(LinkTrouble("proxy-refused"))
    status = site_status(site, now=NOW)
    assert status.state == "proxy-refused" and "CONNECT" in status.reason
    link.accepted()
    assert site_status(site, now=NOW).state == "connected"


def test_a_new_process_keeps_the_last_heartbeat_to_show_but_has_none_of_its_own(site: SiteFolder) -> None:
    recorder(site, NOW).accepted()
    later = recorder(site, NOW + timedelta(seconds=10))
    link = read_link(site.agent)
    assert link is not None and link.accepted_at == NOW and link.heartbeats == 0
    later.accepted()
    assert (read_link(site.agent) or link).heartbeats == 1


@pytest.mark.parametrize("content", [b"", b"{", b'{"schema_version":"link/v1"}', b"x" * 10_000])
def test_a_damaged_link_file_is_no_health(site: SiteFolder, content: bytes) -> None:
    (site.agent / "link.json").write_bytes(content)
    assert not site_status(site).healthy
    recorder(site, datetime.now(UTC)).accepted()
    assert site_status(site).healthy


def test_certificate_trainer_and_studies_stand_beside_it(site: SiteFolder, authority: Authority) -> None:
    install_kit(site, authority, ends=20 * DAY)
    study = make_study()
    ApprovalBook(site).decide(study, "approve", epsilon_cap=3.0)
    write_beat(site, study)
    status = site_status(site)
    assert status.certificate_days_left == pytest.approx(20, abs=0.1)
    assert "ends in 20 days" in status.warnings[0]
    assert status.trainer == "ready" and status.studies[0].standing == "approved"
    ApprovalBook(site).decide(study, "revoke")
    assert site_status(site).studies[0].standing == "approval-withdrawn"
    install_kit(site, authority)
    assert site_status(site).warnings == ()


def test_the_command_is_a_health_check(site: SiteFolder) -> None:
    arguments = ["site", "status", "--site-dir", str(site.root), "--format", "json"]
    done = CliRunner().invoke(build(), arguments)
    assert done.exit_code == 1 and json.loads(done.stdout)["data"]["healthy"] is False
    recorder(site, datetime.now(UTC)).accepted()
    assert CliRunner().invoke(build(), arguments).exit_code == 0
    assert CliRunner().invoke(build(), ["site", "status", "--site-dir", str(site.root / "x")]).exit_code == 4


def test_starting_without_a_kit_ends_with_one_clear_error(site: SiteFolder) -> None:
    site.tls_certificate.unlink()
    done = CliRunner().invoke(build(), ["site", "start", "--site-dir", str(site.root), "--format", "json"])
    body = json.loads(done.stdout)
    assert (done.exit_code, body["code"]) == (4, "no-kit") and "pixcell site install-kit" in body["hint"]


def test_two_agents_of_one_site_are_refused_and_a_lock_is_never_stale(site: SiteFolder) -> None:
    held = lock_agent(site)
    with pytest.raises(RefusedError) as second:
        Supervisor(SupervisorSettings(site), lambda text: None).run()
    assert second.value.code == "agent-running"
    held.close()
    lock_agent(site).close()


def test_a_supernode_that_lives_but_says_nothing_is_killed(site: SiteFolder) -> None:
    """Stopped by a signal it neither beats nor fails; the supervisor ends it, and starts it again as after a crash."""
    supernode = Child("supernode", lambda: time.sleep(60), site.logs / "supernode.log")
    supernode.start()
    said: list[str] = []
    supervisor = Supervisor(SupervisorSettings(site, stuck_s=60.0), said.append)
    try:
        assert supernode.pid is not None
        LinkRecorder(site.agent, supernode.pid).accepted()
        os.kill(supernode.pid, signal.SIGSTOP)
        supervisor.look_at_link(supernode)
        time.sleep(0.05)
        assert supernode.poll(), "a fresh heartbeat is no reason"
        long_ago = datetime.now(UTC) - timedelta(seconds=61)
        LinkRecorder(site.agent, supernode.pid, lambda: long_ago).accepted()
        supervisor.look_at_link(supernode)
        end = time.monotonic() + 5
        while supernode.poll() and time.monotonic() < end:
            time.sleep(0.01)
        assert supernode.exit_code == -signal.SIGKILL
        assert any("says nothing" in text for text in said)
    finally:
        supernode.signal(signal.SIGKILL)


def test_a_supernode_that_says_what_fails_is_left_to_retry(site: SiteFolder) -> None:
    supernode = Child("supernode", lambda: time.sleep(60), site.logs / "supernode.log")
    supernode.start()
    try:
        assert supernode.pid is not None
        LinkRecorder(site.agent, supernode.pid).failed(LinkTrouble("hub-unreachable"))
        Supervisor(SupervisorSettings(site), lambda text: None).look_at_link(supernode)
        time.sleep(0.05)
        assert supernode.poll() and site_status(site).state == "hub-unreachable"
    finally:
        supernode.signal(signal.SIGKILL)
