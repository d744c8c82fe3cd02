"""What every request to the review page must pass before anything looks at it, and what every answer carries.

The page shows real tiles. It is for one person in front of this machine: a request must name this address and this
port, know the token, and come from the page itself. Without the check of the Host header a foreign site could point
its own name at 127.0.0.1 and read the pictures through the reviewer's browser.
"""

from __future__ import annotations

import hmac
import secrets

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 1024
TOKEN_BYTES = 24

SECURITY_HEADERS = {
    "content-security-policy": "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}


def new_token() -> str:
    """An unguessable part of the page's address: 192 bits."""
    return secrets.token_urlsafe(TOKEN_BYTES)


class Door:
    """Refuses what does not come from the page on this machine, and puts the headers on every answer."""

    def __init__(self, app: ASGIApp, *, token: str, port: int) -> None:
        self._app = app
        self._prefix = f"/{token}/".encode("ascii")
        self._hosts = {f"127.0.0.1:{port}".encode(), f"localhost:{port}".encode()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request. Anything but HTTP (a socket, for one) is not spoken here."""
        if scope["type"] != "http":
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [(n, v) for n, v in message["headers"] if n.lower() != b"server"]
                fixed = [(n.encode(), v.encode()) for n, v in SECURITY_HEADERS.items()]
                message = {**message, "headers": [*kept, *fixed]}
            await send(message)

        refusal = self._refusal(scope)
        if refusal is not None:
            await PlainTextResponse(refusal[1] + "\n", status_code=refusal[0])(scope, receive, with_headers)
            return
        await self._app(scope, receive, with_headers)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.lower(), []).append(value)
        hosts = headers.get(b"host", [])
        if len(hosts) != 1 or hosts[0].lower() not in self._hosts:
            return 421, "This page answers to its own address alone."
        # The raw path: what a router would make of %2e%2e or a doubled slash is no business of the token's.
        path: bytes = scope.get("raw_path") or scope["path"].encode()
        if not hmac.compare_digest(path[: len(self._prefix)], self._prefix):
            return 404, "Not found."
        if any(value not in (b"same-origin", b"none") for value in headers.get(b"sec-fetch-site", [])):
            return 403, "Asked from another page."
        own = b"http://" + hosts[0].lower()
        if any(value.lower() != own for value in headers.get(b"origin", [])):
            return 403, "Asked from another page."
        if scope["method"] in ("GET", "HEAD"):
            return None
        return _body_refusal(headers)


def _body_refusal(headers: dict[bytes, list[bytes]]) -> tuple[int, str] | None:
    """What a body must be: JSON, with a length that is named and small. The server holds the sender to the length."""
    length = headers.get(b"content-length", [])
    if b"transfer-encoding" in headers or len(length) != 1 or not length[0].isdigit():
        return 411, "Say how long the body is."
    if len(length[0]) > 9 or int(length[0]) > MAX_BODY_BYTES:
        return 413, f"A body holds at most {MAX_BODY_BYTES} bytes."
    kinds = headers.get(b"content-type", [])
    if len(kinds) != 1 or kinds[0].split(b";")[0].strip().lower() != b"application/json":
        return 415, "Send application/json."
    return None
