"""Pretraining as a job, on real processes: killed, stuck, stopped and resumed, it makes the model it would have made."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from server.enrolment.sites import SiteBook
from server.pretraining import session
from server.pretraining.phase import base_for_study, show_job
from server.pretraining.session import PretrainingRequest, pretrain
from tests.server.enrolled import init_consortium
from tests.server.pretraining.refusals import code
from tests.server.pretraining.test_job_requests import command, options
from tests.server.pretraining_ground import EVERY, PATIENCE, STEPS, Ground, gone, tick_until, workers
from tests.server.processes import Processes, pixcell, wait_until
from tests.server.test_pretraining import silent
from tests.server.test_studies import request_of
from tests.site_client.trainer.site_fixture import TARGETS


def test_two_processes_make_what_one_makes_with_twice_the_batch(pair: Ground, shared: Ground) -> None:
    job = pair.book.get("pair")
    folder, record = pair.book.finished("pair")
    both, one = (
        load_file(f / "diffusion_pytorch_model.safetensors") for f in (folder, Path(shared.undisturbed.base))
    )
    start = load_file(shared.root / "base" / "diffusion_pytorch_model.safetensors")
    apart = {k: (both[k] - one[k]).abs().max().item() for k in one if "to_k.bias" not in k}
    moved = max((one[k] - start[k]).abs().max().item() for k in one)
    assert max(apart.values()) < 1e-4 < 1e-2 < moved, "equal but for rounding, and far from where they began"
    rows = [json.loads(line) for line in (job.work / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), "the leading process alone writes"
    assert record.steps == STEPS and record.public_tiles == 6 and len(record.code_digests) == 1
    assert abs(record.loss_last - shared.undisturbed.loss_last) < 1e-3


def test_a_finished_job_shows_its_digest_and_leaves_no_checkpoint_and_no_process(pair: Ground) -> None:
    job, state = pair.book.get("pair"), pair.book.get("pair").state()
    assert (state.state, state.step, state.attempts, state.process) == ("completed", STEPS, 1, None)
    shown = show_job(pair.layout, "pair")
    assert shown.base == job.result / "transformer" and shown.job["base_digest"] == state.base_digest
    assert state.steps_per_second and state.loss is not None and state.seconds_left is None
    assert not job.checkpoint.exists() and not list(job.root.glob("*.partial"))
    assert [e["event"] for e in pair.events.said] == ["job-started", "listening", "job-completed"]


def test_its_processes_listen_on_loopback_alone(pair: Ground) -> None:
    assert {"event": "listening", "processes": 3, "off_loopback": 0} in pair.events.said


def test_the_study_starts_from_the_committed_base_and_from_no_altered_one(
    pair: Ground, tmp_path: Path
) -> None:
    for site in ("east", "west"):
        (tmp_path / f"{site}.json").write_bytes(request_of(site).to_bytes())
        SiteBook(pair.layout.registry()).add(tmp_path / f"{site}.json")
    folder, record = pair.book.finished("pair")
    text = (
        "--rounds 1 --steps 1 --sigma 4 --clip 0.1 --delta 1e-5 --epsilon-cap 8 --learning-rate 1 "
        "--expected-patients 50 --tiles-per-patient 2 --mpp 1.0 --tile-size 32"
    )
    more = text.split()
    created = command(
        pair, "study", "create", "--id", "s", "--base-from", "pair", "--targets", TARGETS[0], *more
    )
    assert created[0] == 0, created
    assert (
        created[1]["data"]["study"]["base_digest"]
        == record.base_digest
        == show_job(pair.layout, "pair").job["base_digest"]
    )
    assert code(lambda: base_for_study(pair.layout, folder, "pair")) == "two-bases"
    assert base_for_study(pair.layout, folder, None) == folder
    assert code(lambda: base_for_study(pair.layout, None, "nobody")) == "unknown-job"
    assert code(lambda: base_for_study(pair.layout, None, "../pair")) == "unknown-job"

    kept, place = tmp_path / "kept", pair.book.get("pair").root
    shutil.copytree(place, kept)
    weights, said = folder / "diffusion_pytorch_model.safetensors", folder.parent / "record.json"

    def other_weights() -> None:
        tensors = load_file(weights)
        tensors["scale_shift_table"][0, 0] += 1e-3
        save_file(tensors, weights)

    def other_record(**changes: Any) -> None:
        said.write_text(json.dumps(json.loads(said.read_text()) | changes))

    def both() -> None:
        other_weights()
        other_record(base_digest=session_digest(folder))

    alterations: list[Callable[[], object]] = [
        other_weights,
        weights.unlink,
        lambda: said.write_text("{"),
        lambda: other_record(base_digest="sha256:" + "0" * 64),
        lambda: other_record(name="another"),
        both,
    ]
    for alter in alterations:
        alter()
        refused = command(pair, "study", "create", "--id", "t", "--base-from", "pair", *more)
        assert (refused[0], refused[1]["code"]) == (1, "job-altered"), refused
        shutil.rmtree(place)
        shutil.copytree(kept, place)
    pair.book.finished("pair")


def session_digest(folder: Path) -> str:
    from pixcell_core.starter.weights import weights_digest

    return weights_digest(folder)


def test_a_hub_killed_after_the_commit_finds_the_result(pair: Ground) -> None:
    job = pair.book.get("pair")
    before = job.state()
    job.write_state(before.model_copy(update={"state": "running", "base_digest": None, "process": 1}))
    pair.desk().tick()
    assert job.state().state == "completed" and job.state().base_digest == before.base_digest
    assert pair.book.submit(job.request()).state == "completed", "asked for again, it is there already"


def test_killed_stuck_stopped_and_resumed_it_makes_the_same_model(ground: Ground) -> None:
    job, desk = ground.submit("rough", steps=STEPS), ground.desk()
    assert code(lambda: ground.book.finished("rough")) == "job-unfinished"
    tick_until(desk, lambda: job.state().step >= EVERY + 2, "steps")
    state = job.state()
    assert state.state == "running" and state.stage == "training" and state.seconds_left is not None
    assert code(lambda: ground.submit("rough")) == "job-active"
    first = workers(job)
    first[0].send_signal(signal.SIGKILL)
    tick_until(desk, lambda: job.state().state == "submitted", "the restart to be announced")
    state = job.state()
    assert state.code == "worker-killed" and "signal 9" in state.reason and "Attempt 1" in state.reason
    assert gone(first)

    ground.ahead += 10
    resumed = EVERY * (state.step // EVERY)
    tick_until(desk, lambda: job.state().attempts == 2 and job.state().stage == "training", "attempt 2")
    heard = job.progress()
    assert heard is not None and heard.attempt == 2 and heard.resumed_at >= resumed >= EVERY, (
        "from its checkpoint"
    )
    (worker_,) = workers(job)
    worker_.suspend()
    desk.tick()
    ground.ahead += job.request().care.stuck_after_s + 1
    tick_until(desk, lambda: job.state().state != "running", "the silence to be noticed")
    assert job.state().state == "stuck" and "No progress" in job.state().reason
    worker_.resume()
    tick_until(desk, lambda: job.state().state == "running", "progress")

    assert ground.book.stop("rough", now=False).state == "running"
    tick_until(desk, lambda: job.state().state == "stopped", "the checkpoint")
    step = job.state().step
    assert 0 < step < STEPS and not job.stop_file.exists() and gone([worker_])
    assert code(lambda: ground.book.stop("rough", now=False)) == "job-not-active"
    assert code(lambda: ground.book.finished("rough")) == "job-unfinished"
    for changes in ({"seed": 5}, {"steps": STEPS + 1}, {"processes": 2}, {"checkpoint_every": 7}):
        assert code(lambda changes=changes: ground.submit("rough", **changes)) == "job-differs", changes

    ground.submit("rough")
    tick_until(desk, lambda: job.state().state not in ("submitted", "running"), "the end")
    assert job.state().state == "completed", job.log.read_text()[-3000:]
    done = (job.work / "metrics.jsonl").read_text().count("\n")
    assert job.state().attempts == 3 and done < STEPS + 2 * EVERY, (
        "only steps after a checkpoint were done again"
    )
    assert job.state().base_digest == ground.undisturbed.base_digest, "bit for bit the undisturbed model"
    assert ground.book.finished("rough")[1].loss_last == ground.undisturbed.loss_last


def test_mutant_a_resume_from_a_touched_checkpoint_differs(ground: Ground, tmp_path: Path) -> None:
    """The comparison of digests above would notice a checkpoint that lost something."""
    settings = PretrainingRequest(
        ground.root / "base", ground.root / "tiles", tmp_path / "out", 32, 2, 4, 1e-3, 4, 1, 1
    )
    whole = pretrain(settings, silent)

    class Stop(session.SessionWatch):
        def should_stop(self) -> bool:
            return True

    def second_part(touch: bool) -> str:
        shutil.rmtree(settings.out)
        assert session.run_session(settings, Stop()) is None, "it stops after the first checkpoint"
        if touch:
            state = torch.load(settings.out / "checkpoint.pt", weights_only=True)
            state["ema"]["updates"] += 1
            torch.save(state, settings.out / "checkpoint.pt")
        return pretrain(settings, silent).base_digest

    assert second_part(touch=False) == whole.base_digest != second_part(touch=True)


def test_now_ends_a_job_at_once(ground: Ground) -> None:
    job, desk = ground.submit("a"), ground.desk()
    desk.tick()
    process = psutil.Process(job.state().process)
    ground.book.stop("a", now=True)
    desk.tick()
    assert job.state().state == "stopped" and gone([process])
    assert not job.work.joinpath("checkpoint.pt").exists()


@pytest.mark.end_to_end
def test_a_killed_hub_takes_the_job_along_and_the_next_one_finishes_it(
    ground: Ground, tmp_path: Path
) -> None:
    folder = ground.layout.root
    shutil.rmtree(folder)
    init_consortium(folder)
    processes = Processes(tmp_path)
    job = ground.book
    try:
        processes.start("hub", "hub", "start", "--dir", folder)
        wait_until(ground.layout.ready.is_file, 60, "the hub")
        given = options(ground.settings(steps=STEPS))
        shown = pixcell("run", "start", "central", "--phase", "pretrain", "--dir", folder, *given)
        assert shown["phase"] == "pretrain" and shown["job"]["state"] in ("submitted", "running")
        wait_until(lambda: job.get("central").state().step >= EVERY + 2, PATIENCE, "steps")
        launcher = psutil.Process(job.get("central").state().process)
        family = [launcher, *launcher.children(recursive=True)]
        hub = processes.running.pop("hub")
        hub.kill()
        hub.wait()
        wait_until(lambda: gone(family), 10, "the job to end with the hub")
        seen = pixcell("run", "watch", "central", "--once", "--dir", folder)["job"]
        assert seen["state"] == "interrupted" and "hub is not running" in seen["reason"]
        error = pixcell("run", "watch", "central", "--dir", folder, expect=2)
        assert error["code"] == "hub-down" and "goes on by itself" in error["hint"]

        processes.start("hub", "hub", "start", "--dir", folder)
        wait_until(lambda: job.get("central").state().attempts == 2, 60, "the hub to take it up")
        done = pixcell("run", "watch", "central", "--dir", folder, "--timeout", PATIENCE)
        assert done["job"]["state"] == "completed" and done["job"]["attempts"] == 2
        assert done["job"]["base_digest"] == ground.undisturbed.base_digest, (
            "bit for bit the undisturbed model"
        )
        assert (Path(done["base"]) / "config.json").is_file()
    finally:
        processes.stop()
