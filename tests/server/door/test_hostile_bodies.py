"""Garbage and floods against a real hub: bodies, heads, connections. All refused, none crash, the log stays small."""

from __future__ import annotations

import os
import random
import shutil
import socket
import ssl
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from server.hub.gate import FLEET_ROUTES, MAX_BODY_BYTES
from tests.server.door.asking import PROTOBUF, client_of, node_header
from tests.server.door.conftest import Honest
from tests.server.enrolled import client_context
from tests.server.hub_process import Hub

pytestmark = pytest.mark.end_to_end


def test_garbage_bodies_are_bad_requests_and_nothing_more(hub: Hub) -> None:
    noise, west = random.Random(1), hub.party("west")
    bodies = [noise.randbytes(n) for n in (0, 1, 7, 64, 1000, 100_000)] + [
        b"\xff" * 64,
        b"{}",
        b"\x0a\xff\xff\xff\x7f",
    ]
    with client_of(hub, client_context(hub.ca, west)) as client:
        for path in sorted(FLEET_ROUTES):
            for body in bodies:
                answer = client.post(path, content=body, headers=node_header(west) | PROTOBUF)
                assert 400 <= answer.status_code < 500, (path, len(body), answer.status_code)
        kinds = ("application/json", "text/plain", "multipart/form-data; boundary=x", "")
        for kind in kinds:
            headers = node_header(west) | {"content-type": kind}
            assert client.post("/v1/fleet/pull-messages", content=b"{}", headers=headers).status_code >= 400


def raw(hub: Hub, party: str) -> ssl.SSLSocket:
    """A TLS connection of a party, for bytes that no HTTP library would send."""
    plain = socket.create_connection(hub.place, 10)
    return client_context(hub.ca, hub.party(party)).wrap_socket(plain, server_hostname=hub.place[0])


def head_of(hub: Hub, party: str, *lines: str) -> bytes:
    """The head of a POST by a site's own node key."""
    headers = [f"{name}: {value}" for name, value in node_header(hub.party(party)).items()]
    first = ["POST /v1/fleet/push-object HTTP/1.1", "Host: hub", "Content-Type: application/protobuf"]
    return "\r\n".join([*first, *headers, *lines, "", ""]).encode()


def answered(stream: ssl.SSLSocket) -> bytes:
    """The first bytes of an answer, or nothing where the hub hung up."""
    try:
        return stream.recv(64)
    except OSError:
        return b""


def test_announced_and_unannounced_bodies_beyond_the_limit_are_refused(hub: Hub) -> None:
    for length in (str(MAX_BODY_BYTES + 1), "9" * 19):
        with raw(hub, "west") as stream:
            stream.sendall(head_of(hub, "west", f"Content-Length: {length}"))
            assert b" 413 " in answered(stream), length
    with raw(hub, "west") as stream:
        stream.sendall(head_of(hub, "west", "Transfer-Encoding: chunked"))
        block = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
        sent, answer = 0, b""
        stream.settimeout(0.001)
        while sent < 3 * MAX_BODY_BYTES and not answer:
            try:
                stream.settimeout(10)
                stream.sendall(block)
                sent += 1 << 20
                stream.settimeout(0.0001)
                answer = stream.recv(64)
            except TimeoutError:
                continue
            except OSError:
                break
        assert b" 413 " in answer or sent >= MAX_BODY_BYTES, "the body was not read to its limit"
        assert sent < 2 * MAX_BODY_BYTES, "the hub went on reading"
    assert "body-too-large" in hub.reasons("west")


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01 garbage inside TLS \r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/fleet/push-object HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/fleet/push-object HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /v1/fleet/push-object HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"A: " + b"b" * 400_000,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"CONNECT 127.0.0.1:1 HTTP/1.1\r\nHost: 127.0.0.1:1\r\n\r\n",
        b"GET http://127.0.0.1:1/v1/control/list-runs HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET * HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
)
def test_what_is_no_proper_request_gets_no_proper_answer(hub: Hub, sent: bytes) -> None:
    with raw(hub, "west") as stream:
        try:
            stream.sendall(sent)
        except OSError:
            return
        assert b" 200 " not in answered(stream) or sent.startswith(b"GET /health HTTP/1.1\r\nHost: a\r\nUpg")


