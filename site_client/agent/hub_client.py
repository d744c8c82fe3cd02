"""The one HTTP client that leaves a site: to the hub alone, as this site, trusting this consortium alone.

Flower's own client trusts what the operating system and the environment say, follows redirects, and shows no
certificate. `hub_client` makes the one we use instead, and `watched_fleet_client` puts it into Flower's SuperNode.
"""

from __future__ import annotations

import ssl
import stat
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from pixcell_core.contracts.canonical import read_bounded
from pixcell_core.errors import BadInputError
from site_client.agent.link_record import LinkRecorder
from site_client.agent.link_trouble import LinkTrouble, NotTheHubError, trouble_of, trouble_of_answer
from site_client.agent.proxy import Proxy
from site_client.approvals.site_folder import SiteFolder

TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 10.0
WARN_DAYS = 30
"""From so many days before its end a certificate is warned of."""


def require_kit(folder: SiteFolder, now: datetime | None = None) -> x509.Certificate:
    """The site's TLS certificate, if it is there, belongs to its key, is private and still valid.

    Raises `BadInputError`: `no-kit`, `bad-kit`, `key-file-exposed`, `kit-expired`, `kit-not-yet-valid`.
    """
    if not folder.tls_certificate.is_file() or not folder.tls_key.is_file():
        raise BadInputError(
            "This site has no kit yet: the hub lets in only who shows a certificate of the consortium.",
            hint=f"Send {folder.request} to the coordinator, then: "
            f"pixcell site install-kit KIT --site-dir {folder.root}",
            code="no-kit",
        )
    if stat.S_IMODE(folder.tls_key.stat().st_mode) & 0o077:
        raise BadInputError(
            f"{folder.tls_key} can be read by other users, so its secret may be known to them.",
            hint="chmod 600 it if you are sure that nobody read it; otherwise enrol anew.",
            code="key-file-exposed",
        )
    try:
        certificate = x509.load_pem_x509_certificate(read_bounded(folder.tls_certificate, 65_536))
        key = serialization.load_pem_private_key(read_bounded(folder.tls_key, 65_536), password=None)
        same = _public(key.public_key()) == _public(certificate.public_key())
    except (ValueError, TypeError):
        same = False
    if not same:
        raise BadInputError(
            "The site's certificate and its key do not belong together, or one of them is damaged.",
            hint="Install the kit again: pixcell site install-kit KIT.",
            code="bad-kit",
        )
    moment = now or datetime.now(UTC)
    if moment >= certificate.not_valid_after_utc:
        raise BadInputError(
            f"The site's certificate expired on {certificate.not_valid_after_utc:%Y-%m-%d}, or this machine's "
            "clock runs ahead.",
            hint="Ask the coordinator to renew the kit, then: pixcell site install-kit KIT.",
            code="kit-expired",
        )
    if moment < certificate.not_valid_before_utc:
        raise BadInputError(
            f"The site's certificate is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC on; this "
            "machine's clock says it is earlier.",
            hint="Set the clock (NTP).",
            code="kit-not-yet-valid",
        )
    return certificate


def days_left(certificate: x509.Certificate, now: datetime) -> float:
    """Days until a certificate ends; negative after."""
    return (certificate.not_valid_after_utc - now).total_seconds() / 86_400


def tls_context(folder: SiteFolder) -> ssl.SSLContext:
    """TLS 1.2 or newer, this consortium's CA and no other, host names checked, this site's certificate shown."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname, context.verify_mode = True, ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(cadata=read_bounded(folder.hub_ca, 65_536).decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise BadInputError(
            f"{folder.hub_ca} is not a certificate authority.",
            hint="Enrol again with the coordinator's ca.crt.",
            code="bad-ca",
        ) from error
    try:
        context.load_cert_chain(folder.tls_certificate, folder.tls_key)
    except (ssl.SSLError, OSError) as error:
        raise BadInputError(
            "The site's certificate and key cannot be loaded.",
            hint="Install the kit again: pixcell site install-kit KIT.",
            code="bad-kit",
        ) from error
    return context


def hub_client(folder: SiteFolder, proxy: Proxy | None, timeout_s: float = TIMEOUT_S) -> httpx.Client:
    """A client of the hub: no environment, no redirect, no system trust store; through `proxy` where there is one."""
    return httpx.Client(
        verify=tls_context(folder),
        proxy=None if proxy is None else httpx.Proxy(proxy.url, auth=proxy.credentials()),
        trust_env=False,
        follow_redirects=False,
        timeout=httpx.Timeout(timeout_s, connect=min(CONNECT_TIMEOUT_S, timeout_s)),
        limits=httpx.Limits(max_connections=8),
    )


@dataclass(frozen=True)
class LinkWatch:
    """What the SuperNode's client needs beyond Flower's: the site, the proxy, and where to write what happened."""

    folder: SiteFolder
    proxy: Proxy | None
    recorder: LinkRecorder
    say: Callable[[str], None]


def watched_fleet_client(watch: LinkWatch) -> type[Any]:
    """Flower's fleet client with our HTTP client in it, every failure explained and every accepted heartbeat noted."""
    from flwr.supernode.fleet_http_client import FleetHttpClient

    class WatchedFleetClient(FleetHttpClient):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if not isinstance(getattr(self, "_client", None), httpx.Client):
                raise RuntimeError(
                    "Flower's client has no _client: this release is not the one that was tested"
                )
            self._client.close()
            self._client = hub_client(watch.folder, watch.proxy)
            # A hook, since Flower ends the process in an interceptor where the hub's release differs.
            self._client.event_hooks = {"response": [lambda response: _note_answer(watch, response)]}

        def _send(self, context: Any, *, stream: bool = False) -> httpx.Response:
            try:
                response = super()._send(context, stream=stream)
                require_hubs_answer(response)
            except Exception as error:
                if not getattr(error, "noted", False):
                    _note(watch, trouble_of(error, proxied=watch.proxy is not None))
                raise
            return response

        def SendNodeHeartbeat(self, request: Any) -> Any:
            answer = super().SendNodeHeartbeat(request)
            if answer.success:
                watch.recorder.accepted()
            return answer

    return WatchedFleetClient


def require_hubs_answer(response: httpx.Response) -> None:
    """Raise `NotTheHubError` for an answer no hub gives; an error of the hub's own stays Flower's to raise."""
    kind = response.headers.get("content-type", "").partition(";")[0].strip()
    trouble = trouble_of_answer(response)
    if response.status_code < 300 and kind != "application/protobuf":
        raise NotTheHubError("an answer that no hub gives", request=response.request)
    if trouble is not None and trouble.code == "not-the-hub":
        error = NotTheHubError(f"HTTP {response.status_code}, which no hub answers", request=response.request)
        error.noted = True
        raise error


def _note_answer(watch: LinkWatch, response: httpx.Response) -> None:
    if response.status_code >= 300:
        response.read()
        if (trouble := trouble_of_answer(response)) is not None:
            _note(watch, trouble)


def _note(watch: LinkWatch, trouble: LinkTrouble) -> None:
    """Record why a request failed; say it once for each new reason."""
    if watch.recorder.failed(trouble):
        watch.say(f"[{trouble.code}] {trouble.reason} {trouble.remedy}")


def _public(key: Any) -> bytes:
    data: bytes = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return data
