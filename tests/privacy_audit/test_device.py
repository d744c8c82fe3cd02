"""The audit runs where it is told to: on a second device it finds what it finds on the processor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pixcell_core.errors import BadInputError
from privacy_audit.evidence import Evidence
from privacy_audit.report import EVIDENCE, REPORT
from privacy_audit.request import AuditRequest
from privacy_audit.run import run_audit
from tests.privacy_audit.conftest import Audited, World, small_policy

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def elsewhere(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("elsewhere")
    folders = [str(path) for path in (world.train, world.holdout, world.dishonest, out)]
    ended = subprocess.run(
        [sys.executable, "-m", "tests.privacy_audit.audit_elsewhere", *folders, "3"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return out, json.loads(ended.stdout.splitlines()[-1])


def test_scores_and_distances_are_those_of_the_processor(
    elsewhere: tuple[Path, dict[str, Any]], dishonest: Audited
) -> None:
    here, there = (Evidence.load(out / EVIDENCE) for out in (dishonest.out, elsewhere[0]))
    for name in (
        "released_scores",
        "null_scores",
        "planted_scores",
        "recoloured_scores",
        "released_distances",
        "released_shape_distances",
        "planted_distances",
        "planted_shape_distances",
    ):
        assert np.allclose(getattr(here, name), getattr(there, name), atol=2e-3), name
    assert (here.planted_right == there.planted_right).all()


def test_the_verdict_and_every_status_are_the_same(
    elsewhere: tuple[Path, dict[str, Any]], dishonest: Audited
) -> None:
    report = json.loads((elsewhere[0] / REPORT).read_text())
    assert report["verdict"] == dishonest.report.verdict.value
    assert [(test["name"], test["status"]) for test in report["tests"]] == [
        (test.name, test.status.value) for test in dishonest.report.tests
    ]
    assert {flag["synthetic"] for flag in report["flagged"]} == {
        flag.synthetic for flag in dishonest.report.flagged
    }


@pytest.mark.parametrize(
    "operation",
    ["aten.mm.default", "aten._fft_r2c.default", "aten._fft_c2r.default", "aten.topk.default"],
)
def test_the_work_was_done_there(elsewhere: tuple[Path, dict[str, Any]], operation: str) -> None:
    assert elsewhere[1]["done"].get(operation, 0) > 20


def test_the_eye_sees_the_same(elsewhere: tuple[Path, dict[str, Any]]) -> None:
    assert elsewhere[1]["done"]["aten.conv2d.default"] > 10
    assert elsewhere[1]["eye"] < 1e-5


def test_a_tensor_left_behind_is_refused(elsewhere: tuple[Path, dict[str, Any]]) -> None:
    assert "both devices" in elsewhere[1]["refused"]


@pytest.mark.parametrize(("asked", "code"), [("cuda:99", "device-missing"), ("gpu", "device-unknown")])
def test_a_device_that_is_not_here_is_refused_before_anything_is_written(
    world: World, tmp_path: Path, asked: str, code: str
) -> None:
    out = tmp_path / "out"
    request = AuditRequest(world.train, world.holdout, world.honest, out, small_policy(), 3, device=asked)
    with pytest.raises(BadInputError) as refused:
        run_audit(request)
    assert refused.value.code == code and not out.exists()
