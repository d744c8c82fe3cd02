"""`pixcell audit review` as a person runs it: a process of its own, an address on stderr, one result at the end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from pixcell_core.trust.keys import SigningKey
from privacy_audit.review.session import DECISIONS, RECORD
from privacy_audit.review_queue import load_queue
from tests.privacy_audit.review.queue_folder import make_queue

PIXCELL = [sys.executable, "-c", "from pixcell_core.cli.main import run; run()"]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    SigningKey.generate().save(tmp_path / "key")
    return make_queue(tmp_path / "out")


def start(out: Path, *more: str) -> tuple[subprocess.Popen[str], str]:
    """The command, and the address it says."""
    key = out.parent / "key"
    process = subprocess.Popen(
        [
            *PIXCELL,
            "audit",
            "review",
            str(out),
            "--key",
            str(key),
            "--user",
            "Dr. A",
            "--format",
            "json",
            *more,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stderr
    for line in process.stderr:
        if found := re.search(r"http://127\.0\.0\.1:\d+/\S+/", line):
            return process, found[0]
    raise AssertionError(process.communicate())


def test_stopped_by_ctrl_c_and_finished_by_a_second_run(out: Path) -> None:
    items = [item.id for item in load_queue(out).items]
    process, address = start(out)
    httpx.post(f"{address}call", json={"id": items[0], "call": "same field"}).raise_for_status()
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=30)
    assert process.returncode == 1 and json.loads(told)["code"] == "interrupted"
    process, again = start(out, "--log", str(out.parent / "log"))
    assert again != address, "each run has a token of its own"
    assert httpx.get(f"{again}state").json()["calls"] == {items[0]: "same field"}
    for item in items[1:]:
        httpx.post(f"{again}call", json={"id": item, "call": "different"}).raise_for_status()
    httpx.post(f"{again}sign", json={"sign": "all"}).raise_for_status()
    told, _ = process.communicate(timeout=30)
    data = json.loads(told)["data"]
    assert process.returncode == 0
    assert (data["user"], data["items"], data["decoys"]) == ("Dr. A", 8, 4)
    assert data["pairs_same"] + data["decoys_same"] == 1
    assert (
        (out / DECISIONS).is_file()
        and (out / RECORD).is_file()
        and (out.parent / "log" / "log.jsonl").is_file()
    )


def test_what_cannot_be_reviewed_is_said_at_once(out: Path, tmp_path: Path) -> None:
    for arguments, code, expected in (
        ([str(tmp_path), "--key", str(tmp_path / "key")], "no-review-queue", 4),
        ([str(out), "--key", str(tmp_path / "nokey")], "document-unreadable", 4),
    ):
        done = subprocess.run(
            [*PIXCELL, "audit", "review", *arguments, "--user", "Dr. A", "--format", "json"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, json.loads(done.stdout)["code"]) == (expected, code), done.stdout
    (tmp_path / "key").chmod(0o644)
    done = subprocess.run(
        [
            *PIXCELL,
            "audit",
            "review",
            str(out),
            "--key",
            str(tmp_path / "key"),
            "--user",
            "A",
            "--format",
            "json",
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 4, "a key that others can read signs nothing"
