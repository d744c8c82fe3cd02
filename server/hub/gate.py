"""The two doors of the hub: what sites may call through the public one, and the executor through the inner one.

Flower serves its fleet, control and runtime interfaces on one port, and its control interface asks nobody who they
are. So neither door passes it: runs are started inside the hub's own process.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from server.hub.admission import PEER, Admission, Refusal

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]

FLEET_ROUTES = frozenset(
    f"/v1/fleet/{name}"
    for name in (
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "get-run",
        "get-fab",
        "push-object",
        "pull-object",
        "confirm-message-received",
    )
)
"""What an enrolled site calls. Registering is not among it: keys are added by the coordinator alone."""

RUNTIME_ROUTES = frozenset(
    f"/v1/runtime/{name}"
    for name in (
        "acquire-task",
        "send-task-heartbeat",
        "pull-task-input",
        "push-task-output",
        "push-object",
        "pull-object",
        "confirm-message-received",
        "push-logs",
        "push-messages",
        "pull-messages",
        "get-nodes",
    )
)
"""What the executor on this machine calls; each is guarded by the shared secret or a task's token."""

REASON_HEADER = b"pixcell-refusal"
"""Header of a refusal: the reason in one word, for the site's own explanation."""

MAX_BODY_BYTES = 64 * 1024 * 1024


class BodyTooLargeError(Exception):
    """A request carried more bytes than a door lets through."""


class Door:
    """Passes POST on `routes` and GET on `/health`; everything else is told that nothing is here (404).

    With `admission` it is the public door: each request is judged by its certificate first, and every refusal, the
    app's own included, is reported with a fixed reason.
    """

    def __init__(
        self,
        app: AsgiApp,
        routes: frozenset[str],
        max_body_bytes: int = MAX_BODY_BYTES,
        *,
        admission: Admission | None = None,
        report: Callable[..., None] = lambda reason, **where: None,
    ) -> None:
        self._app, self._routes, self._max = app, routes, max_body_bytes
        self._admission, self._report = admission, report

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection (ASGI)."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        # Flower answers /health and the routes; a path is compared whole, so no other spelling reaches them.
        known = scope["method"] == "POST" and scope["path"] in self._routes
        route = scope["path"].rsplit("/", 1)[-1] if known else None
        refusal = self._judge(scope, route)
        if refusal is not None:
            await self._refuse(refusal, route, send)
            return
        if self._admission is None:
            await self._pass(scope, receive, send, route, "")
            return
        party = scope[PEER].party
        refusal = self._admission.begin(party)
        if refusal is not None:
            await self._refuse(refusal, route, send)
            return
        try:
            await self._pass(scope, receive, send, route, party)
        finally:
            self._admission.end(party)

    def _judge(self, scope: Scope, route: str | None) -> Refusal | None:
        refusal = self._admission.judge(scope, route) if self._admission is not None else None
        if refusal is not None:
            return refusal
        party = scope[PEER].party if self._admission is not None else ""
        if route is None and (scope["method"], scope["path"]) != ("GET", "/health"):
            return Refusal(404, "nothing-here", party)
        if _declared_length(scope, self._max) > self._max:
            return Refusal(413, "body-too-large", party, hang_up=True)
        return None

    async def _pass(self, scope: Scope, receive: Receive, send: Send, route: str | None, party: str) -> None:
        status, seen, too_large = 0, 0, False

        async def watched_send(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if too_large:
                return
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        async def counted() -> MutableMapping[str, Any]:
            nonlocal seen, too_large
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._max:
                too_large = True
                raise BodyTooLargeError
            return message

        try:
            await self._app(scope, counted, watched_send)
        except Exception:
            # Frameworks wrap what a receiver raises; the flag says whether it was the limit.
            if not too_large:
                raise
        if too_large:
            self._report("body-too-large", party=party, method=route or "")
            if not status:
                await self._refuse(
                    Refusal(413, "body-too-large", party, hang_up=True), route, send, tell=False
                )
        elif status >= 400:
            self._report(f"answered-{status}", party=party, method=route or "")

    async def _refuse(self, refusal: Refusal, route: str | None, send: Send, *, tell: bool = True) -> None:
        if tell:
            self._report(refusal.reason, party=refusal.party, method=route or "")
        headers = [(b"content-length", b"0"), (REASON_HEADER, refusal.reason.encode("ascii"))]
        if refusal.retry_after_s:
            headers.append((b"retry-after", str(refusal.retry_after_s).encode("ascii")))
        if refusal.hang_up:
            # Also ends the reading of a body that nobody wants.
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await send({"type": "http.response.body", "body": b""})


def _declared_length(scope: Scope, limit: int) -> int:
    for name, value in scope["headers"]:
        if name.lower() == b"content-length":
            # More digits than any length has are not read as a number.
            return int(value) if value.isdigit() and len(value) < 20 else limit + 1
    return 0
