"""Runs the review page on 127.0.0.1 until the review is signed, stopped, or left alone too long."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable

import uvicorn

from pixcell_core.errors import BadInputError, TimedOutError
from privacy_audit.review.app import build_app
from privacy_audit.review.door import new_token
from privacy_audit.review.session import ReviewSession

LOOPBACK = "127.0.0.1"
LINGER_S = 1.0
"""After the signature the page gets its answer and shows the result; then the server ends."""


def serve_review(
    session: ReviewSession,
    *,
    port: int = 0,
    idle_s: float = 3600.0,
    say: Callable[[str], None] = lambda _: None,
    token: str | None = None,
) -> None:
    """Serve until signed. `say` gets the page's address once it answers.

    Raises:
        BadInputError: the port is taken. TimedOutError: nobody asked for `idle_s` seconds; calls are kept.
        KeyboardInterrupt: stopped; calls are kept.
    """
    listening = _bind(port)
    bound = int(listening.getsockname()[1])
    secret = token or new_token()
    clock = _Clock()
    app = build_app(session, token=secret, port=bound, on_request=clock.heard, on_signed=clock.finish)
    config = uvicorn.Config(
        app,
        # An access log would keep the token; the door's refusals tell nobody anything.
        access_log=False,
        log_level="critical",
        lifespan="off",
        ws="none",
        server_header=False,
        proxy_headers=False,
        limit_concurrency=64,
        timeout_keep_alive=5,
        h11_max_incomplete_event_size=16 * 1024,
    )
    server = uvicorn.Server(config)
    try:
        asyncio.run(
            _run(server, listening, clock, idle_s, lambda: say(f"http://{LOOPBACK}:{bound}/{secret}/"))
        )
    finally:
        listening.close()
    if session.signed is not None:
        return
    if clock.idle() >= idle_s:
        raise TimedOutError(
            f"Nobody looked at the page for {idle_s / 60:.0f} minutes; {session.open} items are open.",
            hint="Every call is kept. Run the same command again to go on.",
            code="review-idle",
        )
    raise KeyboardInterrupt


class _Clock:
    """When somebody asked last, and whether the review is over."""

    def __init__(self) -> None:
        self._heard = time.monotonic()
        self._over: float | None = None

    def heard(self) -> None:
        self._heard = time.monotonic()

    def finish(self) -> None:
        self._over = self._over or time.monotonic()

    def idle(self) -> float:
        return time.monotonic() - self._heard

    def done(self, idle_s: float) -> bool:
        if self._over is not None:
            return time.monotonic() - self._over > LINGER_S
        return self.idle() >= idle_s


async def _run(
    server: uvicorn.Server, listening: socket.socket, clock: _Clock, idle_s: float, ready: Callable[[], None]
) -> None:
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    told = False
    while not serving.done():
        if server.started and not told:
            told = True
            ready()
        if clock.done(idle_s):
            server.should_exit = True
        await asyncio.sleep(0.05)
    await serving


def _bind(port: int) -> socket.socket:
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listening.bind((LOOPBACK, port))
    except OSError as error:
        listening.close()
        raise BadInputError(
            f"Port {port} of this machine cannot be used: {error.strerror or error}.",
            hint="Leave --port out; a free one is taken.",
            code="port-unusable",
        ) from error
    return listening
