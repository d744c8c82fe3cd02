"""A site that lacks nothing it needs to reach its hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from site_client.agent.proxy import STRAIGHT
from site_client.doctor.question import Question
from tests.site_client.agent.peers import (
    Answer,
    Authority,
    TlsServer,
    make_site,
)
from tests.site_client.doctor.findings import HERE

HEALTHY = Answer(200, "application/json", b"{}")


@pytest.fixture
def hub(authority: Authority, serve: Callable[..., Any]) -> TlsServer:
    made: TlsServer = serve(
        TlsServer, authority.issue("hub", hosts=HERE), authority.ca, lambda path, body: HEALTHY
    )
    return made


@pytest.fixture
def asked(tmp_path: Path, authority: Authority, hub: TlsServer) -> Question:
    """A site that lacks nothing it needs to reach its hub."""
    folder = make_site(tmp_path, authority, hub.address)
    return Question(folder, folder.identity(), hub.address, STRAIGHT, timeout_s=5.0)
