"""Fixtures of the coordinator's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.consortium import Consortium, make_consortium


@pytest.fixture
def consortium_of(tmp_path: Path) -> Iterator[Callable[..., Consortium]]:
    """Makes a consortium; keyword arguments change its study."""
    made: list[Consortium] = []

    def make(**changes: Any) -> Consortium:
        made.append(make_consortium(tmp_path / "run", **changes))
        return made[-1]

    yield make
    for consortium in made:
        consortium.grid.close()


@pytest.fixture
def consortium(consortium_of: Callable[..., Consortium]) -> Consortium:
    """Three honest sites, three rounds, a quorum of two."""
    return consortium_of()
