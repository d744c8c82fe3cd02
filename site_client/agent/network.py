"""The agent's two Flower processes: the SuperNode that polls the hub, and the executor that runs the site's own app."""

from __future__ import annotations

import os
import sys
import types
from dataclasses import dataclass
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


def import_flower() -> None:
    """Everything both processes need, once, before they are forked."""

    import site_client.agent.client_app  # noqa: F401


def run_supernode(settings: NetworkSettings) -> None:
    """Flower's SuperNode with process isolation and the shared secret; its own pauses are capped at `poll_s`."""
    import time

    import flwr.supercore.heartbeat as heartbeat
    import flwr.supernode.fleet_http_connection as connection
    import flwr.supernode.start_client_internal as internal
    from flwr.supernode.cli.flower_supernode import flower_supernode

    pause = settings.poll_s
    # Flower fixes its pauses at 3 s (idle) and 0.5 s (reply), its heartbeat at 30 s. Only names of its own modules
    # are replaced, in this process alone.
    internal.time = types.SimpleNamespace(sleep=lambda seconds: time.sleep(min(seconds, pause)))
    connection.HEARTBEAT_DEFAULT_INTERVAL = heartbeat.HEARTBEAT_DEFAULT_INTERVAL = HEARTBEAT_S
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
    for name in ("install_from_fab", "get_load_client_app_fn"):
        if not hasattr(flower, name):
            raise RuntimeError(f"this release of Flower has no {name}: what the hub sent might be run")
    flower.install_from_fab = lambda *_args, **_kwargs: None
    flower.get_load_client_app_fn = lambda **_kwargs: lambda *_ids: app
    flower.run_clientapp(runtime_api_address=runtime, token=token, insecure=True)


def explain(words: str) -> tuple[str, str]:
    """A code and a sentence for the site admin, from what the SuperNode said when it ended."""
    if NOT_LET_IN in words:
        return (
            "not-let-in",
            "The hub did not let this site in: the coordinator has not added its request yet, or its last connection "
            f"still counts as alive (up to {2 * HEARTBEAT_S} s). Trying again.",
        )
    if BAD_CERTIFICATE in words:
        return "bad-certificate", "The hub's certificate is not of the CA this site trusts: wrong hub, or interception."
    return "hub-unreachable", "The connection to the hub ended; trying again."
