"""The public listener with a small app behind it and small limits: every step of a request has its deadline."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from server.enrolment.revocations import RevocationWatch
from server.hub.admission import Admission, Limits
from server.hub.gate import Door
from server.hub.listener import PublicServer, server_context
from site_client.approvals.site_folder import SiteFolder
from tests.server.enrolled import client_context, make_enrolment
from tests.server.processes import wait_until

LIMITS = Limits(
    head_s=0.5,
    body_s=0.8,
    answer_s=3.0,
    idle_s=1.0,
    handshake_s=0.5,
    head_bytes=4096,
    connections_per_party=4,
    in_flight=2,
)
MAX_BODY = 10_000


@dataclass
class Listening:
    """A listener, a way to speak to it, and what it refused."""

    place: tuple[str, int]
    ca: Path
    site: SiteFolder
    reasons: list[tuple[str, str]] = field(default_factory=list)

    def stream(self) -> ssl.SSLSocket:
        """A connection of the site."""
        plain = socket.create_connection(self.place, 5)
        stream = client_context(self.ca, self.site).wrap_socket(plain, server_hostname="127.0.0.1")
        stream.settimeout(5)
        return stream

    def ask(self, request: bytes) -> bytes:
        """The first line of the answer, or nothing."""
        with self.stream() as stream:
            stream.sendall(request)
            with suppress(OSError):
                return stream.recv(4096).split(b"\r\n")[0]
        return b""


async def small_app(scope: Any, receive: Any, send: Any) -> None:
    """Reads the body and says how long it was; `/v1/fleet/get-fab` answers more than any buffer holds."""
    length, more = 0, True
    while more:
        message = await receive()
        length += len(message.get("body", b""))
        more = message.get("more_body", False)
        if message["type"] == "http.disconnect":
            return
    body = bytes(64 << 20) if scope["path"].endswith("get-fab") else str(length).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[Listening]:
    """A listener in a thread of its own."""
    made = make_enrolment(tmp_path)
    site = made.party("east")
    admission = Admission(RevocationWatch(made.layout, made.authority.certificate), LIMITS)
    found = Listening(("", 0), made.ca, site)

    def report(reason: str, *, party: str = "", method: str = "") -> None:
        found.reasons.append((reason, party))

    with serving(admission, server_context(made.layout.pki), report) as place:
        found.place = place
        yield found


@contextmanager
def serving(
    admission: Admission, context: ssl.SSLContext, report: Callable[..., None], *, judged: bool = False
) -> Iterator[tuple[str, int]]:
    """Run a `PublicServer`; fails if it does not stop."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    routes = frozenset({"/v1/fleet/push-object", "/v1/fleet/get-fab"})
    config = uvicorn.Config(
        # The rules of requests are tested elsewhere; here it is connections.
        Door(small_app, routes, MAX_BODY, admission=admission if judged else None),  # type: ignore[arg-type]
        lifespan="off",
        log_level="error",
        ws="none",
        timeout_keep_alive=int(admission.limits.idle_s),
        timeout_graceful_shutdown=1,
    )
    server = PublicServer(config, context, admission, report)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    wait_until(lambda: server.started, 10, "the listener")
    try:
        yield listener.getsockname()
    finally:
        server.should_exit = True
        thread.join(15)
        assert not thread.is_alive()


GET = b"GET /health HTTP/1.1\r\nHost: h\r\n\r\n"
POST = b"POST /v1/fleet/push-object HTTP/1.1\r\nHost: h\r\n"


def closed_within(stream: ssl.SSLSocket, seconds: float) -> bool:
    """Whether the other side hangs up in that time."""
    stream.settimeout(seconds)
    try:
        return stream.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def test_an_honest_request_is_served_and_an_idle_connection_ended(listening: Listening) -> None:
    with listening.stream() as stream:
        for _ in range(3):
            stream.sendall(GET)
            got = b""
            while not got.endswith(b"\r\n\r\n0"):
                got += stream.recv(4096)
            assert got.startswith(b"HTTP/1.1 200")
            time.sleep(0.2)
        assert closed_within(stream, 10)
    assert listening.ask(POST + b"Content-Length: 5\r\n\r\nhello").endswith(b"200 OK")
    assert listening.reasons == []


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"", "slow-head"),
        (b"GET /health HT", "slow-head"),
        (b"\r\n", "slow-head"),
        (POST + b"Content-Length: 5\r\n\r\nhel", "slow-body"),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", "slow-body"),
    ],
)
def test_a_request_that_does_not_come_to_its_end_is_cut_off(
    listening: Listening, sent: bytes, reason: str
) -> None:
    with listening.stream() as stream:
        stream.sendall(sent)
        assert closed_within(stream, 10)
    assert listening.reasons == [(reason, "east")]


