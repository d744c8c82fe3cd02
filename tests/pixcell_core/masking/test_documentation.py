"""The page on secure aggregation promises nothing without a test, and every refusal has its line."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "secure-aggregation.md").read_text(encoding="utf-8")
FILES = (
    *(ROOT / "tests" / "pixcell_core" / "masking").glob("test_*.py"),
    *(ROOT / "tests" / "server" / "masked").glob("test_*.py"),
    ROOT / "tests" / "server" / "test_federation.py",
    ROOT / "tests" / "server" / "test_masked_loop.py",
    ROOT / "tests" / "site_client" / "agent" / "test_masking.py",
    ROOT / "tests" / "site_client" / "approvals" / "test_decisions.py",
)


def test_every_test_that_the_page_names_exists() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in FILES)
    named = set(re.findall(r"`(test_[a-z0-9_]+)`", PAGE))
    assert len(named) > 30
    assert not [name for name in named if f"def {name}(" not in text]


def test_every_promise_names_a_test() -> None:
    """Each item under what the hub cannot do."""
    promises = PAGE.split("## What the hub cannot do")[1].split("## What it does not protect")[0]
    items = re.split(r"\n- ", promises)[1:]
    assert len(items) >= 8 and all("`test_" in item for item in items)


def test_every_file_that_the_page_names_exists() -> None:
    for name in re.findall(r"`((?:tests|bench)/[a-z_/]+\.py)", PAGE):
        assert (ROOT / name).is_file(), name
