"""The public listener: TLS that demands a certificate of this consortium, on bounded connections with deadlines.

uvicorn parses HTTP; accepting is done here, so that handshakes are bounded, logged with their reason, and cut off, and
so that every request carries the certificate of its connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvicorn
from cryptography import x509
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pixcell_core.errors import PixcellError, RefusedError
from pixcell_core.trust.certificates import PartyCertificate, party_of
from server.hub.admission import PEER, Admission, Limits

Report = Callable[..., None]
"""Called as `report(reason, party=…, method=…)` for whatever is refused."""

BACKLOG = 512


def server_context(pki: Path) -> ssl.SSLContext:
    """TLS 1.2 or newer with the hub's certificate; clients must show one that `pki/ca.crt` issued.

    No session is resumed, so that every connection proves its certificate anew.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.num_tickets = 0
    try:
        context.load_verify_locations(cafile=str(pki / "ca.crt"))
        context.load_cert_chain(str(pki / "server.crt"), str(pki / "server.key"))
    except (ssl.SSLError, OSError) as error:
        raise RefusedError(
            "The hub's certificate or its key cannot be used.",
            hint="Put pki/server.crt and pki/server.key back, or make new ones: pixcell kit renew-hub.",
            code="bad-server-certificate",
        ) from error
    return context


