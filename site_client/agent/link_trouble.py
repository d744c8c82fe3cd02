"""What can be wrong between a site and its hub: one code, one sentence and one remedy each."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx

MAX_SKEW_S = 120.0
"""A clock that differs more from the hub's is called wrong; the hub lets a signature be 300 s old."""

LINK_TROUBLES: dict[str, tuple[str, str]] = {
    "hub-name-unknown": (
        "The hub's name has no address.",
        "Check the address in site.json and this machine's DNS; behind a proxy, set it with `pixcell site proxy`.",
    ),
    "hub-unreachable": (
        "The hub does not answer.",
        "Check that the hub runs and that the firewall lets this machine out to its address and port.",
    ),
    "hub-slow": (
        "The hub did not answer in time.",
        "A firewall may drop packets silently, or the hub is overloaded. Ask both.",
    ),
    "hub-hung-up": (
        "The connection was closed before the hub answered: the hub is restarting, a firewall or another service "
        "closes it, or the hub refuses this site's certificate without a word.",
        "It is tried again; if it stays, check the address, and ask the coordinator whether the kit is still good.",
    ),
    "hub-failing": (
        "The hub answers, but only with an error of its own.",
        "Tell the coordinator: the hub's own log says why. This site tries again by itself.",
    ),
    "proxy-name-unknown": ("The proxy's name has no address.", "Check it with `pixcell site proxy --show`."),
    "proxy-unreachable": (
        "The proxy does not answer.",
        "Check its address with `pixcell site proxy --show`, and ask your network team.",
    ),
    "proxy-refused": (
        "The proxy refuses to open a tunnel to the hub.",
        "Ask your network team to allow CONNECT to the hub's host and port.",
    ),
    "proxy-needs-credentials": (
        "The proxy asks for a user name and a password.",
        "Put user:password into a file of mode 600 and give it: pixcell site proxy URL --credentials-file FILE.",
    ),
    "proxy-cannot-reach-hub": (
        "The proxy opened no tunnel: it cannot reach the hub itself.",
        "Check the hub's address; ask the coordinator whether the hub runs, and your network team for the proxy's log.",
    ),
    "foreign-certificate": (
        "Whoever answers has a certificate of another authority than this consortium's: another hub, or TLS "
        "interception by a proxy. Nothing was sent.",
        "Ask your network team to pass the hub's port through unopened. Never add the proxy's authority here.",
    ),
    "hub-certificate-expired": (
        "The hub's certificate has expired, or this machine's clock runs ahead.",
        "Compare this machine's clock; if it is right, the coordinator renews the hub's certificate.",
    ),
    "hub-certificate-not-yet-valid": (
        "The hub's certificate is not valid yet, or this machine's clock runs behind.",
        "Set this machine's clock (NTP); if it is right, tell the coordinator.",
    ),
    "hub-name-mismatch": (
        "The hub's certificate is of this consortium, but for another name than the one in this site's address.",
        "Use the name the coordinator gave you, or ask for a certificate that also holds this one.",
    ),
    "bad-certificate": (
        "The hub's certificate is not acceptable.",
        "Run `pixcell site doctor`, and send its output to the coordinator.",
    ),
    "not-the-hub": (
        "Something answers at the hub's address, but it is not a hub: plain HTTP, or another service.",
        "Check host and port with the coordinator.",
    ),
    "kit-revoked": (
        "The hub says that this site's certificate was revoked.",
        "Talk to the coordinator; a new kit needs a new enrolment request.",
    ),
    "kit-expired": (
        "The hub says that this site's certificate has expired (or a clock is wrong).",
        "Ask the coordinator to renew the kit, then run `pixcell site install-kit`.",
    ),
    "kit-of-another-consortium": (
        "The hub does not know the authority of this site's certificate.",
        "Install the kit of this hub's consortium: pixcell site install-kit.",
    ),
    "kit-not-presented": (
        "The hub demands a client certificate and got none.",
        "Install the kit the coordinator returned: pixcell site install-kit.",
    ),
    "kit-refused": (
        "The hub refuses this site's certificate.",
        "Talk to the coordinator: it may be revoked, of another role, or of an older kit.",
    ),
    "clock-wrong": (
        f"This machine's clock and the hub's differ by more than {MAX_SKEW_S:.0f} s, so the hub refuses its signatures.",
        "Set the clock (NTP).",
    ),
    "not-let-in": (
        "The hub did not let this site in: the coordinator has not added its kit yet, or its last connection still "
        "counts as alive (some 20 s). Trying again.",
        "Wait a minute; if it stays, ask the coordinator whether this site is enrolled.",
    ),
    "versions-differ": (
        "Hub and site run different releases.",
        "Install the release the coordinator names on both ends.",
    ),
    "outbound-refused": (
        "The agent tried to reach another address than the hub's and was stopped.",
        "Nothing left this machine. Tell the authors; logs/supernode.log says what asked.",
    ),
    "link-failed": ("The connection to the hub ended.", "It is tried again; logs/supernode.log says more."),
}
"""Code -> sentence and remedy. The one list that status, doctor and the agent's log speak from."""


