"""Peers on loopback for the tests of the agent and of the doctor: two authorities, and servers that are closed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.site_client.agent.peers import (
    Authority,
)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("pki") / "ours")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("pki") / "theirs", "Hospital TLS inspection")


@pytest.fixture
def serve() -> Iterator[Callable[..., Any]]:
    """Starts servers and proxies and closes them."""
    started: list[Any] = []

    def start(kind: type[Any], *arguments: Any, **settings: Any) -> Any:
        started.append(kind(*arguments, **settings))
        return started[-1]

    yield start
    for one in started:
        one.close()
