"""A real hub with parties of every standing, and the honest site that it must serve after each attack."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

import psutil
import pytest

from pixcell_core.trust.certificates import node_public_key, public_key_digest, tls_public_key, to_pem
from site_client.approvals.site_folder import SiteFolder
from tests.server.door.asking import NOW
from tests.server.enrolled import Enrolment, make_enrolment
from tests.server.hub_process import Hub, activate, beat, running_hub

MAX_GROWTH = 128 * 1024
"""No test of this folder may make the log grow by more than this."""


def short_lived(made: Enrolment, folder: SiteFolder, end: datetime) -> None:
    """Put a certificate of the true CA in place that ends at `end`."""
    request = made.book.request(folder.root.name)
    node = public_key_digest(node_public_key(request.node_key, request.site))
    start = min(NOW, end - timedelta(hours=1))
    made_now = made.authority.certify_party(request.site, "site", tls_public_key(request), node, start, end)
    folder.tls_certificate.write_text(to_pem(made_now))


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub and its parties, honest and not."""
    root = tmp_path_factory.mktemp("hostile")
    made = make_enrolment(root)
    for name in ("east", "west", "north", "south", "busy", "slow", "many", "revoked", "expiring", "expired"):
        made.party(name)
    made.party("auditor", "auditor")
    made.party("boss", "coordinator")
    made.request("unregistered")
    made.book.revoke("revoked", made.authority)
    short_lived(made, SiteFolder(root / "expired"), NOW - timedelta(minutes=1))
    foreign = make_enrolment(root / "elsewhere", "theirs")
    foreign.party("east")
    with running_hub(made) as running:
        yield running


@dataclass
class Honest:
    """A site that behaves: whatever else happens, the hub answers it."""

    hub: Hub
    node: int

    def is_served(self) -> bool:
        """Whether a new connection's heartbeat is accepted."""
        east = self.hub.party("east")
        with self.hub.fleet(east, east.node_key) as client:
            return beat(client, self.node)


@pytest.fixture(scope="module")
def honest(hub: Hub) -> Honest:
    """The honest site, activated."""
    east = hub.party("east")
    with hub.fleet(east, east.node_key) as client:
        return Honest(hub, activate(client, east.node_key))


@pytest.fixture(autouse=True)
def unharmed(hub: Hub, honest: Honest) -> Iterator[None]:
    """After every attack the same process serves the honest site, and the log did not grow without bound."""
    before = hub.made.layout.events.stat().st_size
    yield
    assert honest.is_served()
    assert psutil.Process(hub.process).is_running()
    assert hub.made.layout.events.stat().st_size - before < MAX_GROWTH
    assert "Traceback" not in hub.processes.log("hub")
