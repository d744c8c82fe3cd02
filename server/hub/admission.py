"""Who may ask what of the public door: decided for every request, from the certificate that TLS has verified.

TLS checks the chain once, when a connection begins. Here each request is checked again, because a connection may
outlive its certificate: revoked, expired, the party's role, the node key that must belong to the certificate's site,
and how much one party may ask. Pure apart from the revocation list's file; the clock comes in.
"""

from __future__ import annotations

import base64
import binascii
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from pixcell_core.trust.certificates import PartyCertificate, public_key_digest

PEER = "pixcell.peer"
"""Key of the ASGI scope: the `PartyCertificate` of the connection, or None."""

NODE_KEY_HEADER = b"flwr-public-key"
"""Flower's header with the base64 of the node's public key in PEM (`FLEET_HTTP_PUBLIC_KEY_HEADER`)."""

MAX_NODE_KEY_HEADER = 1024
OBJECT_CALLS = frozenset({"push-object", "pull-object", "confirm-message-received"})
"""Calls of which one adapter takes hundreds: they have a bucket of their own."""


@dataclass(frozen=True)
class Limits:
    """How much one party, and everybody together, may ask."""

    calls_per_s: float = 50.0
    call_burst: int = 200
    objects_per_s: float = 500.0
    object_burst: int = 5000
    in_flight: int = 16
    connections_per_party: int = 32
    connections: int = 1024
    handshakes_per_address: int = 16
    handshakes: int = 256
    handshake_s: float = 10.0
    head_s: float = 15.0
    body_s: float = 120.0
    answer_s: float = 300.0
    idle_s: float = 30.0
    head_bytes: int = 32 * 1024


@dataclass(frozen=True)
class Refusal:
    """A request that is not passed on: HTTP status, the reason for the log and the caller, and whether to hang up."""

    status: int
    reason: str
    party: str = ""
    retry_after_s: int = 0
    hang_up: bool = False


class Revocations(Protocol):
    """What answers whether a certificate was taken back."""

    def is_revoked(self, serial: str) -> bool:
        """Whether the certificate with this serial number was revoked."""


@dataclass
class Bucket:
    """A token bucket: `rate` tokens a second, at most `burst` at once."""

    rate: float
    burst: int
    tokens: float = field(init=False)
    at: float | None = None

    def __post_init__(self) -> None:
        self.tokens = float(self.burst)

    def take(self, now: float) -> float:
        """Take one token; returns 0, or the seconds after which there will be one."""
        if self.at is not None:
            self.tokens = min(float(self.burst), self.tokens + max(0.0, now - self.at) * self.rate)
        self.at = now
        if self.tokens >= 1.0:
            self.tokens -= 1.0
            return 0.0
        return (1.0 - self.tokens) / self.rate


@dataclass
class _Account:
    calls: Bucket
    objects: Bucket
    in_flight: int = 0
    connections: int = 0


class Admission:
    """The rules of the public door."""

    def __init__(
        self,
        revocations: Revocations,
        limits: Limits | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits or Limits()
        self._revocations, self._clock, self._ticks = revocations, clock, ticks
        # Keyed by what the CA signed, so there are never more accounts than parties.
        self._accounts: dict[str, _Account] = {}
        self._node_keys: dict[bytes, str] = {}

    def judge(self, scope: MutableMapping[str, Any], route: str | None) -> Refusal | None:
        """Whether this request is refused. `route` is the last part of a fleet path, or None for any other path."""
        peer = scope.get(PEER)
        if not isinstance(peer, PartyCertificate):
            return Refusal(403, "not-a-party", hang_up=True)
        now = self._clock()
        if self._revocations.is_revoked(peer.serial):
            return Refusal(403, "certificate-revoked", peer.party, hang_up=True)
        if now >= peer.not_after:
            return Refusal(403, "certificate-expired", peer.party, hang_up=True)
        if now < peer.not_before:
            return Refusal(403, "certificate-not-yet-valid", peer.party, hang_up=True)
        account = self._account(peer.party)
        bucket = account.objects if route in OBJECT_CALLS else account.calls
        wait = bucket.take(self._ticks())
        if wait > 0:
            return Refusal(429, "too-many-requests", peer.party, retry_after_s=max(1, round(wait + 0.5)))
        if route is None:
            return None
        if peer.role != "site":
            return Refusal(403, "role-may-not", peer.party)
        return self._judge_node_key(scope, peer)

    def begin(self, party: str) -> Refusal | None:
        """Count a request that is being answered; refuses where a party has too many at once. Pair with `end`."""
        account = self._account(party)
        if account.in_flight >= self.limits.in_flight:
            return Refusal(429, "too-many-at-once", party, retry_after_s=1)
        account.in_flight += 1
        return None

    def end(self, party: str) -> None:
        """The request was answered."""
        self._account(party).in_flight -= 1

    def connect(self, party: str) -> bool:
        """Count a connection of a party; False where it has too many. Pair a True with `disconnect`."""
        account = self._account(party)
        if account.connections >= self.limits.connections_per_party:
            return False
        account.connections += 1
        return True

    def disconnect(self, party: str) -> None:
        """The connection ended."""
        self._account(party).connections -= 1

    def _account(self, party: str) -> _Account:
        limits = self.limits
        return self._accounts.setdefault(
            party,
            _Account(
                Bucket(limits.calls_per_s, limits.call_burst),
                Bucket(limits.objects_per_s, limits.object_burst),
            ),
        )

    def _judge_node_key(self, scope: MutableMapping[str, Any], peer: PartyCertificate) -> Refusal | None:
        sent = [value for name, value in scope["headers"] if name.lower() == NODE_KEY_HEADER]
        if len(sent) != 1 or len(sent[0]) > MAX_NODE_KEY_HEADER:
            return Refusal(401, "no-node-key", peer.party)
        # The digest of a header is the same for ever, and a site has one: only right answers are remembered.
        digest = self._node_keys.get(sent[0]) or _digest_of(sent[0])
        if peer.node_key is None or digest != peer.node_key:
            return Refusal(403, "node-key-of-another", peer.party)
        if sent[0] not in self._node_keys:
            if len(self._node_keys) >= 10_000:
                self._node_keys.clear()
            self._node_keys[bytes(sent[0])] = digest
        return None


def _digest_of(header: bytes) -> str | None:
    try:
        key = load_pem_public_key(base64.b64decode(header, validate=True))
    except (ValueError, TypeError, binascii.Error, UnsupportedAlgorithm):
        return None
    return public_key_digest(key) if isinstance(key, ec.EllipticCurvePublicKey) else None
