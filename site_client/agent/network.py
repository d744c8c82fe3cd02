"""The agent's two Flower processes: the SuperNode that polls the hub, and the executor that runs the site's own app."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from pixcell_core.flower.executor import ExecutorSettings, serve_tasks
from pixcell_core.flower.pace import Bell
from site_client.agent.outbound_guard import Peer, allow_only
from site_client.agent.proxy import Proxy
from site_client.agent.site_log import SiteLog
from site_client.approvals.site_folder import SiteFolder

LOOPBACK = "127.0.0.1"
HEARTBEAT_S = 10
"""The shortest interval Flower allows. The hub takes a site for gone after twice this: it can rejoin 20 s after a crash."""


@dataclass(frozen=True)
class NetworkSettings:
    """The hub, this site's folder, the loopback port of the SuperNode's runtime, seconds between polls, the way out.

    `guarded` refuses every other outbound connection and every new program in both processes.
    """

    folder: SiteFolder
    hub: str
    runtime_port: int
    secret_file: Path
    poll_s: float = 3.0
    proxy: Proxy | None = None
    guarded: bool = True


PRELOADED = (
    "flwr.supernode.cli.flower_supernode",
    "flwr.supernode.main",
    "flwr.supernode.runtime.run_clientapp",
    "flwr.supernode.start_client_internal",
    "uvicorn.protocols.http.auto",
    "uvicorn.lifespan.on",
    "uvicorn.loops.auto",
    "site_client.agent.app_gate",
    "site_client.agent.client_app",
    "site_client.agent.hub_client",
    "safetensors.numpy",
)
"""What both processes need, and each task's process after them: imported once, before the first fork."""


def import_flower() -> None:
    """Import everything in `PRELOADED`."""
    for name in PRELOADED:
        import_module(name)


def run_supernode(settings: NetworkSettings) -> None:
    """Flower's SuperNode with process isolation and the shared secret, our HTTP client, and its pauses capped.

    It never opens a bundle: the hub's settings of a run are not read, and what runs is installed here.
    """
    from flwr.supernode.cli.flower_supernode import flower_supernode

    from site_client.agent.hub_client import LinkWatch, watched_fleet_client
    from site_client.agent.link_record import LinkRecorder
    from site_client.agent.pauses import SuperNodePauses

    recorder = LinkRecorder(settings.folder.agent, os.getpid())
    watch = LinkWatch(settings.folder, settings.proxy, recorder, lambda text: print(text, flush=True))
    # Flower fixes its pauses at 3 s (idle) and 0.5 s (reply), its heartbeat at 30 s. Only names of its own modules
    # are replaced, in this process alone.
    pauses = SuperNodePauses(settings.poll_s, Bell(settings.folder.bell))
    shorter = types.SimpleNamespace(sleep=pauses.sleep)
    replace_names(
        "flwr.supernode.start_client_internal",
        {"time": shorter, "get_fused_config_from_fab": lambda _content, _run: {}},
    )
    for module in ("flwr.supernode.fleet_http_connection", "flwr.supercore.heartbeat"):
        replace_names(module, {"HEARTBEAT_DEFAULT_INTERVAL": HEARTBEAT_S})
    replace_names("flwr.supernode.fleet_http_connection", {"FleetHttpClient": watched_fleet_client(watch)})
    sys.argv = [
        "flower-supernode",
        *("--superlink", settings.hub),
        *("--root-certificates", str(settings.folder.hub_ca)),
        *("--auth-supernode-private-key", str(settings.folder.node_key)),
        *("--isolation", "process"),
        *("--superexec-auth-secret-file", str(settings.secret_file)),
        *("--host", LOOPBACK),
        *("--port", str(settings.runtime_port)),
    ]
    out = (
        Peer.parse(settings.hub) if settings.proxy is None else Peer(settings.proxy.host, settings.proxy.port)
    )
    _close_off(settings, out)
    flower_supernode()


def run_executor(settings: NetworkSettings) -> None:
    """Run every task of this site's SuperNode with the app installed here; it reaches the SuperNode and nobody else."""
    from flwr.supercore.constant import TaskType

    from site_client.agent.client_app import SITE_VARIABLE

    os.environ[SITE_VARIABLE] = str(settings.folder.root)
    secret = settings.secret_file.read_bytes()
    address = f"{LOOPBACK}:{settings.runtime_port}"
    _close_off(settings, Peer.parse(address))
    serve_tasks(
        ExecutorSettings(address, secret, TaskType.CLIENT_APP, settings.folder.bell), run_installed_app
    )


def run_installed_app(runtime: str, token: str) -> None:
    """Run one task. The bundle the hub sent is neither unpacked nor imported; its digest must be approved here."""
    from flwr.supernode.runtime import run_clientapp as flower

    from site_client.agent.app_gate import AppGate, AppRefusedError
    from site_client.agent.client_app import create_refusing_app, installed_app, site_of_environment

    gate = AppGate(site_of_environment())

    def load(_app: str, _version: str, announced: str) -> Any:
        try:
            gate.require(announced)
        except AppRefusedError:
            return create_refusing_app()
        return installed_app(gate.app_digest)

    replace_names(
        "flwr.supernode.runtime.run_clientapp",
        {
            "install_from_fab": lambda content, **_kwargs: gate.receive(content),
            "get_load_client_app_fn": lambda **_kwargs: load,
            "Error": public_error(gate),
        },
    )
    flower.run_clientapp(runtime_api_address=runtime, token=token, insecure=True)


def public_error(gate: Any) -> Callable[..., Any]:
    """Flower's error reply without Flower's reason: the text of an exception may name a file or a patient."""
    from flwr.app import Error

    from site_client.agent.app_gate import NOT_APPROVED, PUBLIC_REASON

    def make(code: int, reason: str | None = None) -> Any:
        if gate.app_digest and not gate.approved:
            return Error(code, f"[{NOT_APPROVED}] {PUBLIC_REASON}")
        return Error(code, "the site's agent failed; its own log says why")

    return make


def _close_off(settings: NetworkSettings, peer: Peer) -> None:
    """No telemetry, not even its event (which runs programs to describe this machine); then only `peer` is reached."""
    replace_names("flwr.supercore.telemetry", {"create_event": lambda *_: "disabled"})
    if settings.guarded:
        log = SiteLog(settings.folder.logs)
        allow_only((peer,), lambda event: log.say("outbound-refused", call=event))


def replace_names(module: str, names: Mapping[str, object]) -> None:
    """Replace names of a Flower module in this process. A name that is not there stops us: Flower has changed."""
    target = import_module(module)
    for name, value in names.items():
        if not hasattr(target, name):
            raise RuntimeError(
                f"{module} has no {name}: this release of Flower is not the one that was tested"
            )
        setattr(target, name, value)