@dataclass(frozen=True)
class LinkTrouble:
    """One reason why the hub was not reached."""

    code: str

    @property
    def reason(self) -> str:
        """What it means."""
        return LINK_TROUBLES[self.code][0]

    @property
    def remedy(self) -> str:
        """What to do."""
        return LINK_TROUBLES[self.code][1]


class NotTheHubError(httpx.TransportError):
    """An answer that no hub gives. `noted`: its status was recorded already when it came in."""

    noted = False


_VERIFY = {
    9: "hub-certificate-not-yet-valid",
    10: "hub-certificate-expired",
    18: "foreign-certificate",
    19: "foreign-certificate",
    20: "foreign-certificate",
    21: "foreign-certificate",
    7: "foreign-certificate",
    62: "hub-name-mismatch",
    64: "hub-name-mismatch",
}
"""OpenSSL's X509_V_ERR_* numbers (openssl-verify)."""

_ALERTS = (
    ("CERTIFICATE_REVOKED", "kit-revoked"),
    ("CERTIFICATE_EXPIRED", "kit-expired"),
    ("UNKNOWN_CA", "kit-of-another-consortium"),
    ("CERTIFICATE_REQUIRED", "kit-not-presented"),
    ("ALERT_BAD_CERTIFICATE", "kit-refused"),
    ("CERTIFICATE_UNKNOWN", "kit-refused"),
    ("UNSUPPORTED_CERTIFICATE", "kit-refused"),
    ("ACCESS_DENIED", "kit-refused"),
    ("ALERT_HANDSHAKE_FAILURE", "kit-refused"),
)
"""TLS alerts (RFC 8446, 6) that a hub sends about the client's certificate, as OpenSSL names them."""

REASON_HEADER = "pixcell-refusal"
"""Header in which the hub's door says why it refuses a request."""

DOOR_REASONS = {
    "not-a-party": "kit-not-presented",
    "certificate-revoked": "kit-revoked",
    "certificate-expired": "kit-expired",
    "certificate-not-yet-valid": "clock-wrong",
    "role-may-not": "kit-refused",
    "no-node-key": "kit-refused",
    "node-key-of-another": "kit-refused",
    "too-many-requests": "hub-failing",
    "too-many-at-once": "hub-failing",
}
"""What the door says -> what it means here."""

_NOT_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "PACKET_LENGTH")


