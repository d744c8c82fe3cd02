"""A real hub process of a consortium whose parties have kits, and Flower's own client with a party's certificate."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from site_client.approvals.site_folder import SiteFolder
from tests.server.enrolled import Enrolment, client_context
from tests.server.processes import Processes, wait_until


@dataclass
class Hub:
    """A running hub and its consortium."""

    made: Enrolment
    address: str
    process: int
    processes: Processes

    @property
    def folder(self) -> Path:
        """The coordinator's folder."""
        return self.made.layout.root

    @property
    def ca(self) -> Path:
        """The certificate authority."""
        return self.made.ca

    @property
    def place(self) -> tuple[str, int]:
        """Host and port."""
        host, port = self.address.rsplit(":", 1)
        return host, int(port)

    def party(self, name: str) -> SiteFolder:
        """The folder of a party."""
        return SiteFolder(self.made.root / name)

    def fleet(self, party: SiteFolder, node_key: Path) -> FleetHttpClient:
        """A SuperNode's own client that shows the certificate of `party` and signs with `node_key`."""
        key = load_ssh_private_key(node_key.read_bytes(), None)
        client = FleetHttpClient.from_server_address(
            self.address,
            False,
            self.ca.read_bytes(),
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(key, key.public_key()),
            ],
        )
        client._client.close()
        client._client = httpx.Client(verify=client_context(self.ca, party), timeout=30, trust_env=False)
        return client

    def events(self) -> list[dict[str, Any]]:
        """The event log."""
        return [json.loads(line) for line in self.made.layout.events.read_text().splitlines()]

    def reasons(self, party: str | None = None) -> set[str]:
        """Reasons of all refusals (of one party) in the log."""
        refused = [event for event in self.events() if event["event"] == "refused"]
        return {event["reason"] for event in refused if party is None or event["party"] == party}


def public_bytes(key_file: Path) -> bytes:
    """The public half as Flower sends it."""
    return public_key_to_bytes(load_ssh_private_key(key_file.read_bytes(), None).public_key())


def activate(client: FleetHttpClient, node_key: Path) -> int:
    """Activate the node of a key; returns its node id."""
    request = ActivateNodeRequest(public_key=public_bytes(node_key), heartbeat_interval=30)
    return int(client.ActivateNode(request).node_id)


def beat(client: FleetHttpClient, node: int) -> bool:
    """One heartbeat; whether the hub accepted it."""
    request = SendNodeHeartbeatRequest(heartbeat_interval=30)
    request.node.node_id = node
    return bool(client.SendNodeHeartbeat(request).success)


@contextmanager
def running_hub(made: Enrolment) -> Iterator[Hub]:
    """`pixcell hub start` over the folder of `made`."""
    processes = Processes(made.root)
    ready = made.root / "ready.json"
    processes.start("hub", "hub", "start", "--dir", made.layout.root, "--ready-file", ready)
    try:
        wait_until(ready.exists, 60, processes.log("hub"))
        said = json.loads(ready.read_text())
        yield Hub(made, said["address"], said["process"], processes)
    finally:
        processes.stop()
