"""Fixtures every test may use."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1")

# A test run started in the background may inherit an ignored Ctrl-C, and so would every process it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of openly licensed real slides and tiles beside the checkout; absent on a stranger's machine."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not (folder / "MANIFEST.json").is_file():
        pytest.skip("the real slides are not beside this checkout")
    return folder