class PartyProtocol(HttpToolsProtocol):
    """uvicorn's HTTP, with the party of the connection in every scope, and a deadline for each step of a request."""

    def __init__(self, *arguments: Any, admission: Admission, report: Report, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._admission, self._limits, self._report = admission, admission.limits, report
        self._peer: PartyCertificate | None = None
        self._counted = False
        self._head_bytes: int | None = 0
        self._reading: asyncio.TimerHandle | None = None
        self._answering: asyncio.TimerHandle | None = None

    @property
    def party(self) -> str:
        """Name of the party, or empty where the certificate names none."""
        return self._peer.party if self._peer else ""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A handshake succeeded: learn who it is, once for the connection."""
        super().connection_made(transport)
        raw = transport.get_extra_info("ssl_object").getpeercert(binary_form=True)
        with contextlib.suppress(PixcellError, ValueError):
            self._peer = party_of(x509.load_der_x509_certificate(raw or b""))
        self._counted = self._admission.connect(self.party)
        if not self._counted:
            self._report("too-many-connections", party=self.party)
            transport.abort()
            return
        self._read_within(self._limits.head_s, "slow-head")

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks and give the connection's place back."""
        for handle in (self._reading, self._answering):
            if handle is not None:
                handle.cancel()
        if self._counted:
            self._counted = False
            self._admission.disconnect(self.party)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bound the head of a request: the parser itself would collect one without end."""
        if self.transport.is_closing():
            return
        if self._head_bytes is not None:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes is not None and self._head_bytes > self._limits.head_bytes:
            self._hang_up("head-too-large")
        elif self._head_bytes and self._reading is None:
            # Bytes that begin no request (empty lines) stopped uvicorn's idle clock: they get ours.
            self._read_within(self._limits.head_s, "slow-head")

    def send_400_response(self, msg: str) -> None:
        """Something that is not HTTP."""
        self._report("not-http", party=self.party)
        super().send_400_response(msg)

    def on_message_begin(self) -> None:
        """A request starts."""
        super().on_message_begin()
        if self.cycle is None or self.cycle.response_complete:
            self._stop_answering_clock()
        self.scope[PEER] = self._peer  # type: ignore[literal-required]
        self._head_bytes = self._head_bytes or 0
        self._read_within(self._limits.head_s, "slow-head")

    def on_headers_complete(self) -> None:
        """The head is in."""
        self._head_bytes = None
        self._read_within(self._limits.body_s, "slow-body")
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The body is in; now the answer has its time."""
        super().on_message_complete()
        self._head_bytes = 0
        self._stop_reading_clock()
        self._answer_within_time()

    def on_response_complete(self) -> None:
        """Answered, as far as the app goes; what the peer has not read yet is still ours."""
        if not _unread(self.transport):
            self._stop_answering_clock()
        super().on_response_complete()
        # Requests sent ahead are answered one after another, and each answer has its own time.
        self._answer_within_time()

    def timeout_keep_alive_handler(self) -> None:
        """Idle for long. A peer that still reads a long answer over a thin line is not: the answer's clock watches it."""
        if self._answering is not None and _unread(self.transport):
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
            return
        super().timeout_keep_alive_handler()

    def _answer_due(self) -> None:
        self._answering = None
        if not self.cycle.response_complete or _unread(self.transport):
            self._hang_up("slow-answer")

    def _answer_within_time(self) -> None:
        if self._answering is None and not self.cycle.response_complete:
            self._answering = self.loop.call_later(self._limits.answer_s, self._answer_due)

    def _read_within(self, seconds: float, reason: str) -> None:
        self._stop_reading_clock()
        self._reading = self.loop.call_later(seconds, self._hang_up, reason)

    def _stop_answering_clock(self) -> None:
        if self._answering is not None:
            self._answering.cancel()
            self._answering = None

    def _stop_reading_clock(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _hang_up(self, reason: str) -> None:
        if not self.transport.is_closing():
            self._report(reason, party=self.party)
            self.transport.abort()


def _unread(transport: asyncio.Transport) -> int:
    """Bytes written that the peer has not taken yet.

    asyncio's TLS layer hands all it encrypts to the plain transport below it and counts none of that; only that
    transport knows, and it has no public name.
    """
    below = getattr(getattr(transport, "_ssl_protocol", None), "_transport", None)
    return transport.get_write_buffer_size() + (below.get_write_buffer_size() if below is not None else 0)


class PublicServer(uvicorn.Server):
    """Accepts, shakes hands, and serves `PartyProtocol`s; leaves signals to the hub."""

    def __init__(
        self, config: uvicorn.Config, context: ssl.SSLContext, admission: Admission, report: Report
    ) -> None:
        super().__init__(config)
        self._context, self._admission, self._report = context, admission, report
        self._limits = _within_descriptors(admission.limits)
        self._accepting: list[asyncio.Task[None]] = []
        self._greeting: dict[asyncio.Task[None], str] = {}

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The hub stops both listeners together."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept on `sockets`."""
        await self.lifespan.startup()
        self.servers = []
        for listener in sockets or []:
            listener.listen(BACKLOG)
            listener.setblocking(False)
            self._accepting.append(asyncio.create_task(self._accept(listener)))
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more, then let open connections end as uvicorn does."""
        tasks = [*self._accepting, *self._greeting]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await super().shutdown(sockets)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, address = await loop.sock_accept(listener)
            except OSError:
                # Out of descriptors, most likely: those in use must end first.
                self._report("cannot-accept")
                await asyncio.sleep(0.2)
                continue
            if len(self.server_state.connections) >= self._limits.connections:
                self._report("hub-is-full")
                connection.close()
                continue
            self._make_room(address[0])
            task = asyncio.create_task(self._greet(connection))
            self._greeting[task] = address[0]
            task.add_done_callback(lambda done: self._greeting.pop(done, None))

    def _make_room(self, address: str) -> None:
        """End the oldest unfinished handshake where there are too many: an honest one takes milliseconds."""
        of_address = [task for task, theirs in self._greeting.items() if theirs == address]
        everybody = list(self._greeting)
        if len(of_address) >= self._limits.handshakes_per_address:
            victim = of_address[0]
        elif len(everybody) >= self._limits.handshakes:
            victim = everybody[0]
        else:
            return
        self._greeting.pop(victim)
        victim.cancel()
        self._report("handshake-crowded-out")

    async def _greet(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(
                self._protocol,
                connection,
                ssl=self._context,
                ssl_handshake_timeout=self._limits.handshake_s,
                ssl_shutdown_timeout=2.0,
            )
        except (ssl.SSLError, OSError, TimeoutError) as error:
            self._report(_handshake_reason(error))
            connection.close()
        except asyncio.CancelledError:
            connection.close()
            raise

    def _protocol(self) -> PartyProtocol:
        return PartyProtocol(
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
            admission=self._admission,
            report=self._report,
        )


_VERIFY_REASONS = {
    9: "certificate-not-yet-valid",
    10: "certificate-expired",
    18: "certificate-of-another-ca",
    19: "certificate-of-another-ca",
    20: "certificate-of-another-ca",
    21: "certificate-of-another-ca",
    26: "certificate-of-another-purpose",
}
"""OpenSSL's verification codes (x509_vfy.h) that have a name of their own here."""


def _handshake_reason(error: BaseException) -> str:
    """A fixed word for why a handshake failed: nothing the peer sent gets into the log."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _VERIFY_REASONS.get(error.verify_code, "certificate-not-valid")
    if isinstance(error, ssl.SSLError):
        if error.reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
            return "no-certificate"
        return "not-tls" if error.reason in ("HTTP_REQUEST", "WRONG_VERSION_NUMBER") else "handshake-failed"
    return "handshake-given-up"


def _within_descriptors(limits: Limits) -> Limits:
    """The limits, with no more connections than half of the descriptors this process may open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return limits
    room = max(16, soft // 2)
    return replace(
        limits,
        connections=min(limits.connections, room),
        handshakes=max(16, min(limits.handshakes, room // 2)),
    )
