"""The agent's two Flower processes: the SuperNode that polls the hub, and the executor that runs the site's own app."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from pixcell_core.flower.executor import ExecutorSettings, serve_tasks
from site_client.approvals.site_folder import SiteFolder

LOOPBACK = "127.0.0.1"
HEARTBEAT_S = 10
"""The shortest interval Flower allows. The hub takes a site for gone after twice this: it can rejoin 20 s after a crash."""

CONNECTED = "SuperNode ID:"
NOT_LET_IN = "Failed to activate SuperNode"
BAD_CERTIFICATE = "CERTIFICATE_VERIFY_FAILED"


@dataclass(frozen=True)
class NetworkSettings:
    """The hub, this site's folder, the loopback port of the SuperNode's runtime, seconds between polls."""

    folder: SiteFolder
    hub: str
    runtime_port: int
    secret_file: Path
    poll_s: float = 3.0
    executor_poll_s: float = 0.2


PRELOADED = (
    "flwr.supernode.cli.flower_supernode",
    "flwr.supernode.main",
    "flwr.supernode.runtime.run_clientapp",
    "flwr.supernode.start_client_internal",
    "uvicorn.protocols.http.auto",
    "uvicorn.lifespan.on",
    "uvicorn.loops.auto",
    "site_client.agent.client_app",
    "safetensors.numpy",
)
"""What both processes need, and each task's process after them: imported once, before the first fork."""


def import_flower() -> None:
    """Import everything in `PRELOADED`."""
    for name in PRELOADED:
        import_module(name)


def run_supernode(settings: NetworkSettings) -> None:
    """Flower's SuperNode with process isolation and the shared secret; its own pauses are capped at `poll_s`."""
    import time

    from flwr.supernode.cli.flower_supernode import flower_supernode

    pause = settings.poll_s
    # Flower fixes its pauses at 3 s (idle) and 0.5 s (reply), its heartbeat at 30 s. Only names of its own modules
    # are replaced, in this process alone.
    shorter = types.SimpleNamespace(sleep=lambda seconds: time.sleep(min(seconds, pause)))
    replace_names("flwr.supernode.start_client_internal", {"time": shorter})
    for module in ("flwr.supernode.fleet_http_connection", "flwr.supercore.heartbeat"):
        replace_names(module, {"HEARTBEAT_DEFAULT_INTERVAL": HEARTBEAT_S})
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
    flower_supernode()


def run_executor(settings: NetworkSettings) -> None:
    """Run every task of this site's SuperNode with the app installed here."""
    from flwr.supercore.constant import TaskType

    from site_client.agent.client_app import SITE_VARIABLE

    os.environ[SITE_VARIABLE] = str(settings.folder.root)
    secret = settings.secret_file.read_bytes()
    address = f"{LOOPBACK}:{settings.runtime_port}"
    serve_tasks(
        ExecutorSettings(address, secret, TaskType.CLIENT_APP, settings.executor_poll_s), run_installed_app
    )


def run_installed_app(runtime: str, token: str) -> None:
    """Run one task. The bundle the hub sent is neither unpacked nor imported: both steps are taken out."""
    from flwr.supernode.runtime import run_clientapp as flower

    from site_client.agent.client_app import installed_app

    app = installed_app()
    replace_names(
        "flwr.supernode.runtime.run_clientapp",
        {
            "install_from_fab": lambda *_args, **_kwargs: None,
            "get_load_client_app_fn": lambda **_kwargs: lambda *_ids: app,
        },
    )
    flower.run_clientapp(runtime_api_address=runtime, token=token, insecure=True)


def replace_names(module: str, names: Mapping[str, object]) -> None:
    """Replace names of a Flower module in this process. A name that is not there stops us: Flower has changed."""
    target = import_module(module)
    for name, value in names.items():
        if not hasattr(target, name):
            raise RuntimeError(
                f"{module} has no {name}: this release of Flower is not the one that was tested"
            )
        setattr(target, name, value)


def explain(words: str) -> tuple[str, str]:
    """A code and a sentence for the site admin, from what the SuperNode said when it ended."""
    if NOT_LET_IN in words:
        return (
            "not-let-in",
            "The hub did not let this site in: the coordinator has not added its request yet, or its last connection "
            f"still counts as alive (up to {2 * HEARTBEAT_S} s). Trying again.",
        )
    if BAD_CERTIFICATE in words:
        return (
            "bad-certificate",
            "The hub's certificate is not of the CA this site trusts: wrong hub, or interception.",
        )
    return "hub-unreachable", "The connection to the hub ended; trying again."
