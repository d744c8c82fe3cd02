"""The phase "pretrain" of `pixcell run`: ask for a job, watch it, stop it, take its result as a study's base."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from pixcell_core.cli.contract import emit_note
from pixcell_core.contracts.artifacts import base_digest
from pixcell_core.contracts.canonical import first_complaint
from pixcell_core.errors import BadInputError, ConnectionFailedError, RefusedError, TimedOutError
from server.layout import ServerLayout
from server.pretraining.book import JobBook
from server.pretraining.job import ACTIVE, JobCare, JobRequest, JobSettings, JobState

PHASES = ("rounds", "pretrain")
POLL_S = 0.3
SAY_EVERY_S = 5.0

_NAMES = {"stuck_after": "stuck_after_s"}


class JobShown(BaseModel):
    """A pretraining job as it stands; `base` is its model folder once it is finished."""

    phase: str = "pretrain"
    folder: Path
    log: Path
    base: Path | None
    job: dict[str, Any]

    def render(self) -> Any:
        """One table of facts."""
        from rich.table import Table

        job = self.job
        table = Table(
            title=f"{job['name']}: {job['state']}", caption=job["reason"] or None, show_header=False
        )
        rows = {
            "phase": "pretrain",
            "step": f"{job['step']} of {job['steps']}",
            "stage": _stage(job),
            "loss": "" if job["loss"] is None else f"{job['loss']:.4f}",
            "rate": "" if job["steps_per_second"] is None else f"{job['steps_per_second']:.2f} steps/s",
            "time left": "" if job["seconds_left"] is None else _duration(job["seconds_left"]),
            "attempts": str(job["attempts"]),
            "digest": job["base_digest"] or "",
            "base": str(self.base or ""),
            "log": str(self.log),
        }
        for name, value in rows.items():
            if value:
                table.add_row(name, value)
        return table


def is_pretraining(phase: str | None, given: dict[str, Any]) -> bool:
    """Whether this run is a pretraining job. Its settings beside rounds are refused: a study fixes those.

    Raises `BadInputError` for an unknown phase, or for settings of a job where rounds are meant.
    """
    if phase not in (None, *PHASES):
        raise BadInputError(
            f"There is no phase '{phase}'.", hint=f"Known phases: {', '.join(PHASES)}.", code="unknown-phase"
        )
    if phase == "pretrain":
        return True
    if said := sorted(f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None):
        raise BadInputError(
            f"{', '.join(said)} belong to a pretraining job; a study's rounds are fixed by the study.",
            hint="Leave them out, or add --phase pretrain.",
            code="not-a-rounds-setting",
        )
    return False


def start_job(
    folder: Path, name: str, given: dict[str, Any], *, wait: bool = False, timeout: float = 86_400.0
) -> JobShown:
    """Ask the hub for a job, or for the rest of one; with `wait`, follow it to its end.

    `given` holds the options of the command line by name; None means not given. A job that is known goes on with its
    own settings where none are given.
    """
    layout = ServerLayout(folder.absolute()).check()
    book = JobBook(layout.pretraining)
    said = {name: value for name, value in given.items() if value is not None}
    request = book.get(name).request() if book.has(name) and not said else make_request(layout, name, said)
    _require_hub(layout)
    state = book.submit(request)
    if wait and state.state != "completed":
        return follow_job(layout, name, timeout)
    return show_job(layout, name)


def make_request(layout: ServerLayout, name: str, given: dict[str, Any]) -> JobRequest:
    """A checked request; everything that can be refused now is refused before anything starts.

    Raises `BadInputError`.
    """
    from pixcell_core.starter import STARTER
    from server.studies.book import StudyBook

    if StudyBook(layout.registry()).has(name):
        raise BadInputError(
            f"A study is already called {name}.", hint="Give the job another name.", code="name-taken"
        )
    values = {_NAMES.get(key, key): value for key, value in given.items()}
    tiles, draw = values.pop("tiles", None), values.pop("draw", None) or 0
    if (tiles is None) == (draw == 0):
        raise BadInputError(
            "Pretraining needs public tiles: either a folder or a number to draw.",
            hint="Give --tiles DIR or --draw N, not both.",
            code="no-public-tiles",
        )
    if tiles is not None and not Path(tiles).is_dir():
        raise BadInputError(
            f"There is no folder {tiles}.", hint="Give --tiles a folder of images.", code="no-public-tiles"
        )
    base = Path(values.pop("base", None) or STARTER / "transformer").absolute()
    digest = base_digest(base)
    processes = int(values.get("processes", 1))
    share = max(1, (os.cpu_count() or 1) // max(1, processes))
    values["threads"] = values.get("threads") or share
    care = {key: values.pop(key) for key in JobCare.model_fields if key in values}
    place = str(Path(tiles).absolute()) if tiles is not None else None
    try:
        settings = JobSettings(base=str(base), base_digest=digest, tiles=place, draw=draw, **values)
        return JobRequest(name=name, settings=settings, care=JobCare(**care))
    except ValidationError as error:
        where, why = first_complaint(error, "the job")
        raise BadInputError(
            f"This job is not possible: {where}: {why}.",
            hint="Correct that setting. Nothing was started.",
            code="bad-job-setting",
        ) from error


def watches_job(folder: Path, name: str, phase: str | None = None) -> bool:
    """Whether `name` means a pretraining job here: it does where no study has that name."""
    from server.studies.book import StudyBook

    layout = ServerLayout(folder.absolute()).check()
    if is_pretraining(phase, {}):
        return True
    return (
        phase is None and JobBook(layout.pretraining).has(name) and not StudyBook(layout.registry()).has(name)
    )


def watch_job(folder: Path, name: str, *, once: bool, timeout: float) -> JobShown:
    """Show a job, or follow it to its end."""
    layout = ServerLayout(folder.absolute()).check()
    return show_job(layout, name) if once else follow_job(layout, name, timeout)


def stop_job(folder: Path, name: str, *, now: bool = False) -> JobShown:
    """Ask a job to end after its next checkpoint, or at once."""
    layout = ServerLayout(folder.absolute()).check()
    JobBook(layout.pretraining).stop(name, now=now)
    return show_job(layout, name)


def base_for_study(layout: ServerLayout, base: Path | None, base_from: str | None) -> Path | None:
    """The base folder a study starts from: the given one, or the checked result of a finished job.

    Raises `BadInputError` where both are given or the job is unknown, `RefusedError` where it is unfinished or altered.
    """
    if base_from is None:
        return base
    if base is not None:
        raise BadInputError(
            "--base and --base-from were given together.",
            hint="A study starts from one of them.",
            code="two-bases",
        )
    return JobBook(layout.pretraining).finished(base_from)[0]


def show_job(layout: ServerLayout, name: str) -> JobShown:
    """The job as it stands. Where the hub is gone, nothing goes on, whatever the last state says."""
    job = JobBook(layout.pretraining).get(name)
    state = _seen(layout, job.state())
    return JobShown(
        folder=job.root,
        log=job.log,
        base=job.result / "transformer" if job.record_file.is_file() else None,
        job=state.model_dump(mode="json"),
    )


def follow_job(layout: ServerLayout, name: str, timeout: float) -> JobShown:
    """Say how the job is until it ends.

    Raises:
        RefusedError: it failed.
        ConnectionFailedError: the hub is gone.
        TimedOutError: it goes on after `timeout` seconds.
    """
    job = JobBook(layout.pretraining).get(name)
    began, said, last = time.monotonic(), 0.0, ("", "")
    while True:
        state, now = _seen(layout, job.state()), time.monotonic()
        if (state.state, state.stage) != last or now - said > SAY_EVERY_S:
            emit_note(line_of(state))
            said, last = now, (state.state, state.stage)
        if state.state == "interrupted":
            raise ConnectionFailedError(
                f"The hub is not running; the job {name} waits at step {state.step} of {state.steps}.",
                hint=f"Start it: pixcell hub start --dir {layout.root}. The job then goes on by itself.",
                code="hub-down",
            )
        if state.state not in ACTIVE:
            break
        if now - began > timeout:
            raise TimedOutError(
                f"The job {name} is {state.state} after {timeout:g} s, at step {state.step} of {state.steps}.",
                hint=f"It goes on. Watch it: pixcell run watch {name} --dir {layout.root}",
            )
        time.sleep(POLL_S)
    if state.state == "failed":
        raise RefusedError(
            f"The job {name} failed at step {state.step} of {state.steps}: {state.reason}",
            hint=f"See {job.log}; start it again to go on from its last checkpoint.",
            code="job-failed",
        )
    return show_job(layout, name)


def line_of(state: JobState) -> str:
    """One line for a terminal."""
    parts = [f"{state.state}: step {state.step}/{state.steps}"]
    if state.state in ("running", "stuck", "stopping"):
        parts.append(_stage(state.model_dump()))
        if state.loss is not None:
            parts.append(f"loss {state.loss:.4f}")
        if state.steps_per_second:
            parts.append(f"{state.steps_per_second:.2f} steps/s")
        if state.seconds_left is not None:
            parts.append(f"{_duration(state.seconds_left)} left")
    if state.reason:
        parts.append(state.reason)
    return ", ".join(parts)


def _stage(job: dict[str, Any]) -> str:
    counted = job["stage"] in ("drawing", "encoding") and job["stage_total"]
    return f"{job['stage']} {job['stage_done']}/{job['stage_total']} tiles" if counted else str(job["stage"])


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _hub_alive(layout: ServerLayout) -> bool:
    try:
        os.kill(int(json.loads(layout.ready.read_text())["process"]), 0)
    except PermissionError:
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return True


def _require_hub(layout: ServerLayout) -> None:
    if not _hub_alive(layout):
        raise ConnectionFailedError(
            "The hub is not running.",
            hint=f"Start it: pixcell hub start --dir {layout.root}",
            code="hub-down",
        )


def _seen(layout: ServerLayout, state: JobState) -> JobState:
    if state.state in ACTIVE and not _hub_alive(layout):
        reason = (
            "The hub is not running. The job goes on from its last checkpoint when the hub is started again."
        )
        return state.model_copy(update={"state": "interrupted", "reason": reason, "seconds_left": None})
    return state
