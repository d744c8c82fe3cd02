"""A hub that lets everybody in, and the agent's own way of joining it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import ActivateNodeRequest, ActivateNodeResponse
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatResponse
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from site_client.agent.hub_client import LinkWatch, watched_fleet_client
from site_client.agent.link_record import LinkRecorder, read_link
from site_client.agent.link_trouble import (
    LINK_TROUBLES,
)
from site_client.agent.proxy import Proxy
from site_client.approvals.site_folder import SiteFolder
from tests.site_client.agent.peers import (
    Answer,
    Authority,
    TlsServer,
)

HERE = ("127.0.0.1",)


def hub_answer(path: str, body: bytes) -> Answer:
    """A hub that lets everybody in."""
    if path.endswith("activate-node"):
        return Answer(body=ActivateNodeResponse(node_id=7).SerializeToString())
    return Answer(body=SendNodeHeartbeatResponse(success=True).SerializeToString())


def good_hub(serve: Callable[..., Any], authority: Authority, **settings: Any) -> TlsServer:
    made: TlsServer = serve(
        TlsServer, authority.issue("hub", hosts=HERE), authority.ca, hub_answer, **settings
    )
    return made


def fleet(site: SiteFolder, address: str, proxy: Proxy | None = None, said: list[str] | None = None) -> Any:
    """The SuperNode's own client as our agent builds it."""
    words = said if said is not None else []
    site.agent.mkdir(exist_ok=True)
    watch = LinkWatch(site, proxy, LinkRecorder(site.agent, 1), words.append)
    key = ec.generate_private_key(ec.SECP384R1())
    return watched_fleet_client(watch).from_server_address(
        address,
        False,
        site.hub_ca.read_bytes(),
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperNode"),
            NodeAuthHttpInterceptor(key, key.public_key()),
        ],
    )


def activate(site: SiteFolder, address: str, proxy: Proxy | None = None) -> str:
    """Try to join; the code of the trouble that was recorded, or `ok`."""
    said: list[str] = []
    (site.agent / "link.json").unlink(missing_ok=True)
    with fleet(site, address, proxy, said) as client:
        try:
            client.ActivateNode(ActivateNodeRequest(public_key=b"k", heartbeat_interval=10))
        except Exception:
            link = read_link(site.agent)
            assert link is not None and link.failures == 1
            assert said == [f"[{link.trouble}] {' '.join(LINK_TROUBLES[link.trouble])}"]
            return link.trouble
    assert said == []
    return "ok"
