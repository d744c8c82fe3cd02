"""Real processes killed by SIGKILL at every point: the ledger verifies after, and never shows less than was spent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = Path(__file__).with_name("crashing_trainer.py")
MEMORY = Path("/dev/shm")
LARGEST_BLOCK = 2
"""Steps that a scenario charges together, at most: what one death may cost without having been drawn."""

Case = dict[str, Any]


@pytest.fixture(scope="module")
def everything() -> list[Case]:
    """All cases. SIGKILL takes nothing from the kernel, so that a file system in memory tells the same as a disk."""
    where = MEMORY if os.access(MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where) as folder:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", str(SCRIPT), folder, "7"],
            capture_output=True,
            text=True,
            timeout=280,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def cases(everything: list[Case]) -> list[Case]:
    """The cases of the trainer as it is."""
    return [case for case in everything if case["scenario"] != "late"]


def deaths(cases: list[Case]) -> int:
    return sum(1 for case in cases for point in case["points"] if point or case["kind"] == "outside")


def test_hundreds_of_deaths_cover_every_kind_of_point(cases: list[Case]) -> None:
    every = [case for case in cases if case["kind"] == "every"]
    assert deaths(every) >= 300 and deaths(cases) >= 350
    for scenario in ("first", "study", "cohort", "torn", "whole", "behind"):
        mine = [case for case in every if case["scenario"] == scenario]
        assert [c["ended"] for c in mine] == [-signal.SIGKILL] * (len(mine) - 1) + [0], (
            "each point once, then the end"
        )
    points = {case["points"][0] for case in every} - {""}
    assert points == {
        "half a write",
        "half a pwrite",
        *(
            f"after {call}"
            for call in (
                *("open", "write", "pwrite", "fsync", "fdatasync"),
                *("ftruncate", "replace", "link", "mkdir", "unlink"),
            )
        ),
        "noise about to be drawn",
        "noise drawn",
        "step done",
    }


def test_the_ledger_verifies_after_every_death(cases: list[Case]) -> None:
    assert all(case["after"]["ok"] and case["again"]["ok"] for case in cases)


def test_the_ledger_never_shows_less_than_was_drawn(cases: list[Case]) -> None:
    for case in cases:
        before, after = case["before"], case["after"]
        spare = before["charged"] - before["drawn"]
        assert after["drawn"] <= after["charged"], case
        assert after["charged"] <= after["drawn"] + spare + LARGEST_BLOCK * len(case["points"]), case
        assert after["charged"] >= before["charged"], "nothing is given back"


def test_a_resumed_step_is_a_new_charge_with_new_noise(cases: list[Case]) -> None:
    for case in cases:
        after, again = case["after"], case["again"]
        assert again["charged"] == after["charged"] + case["steps"], case
        assert again["drawn"] == after["drawn"] + case["steps"], case
        assert again["repeated_noise"] == 0, case


def test_a_chain_of_deaths_dies_while_mending_too(cases: list[Case]) -> None:
    chained = [case for case in cases if case["kind"] == "chain"]
    assert len(chained) == 12 and deaths(chained) >= 30
    mended = {
        point for case in cases if case["scenario"] in ("torn", "whole", "behind") for point in case["points"]
    }
    assert {"after ftruncate", "half a write", "half a pwrite"} <= mended


def test_a_trainer_that_charges_after_the_noise_is_caught(everything: list[Case]) -> None:
    """The same deaths of a trainer with that one fault: at some of them more was drawn than was charged."""
    late = [case["after"] for case in everything if case["scenario"] == "late"]
    assert any(found["drawn"] > found["charged"] for found in late) and all(found["ok"] for found in late)
