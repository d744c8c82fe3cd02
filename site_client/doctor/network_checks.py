"""Checks of the way to the hub: kit, authority, proxy, name, port, certificate, answer, clock, and nothing else."""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import socket
import ssl
from datetime import datetime
from functools import lru_cache

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from pixcell_core.contracts.canonical import parse_json, read_bounded
from pixcell_core.errors import PixcellError
from pixcell_core.trust.dsse import Envelope
from site_client.agent.hub_client import WARN_DAYS, days_left, hub_client, require_kit
from site_client.agent.link_trouble import MAX_SKEW_S, LinkTrouble, clock_skew, trouble_of
from site_client.agent.outbound_guard import Peer
from site_client.agent.proxy import Proxy
from site_client.doctor.finding import Finding
from site_client.doctor.question import Question


def check_kit(asked: Question) -> Finding:
    """The site's own certificate: there, matching its key, private, valid, and for how long."""
    certificate = require_kit(asked.folder, asked.now)
    left = days_left(certificate, asked.now)
    found = f"certificate valid until {certificate.not_valid_after_utc:%Y-%m-%d}, {left:.0f} days left"
    if left < WARN_DAYS:
        return Finding(
            name="kit",
            status="warn",
            found=found,
            remedy="Ask the coordinator to renew the kit now, then: pixcell site install-kit KIT.",
        )
    return Finding(name="kit", status="ok", found=found)


def check_kit_version(asked: Question) -> Finding:
    """The version that the installed kit says it has."""
    if not asked.folder.kit.is_file():
        return Finding(name="kit-version", status="skip", found="no kit.json is installed")
    envelope = Envelope.from_bytes(read_bounded(asked.folder.kit, 1 << 20), name="kit.json")
    # Only to show it: what the kit is trusted for was verified when it was installed.
    value = parse_json(envelope.unsafe_unverified_payload(), name="the kit")
    version = value.get("version") if isinstance(value, dict) else None
    if not isinstance(version, int):
        return Finding(name="kit-version", status="skip", found="the kit names no version")
    return Finding(name="kit-version", status="ok", found=f"kit version {version}")


def check_authority(asked: Question) -> Finding:
    """The pinned authority: the only one whose hub this site believes."""
    ca = x509.load_pem_x509_certificate(read_bounded(asked.folder.hub_ca, 65_536))
    left = days_left(ca, asked.now)
    fingerprint = "sha256:" + ca.fingerprint(hashes.SHA256()).hex()
    found = f"{fingerprint}, {left:.0f} days left"
    if left <= 0:
        return Finding(
            name="authority", status="fail", found=found, remedy="The consortium needs a new authority."
        )
    return Finding(
        name="authority",
        status="ok" if left >= WARN_DAYS else "warn",
        found=found,
        remedy="" if left >= WARN_DAYS else "Ask the coordinator when the authority is replaced.",
    )


def check_proxy(asked: Question) -> Finding:
    """Which way is taken, who said so, and whether the proxy's credentials can be read."""
    proxy = asked.way_out.proxy
    if proxy is None:
        return Finding(name="proxy", status="ok", found=str(asked.way_out))
    with_credentials = ", with credentials" if proxy.credentials() is not None else ""
    return Finding(name="proxy", status="ok", found=f"{asked.way_out}{with_credentials}")


def check_name(asked: Question) -> Finding:
    """The name of the hub, or of the proxy that looks it up instead."""
    peer, who = _first_hop(asked)
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(peer.host)
        return Finding(name="dns", status="ok", found=f"the {who} is given by its address {peer.host}")
    try:
        found = {
            str(entry[4][0]) for entry in socket.getaddrinfo(peer.host, peer.port, type=socket.SOCK_STREAM)
        }
    except OSError:
        return _trouble("dns", LinkTrouble("hub-name-unknown" if who == "hub" else "proxy-name-unknown"))
    return Finding(name="dns", status="ok", found=f"{peer.host} is {', '.join(sorted(found))}")


def check_port(asked: Question) -> Finding:
    """Whether the first machine on the way takes connections."""
    peer, who = _first_hop(asked)
    try:
        socket.create_connection((peer.host, peer.port), asked.timeout_s).close()
    except socket.gaierror:
        return Finding(name="tcp", status="skip", found=f"the {who}'s name has no address")
    except OSError as error:
        trouble = _trouble("tcp", LinkTrouble("hub-unreachable" if who == "hub" else "proxy-unreachable"))
        return trouble.model_copy(
            update={"found": f"{trouble.found} ({error.strerror or 'no answer in time'})"}
        )
    return Finding(name="tcp", status="ok", found=f"the {who} at {peer.host}:{peer.port} takes connections")


def check_certificate(asked: Question) -> Finding:
    """The certificate that answers at the hub's address: of the pinned authority, for this name, and for how long."""
    answer = _answer(asked)
    if isinstance(answer, LinkTrouble):
        if not answer.code.startswith(("foreign", "hub-cert", "hub-name-mis", "bad-cert", "kit-", "not-the")):
            return Finding(name="tls", status="skip", found=f"the hub was not reached [{answer.code}]")
        finding = _trouble("tls", answer)
        if answer.code != "foreign-certificate":
            return finding
        issuer = presented_issuer(asked)
        return finding.model_copy(update={"found": f"{finding.found} It was issued by: {issuer}."})
    if answer.ends is None:
        return Finding(name="tls", status="skip", found="the connection shows no certificate")
    left = (answer.ends - asked.now).total_seconds() / 86_400
    found = f"{answer.tls}; the hub's certificate is this consortium's, {left:.0f} days left"
    if left < WARN_DAYS:
        return Finding(
            name="tls",
            status="warn",
            found=found,
            remedy="Tell the coordinator to renew the hub's certificate.",
        )
    return Finding(name="tls", status="ok", found=found)


