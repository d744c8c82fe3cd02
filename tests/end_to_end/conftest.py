"""One demonstration at a reduced size, shared by every test of the road."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.demonstration import Demonstration, run_demo

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def demonstration(tmp_path_factory: pytest.TempPathFactory) -> Demonstration:
    """Three hospitals with two dozen patients each, one of them dishonest; their conditions are private."""
    out = tmp_path_factory.mktemp("road") / "demo"
    sizes = {"--patients": "24", "--slide-size": "640", "--tiles-per-patient": "14", "--surrogates": "40"}
    arguments = ["--out", str(out), "--rounds", "2", "--policy", str(HERE / "small_cohort.yaml")]
    arguments += ["--conditioning", "private"]
    return run_demo(arguments + [word for pair in sizes.items() for word in pair])
