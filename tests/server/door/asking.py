"""How the tests of the hub's door ask it."""

from __future__ import annotations

import ssl
from base64 import b64encode
from datetime import UTC, datetime

import httpx
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.superlink.main import create_app

from server.hub.gate import REASON_HEADER
from site_client.approvals.site_folder import SiteFolder
from tests.server.hub_process import Hub

NOW = datetime.now(UTC).replace(microsecond=0)


PROTOBUF = {"content-type": "application/protobuf"}


def every_route() -> list[tuple[str, str]]:
    """Every method and path of the whole SuperLink app."""
    found = [(m.upper(), p) for p, methods in create_app().openapi()["paths"].items() for m in methods]
    return [*found, ("GET", "/openapi.json"), ("GET", "/docs"), ("GET", "/")]


def node_header(folder: SiteFolder) -> dict[str, str]:
    """Flower's headers, signed now with the node key of a folder."""
    return signed_headers(folder, datetime.now(UTC))


def signed_headers(folder: SiteFolder, at: datetime) -> dict[str, str]:
    """Flower's headers for a time, with a true signature."""
    key = load_ssh_private_key(folder.node_key.read_bytes(), None)
    stamp = at.isoformat()
    return {
        "flwr-public-key": b64encode(public_key_to_bytes(key.public_key())).decode(),
        "flwr-timestamp": stamp,
        "flwr-signature": b64encode(sign_message(key, stamp.encode())).decode(),
    }


def client_of(hub: Hub, context: ssl.SSLContext) -> httpx.Client:
    """A client on the hub."""
    return httpx.Client(base_url=f"https://{hub.address}", verify=context, trust_env=False, timeout=20)


def reason_of(answer: httpx.Response) -> str:
    """The hub's own word for its refusal."""
    return str(answer.headers.get(REASON_HEADER.decode(), ""))
