"""Wrong credentials against a real hub: every route, every certificate, every signature. All refused, none crash."""

from __future__ import annotations

import ssl
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from flwr.proto.fleet_pb2 import PullMessagesRequest

from pixcell_core.trust.certificates import tls_public_key, to_pem
from server.hub.gate import FLEET_ROUTES
from site_client.approvals.enrolment import load_tls_key
from site_client.approvals.site_folder import SiteFolder
from tests.server.door.asking import (
    NOW,
    PROTOBUF,
    client_of,
    every_route,
    node_header,
    reason_of,
    signed_headers,
)
from tests.server.door.conftest import Honest, short_lived
from tests.server.enrolled import client_context
from tests.server.hub_process import Hub
from tests.server.processes import wait_until

pytestmark = pytest.mark.end_to_end


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
