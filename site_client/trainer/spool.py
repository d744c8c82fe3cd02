"""The spool between agent and trainer: jobs in, results out, each a folder that appears whole or not at all.

    inbox/<job>/job.json + arrays.safetensors       written by the agent
    working/<job>/...                               taken by the trainer
    outbox/<job>/result.json [+ arrays.safetensors] written by the trainer
    trainer.json                                    the trainer's sign of life

A folder is filled and flushed under `partial/` and renamed into its place. Whoever reads checks names, sizes and
digests. Nothing here needs torch: the agent stays light.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from pixcell_core.contracts.atomic import write_atomically
from pixcell_core.contracts.canonical import load_document
from pixcell_core.contracts.spool import (
    Arrays,
    SpoolError,
    TrainerBeat,
    TrainJob,
    TrainResult,
    arrays_to_bytes,
    read_arrays,
)

MAX_TEXT_BYTES = 1 << 20
JOB, RESULT, ARRAYS = "job.json", "result.json", "arrays.safetensors"
_JOB_ID = re.compile(r"^r[0-9]{5}-[0-9a-f]{24}$")


@dataclass(frozen=True)
class Spool:
    """One site's spool."""

    root: Path

    def open(self) -> None:
        """Make its folders, for this user alone."""
        for name in ("", "partial", "inbox", "working", "outbox", "answered"):
            (self.root / name).mkdir(parents=True, exist_ok=True, mode=0o700)

    # --- the agent's side ---------------------------------------------------------------------------------

    def submit(self, job: TrainJob, arrays: Arrays) -> None:
        """Put a job into the inbox; the same job twice is one job."""
        if any((self.root / place / job.job_id).exists() for place in ("inbox", "working", "outbox")):
            return
        self._place("inbox", job.job_id, {JOB: job.to_bytes(), ARRAYS: arrays_to_bytes(arrays)})

    def result(self, job: TrainJob) -> tuple[TrainResult, Arrays] | None:
        """The result of a job, if it is there; a refusal carries no tensors. Raises `SpoolError`."""
        place = self.root / "outbox" / job.job_id
        if not place.is_dir():
            return None
        result = load_document(TrainResult, _plain_file(place / RESULT), max_bytes=MAX_TEXT_BYTES)
        asked = (job.job_id, job.study_digest, job.round, job.input_digest)
        if asked != (result.job_id, result.study_digest, result.round, result.input_digest):
            raise SpoolError(
                "The result in the spool answers another job.", hint="Restart agent and trainer."
            )
        if result.status == "refused":
            return result, {}
        if result.update_digest is None:
            raise SpoolError("The result names no update.", hint="Restart the trainer.")
        return result, read_arrays(place / ARRAYS, result.update_digest)

    def close_job(self, job_id: str) -> None:
        """Remove a job that was answered or given up; one the trainer holds is marked as given up."""
        shutil.rmtree(self.root / "inbox" / job_id, ignore_errors=True)
        shutil.rmtree(self.root / "outbox" / job_id, ignore_errors=True)
        working = self.root / "working" / job_id
        if working.is_dir():
            (working / "given-up").touch()

    def beat(self) -> TrainerBeat | None:
        """The trainer's last sign of life, if it can be read."""
        path = self.root / "trainer.json"
        return load_document(TrainerBeat, path, max_bytes=MAX_TEXT_BYTES) if path.is_file() else None

    # --- the trainer's side -------------------------------------------------------------------------------

    def take(self) -> str | None:
        """Move the oldest job of the inbox to `working` and return its id; None when there is none."""
        waiting = [p for p in (self.root / "inbox").iterdir() if _JOB_ID.match(p.name) and not p.is_symlink()]
        for place in sorted(waiting, key=lambda p: (p.stat().st_mtime_ns, p.name)):
            try:
                os.rename(place, self.root / "working" / place.name)
            except FileNotFoundError:
                # The agent gave it up between our look and our hand.
                continue
            return place.name
        return None

    def unfinished(self) -> list[str]:
        """Jobs that were taken and not answered: what a killed trainer leaves."""
        names = sorted(p.name for p in (self.root / "working").iterdir() if _JOB_ID.match(p.name))
        return [name for name in names if not (self.root / "outbox" / name).exists()]

    def read_job(self, job_id: str) -> tuple[TrainJob, Arrays]:
        """A taken job, strictly read. Raises `SpoolError` or a document error."""
        place = self.root / "working" / job_id
        job = load_document(TrainJob, _plain_file(place / JOB), max_bytes=MAX_TEXT_BYTES)
        if job.job_id != job_id:
            raise SpoolError(
                "A job lies in the folder of another.", hint="It was put there by hand; remove it."
            )
        return job, read_arrays(place / ARRAYS, job.input_digest)

    def given_up(self, job_id: str) -> bool:
        """Whether the agent no longer waits for a taken job."""
        return (self.root / "working" / job_id / "given-up").exists()

    def answer(self, result: TrainResult, update: Arrays | None = None) -> None:
        """Put a result into the outbox and forget the job. An `ok` result is kept once more under `answered`.

        A round that the hub asks for again, from the same adapter, is answered with the same bytes: releasing what
        was released already costs nothing, drawing new noise would.
        """
        files = {RESULT: result.to_bytes()}
        if update is not None:
            files[ARRAYS] = arrays_to_bytes(update)
            shutil.rmtree(self.root / "answered", ignore_errors=True)
            (self.root / "answered").mkdir(mode=0o700)
            self._place("answered", result.job_id, files)
        self.discard_answer(result.job_id)
        self._place("outbox", result.job_id, files)
        shutil.rmtree(self.root / "working" / result.job_id, ignore_errors=True)

    def discard_answer(self, job_id: str) -> None:
        """Remove an answer nobody took."""
        shutil.rmtree(self.root / "outbox" / job_id, ignore_errors=True)

    def drop(self, job_id: str) -> None:
        """Forget a taken job without an answer."""
        shutil.rmtree(self.root / "working" / job_id, ignore_errors=True)

    def earlier_answer(self, job: TrainJob) -> tuple[TrainResult, Arrays] | None:
        """The last update answered, if it was to this very question."""
        for place in (self.root / "answered").iterdir():
            result = load_document(TrainResult, _plain_file(place / RESULT), max_bytes=MAX_TEXT_BYTES)
            same = (result.study_digest, result.round, result.input_digest)
            if same == (job.study_digest, job.round, job.input_digest) and result.update_digest is not None:
                return result, read_arrays(place / ARRAYS, result.update_digest)
        return None

    def write_beat(self, beat: TrainerBeat) -> None:
        """Replace the sign of life."""
        write_atomically(self.root / "trainer.json", beat.to_bytes(), durable=False)

    def _place(self, where: str, job_id: str, files: dict[str, bytes]) -> None:
        partial = self.root / "partial" / f"{job_id}-{os.urandom(4).hex()}"
        partial.mkdir(mode=0o700)
        try:
            for name, data in files.items():
                with (partial / name).open("wb") as stream:
                    stream.write(data)
                    stream.flush()
                    os.fsync(stream.fileno())
            os.rename(partial, self.root / where / job_id)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _plain_file(path: Path) -> Path:
    if path.is_symlink():
        raise SpoolError(f"{path.name} is a link.", hint="The spool holds plain files only.")
    return path
