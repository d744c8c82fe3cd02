"""Fixtures of the registry's tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.server.registry.cluster import (
    Cluster,
    find_binaries,
    remove_cluster,
    require_binaries,
    start_cluster,
)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A real PostgreSQL server of this test run's own."""
    made = start_cluster(require_binaries(find_binaries(), os.environ))
    try:
        yield made
    finally:
        remove_cluster(made)
