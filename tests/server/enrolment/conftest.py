"""Fixtures of the tests of enrolment."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.server.enrolled import Enrolment, make_enrolment


@pytest.fixture
def made(tmp_path: Path) -> Enrolment:
    """A new consortium."""
    return make_enrolment(tmp_path)
