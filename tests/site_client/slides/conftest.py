"""Slides the tests of this room share: written once per session, from procedural tissue."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hostile.make_slides import make_all


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every hostile slide, and `good.tiff` they were made from."""
    folder = tmp_path_factory.mktemp("hostile")
    make_all(folder)
    return folder
