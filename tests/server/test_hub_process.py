"""A real hub: what its doors let through, whom it lets in, and what its log holds."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, RegisterNodeFleetRequest
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.superlink.main import create_app
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from server.hub.gate import FLEET_ROUTES, RUNTIME_ROUTES
from tests.server.processes import Processes, pixcell, wait_until

pytestmark = pytest.mark.end_to_end


@dataclass
class Hub:
    """A running hub and its folder."""

    folder: Path
    address: str
    process: int

    @property
    def ca(self) -> Path:
        """Its certificate authority."""
        return self.folder / "pki" / "ca.crt"

    def fleet(self, key_file: Path) -> FleetHttpClient:
        """A SuperNode's own client with the given key."""
        key = load_ssh_private_key(key_file.read_bytes(), None)
        return FleetHttpClient.from_server_address(
            self.address,
            False,
            self.ca.read_bytes(),
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(key, key.public_key()),
            ],
        )


def public_bytes(key_file: Path) -> bytes:
    """The public half as Flower sends it."""
    return public_key_to_bytes(load_ssh_private_key(key_file.read_bytes(), None).public_key())


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub with one enrolled site, `east`, and a folder of a stranger who enrolled nowhere."""
    root = tmp_path_factory.mktemp("hub")
    folder = root / "server"
    pixcell("init", "--dir", folder)
    for name in ("east", "stranger"):
        pixcell(
            "site",
            "enroll",
            "--site-dir",
            root / name,
            "--name",
            name,
            "--hub",
            "127.0.0.1:1",
            "--ca",
            folder / "pki" / "ca.crt",
        )
    pixcell("kit", "add", root / "east" / "request.json", "--dir", folder)
    processes = Processes(root)
    processes.start("hub", "hub", "start", "--dir", folder, "--ready-file", root / "ready.json")
    try:
        wait_until((root / "ready.json").exists, 60, processes.log("hub"))
        ready = json.loads((root / "ready.json").read_text())
        yield Hub(folder, ready["address"], ready["process"])
    finally:
        processes.stop()
    assert not (root / "ready.json").exists()


def outside(hub: Hub) -> httpx.Client:
    """A client that trusts the consortium's CA and has no key."""
    return httpx.Client(
        base_url=f"https://{hub.address}", verify=ssl.create_default_context(cafile=str(hub.ca))
    )


def every_route() -> list[tuple[str, str]]:
    """Every method and path of the whole SuperLink app."""
    routes: list[tuple[str, str]] = [
        ("GET", "/openapi.json"),
        ("GET", "/docs"),
        ("GET", "/docs/oauth2-redirect"),
    ]
    for path, methods in create_app().openapi()["paths"].items():
        routes += [(method.upper(), path) for method in methods]
    return routes


def test_the_public_door_answers_fleet_and_health_and_nothing_else(hub: Hub) -> None:
    routes = every_route()
    assert {path for _, path in routes} >= FLEET_ROUTES | RUNTIME_ROUTES
    assert any(path.startswith("/v1/control/") for _, path in routes)
    with outside(hub) as client:
        assert client.get("/health").status_code == 200
        for method, path in routes:
            answer = client.request(method, path.replace("{", "").replace("}", ""))
            if path in FLEET_ROUTES:
                assert answer.status_code in (400, 401, 412, 415, 422), (path, answer.status_code)
            elif path != "/health":
                assert answer.status_code == 404, (method, path, answer.status_code)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/fleet/../control/list-runs",
        "/v1/fleet/%2e%2e/control/list-runs",
        "//v1/control/list-runs",
        "/V1/control/list-runs",
        "/v1/control/list-runs/",
        "/v1/fleet/activate-node/../../runtime/acquire-task",
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "/",
    ],
)
def test_no_spelling_of_a_path_reaches_more(hub: Hub, path: str) -> None:
    host, port = hub.address.split(":")
    context = ssl.create_default_context(cafile=str(hub.ca))
    with (
        socket.create_connection((host, int(port)), 10) as plain,
        context.wrap_socket(plain, server_hostname=host) as stream,
    ):
        stream.sendall(
            f"POST {path} HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
        )
        status = stream.recv(64).split(b"\r\n")[0]
    assert b" 404 " in status + b" ", status


