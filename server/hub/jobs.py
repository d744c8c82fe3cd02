"""Looks after pretraining jobs from inside the hub's process: starts them, restarts them, says how they are.

A job is asked for by a file in its folder, so a hub that was killed goes on with it when it is started again. One job
at a time has the machine; the others wait. Its processes hold a pipe to the hub and end when the hub does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

from pixcell_core.errors import PixcellError
from server.layout import ServerLayout
from server.pretraining.book import STOP_NOW, JobBook, JobFolder
from server.pretraining.job import ACTIVE, JobFailure, JobProgress, JobRequest, JobState
from server.pretraining.launcher import EXIT_DONE, EXIT_STOPPED

RESTART_PAUSE_S = 1.0
"""Seconds before the first fruitless restart; twice as long before each further one."""


class Events(Protocol):
    """Where the hub writes what happened."""

    def say(self, event: str, **public: str | int | bool) -> None:
        """Record an event."""


@dataclass
class _Attempt:
    """A running attempt, and what was last heard of it."""

    job: JobFolder
    request: JobRequest
    number: int
    process: subprocess.Popen[bytes]
    heard: JobProgress | None = None
    heard_at: float = field(default_factory=time.monotonic)


class JobDesk:
    """Keeps the jobs of one coordinator's folder going."""

    def __init__(
        self, layout: ServerLayout, events: Events, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._book, self._events, self._clock = JobBook(layout.pretraining), events, clock
        self._running: _Attempt | None = None
        self._not_before: dict[str, float] = {}
        self._broken: set[str] = set()
        self._begun = False

    def tick(self) -> None:
        """Do what the folders ask for; never raises for what a file contains."""
        if not self._begun:
            self._begun = True
            self._each(self._take_up)
        if self._running is not None:
            attempt = self._running
            try:
                over = self._look_at(attempt)
            except PixcellError as error:
                _end(attempt)
                self._set_aside(attempt.job, error.code)
                over = True
            # Only now: where the disk refused the state, the next tick says it again.
            self._running = None if over else attempt
        self._each(self._start_or_drop)

    def close(self) -> None:
        """End the running job; it stays asked for, and the next hub goes on with it."""
        if self._running is None:
            return
        attempt, self._running = self._running, None
        _end(attempt)
        if attempt.job.asked_to_stop():
            self._write(attempt.job, state="stopped", reason=_STOPPED, process=None)
        else:
            self._write(attempt.job, state="submitted", stage="queued", reason=_HUB_STOPPED, process=None)

    def _each(self, act: Callable[[JobFolder], None]) -> None:
        for job in self._book.jobs():
            if job.name in self._broken:
                continue
            try:
                act(job)
            except (PixcellError, OSError) as error:
                # One damaged folder must not keep the others from going on.
                self._set_aside(job, error.code if isinstance(error, PixcellError) else "job-io")

    def _set_aside(self, job: JobFolder, code: str) -> None:
        self._broken.add(job.name)
        self._events.say("job-unreadable", job=job.name, code=code)

    def _take_up(self, job: JobFolder) -> None:
        """What an earlier hub left: nothing runs yet in this one."""
        state = job.state()
        if state.state not in ACTIVE:
            return
        if job.record_file.is_file():
            self._complete(job)
        elif job.asked_to_stop():
            self._write(job, state="stopped", reason=_STOPPED, process=None)
        elif state.state != "submitted":
            self._write(job, state="submitted", stage="queued", reason=_HUB_STOPPED, process=None)

    def _start_or_drop(self, job: JobFolder) -> None:
        state = job.state()
        if state.state != "submitted":
            return
        if job.asked_to_stop():
            job.stop_file.unlink(missing_ok=True)
            self._write(job, state="stopped", reason=_STOPPED)
            return
        if self._running is not None:
            reason = f"It waits for the job {self._running.job.name}."
            if state.reason != reason:
                self._write(job, reason=reason)
            return
        if self._clock() >= self._not_before.get(job.name, 0.0):
            self._start(job, state)

    def _start(self, job: JobFolder, state: JobState) -> None:
        request, number = job.request(), state.attempts + 1
        job.work.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": str(request.settings.threads),
        }
        with job.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "server.pretraining.launcher", str(job.root), str(number)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=environment,
            )
        self._running = _Attempt(job, request, number, process, heard_at=self._clock())
        self._write(
            job,
            state="running",
            stage="starting",
            code="",
            reason=state.reason if state.fruitless else "",
            attempts=number,
            process=process.pid,
        )
        self._events.say("job-started", job=job.name, attempt=number)

    def _look_at(self, attempt: _Attempt) -> bool:
        """Write how the attempt is; returns whether it is over."""
        job = attempt.job
        code = attempt.process.poll()
        self._hear(attempt)
        if code is not None:
            _end(attempt)
            self._ended(attempt, code)
            return True
        limit = attempt.request.care.stuck_after_s
        wish, stuck = job.asked_to_stop(), self._clock() - attempt.heard_at > limit
        if wish == STOP_NOW or (wish and stuck):
            _end(attempt)
            self._stopped(job)
            return True
        if stuck:
            reason = f"No progress for more than {limit:g} s. See the job's log; stop it and start it again."
            self._change(job, state="stuck", reason=reason)
        elif wish:
            self._change(job, state="stopping", reason="It ends after its next checkpoint.")
        elif job.state().state == "stuck":
            self._change(job, state="running", reason="")
        return False

    def _hear(self, attempt: _Attempt) -> None:
        try:
            said = attempt.job.progress()
        except PixcellError:
            return  # not ours: a worker writes whole documents or none
        if said is None or said.attempt != attempt.number or said == attempt.heard:
            return
        attempt.heard, attempt.heard_at = said, self._clock()
        changes: dict[str, Any] = {
            "stage": said.stage,
            "stage_done": said.done,
            "stage_total": said.total,
            "progress_at": datetime.now(UTC),
        }
        if said.stage == "training":
            left = (said.total - said.done) / said.per_second if said.per_second else None
            changes |= {
                "step": said.done,
                "loss": said.loss,
                "steps_per_second": said.per_second,
                "seconds_left": left,
            }
        self._write(attempt.job, **changes)

    def _ended(self, attempt: _Attempt, code: int) -> None:
        job = attempt.job
        if job.record_file.is_file():
            self._complete(job)
        elif code == EXIT_STOPPED:
            self._stopped(job)
        else:
            self._again_or_fail(attempt, code)

    def _again_or_fail(self, attempt: _Attempt, code: int) -> None:
        job, care = attempt.job, attempt.request.care
        failure = job.failure()
        if failure is None or failure.attempt != attempt.number:
            failure = _unexplained(attempt.number, code)
        state = job.state()
        # A job that reached a new checkpoint has earned all its restarts again: it gets somewhere.
        heard, every = attempt.heard, care.checkpoint_every
        gained = (
            heard is not None
            and heard.stage == "training"
            and heard.done // every > heard.resumed_at // every
        )
        fruitless = 0 if gained else state.fruitless
        words = f"Attempt {attempt.number}: {failure.message} {failure.hint}".strip()
        self._events.say("job-attempt-failed", job=job.name, attempt=attempt.number, code=failure.code)
        if failure.again and fruitless < care.restarts:
            self._not_before[job.name] = self._clock() + RESTART_PAUSE_S * 2**fruitless
            self._write(
                job,
                state="submitted",
                stage="queued",
                code=failure.code,
                reason=f"{words} It goes on from its last checkpoint."[:500],
                fruitless=fruitless + 1,
                process=None,
            )
            return
        tried = f" {fruitless} restarts did not help." if failure.again else ""
        self._write(
            job, state="failed", code=failure.code, reason=(words + tried)[:500], fruitless=0, process=None
        )

    def _stopped(self, job: JobFolder) -> None:
        job.stop_file.unlink(missing_ok=True)
        self._write(job, state="stopped", reason=_STOPPED, process=None, fruitless=0, seconds_left=None)
        self._events.say("job-stopped", job=job.name)

    def _complete(self, job: JobFolder) -> None:
        """The record says so; that the model is what it names is checked again by whoever takes it."""
        from pixcell_core.contracts.canonical import load_document
        from server.pretraining.job import JobRecord

        record = load_document(JobRecord, job.record_file)
        job.stop_file.unlink(missing_ok=True)
        self._write(
            job,
            state="completed",
            stage="saving",
            code="",
            reason="",
            step=record.steps,
            base_digest=record.base_digest,
            process=None,
            seconds_left=None,
        )
        self._events.say("job-completed", job=job.name, digest=record.base_digest)

    def _change(self, job: JobFolder, **changes: Any) -> None:
        """Write only what is not so already: a state that does not move is not rewritten twice a second."""
        state = job.state()
        if any(getattr(state, key) != value for key, value in changes.items()):
            job.write_state(state.model_copy(update=changes))

    def _write(self, job: JobFolder, **changes: Any) -> None:
        job.write_state(job.state().model_copy(update=changes))


_STOPPED = "Stopped as asked. Start it again to go on from its last checkpoint."
_HUB_STOPPED = "The hub was stopped during the job. It goes on from its last checkpoint."


def _unexplained(attempt: int, code: int) -> JobFailure:
    """Why an attempt ended that could not say so itself."""
    if code == EXIT_DONE:
        return JobFailure(attempt=attempt, code="no-result", message="It ended without a result.")
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return JobFailure(
        attempt=attempt, code="launcher-killed", message=f"Its launcher ended by {how}.", again=True
    )


def _end(attempt: _Attempt) -> None:
    """Kill what is left of the attempt's process group: every file is written whole, so nothing is half-done."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(attempt.process.pid, signal.SIGKILL)
    attempt.process.wait()
    if attempt.process.stdin is not None:
        attempt.process.stdin.close()