def trouble_of(error: BaseException, *, proxied: bool = False) -> LinkTrouble:
    """The trouble behind an exception of a request to the hub. Pure; looks at causes too."""
    chain = tuple(_chain(error))
    for one in chain:
        if isinstance(one, ssl.SSLCertVerificationError):
            return LinkTrouble(_VERIFY.get(one.verify_code, "bad-certificate"))
    for one in chain:
        if isinstance(one, ssl.SSLEOFError):
            return LinkTrouble("hub-hung-up")
        if isinstance(one, ssl.SSLError):
            return LinkTrouble(_tls_code(f"{one.reason or ''} {one}".upper().replace(" ", "_")))
    for one in chain:
        if getattr(one, "code", "") == "outbound-refused":
            return LinkTrouble("outbound-refused")
        if isinstance(one, httpx.ProxyError):
            return LinkTrouble(_proxy_code(str(one)))
        if isinstance(one, NotTheHubError):
            return LinkTrouble("not-the-hub")
        if isinstance(one, socket.gaierror):
            return LinkTrouble("proxy-name-unknown" if proxied else "hub-name-unknown")
        if isinstance(one, httpx.HTTPStatusError):
            return trouble_of_answer(one.response) or LinkTrouble("link-failed")
    if isinstance(error, httpx.RemoteProtocolError):
        return LinkTrouble("hub-hung-up" if "disconnected" in str(error) else "not-the-hub")
    if isinstance(error, (httpx.ReadError, httpx.WriteError, httpx.CloseError)):
        return LinkTrouble("hub-hung-up")
    if isinstance(error, httpx.ConnectError):
        if any(isinstance(one, (ConnectionResetError, BrokenPipeError)) for one in chain):
            # Somebody was there and closed while TLS was being agreed on.
            return LinkTrouble("hub-hung-up")
        return LinkTrouble("proxy-unreachable" if proxied else "hub-unreachable")
    if isinstance(error, httpx.TimeoutException):
        return LinkTrouble("hub-slow")
    if isinstance(error, (httpx.TransportError, OSError)):
        return LinkTrouble("hub-unreachable")
    return LinkTrouble("link-failed")


def trouble_of_answer(response: httpx.Response, now: datetime | None = None) -> LinkTrouble | None:
    """The trouble that an answer of the hub tells of; None for an answer as it should be."""
    status = response.status_code
    if status < 300:
        return None
    if status in (401, 403) and abs(clock_skew(response, now) or 0.0) > MAX_SKEW_S:
        return LinkTrouble("clock-wrong")
    if (said := DOOR_REASONS.get(response.headers.get(REASON_HEADER, ""))) is not None:
        return LinkTrouble(said)
    code = _flower_code(response)
    if status == 403:
        # With a code of Flower's it speaks of a run that ended; without one the hub's door speaks of the kit.
        return None if code is not None else LinkTrouble("kit-refused")
    if status in (401, 412):
        return LinkTrouble("versions-differ" if code == 1001 else "not-let-in")
    if status == 429 or status >= 500:
        return LinkTrouble("hub-failing")
    return None if code is not None else LinkTrouble("not-the-hub")


def clock_skew(response: httpx.Response, now: datetime | None = None) -> float | None:
    """Seconds this machine's clock is ahead of the hub's, from the answer's Date; None where it has none."""
    text = response.headers.get("date", "")
    try:
        there = parsedate_to_datetime(text)
    except (TypeError, ValueError):
        return None
    if there.tzinfo is None:
        there = there.replace(tzinfo=UTC)
    return ((now or datetime.now(UTC)) - there).total_seconds()


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or one.__context__


def _tls_code(words: str) -> str:
    for sign, code in _ALERTS:
        if sign in words:
            return code
    if any(sign in words for sign in _NOT_TLS):
        return "not-the-hub"
    return "bad-certificate"


def _proxy_code(words: str) -> str:
    status = words.strip()[:3]
    if status == "407":
        return "proxy-needs-credentials"
    if status in ("502", "503", "504"):
        return "proxy-cannot-reach-hub"
    return "proxy-refused"


def _flower_code(response: httpx.Response) -> int | None:
    try:
        body = response.json()
    except (ValueError, httpx.StreamError):
        return None
    code = body.get("code") if isinstance(body, dict) else None
    return code if isinstance(code, int) else None
