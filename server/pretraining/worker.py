"""One of the processes that train together: draws the tiles, joins the others, trains, commits the result."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path

from pixcell_core.contracts.artifacts import base_digest, code_digest
from pixcell_core.contracts.atomic import write_atomically
from pixcell_core.contracts.canonical import canonical_bytes, parse_json, read_bounded
from pixcell_core.errors import PixcellError, RefusedError
from pixcell_core.flower.processes import die_with_parent
from pixcell_core.models.devices import choose_device
from pixcell_core.training.parallel import joined_processes
from server.pretraining.book import JobFolder
from server.pretraining.job import JobFailure, JobProgress, JobRecord, JobRequest, JobStage
from server.pretraining.public_tiles import draw_public_tiles
from server.pretraining.session import PretrainingRequest, SessionWatch, run_session

FINISHED, STOPPED = "finished", "stopped"
SAY_EVERY_S = 0.2
WAIT_FOR_TILES_S = 0.1

PRETRAINING_CODE = (
    "pixcell_core/diffusion",
    "pixcell_core/models",
    "pixcell_core/procedural",
    "pixcell_core/training",
    "server/pretraining",
)
"""Source folders that decide what a pretraining computes."""


def work(folder: str, attempt: int, meeting: str) -> str:
    """The body of a worker process. An error a person can cause goes to the failure file, without a trace."""
    # The launcher's handler would make an error of the end that follows from another worker's.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent(os.getppid())
    job = JobFolder(Path(folder))
    try:
        return _train(job, attempt, Path(meeting))
    except PixcellError as error:
        write_failure(job, attempt, error.code, error.message, error.hint)
        print(f"error {error}", file=sys.stderr, flush=True)
    except OSError as error:
        traceback.print_exc()
        why = f"{type(error).__name__}: {error.strerror or error}."
        write_failure(
            job, attempt, "job-io", why, "See the job's log, and whether its disk has room.", again=True
        )
    except Exception as error:
        traceback.print_exc()
        write_failure(
            job, attempt, "worker-failed", f"{type(error).__name__}.", "See the job's log.", again=True
        )
    sys.exit(1)


def write_failure(
    job: JobFolder, attempt: int, code: str, message: str, hint: str = "", *, again: bool = False
) -> None:
    """Note why this attempt ended; the first word of an attempt stands, what follows from it does not."""
    said = job.failure()
    if said is not None and said.attempt == attempt:
        return
    found = JobFailure(attempt=attempt, code=code, message=message[:500], hint=hint[:500], again=again)
    write_atomically(job.failure_file, found.to_bytes(), durable=False)


class _Reporter(SessionWatch):
    """Writes the job's progress file, and looks for the wish to stop."""

    def __init__(self, job: JobFolder, attempt: int, steps: int) -> None:
        self._job, self._attempt, self._steps = job, attempt, steps
        self._said, self._began, self._first = 0.0, 0.0, 0

    def stage(self, stage: JobStage, done: int = 0, total: int = 0, *, whatever: bool = True) -> None:
        if whatever or time.monotonic() - self._said >= SAY_EVERY_S:
            self._write(JobProgress(attempt=self._attempt, stage=stage, done=done, total=total))

    def encoded(self, done: int, total: int) -> None:
        self.stage("encoding", done, total, whatever=done == total)

    def stepped(self, step: int, loss: float) -> None:
        now = time.monotonic()
        if not self._began:
            self._began, self._first = now, step
        if now - self._said < SAY_EVERY_S and step != self._steps and step != self._first:
            return
        spent = now - self._began
        rate = (step - self._first) / spent if step > self._first and spent > 0 else None
        self._write(
            JobProgress(
                attempt=self._attempt,
                stage="training",
                done=step,
                total=self._steps,
                resumed_at=self._first - 1,
                loss=loss,
                per_second=rate,
            )
        )

    def should_stop(self) -> bool:
        return bool(self._job.asked_to_stop())

    def _write(self, progress: JobProgress) -> None:
        self._said = time.monotonic()
        write_atomically(self._job.progress_file, progress.to_bytes(), durable=False)


def _train(job: JobFolder, attempt: int, meeting: Path) -> str:
    request = job.request()
    settings = request.settings
    leads = int(os.environ.get("RANK", "0")) == 0
    reporter = _Reporter(job, attempt, settings.steps)
    if base_digest(Path(settings.base)) != settings.base_digest:
        raise RefusedError(
            "The base model is not the one that the job was asked to start from.",
            hint="Put the folder back as it was, or start a job of another name from what is there now.",
            code="job-base-changed",
        )
    device = choose_device(settings.device)
    if leads:
        job.work.mkdir(parents=True, exist_ok=True)
        reporter.stage("starting")
    tiles = _public_tiles(job, request, reporter if leads else None, meeting)
    codes = _codes(job) if leads else ()
    with joined_processes(device, meeting) as processes:
        result = run_session(
            PretrainingRequest(
                base=Path(settings.base),
                tiles=tiles,
                out=job.work,
                tile_size=settings.tile_size,
                steps=settings.steps,
                batch_size=settings.batch_size,
                learning_rate=settings.learning_rate,
                seed=settings.seed,
                threads=settings.threads,
                checkpoint_every=request.care.checkpoint_every,
            ),
            reporter,
            processes,
        )
        stopped = processes.leader_says(lambda: result is None)
    if result is not None:
        reporter.stage("saving")
        made_of = parse_json(read_bounded(job.work / "pretraining.json"))
        record = JobRecord(
            name=request.name,
            settings=settings,
            base_digest=result.base_digest,
            tiles_digest=made_of["tiles"],
            public_tiles=result.public_tiles,
            code_digests=codes,
            steps=result.steps,
            loss_first=result.loss_first,
            loss_last=result.loss_last,
            finished_at=datetime.now(UTC),
        )
        job.commit(Path(result.base), record)
    return STOPPED if stopped else FINISHED


def _public_tiles(job: JobFolder, request: JobRequest, reporter: _Reporter | None, meeting: Path) -> Path:
    """The folder of public tiles; the leading process (the one with a reporter) draws what is to be drawn."""
    settings = request.settings
    if settings.tiles is not None:
        return Path(settings.tiles)
    folder, ready = job.work / "public-tiles", meeting.with_name("tiles-drawn")
    if reporter is None:
        while not ready.exists():
            time.sleep(WAIT_FOR_TILES_S)
        return folder
    drawn = 0

    def on_tile(count: int) -> None:
        nonlocal drawn
        drawn += count
        reporter.stage("drawing", drawn, settings.draw, whatever=False)

    draw_public_tiles(folder, settings.draw, settings.tile_size, settings.seed, on_tile)
    ready.touch()
    return folder


def _codes(job: JobFolder) -> tuple[str, ...]:
    """Digests of all code that had a part in the job, in order; one, unless it was updated between two attempts."""
    path, now = job.work / "code.json", code_digest(PRETRAINING_CODE)
    before = parse_json(read_bounded(path)) if path.is_file() and job.checkpoint.is_file() else []
    codes = [str(code) for code in before]
    if not codes or codes[-1] != now:
        codes.append(now)
        write_atomically(path, canonical_bytes(list(codes)))
    return tuple(codes)
