"""Pretraining as a job: how it is asked for, and what is refused before anything starts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import psutil
import pytest
import typer
from typer.testing import CliRunner

from pixcell_core.errors import BadInputError, RefusedError
from server.pretraining.book import JobFolder
from server.pretraining.job import JobCare, JobRequest
from server.pretraining.phase import make_request
from server.studies.book import StudyBook
from tests.server.consortium import make_study
from tests.server.pretraining_ground import EVERY, Ground, gone


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
