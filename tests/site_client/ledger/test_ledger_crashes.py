"""Real processes killed by SIGKILL at every point: the ledger verifies after, and never shows less than was spent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from site_client.ledger.ledger import RoundCharge
from site_client.ledger.site import ledger_folder, open_site_ledger
from site_client.ledger.view import BudgetCap, read_ledger

SCRIPT = Path(__file__).with_name("crashing_trainer.py")
CODE = "sha256:" + "c0de" * 16


def cases(mode: str, folder: Path, *arguments: int) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), mode, str(folder), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def noise_draws(site_dir: Path) -> int:
    evidence = site_dir / "evidence"
    return evidence.stat().st_size if evidence.exists() else 0


def charged(site_dir: Path) -> int:
    return sum(e.steps for e in read_ledger(ledger_folder(site_dir)).require_whole().totals())


@pytest.mark.parametrize(("steps", "at_a_time"), [(3, 1), (4, 2)])
def test_killed_at_every_point_of_a_round(tmp_path: Path, steps: int, at_a_time: int) -> None:
    found = cases("points", tmp_path, steps, at_a_time)
    assert found[-1]["ended"] == 0 and all(c["ended"] == -signal.SIGKILL for c in found[:-1])
    died_at = [c["point"] for c in found[:-1]]
    assert len(died_at) >= 30
    assert set(died_at) == {
        "ledger open",
        "before line",
        "line written",
        "line on disk",
        "head written",
        "head replaced",
        "head on disk",
        "noise about to be drawn",
        "noise drawn",
        "step done",
    }
    drawn = []
    for case in found:
        site_dir = Path(case["folder"])
        spent = noise_draws(site_dir)
        drawn.append(spent)
        assert spent <= charged(site_dir) <= spent + at_a_time, case
    assert drawn == sorted(drawn) and drawn[-1] == steps
    for case in found[::4]:
        site_dir = Path(case["folder"])
        before = charged(site_dir)
        with open_site_ledger(site_dir, site="north", cap=BudgetCap(50.0, 1e-5)) as ledger:
            with ledger.reserve(RoundCharge("crash", 1, 1.0, 20.0, 2, 1.0, CODE)) as resumed:
                resumed(0)
                resumed(1)
            assert ledger.verify().ok
        assert charged(site_dir) == before + 2, "a resumed step is a new charge"


def test_killed_from_outside_at_random_times(tmp_path: Path) -> None:
    found = cases("random", tmp_path, 200, 1, 20)
    drawn = 0
    for case in found:
        site_dir = Path(case["folder"])
        assert case["ended"] == -signal.SIGKILL
        spent = noise_draws(site_dir)
        drawn += spent
        assert spent <= charged(site_dir) <= spent + 1, case
        assert read_ledger(ledger_folder(site_dir)).check.ok
    assert drawn > 0, "some of the processes must have been in the middle of training"
