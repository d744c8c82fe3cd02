"""Hostile clients against a real hub: every route, every wrong credential, floods and garbage. All refused, none crash."""

from __future__ import annotations

import os
import random
import shutil
import socket
import ssl
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.superlink.main import create_app

from pixcell_core.trust.certificates import node_public_key, public_key_digest, tls_public_key, to_pem
from server.hub.gate import FLEET_ROUTES, MAX_BODY_BYTES, REASON_HEADER
from site_client.approvals.enrolment import load_tls_key
from site_client.approvals.site_folder import SiteFolder
from tests.server.enrolled import Enrolment, client_context, make_enrolment
from tests.server.hub_process import Hub, activate, beat, running_hub
from tests.server.processes import wait_until

pytestmark = pytest.mark.end_to_end

NOW = datetime.now(UTC).replace(microsecond=0)
PROTOBUF = {"content-type": "application/protobuf"}
MAX_GROWTH = 128 * 1024
"""No test of this file may make the log grow by more than this."""


def short_lived(made: Enrolment, folder: SiteFolder, end: datetime) -> None:
    """Put a certificate of the true CA in place that ends at `end`."""
    request = made.book.request(folder.root.name)
    node = public_key_digest(node_public_key(request.node_key, request.site))
    start = min(NOW, end - timedelta(hours=1))
    made_now = made.authority.certify_party(request.site, "site", tls_public_key(request), node, start, end)
    folder.tls_certificate.write_text(to_pem(made_now))


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub and its parties, honest and not."""
    root = tmp_path_factory.mktemp("hostile")
    made = make_enrolment(root)
    for name in ("east", "west", "north", "south", "busy", "slow", "many", "revoked", "expiring", "expired"):
        made.party(name)
    made.party("auditor", "auditor")
    made.party("boss", "coordinator")
    made.request("unregistered")
    made.book.revoke("revoked", made.authority)
    short_lived(made, SiteFolder(root / "expired"), NOW - timedelta(minutes=1))
    foreign = make_enrolment(root / "elsewhere", "theirs")
    foreign.party("east")
    with running_hub(made) as running:
        yield running


@dataclass
class Honest:
    """A site that behaves: whatever else happens, the hub answers it."""

    hub: Hub
    node: int

    def is_served(self) -> bool:
        """Whether a new connection's heartbeat is accepted."""
        east = self.hub.party("east")
        with self.hub.fleet(east, east.node_key) as client:
            return beat(client, self.node)


@pytest.fixture(scope="module")
def honest(hub: Hub) -> Honest:
    """The honest site, activated."""
    east = hub.party("east")
    with hub.fleet(east, east.node_key) as client:
        return Honest(hub, activate(client, east.node_key))


@pytest.fixture(autouse=True)
def unharmed(hub: Hub, honest: Honest) -> Iterator[None]:
    """After every attack the same process serves the honest site, and the log did not grow without bound."""
    before = hub.made.layout.events.stat().st_size
    yield
    assert honest.is_served()
    assert psutil.Process(hub.process).is_running()
    assert hub.made.layout.events.stat().st_size - before < MAX_GROWTH
    assert "Traceback" not in hub.processes.log("hub")


def every_route() -> list[tuple[str, str]]:
    """Every method and path of the whole SuperLink app."""
    found = [(m.upper(), p) for p, methods in create_app().openapi()["paths"].items() for m in methods]
    return [*found, ("GET", "/openapi.json"), ("GET", "/docs"), ("GET", "/")]


def node_header(folder: SiteFolder) -> dict[str, str]:
    """Flower's headers, signed now with the node key of a folder."""
    return signed_headers(folder, datetime.now(UTC))


def signed_headers(folder: SiteFolder, at: datetime) -> dict[str, str]:
    """Flower's headers for a time, with a true signature."""
    key = load_ssh_private_key(folder.node_key.read_bytes(), None)
    stamp = at.isoformat()
    return {
        "flwr-public-key": b64encode(public_key_to_bytes(key.public_key())).decode(),
        "flwr-timestamp": stamp,
        "flwr-signature": b64encode(sign_message(key, stamp.encode())).decode(),
    }


def client_of(hub: Hub, context: ssl.SSLContext) -> httpx.Client:
    """A client on the hub."""
    return httpx.Client(base_url=f"https://{hub.address}", verify=context, trust_env=False, timeout=20)


