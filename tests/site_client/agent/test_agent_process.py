"""The real agent against a real hub: whom it calls, when it is healthy, what it refuses, how it comes back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import psutil
import pytest

from pixcell_core.contracts.atomic import write_atomically
from pixcell_core.contracts.canonical import digest
from pixcell_core.contracts.spool import arrays_to_bytes
from pixcell_core.contracts.study import Study
from server.hub.bundle import build_bundle
from server.layout import START_ADAPTER, ServerLayout
from server.studies.book import StudyBook
from site_client.agent.link_record import LinkState, read_link
from site_client.agent.link_trouble import LINK_TROUBLES
from site_client.approvals.book import ApprovalBook
from site_client.approvals.site_folder import SiteFolder
from tests.server.consortium import SHAPES, make_study
from tests.server.enrolled import enrol_site, init_consortium
from tests.server.processes import PIXCELL, Processes, pixcell, wait_until
from tests.site_client.agent.peers import (
    Authority,
    ConnectProxy,
    unused_port,
)

pytestmark = pytest.mark.end_to_end

AUDIT = Path(__file__).parent / "audit"
NUMBERS = count(1)


@dataclass
class Scene:
    """A hub, one site's agent under the audit hook, and a proxy of which the agent is not told."""

    root: Path
    processes: Processes
    hub: str
    runtime: str

    @property
    def server(self) -> Path:
        return self.root / "server"

    @property
    def site(self) -> SiteFolder:
        return SiteFolder(self.root / "east")

    def study(self, name: str, app: bytes) -> Study:
        """A study of this site alone that names the bundle, known to the coordinator and approved."""
        study = make_study(id=name, sites=("east",), quorum=1, app_digest=digest(app), round_timeout_s=30.0)
        layout = ServerLayout(self.server)
        StudyBook(layout.registry()).add(study)
        import numpy as np

        start = {n: np.zeros(shape, np.float32) for n, shape in SHAPES.items()}
        write_atomically(layout.run(name) / START_ADAPTER, arrays_to_bytes(start))
        ApprovalBook(self.site).decide(study, "approve")
        return study

    def asked(self, name: str) -> str:
        """Start a run that cannot get ready, since no trainer runs; what its board says of the site."""
        arguments = ("run", "start", name, "--dir", self.server, "--wait", "--ready-timeout", "8")
        return str(pixcell(*arguments, expect=1)["message"])

    def calls(self) -> list[dict[str, object]]:
        """Everything the agent's processes asked the network or the operating system for."""
        path = self.root / "audit.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def supernode(self) -> psutil.Process:
        link = read_link(self.site.agent)
        assert link is not None
        return psutil.Process(link.process)

    def supernode_changed(self, before: int) -> bool:
        """Whether another process has had a heartbeat accepted since."""
        link = read_link(self.site.agent)
        return link is not None and link.process != before and link.heartbeats > 0

    def healthy(self, fresh: int = 8) -> bool:
        done = subprocess.run(
            [*PIXCELL, "site", "status", "--site-dir", str(self.site.root), "--fresh", str(fresh)],
            capture_output=True,
        )
        assert done.returncode in (0, 1), done.stderr
        return done.returncode == 0


def _none() -> LinkState:
    raise AssertionError("the agent wrote no link state")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    root = tmp_path_factory.mktemp("agent")
    processes = Processes(root)
    init_consortium(root / "server")
    processes.start("hub", "hub", "start", "--dir", root / "server", "--ready-file", root / "hub.json")
    detour = ConnectProxy(refuse=403)
    try:
        wait_until((root / "hub.json").exists, 90, "the hub")
        hub = str(json.loads((root / "hub.json").read_text())["address"])
        made = Scene(root, processes, hub, f"127.0.0.1:{unused_port()}")
        enrol_site(made.server, made.site.root, "east", hub)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join([str(AUDIT), os.environ.get("PYTHONPATH", "")]))
            patch.setenv("AUDIT_FILE", str(root / "audit.jsonl"))
            patch.setenv("AUDIT_ALLOW", f"{hub},{made.runtime}")
            # What a library of the agent might follow behind the admin's back.
            patch.setenv("NO_PROXY", "127.0.0.1")
            for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"):
                patch.setenv(name, detour.url)
            for name in ("FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK"):
                patch.delenv(name, raising=False)
            patch.delenv("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", raising=False)
            arguments = ("--poll", "0.3", "--runtime-port", made.runtime.rpartition(":")[2])
            ready = ("--ready-file", root / "east.ready")
            processes.start("east", "site", "start", "--site-dir", made.site.root, *arguments, *ready)
        wait_until((root / "east.ready").exists, 120, f"the agent: {processes.log('east')}")
        yield made
        assert detour.asked == [], "something followed the environment's proxy"
    finally:
        processes.stop()
        detour.close()


