"""Fixtures of the trainer's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.site_client.trainer.site_fixture import TinySite, make_base, make_ca, make_site


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random transformer on disk."""
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def tiny_site(tmp_path: Path, tiny_base: Path) -> TinySite:
    """One enrolled site, `east`, with five patients."""
    return make_site(tmp_path, "east", tiny_base, make_ca(tmp_path / "ca.crt"))
