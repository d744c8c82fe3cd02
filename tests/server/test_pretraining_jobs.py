"""Pretraining as a job, on real processes: killed, stuck, stopped and resumed, it makes the model it would have made."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from pixcell_core.errors import BadInputError, PixcellError, RefusedError
from pixcell_core.models import PixCellTransformer2DModel
from pixcell_core.starter.weights import load_folder, save_folder
from server.enrolment.sites import SiteBook
from server.layout import ServerLayout
from server.pretraining import session, worker
from server.pretraining.book import JobFolder
from server.pretraining.job import JobCare, JobProgress, JobRequest
from server.pretraining.phase import base_for_study, make_request, show_job
from server.pretraining.session import PretrainingRequest, pretrain
from server.studies.book import StudyBook
from tests.server.consortium import make_study
from tests.server.enrolled import init_consortium
from tests.server.pretraining_ground import EVERY, PATIENCE, STEPS, Ground, gone, tick_until, workers
from tests.server.processes import Processes, pixcell, wait_until
from tests.server.test_pretraining import picture, silent
from tests.server.test_studies import request_of
from tests.site_client.trainer.site_fixture import TARGETS


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("jobs")
    for number in range(6):
        picture(root / "tiles" / f"{number}.png", seed=number)
    torch.manual_seed(0)
    model = PixCellTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=4,
        caption_channels=256,
    )
    save_folder(model, root / "base")
    whole = pretrain(
        PretrainingRequest(root / "base", root / "tiles", root / "whole", 32, STEPS, 4, 1e-3, 4, 1, EVERY),
        silent,
    )
    return Ground(root, ServerLayout(root / "none"), whole)


@pytest.fixture
def ground(shared: Ground, tmp_path: Path) -> Ground:
    """The shared tiles and base, with a coordinator's folder of its own."""
    layout = ServerLayout(tmp_path / "server")
    layout.pki.mkdir(parents=True)
    (layout.pki / "ca.crt").touch()
    return Ground(shared.root, layout, shared.undisturbed)


