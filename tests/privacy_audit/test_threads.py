"""The audit's command sets how threads wait before torch reads it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROBE = """
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("torch sees", os.environ.get("OMP_WAIT_POLICY"))
            sys.meta_path.remove(self)
sys.meta_path.insert(0, Watch())
from pixcell_core.cli.main import run
run()
"""


@pytest.mark.parametrize(("own", "seen"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_wait_asleep_unless_the_user_says_otherwise(
    tmp_path: Path, own: str | None, seen: str
) -> None:
    folders = [
        word for name in ("train", "holdout", "synthetic", "out") for word in (f"--{name}", tmp_path / name)
    ]
    env = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    ended = subprocess.run(
        [sys.executable, "-c", PROBE, "audit", "run", *map(str, folders)],
        env=env if own is None else {**env, "OMP_WAIT_POLICY": own},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert f"torch sees {seen}" in ended.stdout, ended.stderr
    assert ended.returncode == 4  # the folders are not there: torch was imported all the same