def reason_of(answer: httpx.Response) -> str:
    """The hub's own word for its refusal."""
    return str(answer.headers.get(REASON_HEADER.decode(), ""))


# --- no certificate that counts: the handshake ends it -----------------------------------------------------------------


def contexts_without_standing(hub: Hub, tmp: Path) -> dict[str, tuple[ssl.SSLContext, str]]:
    """Per attacker: how it speaks TLS, and what the log must call it."""
    made, east = hub.made, hub.party("east")
    foreign = SiteFolder(made.root / "elsewhere" / "east")

    def showing(certificate: str, key: Path) -> ssl.SSLContext:
        path = tmp / "shown.crt"
        path.write_text(certificate)
        context = client_context(hub.ca, None)
        context.load_cert_chain(str(path), str(key))
        return context

    request, key = made.book.request("north"), hub.party("north").tls_key
    future = made.authority.certify_party(
        "north", "site", tls_public_key(request), None, NOW + timedelta(days=1), NOW + timedelta(days=2)
    )
    own = load_tls_key(key)
    from cryptography.hazmat.primitives import hashes

    itself = (
        x509.CertificateBuilder()
        .subject_name(made.authority.certificate.subject)
        .issuer_name(made.authority.certificate.subject)
        .public_key(own.public_key())
        .serial_number(1)
        .not_valid_before(NOW)
        .not_valid_after(NOW + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier("urn:pixcell:site:east")]), False
        )
        .sign(own, hashes.SHA384())
    )
    server = (made.layout.pki / "server.crt").read_text()
    return {
        "no certificate": (client_context(hub.ca, None), "no-certificate"),
        "another CA": (client_context(hub.ca, foreign), "certificate-of-another-ca"),
        "expired": (client_context(hub.ca, hub.party("expired")), "certificate-expired"),
        "not yet valid": (showing(to_pem(future), key), "certificate-not-yet-valid"),
        "signed by itself": (showing(to_pem(itself), key), "certificate"),
        "the hub's own": (showing(server, made.layout.pki / "server.key"), "certificate-of-another-purpose"),
        "old TLS": (old_tls(client_context(hub.ca, east)), "handshake-failed"),
    }