def test_drops_of_bytes_do_not_extend_a_deadline(listening: Listening) -> None:
    with listening.stream() as stream:
        began = time.monotonic()
        with suppress(OSError):
            while time.monotonic() - began < 5:
                stream.sendall(b"\r\n")
                time.sleep(0.1)
        assert time.monotonic() - began < 2
    assert ("slow-head", "east") in listening.reasons


def test_an_answer_that_nobody_reads_is_cut_off(listening: Listening) -> None:
    with listening.stream() as stream:
        stream.sendall(b"POST /v1/fleet/get-fab HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n")
        wait_until(lambda: ("slow-answer", "east") in listening.reasons, 5, "the cut")
    assert listening.reasons == [("slow-answer", "east")], "cut once, for this reason alone"


def test_requests_sent_ahead_have_each_their_own_time_for_the_answer(listening: Listening) -> None:
    with listening.stream() as stream:
        stream.sendall(GET + b"POST /v1/fleet/get-fab HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n")
        wait_until(lambda: ("slow-answer", "east") in listening.reasons, 6, "the cut")
    assert listening.reasons == [("slow-answer", "east")], "cut once, for this reason alone"


def test_a_slow_reader_gets_its_answer_beyond_the_idle_time(listening: Listening) -> None:
    with listening.stream() as stream:
        stream.sendall(b"POST /v1/fleet/get-fab HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n")
        time.sleep(LIMITS.idle_s + 0.8)
        got = 0
        while got < 64 << 20:
            piece = stream.recv(1 << 20)
            assert piece, f"cut after {got} bytes"
            got += len(piece)
    assert listening.reasons == []


@pytest.mark.parametrize("head", [b"GET /" + b"a" * 9000, b"GET / HTTP/1.1\r\nA: " + b"b" * 9000])
def test_a_head_without_end_is_cut_off(listening: Listening, head: bytes) -> None:
    with listening.stream() as stream:
        stream.sendall(head)
        assert closed_within(stream, 10)
    assert listening.reasons[0] == ("head-too-large", "east")


def test_a_handshake_that_stalls_is_given_up(listening: Listening) -> None:
    with socket.create_connection(listening.place, 5) as quiet:
        quiet.settimeout(3)
        assert quiet.recv(1) == b""
    wait_until(lambda: bool(listening.reasons), 5, "the report")
    assert listening.reasons == [("handshake-given-up", "")]


def test_connections_of_one_party_are_counted_and_given_back(listening: Listening) -> None:
    streams = [listening.stream() for _ in range(LIMITS.connections_per_party)]
    try:
        for stream in streams:
            stream.sendall(GET)
            assert b"200" in stream.recv(4096)
        assert listening.ask(GET) == b""
        assert listening.reasons == [("too-many-connections", "east")]
    finally:
        for stream in streams:
            stream.close()
    wait_until(lambda: listening.ask(GET).endswith(b"200 OK"), 5, "a free place")


def test_a_session_is_never_resumed(listening: Listening) -> None:
    context = client_context(listening.ca, listening.site)
    context.maximum_version = ssl.TLSVersion.TLSv1_2

    def connect(session: ssl.SSLSession | None) -> ssl.SSLSocket:
        plain = socket.create_connection(listening.place, 5)
        return context.wrap_socket(plain, server_hostname="127.0.0.1", session=session)

    with connect(None) as first:
        first.sendall(GET)
        first.recv(4096)
        session = first.session
    with connect(session) as second:
        second.sendall(GET)
        assert b"200" in second.recv(4096)
        assert not second.session_reused


def test_a_listener_that_forgot_to_demand_certificates_still_lets_nobody_in(tmp_path: Path) -> None:
    """Mutant: TLS asks for no certificate. The door behind it knows no party, and answers to none."""
    made = make_enrolment(tmp_path)
    admission = Admission(RevocationWatch(made.layout, made.authority.certificate), LIMITS)
    context = server_context(made.layout.pki)
    context.verify_mode = ssl.CERT_NONE
    with serving(admission, context, lambda reason, **where: None, judged=True) as place:
        plain = socket.create_connection(place, 5)
        with client_context(made.ca, None).wrap_socket(plain, server_hostname="127.0.0.1") as stream:
            stream.sendall(GET)
            answer = stream.recv(4096)
    assert answer.startswith(b"HTTP/1.1 403") and b"pixcell-refusal: not-a-party" in answer