def check_hub(asked: Question) -> Finding:
    """Whether what answers is a hub in health."""
    answer = _answer(asked)
    if isinstance(answer, LinkTrouble):
        return _trouble("hub", answer)
    if answer.status != 200:
        return _trouble("hub", LinkTrouble("hub-failing" if answer.status >= 500 else "not-the-hub"))
    return Finding(name="hub", status="ok", found=f"{asked.hub} answers")


def check_clock(asked: Question) -> Finding:
    """How far this machine's clock is from the hub's."""
    answer = _answer(asked)
    if isinstance(answer, LinkTrouble):
        return Finding(name="clock", status="skip", found=f"the hub was not reached [{answer.code}]")
    if answer.skew_s is None:
        return Finding(name="clock", status="skip", found="the hub's answer carries no date")
    found = (
        f"this machine is {abs(answer.skew_s):.0f} s {'ahead of' if answer.skew_s > 0 else 'behind'} the hub"
    )
    if abs(answer.skew_s) > MAX_SKEW_S:
        return _trouble("clock", LinkTrouble("clock-wrong")).model_copy(update={"found": found})
    if abs(answer.skew_s) > MAX_SKEW_S / 4:
        return Finding(name="clock", status="warn", found=found, remedy="Set the clock (NTP).")
    return Finding(name="clock", status="ok", found=found)


def check_other_host(asked: Question) -> Finding:
    """Whether the firewall stops what is not the hub; asked only where the admin names a host for it."""
    if asked.other_host is None:
        return Finding(
            name="firewall", status="skip", found="not asked; give --other-host HOST:PORT to try one"
        )
    peer = Peer.parse(asked.other_host)
    try:
        socket.create_connection((peer.host, peer.port), asked.timeout_s).close()
    except OSError:
        return Finding(name="firewall", status="ok", found=f"{asked.other_host} is not reached from here")
    return Finding(
        name="firewall",
        status="warn",
        found=f"{asked.other_host} can be reached from this machine",
        remedy="Let this machine out to the hub (or the proxy) alone.",
    )


NETWORK_CHECKS = (
    check_kit,
    check_kit_version,
    check_authority,
    check_proxy,
    check_name,
    check_port,
    check_certificate,
    check_hub,
    check_clock,
    check_other_host,
)


class _Answered:
    """What one request to the hub's /health showed."""

    def __init__(self, response: httpx.Response) -> None:
        self.status = response.status_code
        self.skew_s = clock_skew(response)
        self.ends: datetime | None = None
        self.tls = "TLS"
        stream = response.extensions.get("network_stream")
        tls = stream.get_extra_info("ssl_object") if stream is not None else None
        if tls is not None:
            self.tls = str(tls.version())
            # By place: what stands here is OpenSSL's own object, which knows no keywords.
            shown = tls.getpeercert(True)
            if shown:
                self.ends = x509.load_der_x509_certificate(shown).not_valid_after_utc


@lru_cache(maxsize=4)
def _answer(asked: Question) -> _Answered | LinkTrouble:
    """Ask the hub once for all checks of one run."""
    try:
        with (
            hub_client(asked.folder, asked.way_out.proxy, asked.timeout_s) as client,
            client.stream("GET", f"https://{asked.hub}/health") as response,
        ):
            return _Answered(response)
    except PixcellError as error:
        known = {"no-kit": "kit-not-presented", "kit-expired": "kit-expired"}
        return LinkTrouble(known.get(error.code, "kit-refused"))
    except (httpx.HTTPError, OSError) as error:
        return trouble_of(error, proxied=asked.way_out.proxy is not None)


def presented_issuer(asked: Question) -> str:
    """Who issued the certificate that answers at the hub's address. Looks without believing; sends nothing over it."""
    peer = Peer.parse(asked.hub)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            _reach(peer, asked.way_out.proxy, asked.timeout_s) as plain,
            context.wrap_socket(plain, server_hostname=peer.host) as stream,
        ):
            shown = stream.getpeercert(binary_form=True)
        return x509.load_der_x509_certificate(shown).issuer.rfc4514_string()[:200] if shown else "nobody"
    except (OSError, ValueError):
        return "somebody whose certificate could not be read"


def _reach(peer: Peer, proxy: Proxy | None, timeout_s: float) -> socket.socket:
    """A connection to the hub's port, through the proxy's tunnel where there is one."""
    if proxy is None:
        return socket.create_connection((peer.host, peer.port), timeout_s)
    stream = socket.create_connection((proxy.host, proxy.port), timeout_s)
    credentials = proxy.credentials()
    secret = base64.b64encode(":".join(credentials).encode()).decode() if credentials else ""
    header = f"Proxy-Authorization: Basic {secret}\r\n" if secret else ""
    target = f"{f'[{peer.host}]' if ':' in peer.host else peer.host}:{peer.port}"
    stream.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n{header}\r\n".encode("ascii"))
    head = b""
    while b"\r\n\r\n" not in head and len(head) < 65_536:
        # One byte at a time: what follows the head belongs to the TLS handshake.
        more = stream.recv(1)
        if not more:
            break
        head += more
    if b" 200" not in head.split(b"\r\n", 1)[0]:
        stream.close()
        raise OSError("the proxy opened no tunnel")
    return stream


def _first_hop(asked: Question) -> tuple[Peer, str]:
    proxy = asked.way_out.proxy
    return (Peer.parse(asked.hub), "hub") if proxy is None else (Peer(proxy.host, proxy.port), "proxy")


def _trouble(name: str, trouble: LinkTrouble) -> Finding:
    return Finding(
        name=name, status="fail", found=f"[{trouble.code}] {trouble.reason}", remedy=trouble.remedy
    )
