"""The coordinator's pretraining jobs on disk: one folder each, with request, state, checkpoints and result."""

from __future__ import annotations

import json
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel

from pixcell_core.contracts.artifacts import base_digest
from pixcell_core.contracts.atomic import write_atomically
from pixcell_core.contracts.canonical import load_document
from pixcell_core.errors import BadInputError, PixcellError, RefusedError
from pixcell_core.trust.durable import sync_folder
from server.pretraining.job import (
    ACTIVE,
    JobFailure,
    JobName,
    JobProgress,
    JobRecord,
    JobRequest,
    JobState,
)

MODEL = "transformer"
STOP_SOON, STOP_NOW = b"checkpoint", b"now"


class JobFolder:
    """One job's files. The state is written by the hub, and by a command only where no attempt is going on."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.request_file = root / "request.json"
        self.state_file = root / "state.json"
        self.stop_file = root / "stop"
        self.log = root / "log.txt"
        self.work = root / "work"
        self.progress_file = self.work / "progress.json"
        self.failure_file = self.work / "failure.json"
        self.checkpoint = self.work / "checkpoint.pt"
        self.result = root / "result"
        self.record_file = self.result / "record.json"

    @property
    def name(self) -> str:
        """The job's name."""
        return self.root.name

    def request(self) -> JobRequest:
        """What was asked for."""
        return load_document(JobRequest, self.request_file)

    def state(self) -> JobState:
        """The last state written."""
        return load_document(JobState, self.state_file)

    def write_state(self, state: JobState) -> JobState:
        """Replace the state."""
        stamped = state.model_copy(update={"updated_at": datetime.now(UTC)})
        write_atomically(self.state_file, stamped.to_bytes(), durable=False)
        return stamped

    def progress(self) -> JobProgress | None:
        """What the leading process said last."""
        return load_document(JobProgress, self.progress_file) if self.progress_file.is_file() else None

    def failure(self) -> JobFailure | None:
        """Why the last attempt ended, where it could say so."""
        return load_document(JobFailure, self.failure_file) if self.failure_file.is_file() else None

    def asked_to_stop(self) -> bytes:
        """What a person who wants the job to end has left: `STOP_SOON`, `STOP_NOW`, or nothing."""
        try:
            return self.stop_file.read_bytes()[:16]
        except OSError:
            return b""

    def commit(self, model: Path, record: JobRecord) -> None:
        """Put model folder and record in place in one step, durably; the checkpoint has then done its duty."""
        partial = self.root / "result.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        model.rename(partial / MODEL)
        for path in (partial / MODEL).iterdir():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        write_atomically(partial / self.record_file.name, record.to_bytes())
        for folder in (partial / MODEL, partial):
            sync_folder(folder)
        partial.rename(self.result)
        sync_folder(self.root)
        self.checkpoint.unlink(missing_ok=True)


class JobBook:
    """All jobs below one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def jobs(self) -> list[JobFolder]:
        """Jobs that were asked for, by name."""
        return [JobFolder(path.parent) for path in sorted(self._folder.glob("*/request.json"))]

    def has(self, name: str) -> bool:
        """Whether a job of this name was asked for."""
        return _is_name(name) and JobFolder(self._folder / name).request_file.is_file()

    def get(self, name: str) -> JobFolder:
        """The job of this name; an input error if there is none."""
        if not self.has(name):
            known = ", ".join(job.name for job in self.jobs()) or "none"
            raise BadInputError(
                f"There is no pretraining job {name} here.",
                hint=f"Known jobs: {known}. Start one: pixcell run start {name} --phase pretrain --dir DIR",
                code="unknown-job",
            )
        return JobFolder(self._folder / name)

    def submit(self, request: JobRequest) -> JobState:
        """Ask for a job, or for the rest of one that stopped or failed.

        Raises:
            RefusedError: it is going on already, or the name belongs to a job of other settings.
        """
        job = JobFolder(self._folder / request.name)
        state = None
        if job.request_file.is_file():
            before, state = job.request(), job.state()
            if changed := _differing(before, request):
                raise RefusedError(
                    f"The job {request.name} has other settings ({', '.join(changed)}).",
                    hint="Give the same settings to go on with it, or another name for another job.",
                    code="job-differs",
                )
            if state.state == "completed":
                return state
            if state.state in ACTIVE:
                raise RefusedError(
                    f"The job {request.name} is already {state.state}.",
                    hint=f"Watch it: pixcell run watch {request.name} --dir DIR",
                    code="job-active",
                )
        job.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        job.stop_file.unlink(missing_ok=True)
        now = datetime.now(UTC)
        fresh = JobState(
            name=request.name, state="submitted", steps=request.settings.steps, started_at=now, updated_at=now
        )
        if state is not None:
            kept = {"step": state.step, "attempts": state.attempts, "started_at": state.started_at}
            fresh = fresh.model_copy(update=kept)
        fresh = job.write_state(fresh)
        write_atomically(job.request_file, request.to_bytes())
        return fresh

    def stop(self, name: str, *, now: bool) -> JobState:
        """Ask a job to end: after its next checkpoint, or at once (the steps since the last one are done again).

        Raises:
            RefusedError: it is not going on.
        """
        job = self.get(name)
        state = job.state()
        if state.state not in ACTIVE:
            raise RefusedError(
                f"The job {name} is {state.state}; there is nothing to stop.",
                hint=f"See it: pixcell run watch {name} --once --dir DIR",
                code="job-not-active",
            )
        write_atomically(job.stop_file, STOP_NOW if now else STOP_SOON, durable=False)
        return state

    def finished(self, name: str) -> tuple[Path, JobRecord]:
        """Model folder and record of a finished job, checked against each other.

        Raises:
            BadInputError: no such job.
            RefusedError: it is not finished, or its result is not what it committed.
        """
        job = self.get(name)
        if not job.record_file.is_file():
            state = job.state()
            raise RefusedError(
                f"The job {name} is {state.state} at step {state.step} of {state.steps}: it has no result yet.",
                hint=f"Let it finish: pixcell run watch {name} --dir DIR",
                code="job-unfinished",
            )
        try:
            record = load_document(JobRecord, job.record_file)
            met = base_digest(job.result / MODEL)
        except PixcellError as error:
            raise _altered(name, error.message) from error
        if record.name != name or record.settings != job.request().settings:
            raise _altered(name, "its record is of another job.")
        state = job.state()
        if state.state == "completed" and state.base_digest != record.base_digest:
            raise _altered(name, "its record is not the one that the hub saw.")
        if met != record.base_digest:
            raise _altered(
                name, f"the model has digest {met[:19]}…, committed was {record.base_digest[:19]}…."
            )
        return job.result / MODEL, record


def _is_name(name: str) -> bool:
    from pydantic import TypeAdapter, ValidationError

    try:
        TypeAdapter(JobName).validate_python(name)
    except ValidationError:
        return False
    return True


def _differing(one: JobRequest, other: JobRequest) -> list[str]:
    def flat(part: BaseModel) -> dict[str, object]:
        return dict(json.loads(part.model_dump_json()))

    before, now = flat(one.settings) | flat(one.care), flat(other.settings) | flat(other.care)
    return sorted(key for key in before if before[key] != now[key])


def _altered(name: str, why: str) -> RefusedError:
    return RefusedError(
        f"The result of the job {name} was altered: {why}",
        hint="Restore its folder from a copy, or run the job again under another name.",
        code="job-altered",
    )