def test_over_start_heartbeats_and_an_exchange_the_agent_calls_its_hub_and_nobody_else(scene: Scene) -> None:
    scene.study("right", build_bundle())
    first = read_link(scene.site.agent)
    said = scene.asked("right")
    assert "east: not configured (the site's trainer is not running)" in said, said
    wait_until(lambda: (read_link(scene.site.agent) or first).heartbeats > 2, 60, "heartbeats")  # type: ignore[union-attr]
    calls = scene.calls()
    assert {c["where"] for c in calls if c["event"] == "socket.connect"} == {scene.hub, scene.runtime}
    assert {c["where"] for c in calls if c["event"] == "socket.getaddrinfo"} <= {"127.0.0.1", "None"}
    assert {c["event"] for c in calls} <= {"socket.connect", "socket.getaddrinfo"}, calls
    assert all(c["allowed"] for c in calls)
    assert not list(scene.site.root.rglob("apps")), "a bundle of the hub was unpacked"


def test_the_audit_hook_would_have_seen_and_stopped_another_call(scene: Scene) -> None:
    program = "import socket; socket.create_connection(('192.0.2.1', 80), 1)"
    audit = scene.root / "mutant.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(AUDIT), "AUDIT_FILE": str(audit), "AUDIT_ALLOW": f"{scene.hub}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "audit: socket" in done.stderr
    assert not json.loads(audit.read_text().splitlines()[0])["allowed"]


def test_a_bundle_that_no_approval_names_is_refused_and_the_hub_is_told(scene: Scene) -> None:
    scene.study("wrong", b"another bundle than the hub sends")
    # The coordinator does not even ask for it; what an agent does is tested in `test_app_gate`.
    assert "its app digest is another" in scene.asked("wrong")
    right = StudyBook(ServerLayout(scene.server).registry()).get("right")
    ApprovalBook(scene.site).decide(right, "revoke")
    assert "this site approved no study with the app that the hub sent" in scene.asked("right")
    log = (scene.site.logs / "events.jsonl").read_text()
    assert any(json.loads(line)["event"] == "app-refused" for line in log.splitlines())
    ApprovalBook(scene.site).decide(right, "approve")
    scene.study("again", build_bundle())
    assert "the site's trainer is not running" in scene.asked("again")


def test_healthy_means_a_heartbeat_the_hub_accepted_lately(scene: Scene) -> None:
    assert scene.healthy()
    shown = pixcell("site", "status", "--site-dir", scene.site.root)
    assert shown["state"] == "connected" and 360 < shown["certificate_days_left"] <= 365
    assert 0 <= shown["heartbeat_age_s"] < 30 and shown["trainer"] == "not running"
    assert {s["study"]: s["standing"] for s in shown["studies"]}["right"] == "approved"


def test_a_process_that_hangs_is_unhealthy_although_it_lives(scene: Scene) -> None:
    process = scene.supernode()
    process.suspend()
    try:
        wait_until(lambda: not scene.healthy(), 30, "the hung agent to be seen")
        assert process.status() == psutil.STATUS_STOPPED
    finally:
        process.resume()
    wait_until(scene.healthy, 60, "the agent to go on")