def test_a_party_that_asks_too_often_is_told_when_to_come_back_and_others_are_served(
    hub: Hub, honest: Honest
) -> None:
    # All at once on one connection, for a path that costs the hub little: faster than the rate on any machine.
    count = 1500
    with raw(hub, "busy") as stream:
        stream.settimeout(60)
        # From one thread, since a TLS stream must not be read and written at once: 46 kB fit what the system holds.
        stream.sendall(b"GET /x HTTP/1.1\r\nHost: h\r\n\r\n" * count)
        got = b""
        while got.count(b"HTTP/1.1 ") < count:
            piece = stream.recv(1 << 16)
            assert piece, f"the hub hung up after {got.count(b'HTTP/1.1 ')} answers: {hub.reasons()}"
            got += piece
    heads = got.split(b"HTTP/1.1 ")[1:]
    limited = [head for head in heads if head.startswith(b"429 ")]
    served = [head for head in heads if head.startswith(b"404 ")]
    assert len(served) >= 200 and limited and len(served) + len(limited) == count
    assert all(int(head.split(b"retry-after: ")[1].split(b"\r\n")[0]) >= 1 for head in limited)
    assert honest.is_served()
    with client_of(hub, client_context(hub.ca, hub.party("busy"))) as client:
        time.sleep(1.1)
        assert client.get("/health").status_code == 200
    busy = [e for e in hub.events() if e.get("party") == "busy"]
    assert {e["reason"] for e in busy} == {"too-many-requests", "nothing-here"} and len(busy) <= 12


def test_silent_and_half_open_connections_do_not_keep_others_out(hub: Hub, honest: Honest) -> None:
    with ExitStack() as held:
        for number in range(200):
            quiet = held.enter_context(socket.create_connection(hub.place, 10))
            if number % 2:
                quiet.sendall(b"\x16\x03\x01\x02\x00\x01")
        assert honest.is_served()
    assert "handshake-crowded-out" in hub.reasons()


def test_one_party_holds_a_bounded_number_of_connections(hub: Hub, honest: Honest) -> None:
    with ExitStack() as held:
        streams = []
        for _ in range(40):
            try:
                streams.append(held.enter_context(raw(hub, "many")))
            except OSError:
                continue
        for stream in streams:
            stream.settimeout(10)
        alive = 0
        for stream in streams:
            try:
                stream.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
                alive += b" 200 " in stream.recv(64)
            except OSError:
                continue
        assert alive == 32
        assert honest.is_served()
    assert "too-many-connections" in hub.reasons("many")


def test_a_slow_request_is_cut_off(hub: Hub, honest: Honest) -> None:
    with raw(hub, "south") as stream:
        began = time.monotonic()
        stream.settimeout(30)
        stream.sendall(b"GET /health HTTP/1.1\r\nX: ")
        try:
            while time.monotonic() - began < 25 and not stream.pending():
                stream.sendall(b"a")
                time.sleep(0.5)
        except OSError:
            pass
        assert 10 < time.monotonic() - began < 20
    assert "slow-head" in hub.reasons("south")


def test_the_log_names_parties_and_reasons_and_nothing_that_was_sent(hub: Hub) -> None:
    secret = "patient-4711"
    with client_of(hub, client_context(hub.ca, hub.party("west"))) as client:
        client.get(f"/{secret}", headers={"x-note": secret})
        client.post("/v1/fleet/push-object", content=secret, headers={"flwr-public-key": secret})
    for line in hub.events():
        assert secret not in str(line)
        if line["event"] == "refused":
            assert set(line) <= {"at", "event", "reason", "party", "method", "repeats"}
            assert line["method"] in {"", *(path.rsplit("/", 1)[-1] for path in FLEET_ROUTES)}
    assert secret not in hub.processes.log("hub")


def test_a_hub_without_its_revocation_list_does_not_start(hub: Hub, tmp_path: Path) -> None:
    from tests.server.processes import pixcell

    copy = tmp_path / "server"
    shutil.copytree(hub.folder / "pki", copy / "pki")
    (copy / "pki" / "revoked.json").unlink()
    error = pixcell("hub", "start", "--dir", copy, expect=1)
    assert error["code"] == "no-revocations" and "backup" in error["hint"]
    shutil.copy(hub.folder / "pki" / "revoked.json", copy / "pki")
    os.truncate(copy / "pki" / "server.key", 10)
    assert pixcell("hub", "start", "--dir", copy, expect=1)["code"] == "bad-server-certificate"
