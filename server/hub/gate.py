"""The two doors of the hub: what sites may call through the public one, and the executor through the inner one.

Flower serves its fleet, control and runtime interfaces on one port, and its control interface asks nobody who they
are. So neither door passes it: runs are started inside the hub's own process.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

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

MAX_BODY_BYTES = 64 * 1024 * 1024


class BodyTooLargeError(Exception):
    """A request carried more bytes than a door lets through."""


class Door:
    """Passes POST on `routes` and GET on `/health`; everything else is told that nothing is here (404)."""

    def __init__(self, app: AsgiApp, routes: frozenset[str], max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self._app, self._routes, self._max = app, routes, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection (ASGI)."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        wanted = (scope["method"], scope["path"])
        if wanted != ("GET", "/health") and not (wanted[0] == "POST" and wanted[1] in self._routes):
            await _answer(send, 404)
            return
        if _declared_length(scope) > self._max:
            await _answer(send, 413)
            return
        started = False

        async def watched_send(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, self._counted(receive), watched_send)
        except BodyTooLargeError:
            if not started:
                await _answer(send, 413)

    def _counted(self, receive: Receive) -> Receive:
        seen = 0

        async def counted() -> MutableMapping[str, Any]:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._max:
                raise BodyTooLargeError
            return message

        return counted


def _declared_length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name.lower() == b"content-length":
            return int(value) if value.isdigit() else MAX_BODY_BYTES + 1
    return 0


async def _answer(send: Send, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})