def test_a_body_above_the_limit_is_refused_by_its_announcement(hub: Hub) -> None:
    host, port = hub.address.split(":")
    context = ssl.create_default_context(cafile=str(hub.ca))
    with (
        socket.create_connection((host, int(port)), 10) as plain,
        context.wrap_socket(plain, server_hostname=host) as stream,
    ):
        stream.sendall(
            b"POST /v1/fleet/push-object HTTP/1.1\r\nHost: h\r\nContent-Length: 99999999999\r\n\r\n"
        )
        assert b" 413 " in stream.recv(64)


def test_plain_http_and_a_foreign_ca_get_nothing(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://{hub.address}/health")
    pixcell("init", "--dir", tmp_path / "other")
    foreign = ssl.create_default_context(cafile=str(tmp_path / "other" / "pki" / "ca.crt"))
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"https://{hub.address}/health", verify=foreign)


def test_an_enrolled_key_is_let_in_and_an_unregistered_one_is_not(hub: Hub) -> None:
    root = hub.folder.parent
    with hub.fleet(root / "east" / "keys" / "node") as client:
        node = client.ActivateNode(
            ActivateNodeRequest(
                public_key=public_bytes(root / "east" / "keys" / "node"), heartbeat_interval=10
            )
        ).node_id
    assert str(node) == json.loads((hub.folder / "hub" / "nodes.json").read_text())["east"]
    stranger = root / "stranger" / "keys" / "node"
    with hub.fleet(stranger) as client:
        with pytest.raises(httpx.HTTPStatusError) as refused:
            client.ActivateNode(ActivateNodeRequest(public_key=public_bytes(stranger), heartbeat_interval=10))
        assert refused.value.response.status_code in (401, 404, 412)
        with pytest.raises(httpx.HTTPStatusError) as itself:
            client.RegisterNode(RegisterNodeFleetRequest(public_key=public_bytes(stranger)))
        assert itself.value.response.status_code == 404
        request = PullMessagesRequest()
        request.node.node_id = node
        with pytest.raises(httpx.HTTPStatusError) as borrowed:
            client.PullMessages(request)
        assert borrowed.value.response.status_code == 401


def test_the_inner_door_is_on_loopback_guarded_by_the_secret_and_has_no_control(hub: Hub) -> None:
    listening = [c.laddr for c in psutil.Process(hub.process).net_connections("tcp") if c.status == "LISTEN"]
    assert all(place.ip == "127.0.0.1" for place in listening) and len(listening) == 2
    inner = next(place.port for place in listening if f"127.0.0.1:{place.port}" != hub.address)
    with httpx.Client(base_url=f"http://127.0.0.1:{inner}") as client:
        assert client.get("/health").status_code == 200
        for method, path in every_route():
            if path not in RUNTIME_ROUTES and path != "/health":
                assert client.request(method, path).status_code == 404, path
        taken = client.post("/v1/runtime/acquire-task", headers={"content-type": "application/protobuf"})
        assert taken.status_code >= 400


def test_the_event_log_says_who_called_and_nothing_of_what(hub: Hub) -> None:
    lines = [json.loads(line) for line in (hub.folder / "hub" / "events.jsonl").read_text().splitlines()]
    assert {"hub-started", "site-registered", "fleet-call"} <= {line["event"] for line in lines}
    allowed = {
        "at",
        "event",
        "method",
        "node",
        "accepted",
        "site",
        "port",
        "study",
        "digest",
        "run",
        "outcome",
        "code",
    }
    assert all(set(line) <= allowed for line in lines)


def test_a_second_hub_on_the_port_says_so(hub: Hub) -> None:
    port = hub.address.split(":")[1]
    error = pixcell("hub", "start", "--dir", hub.folder, "--port", port, expect=2)
    assert error["code"] == "cannot-listen"
