"""Fixtures of the registry's tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.server.registry.cluster import Cluster, find_binaries, remove_cluster, start_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A real PostgreSQL server of this test run's own."""
    binaries = find_binaries()
    if binaries is None:
        why = "PostgreSQL's server is not installed (Debian: apt-get install postgresql)"
        if os.environ.get("CI") == "true":
            pytest.fail(why)
        pytest.skip(why)
    made = start_cluster(binaries)
    try:
        yield made
    finally:
        remove_cluster(made)