def old_tls(context: ssl.SSLContext) -> ssl.SSLContext:
    """TLS 1.1 at most."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    return context


def test_no_route_answers_whom_tls_does_not_know(hub: Hub, tmp_path: Path) -> None:
    for name, (context, reason) in contexts_without_standing(hub, tmp_path).items():
        with client_of(hub, context) as client:
            for method, path in every_route():
                with pytest.raises(httpx.TransportError):
                    client.request(method, path)
        wait_until(lambda r=reason: any(x.startswith(r) for x in hub.reasons()), 5, f"{name}: {reason}")


# --- a certificate of this CA, but not the right one ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("party", "key_of", "status", "reason", "health"),
    [
        ("revoked", "revoked", 403, "certificate-revoked", 403),
        ("auditor", "auditor", 403, "role-may-not", 200),
        ("boss", "boss", 403, "role-may-not", 200),
        ("north", "unregistered", 403, "node-key-of-another", 200),
        ("south", "west", 403, "node-key-of-another", 200),
        ("west", None, 401, "no-node-key", 200),
    ],
)
def test_every_route_refuses_a_party_that_may_not(
    hub: Hub, party: str, key_of: str | None, status: int, reason: str, health: int
) -> None:
    headers = node_header(hub.party(key_of)) if key_of else {}
    with client_of(hub, client_context(hub.ca, hub.party(party))) as client:
        for method, path in every_route():
            answer = client.request(method, path, headers=headers | PROTOBUF)
            if path in FLEET_ROUTES:
                assert (answer.status_code, reason_of(answer)) == (status, reason), path
            elif (method, path) == ("GET", "/health"):
                assert answer.status_code == health
            else:
                assert answer.status_code == (403 if health == 403 else 404), path
    assert reason in hub.reasons(party)


def test_a_certificate_revoked_while_connected_is_refused_within_seconds(hub: Hub, honest: Honest) -> None:
    slow = hub.party("slow")
    with client_of(hub, client_context(hub.ca, slow)) as client:
        assert client.get("/health").status_code == 200
        hub.made.book.revoke("slow", hub.made.authority)
        began = time.monotonic()
        wait_until(lambda: reason_of(client.get("/health")) == "certificate-revoked", 5, "the revocation")
        assert time.monotonic() - began < 2
    assert honest.is_served()
    with client_of(hub, client_context(hub.ca, hub.party("west"))) as client:
        assert client.get("/health").status_code == 200


def test_a_connection_does_not_outlive_its_certificate(hub: Hub) -> None:
    end = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=6)
    short_lived(hub.made, hub.party("expiring"), end)
    with client_of(hub, client_context(hub.ca, hub.party("expiring"))) as client:
        assert client.get("/health").status_code == 200
        while datetime.now(UTC) < end:
            time.sleep(0.2)
            last = client.get("/health")
        assert last.status_code == 403 or client.get("/health").status_code == 403
    assert "certificate-expired" in hub.reasons("expiring")


def test_a_certificate_without_a_party_is_nobody(hub: Hub, tmp_path: Path) -> None:
    request = hub.made.book.request("north")
    nobody = hub.made.authority._certify(
        "north",
        tls_public_key(request),
        [x509.DNSName("north.example.org")],
        ExtendedKeyUsageOID.CLIENT_AUTH,
        NOW,
        NOW + timedelta(days=1),
    )
    (tmp_path / "nobody.crt").write_text(to_pem(nobody))
    context = client_context(hub.ca, None)
    context.load_cert_chain(str(tmp_path / "nobody.crt"), str(hub.party("north").tls_key))
    with client_of(hub, context) as client:
        assert reason_of(client.get("/health")) == "not-a-party"


# --- Flower's own signature -------------------------------------------------------------------------------------------


def pull(hub: Hub, party: str, headers: dict[str, str], node: int) -> int:
    """Status of a pull of messages."""
    request = PullMessagesRequest()
    request.node.node_id = node
    with client_of(hub, client_context(hub.ca, hub.party(party))) as client:
        body = request.SerializeToString()
        return client.post("/v1/fleet/pull-messages", content=body, headers=headers | PROTOBUF).status_code


def test_old_and_future_timestamps_and_false_signatures_are_refused(hub: Hub, honest: Honest) -> None:
    east, now = hub.party("east"), datetime.now(UTC)
    assert pull(hub, "east", signed_headers(east, now), honest.node) == 200
    for at in (now - timedelta(seconds=400), now + timedelta(seconds=400)):
        assert pull(hub, "east", signed_headers(east, at), honest.node) == 401
    false = signed_headers(east, now) | {"flwr-timestamp": (now + timedelta(seconds=1)).isoformat()}
    assert pull(hub, "east", false, honest.node) == 401
    assert pull(hub, "east", {"flwr-public-key": false["flwr-public-key"]}, honest.node) == 401
    assert "answered-401" in hub.reasons("east")


def test_a_replayed_header_is_worth_nothing_without_the_certificate(hub: Hub, honest: Honest) -> None:
    """Flower takes a signature for 300 seconds, as often as it is sent. The door ties it to the site's certificate:
    whoever overhears the headers (and TLS lets nobody) would need the site's TLS key as well."""
    headers = signed_headers(hub.party("east"), datetime.now(UTC))
    assert pull(hub, "east", headers, honest.node) == 200
    assert pull(hub, "east", headers, honest.node) == 200
    assert pull(hub, "west", headers, honest.node) == 403
    assert pull(hub, "auditor", headers, honest.node) == 403


@pytest.mark.parametrize("damage", ["not base64", "e30=", "", "A" * 5000])
def test_damaged_node_keys_are_refused(hub: Hub, honest: Honest, damage: str) -> None:
    headers = node_header(hub.party("east")) | {"flwr-public-key": damage}
    assert pull(hub, "east", headers, honest.node) in (401, 403)


def test_two_node_keys_in_one_request_are_refused(hub: Hub) -> None:
    both = [
        *node_header(hub.party("north")).items(),
        ("flwr-public-key", node_header(hub.party("west"))["flwr-public-key"]),
    ]
    with client_of(hub, client_context(hub.ca, hub.party("north"))) as client:
        answer = client.post("/v1/fleet/pull-messages", headers=both)
    assert (answer.status_code, reason_of(answer)) == (401, "no-node-key")


# --- bodies -----------------------------------------------------------------------------------------------------------


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


# --- floods -----------------------------------------------------------------------------------------------------------


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
