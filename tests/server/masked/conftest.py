"""Consortia under masks for the tests of masked rounds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.masked_consortium import Make, MaskedConsortium, make_masked_consortium


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes a consortium; keyword arguments change it."""
    made: list[MaskedConsortium] = []

    def of(**changes: object) -> MaskedConsortium:
        made.append(make_masked_consortium(tmp_path, **changes))
        return made[-1]

    yield of
    for consortium in made:
        consortium.grid.close()