@pytest.fixture(scope="module")
def pair(shared: Ground, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    """A job of two processes with half the batch each, run to its end; what was listened to meanwhile is in `said`."""
    layout = ServerLayout(tmp_path_factory.mktemp("pair") / "server")
    layout.pki.mkdir(parents=True)
    (layout.pki / "ca.crt").touch()
    ground = Ground(shared.root, layout, shared.undisturbed)
    job, desk = ground.submit("pair", batch_size=2, processes=2), ground.desk()
    desk.tick()
    tick_until(desk, lambda: job.state().step > 0 or job.state().state != "running", "the first step")
    heard = [psutil.Process(job.state().process), *workers(job)]
    places = [c.laddr.ip for p in heard for c in p.net_connections("inet") if c.status == "LISTEN"]
    ground.events.say(
        "listening", processes=len(heard), off_loopback=len([p for p in places if p != "127.0.0.1"])
    )
    tick_until(desk, lambda: job.state().state not in ("running", "submitted"), "the end")
    assert job.state().state == "completed", (job.state(), job.log.read_text()[-3000:])
    yield ground
    desk.close()


def code(action: Callable[[], Any]) -> str:
    with pytest.raises(PixcellError) as refused:
        action()
    return refused.value.code


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


def test_one_job_at_a_time_and_a_waiting_one_can_be_dropped(ground: Ground) -> None:
    one, two, desk = ground.submit("a"), ground.submit("b"), ground.desk()
    desk.tick()
    assert (one.state().state, two.state().state) == ("running", "submitted")
    assert "waits for the job a" in two.state().reason
    ground.book.stop("b", now=False)
    desk.tick()
    assert two.state().state == "stopped" and not two.stop_file.exists()
    process = psutil.Process(one.state().process)
    desk.close()
    assert gone([process]) and one.state().state == "submitted" and "hub was stopped" in one.state().reason
    one.stop_file.write_bytes(b"now")
    later = ground.desk()
    later.tick()
    assert one.state().state == "stopped" and one.state().attempts == 1


def test_now_ends_a_job_at_once(ground: Ground) -> None:
    job, desk = ground.submit("a"), ground.desk()
    desk.tick()
    process = psutil.Process(job.state().process)
    ground.book.stop("a", now=True)
    desk.tick()
    assert job.state().state == "stopped" and gone([process])
    assert not job.work.joinpath("checkpoint.pt").exists()


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


def command(ground: Ground, *arguments: object) -> tuple[int, dict[str, Any]]:
    """Exit code and envelope of a command of the coordinator."""
    from server.rounds.commands import register as rounds
    from server.studies.commands import register as studies

    root = typer.Typer()
    root.callback()(lambda: None)
    rounds(root)
    studies(root)
    given = [*map(str, arguments), "--dir", str(ground.layout.root), "--format", "json"]
    result = CliRunner().invoke(root, given)
    assert result.stdout.strip(), (result.output, result.exception)
    return result.exit_code, json.loads(result.stdout.strip().splitlines()[-1])


def options(settings: dict[str, Any]) -> list[str]:
    return [part for key, value in settings.items() for part in (f"--{key.replace('_', '-')}", str(value))]


def test_bad_settings_are_refused_before_anything_starts(ground: Ground, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()

    def start(name: str = "j", drop: str = "", **changes: Any) -> tuple[int, str]:
        given = {k: v for k, v in ground.settings(**changes).items() if k != drop}
        exit_code, body = command(ground, "run", "start", name, "--phase", "pretrain", *options(given))
        return exit_code, body["code"]

    assert start() == (2, "hub-down"), "good settings get as far as the hub"
    assert start(drop="tiles") == (4, "no-public-tiles")
    assert start(draw=3) == (4, "no-public-tiles")
    assert start(tiles=tmp_path / "nowhere") == (4, "no-public-tiles")
    assert start(base=tmp_path / "nothing") == (4, "no-weights")
    assert start(name="No Name!") == (4, "bad-job-setting")
    bad: list[dict[str, Any]] = [
        {"tile_size": 40},
        {"learning_rate": 0},
        {"device": "tpu"},
        {"processes": 65},
        {"seed": 2**31},
        {"steps": 10**9},
        {"stuck_after": 1e9},
    ]
    for changes in bad:
        assert start(**changes) == (4, "bad-job-setting"), changes
    StudyBook(ground.layout.registry()).add(make_study(id="s"))
    assert start(name="s") == (4, "name-taken")
    assert command(ground, "run", "start", "s", "--phase", "pretraining")[1]["code"] == "unknown-phase"
    mixed = command(ground, "run", "start", "s", "--tiles", ground.root, "--seed", 3)
    assert (mixed[0], mixed[1]["code"]) == (4, "not-a-rounds-setting") and "--seed, --tiles" in mixed[1][
        "message"
    ]
    assert command(ground, "run", "watch", "j", "--phase", "pretrain", "--once")[1]["code"] == "unknown-job"
    assert command(ground, "run", "stop", "j", "--phase", "pretrain")[1]["code"] == "unknown-job"
    assert not ground.layout.pretraining.exists(), "nothing was written"


def test_threads_are_settled_when_the_job_is_asked_for(ground: Ground) -> None:
    settings = make_request(ground.layout, "j", ground.settings(threads=None) | {"threads": 0}).settings
    assert settings.threads == max(1, (os.cpu_count() or 1))
    assert make_request(ground.layout, "j", ground.settings()).care == JobCare(checkpoint_every=EVERY)


@pytest.mark.parametrize("field_", ["base", "device", "steps", "schema_version"])
def test_mutant_a_request_with_a_forged_field_is_not_read(ground: Ground, field_: str) -> None:
    job = ground.submit("j")
    body = json.loads(job.request_file.read_text())
    (body if field_ == "schema_version" else body["settings"])[field_] = {"base": "relative", "steps": 0}.get(
        field_, "x"
    )
    with pytest.raises(BadInputError):
        JobRequest.model_validate(body) if field_ == "none" else _reread(job, body)


def _reread(job: JobFolder, body: dict[str, Any]) -> None:
    job.request_file.write_text(json.dumps(body))
    job.request()


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


def test_refusals_name_what_to_do(ground: Ground) -> None:
    ground.submit("j")
    for action in (
        lambda: ground.submit("j", seed=9),
        lambda: ground.submit("j"),
        lambda: ground.book.finished("j"),
    ):
        with pytest.raises(RefusedError) as refused:
            action()
        assert refused.value.hint and "j" in refused.value.message