def test_a_killed_supernode_rejoins_by_itself(scene: Scene) -> None:
    process, began = scene.supernode(), time.monotonic()
    process.send_signal(signal.SIGKILL)
    wait_until(
        lambda: scene.supernode_changed(process.pid) and scene.healthy(), 90, scene.processes.log("east")
    )
    assert not process.is_running() and scene.supernode().pid != process.pid
    print(f"rejoined after {time.monotonic() - began:.1f} s")


@pytest.fixture
def west(scene: Scene, tmp_path: Path) -> Iterator[SiteFolder]:
    """Another enrolled site with its certificate; what a test starts of it is ended."""
    folder = SiteFolder(tmp_path / "west")
    # New keys are a new party: a name belongs to the keys it was enrolled with.
    enrol_site(scene.server, folder.root, f"west-{next(NUMBERS)}", scene.hub)
    yield folder
    if "west" in scene.processes.running:
        scene.processes.end("west")


def test_through_a_proxy_with_credentials_and_no_other_way(
    scene: Scene, west: SiteFolder, tmp_path: Path
) -> None:
    secret = tmp_path / "proxy.txt"
    secret.touch(mode=0o600)
    secret.write_text("west:s3cret")
    proxy = ConnectProxy(credentials="west:s3cret")
    try:
        setting = ("--site-dir", west.root, "--credentials-file", secret)
        assert pixcell("site", "proxy", proxy.url, *setting)["source"] == "site.json"
        ready = tmp_path / "west.ready"
        scene.processes.start("west", "site", "start", "--site-dir", west.root, "--ready-file", ready)
        wait_until(ready.exists, 90, f"{scene.processes.log('west')}")
        assert pixcell("site", "status", "--site-dir", west.root)["healthy"]
        assert set(proxy.asked) == {f"CONNECT {scene.hub} HTTP/1.1"}
        words = scene.processes.log("west") + (west.logs / "supernode.log").read_text(errors="replace")
        assert f"through {proxy.url} (from site.json)" in words and "s3cret" not in words
        # The guard lets this process reach the proxy alone: with the proxy gone there is no way around it.
        proxy.close()
        wait_until(lambda: (read_link(west.agent) or _none()).trouble != "", 60, "the proxy to be missed")
        assert (read_link(west.agent) or _none()).trouble == "proxy-unreachable"
    finally:
        proxy.close()


@pytest.mark.parametrize("obstacle", ["nobody", "refusing-proxy", "intercepting-proxy"])
def test_no_obstacle_is_an_endless_silent_retry(scene: Scene, west: SiteFolder, obstacle: str) -> None:
    stranger = Authority.make(west.root.parent / "stranger")
    proxy = ConnectProxy(
        refuse=403 if obstacle == "refusing-proxy" else 0,
        intercept=stranger.issue("hub", hosts=("127.0.0.1",)) if obstacle == "intercepting-proxy" else None,
    )
    arguments = ("--hub", f"127.0.0.1:{unused_port()}") if obstacle == "nobody" else ("--proxy", proxy.url)
    code = {
        "nobody": "hub-unreachable",
        "refusing-proxy": "proxy-refused",
        "intercepting-proxy": "foreign-certificate",
    }[obstacle]
    try:
        scene.processes.start("west", "site", "start", "--site-dir", west.root, *arguments)
        wait_until(lambda: f"[{code}]" in scene.processes.log("west"), 60, scene.processes.log("west"))
        shown = subprocess.run(
            [*PIXCELL, "site", "status", "--site-dir", str(west.root), "--format", "json"],
            capture_output=True,
            text=True,
        )
        body = json.loads(shown.stdout)["data"]
        assert shown.returncode == 1 and body["state"] == code and not body["healthy"]
        assert LINK_TROUBLES[code][1] in body["reason"]
        assert proxy.opened == b""
    finally:
        scene.processes.end("west")
        proxy.close()


def test_a_second_agent_of_the_site_is_refused(scene: Scene) -> None:
    assert pixcell("site", "start", "--site-dir", scene.site.root, expect=1)["code"] == "agent-running"
