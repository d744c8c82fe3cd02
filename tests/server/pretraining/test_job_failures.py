"""Pretraining as a job: what is tried again, how often, and what is ended and said."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from pixcell_core.models import PixCellTransformer2DModel
from pixcell_core.starter.weights import load_folder, save_folder
from server.pretraining import session, worker
from server.pretraining.job import JobProgress
from server.pretraining.session import PretrainingRequest, pretrain
from tests.server.pretraining.refusals import code
from tests.server.pretraining_ground import EVERY, PATIENCE, STEPS, Ground, gone, tick_until
from tests.server.processes import wait_until
from tests.server.test_pretraining import silent


def test_restarts_that_bring_nothing_are_bounded_and_the_reason_stands(ground: Ground) -> None:
    job, desk = ground.submit("dying", restarts=2), ground.desk()
    for attempt in (1, 2, 3):
        ground.ahead += 60
        tick_until(desk, lambda: job.state().state != "submitted", "a start")
        assert job.state().attempts == attempt and job.state().state == "running"
        os.killpg(job.state().process, signal.SIGKILL)
        tick_until(desk, lambda: job.state().state != "running", "the end of the attempt")
        if attempt < 3:
            assert job.state().state == "submitted" and "Attempt" in job.state().reason
            desk.tick()
            assert job.state().state == "submitted", "not at once: a pause grows with each"
    state = job.state()
    assert state.state == "failed" and state.code == "launcher-killed"
    assert "signal 9" in state.reason and "2 restarts did not help" in state.reason
    desk.tick()
    assert job.state().attempts == 3
    assert [e["event"] for e in ground.events.said].count("job-attempt-failed") == 3


def test_a_job_that_gets_somewhere_earns_its_restarts_again(ground: Ground) -> None:
    job, desk = ground.submit("slow", restarts=1), ground.desk()
    for attempt in (1, 2, 3):
        ground.ahead += 60
        tick_until(desk, lambda: job.state().state == "running", "a start")
        done = EVERY * attempt
        said = JobProgress(attempt=attempt, stage="training", done=done, total=STEPS, resumed_at=done - EVERY)
        job.progress_file.write_bytes(said.to_bytes())
        desk.tick()
        os.killpg(job.state().process, signal.SIGKILL)
        tick_until(desk, lambda: job.state().state != "running", "the end of the attempt")
        assert job.state().state == "submitted", "each attempt made a checkpoint"
    desk.close()


def test_a_damaged_folder_keeps_no_other_job_from_going_on(ground: Ground) -> None:
    bad, good, desk = ground.submit("a"), ground.submit("b"), ground.desk()
    bad.state_file.write_text("{")
    desk.tick()
    assert good.state().state == "running"
    assert [e for e in ground.events.said if e["event"] == "job-unreadable"] == [
        {"event": "job-unreadable", "job": "a", "code": "bad-document"}
    ]
    desk.close()


def test_a_job_whose_state_is_spoilt_while_it_runs_is_ended_and_set_aside(ground: Ground) -> None:
    bad, good, desk = ground.submit("a"), ground.submit("b"), ground.desk()
    desk.tick()
    process = psutil.Process(bad.state().process)
    bad.state_file.write_text("[]")
    desk.tick()
    assert gone([process]) and good.state().state == "running"
    assert [e["code"] for e in ground.events.said if e["event"] == "job-unreadable"] == ["bad-document"]
    desk.close()


def test_a_worker_ended_because_of_another_one_claims_no_failure_of_its_own(ground: Ground) -> None:
    job = ground.submit("j", steps=10_000)

    def launchers_handler(number: int, frame: object) -> None:
        raise RuntimeError("the launcher's")

    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, launchers_handler)
        worker.work(str(job.root), 1, str(job.work / "meeting" / "w"))
        os._exit(0)
    wait_until(lambda: (said := job.progress()) is not None and said.stage == "training", PATIENCE, "steps")
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    assert job.failure() is None


def in_a_child(action: Callable[[], object]) -> int:
    """Run in a fork, as the launcher runs its workers; returns the exit code."""
    child = os.fork()
    if child == 0:
        ended = 1
        try:
            action()
            ended = 0
        except SystemExit as leave:
            ended = int(str(leave.code))
        finally:
            os._exit(ended)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(
    ("spoil", "wanted"), [("tile", "unreadable-tile"), ("base", "job-base-changed"), ("disk", "job-io")]
)
def test_what_another_attempt_cannot_mend_is_said_and_not_tried_again(
    ground: Ground, tmp_path: Path, spoil: str, wanted: str
) -> None:
    shutil.copytree(ground.root / "tiles", tmp_path / "tiles")
    shutil.copytree(ground.root / "base", tmp_path / "base")
    job = ground.submit("j", tiles=tmp_path / "tiles", base=tmp_path / "base")
    job.work.mkdir()
    if spoil == "tile":
        (tmp_path / "tiles" / "3.png").write_bytes(b"no image")
    elif spoil == "base":
        model = load_folder(PixCellTransformer2DModel, tmp_path / "base")
        with torch.no_grad():
            model.scale_shift_table.add_(1.0)
        save_folder(model, tmp_path / "base")
    else:
        (job.work / "metrics.jsonl").mkdir()
    assert in_a_child(lambda: worker.work(str(job.root), 1, str(job.work / "meeting" / "w"))) == 1
    failure = job.failure()
    assert failure is not None and failure.code == wanted and failure.again == (spoil == "disk")
    worker.write_failure(job, 1, "later", "What follows from it.")
    assert job.failure() == failure, "the first word stands"

    desk = ground.desk()
    desk.tick()
    os.killpg(job.state().process, signal.SIGKILL)
    tick_until(desk, lambda: job.state().state != "running", "the end")
    state = job.state()
    assert state.code == wanted and state.state == ("submitted" if spoil == "disk" else "failed"), state
    assert failure.message in state.reason
    desk.close()


def test_two_sessions_never_share_a_folder(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    settings = PretrainingRequest(
        ground.root / "base", ground.root / "tiles", tmp_path / "out", 32, 1, 4, 1e-3, 4, 1, 1
    )
    settings.out.mkdir()
    monkeypatch.setattr(session, "LOCK_PATIENCE_S", 0.1)
    with (settings.out / "session.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert code(lambda: pretrain(settings, silent)) == "pretraining-busy"
    assert pretrain(settings, silent).steps == 1
