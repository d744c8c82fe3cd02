"""A real hub: what its doors let through, whom it lets in, and what its log holds."""

from __future__ import annotations

import json
import socket
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from flwr.proto.fleet_pb2 import PullMessagesRequest, RegisterNodeFleetRequest
from flwr.superlink.main import create_app

from server.enrolment.pki import renew_hub
from server.hub.gate import FLEET_ROUTES, RUNTIME_ROUTES
from tests.server.enrolled import client_context, make_enrolment
from tests.server.hub_process import Hub, activate, public_bytes, running_hub
from tests.server.processes import pixcell, wait_until

pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub with a site `east`, and a folder of a stranger who enrolled nowhere."""
    root = tmp_path_factory.mktemp("hub")
    made = make_enrolment(root)
    made.party("east")
    made.request("stranger")
    with running_hub(made) as hub:
        yield hub
    assert not (root / "ready.json").exists()


def outside(hub: Hub) -> httpx.Client:
    """A client with the kit of `east` that sends no node key by itself."""
    context = client_context(hub.ca, hub.party("east"))
    return httpx.Client(base_url=f"https://{hub.address}", verify=context, trust_env=False)


def east_key(hub: Hub) -> dict[str, str]:
    """Flower's header with the node key of `east`, without its signature."""
    return {"flwr-public-key": b64encode(public_bytes(hub.party("east").node_key)).decode()}


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
            answer = client.request(method, path.replace("{", "").replace("}", ""), headers=east_key(hub))
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
    context = client_context(hub.ca, hub.party("east"))
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
    context = client_context(hub.ca, hub.party("east"))
    with (
        socket.create_connection((host, int(port)), 10) as plain,
        context.wrap_socket(plain, server_hostname=host) as stream,
    ):
        stream.sendall(
            b"POST /v1/fleet/push-object HTTP/1.1\r\nHost: h\r\nContent-Length: 99999999999\r\n"
            b"flwr-public-key: " + east_key(hub)["flwr-public-key"].encode() + b"\r\n\r\n"
        )
        assert b" 413 " in stream.recv(64)


def test_plain_http_and_a_foreign_ca_get_nothing(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://{hub.address}/health")
    foreign = client_context(make_enrolment(tmp_path, "theirs").ca, hub.party("east"))
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"https://{hub.address}/health", verify=foreign)


def test_an_enrolled_site_is_let_in_and_asks_for_nobody_else(hub: Hub) -> None:
    east = hub.party("east")
    with hub.fleet(east, east.node_key) as client:
        node = activate(client, east.node_key)
        assert str(node) == json.loads((hub.folder / "hub" / "nodes.json").read_text())["east"]
        with pytest.raises(httpx.HTTPStatusError) as itself:
            client.RegisterNode(RegisterNodeFleetRequest(public_key=public_bytes(east.node_key)))
        assert itself.value.response.status_code == 404
        request = PullMessagesRequest()
        request.node.node_id = node + 1
        with pytest.raises(httpx.HTTPStatusError) as borrowed:
            client.PullMessages(request)
        assert borrowed.value.response.status_code == 401
        request.node.node_id = node
        client.PullMessages(request)


def test_a_renewed_server_certificate_is_taken_up_by_the_running_hub(hub: Hub) -> None:
    def serial() -> str:
        host, port = hub.address.split(":")
        context = client_context(hub.ca, hub.party("east"))
        with (
            socket.create_connection((host, int(port)), 10) as plain,
            context.wrap_socket(plain, server_hostname=host) as stream,
        ):
            return str(stream.getpeercert()["serialNumber"])

    before = serial()
    renew_hub(hub.made.layout, hub.made.authority)
    wait_until(lambda: serial() != before, 15, "the new certificate")
    with outside(hub) as client:
        assert client.get("/health").status_code == 200


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
        "reason",
        "party",
        "repeats",
    }
    assert all(set(line) <= allowed for line in lines)


def test_a_second_hub_on_the_port_says_so(hub: Hub) -> None:
    port = hub.address.split(":")[1]
    error = pixcell("hub", "start", "--dir", hub.folder, "--port", port, expect=2)
    assert error["code"] == "cannot-listen"
