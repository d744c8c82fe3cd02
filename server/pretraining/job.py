"""The documents of a pretraining job: what was asked for, how far it is, why it failed, what it made."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, StringConstraints

from pixcell_core.contracts.canonical import Digest, Document
from pixcell_core.contracts.round import Reason

JobName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,59}$")]
"""A job's name: lower-case letters, digits and hyphens, at most 60."""

JobStage = Literal["queued", "starting", "drawing", "encoding", "training", "saving"]
JobStateName = Literal[
    "submitted", "running", "stuck", "stopping", "stopped", "completed", "failed", "interrupted"
]
ErrorCode = Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{0,60}$")]
FolderPath = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=r"^/")]

ACTIVE: frozenset[str] = frozenset({"submitted", "running", "stuck", "stopping"})
"""States in which the hub has something to do."""


class JobSettings(Document):
    """What decides the result: equal settings, base, tiles and code give an equal model on equal hardware.

    Every optimiser step sees batch_size x processes tiles. `threads` are those of one process; sums over another number
    of threads round otherwise, so they are fixed here and never guessed anew. `tiles` is a folder of public images;
    without it `draw` procedural ones are drawn.
    """

    base: FolderPath
    base_digest: Digest
    tiles: FolderPath | None = None
    draw: Annotated[int, Field(ge=0, le=10_000_000)] = 0
    tile_size: Annotated[int, Field(ge=16, le=4096, multiple_of=16)] = 128
    steps: Annotated[int, Field(ge=1, le=100_000_000)] = 40
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 32
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 1e-4
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    processes: Annotated[int, Field(ge=1, le=64)] = 1
    device: Annotated[str, StringConstraints(pattern=r"^(auto|cpu|cuda)$")] = "cpu"


class JobCare(Document):
    """How the hub looks after a job; nothing here changes its result."""

    checkpoint_every: Annotated[int, Field(ge=1, le=10_000_000)] = 20
    stuck_after_s: Annotated[float, Field(gt=0, le=7 * 86_400)] = 900.0
    restarts: Annotated[int, Field(ge=0, le=100)] = 3


class JobRequest(Document):
    """A job somebody asked for. It stays in the job's folder, so that a hub started later goes on with it."""

    schema_version: Literal["pretraining-request/v1"] = "pretraining-request/v1"
    name: JobName
    settings: JobSettings
    care: JobCare = JobCare()


class JobProgress(Document):
    """What the leading process says while it works, replaced whole a few times a second.

    In the stage "training", `done` of `total` are steps, and `resumed_at` is the step that this attempt began with.
    """

    schema_version: Literal["pretraining-progress/v1"] = "pretraining-progress/v1"
    attempt: Annotated[int, Field(ge=1)]
    stage: JobStage
    done: Annotated[int, Field(ge=0)] = 0
    total: Annotated[int, Field(ge=0)] = 0
    resumed_at: Annotated[int, Field(ge=0)] = 0
    loss: float | None = None
    per_second: Annotated[float, Field(ge=0)] | None = None


class JobFailure(Document):
    """Why an attempt ended; `again` says whether another one could fare better."""

    schema_version: Literal["pretraining-failure/v1"] = "pretraining-failure/v1"
    attempt: Annotated[int, Field(ge=1)]
    code: ErrorCode
    message: Reason
    hint: Reason = ""
    again: bool = False


class JobState(Document):
    """A job as the hub sees it, rewritten at every change for those who watch it."""

    schema_version: Literal["pretraining-state/v1"] = "pretraining-state/v1"
    phase: Literal["pretrain"] = "pretrain"
    name: JobName
    state: JobStateName
    stage: JobStage = "queued"
    code: ErrorCode = ""
    reason: Reason = ""
    step: Annotated[int, Field(ge=0)] = 0
    steps: Annotated[int, Field(ge=1)]
    stage_done: Annotated[int, Field(ge=0)] = 0
    stage_total: Annotated[int, Field(ge=0)] = 0
    loss: float | None = None
    steps_per_second: float | None = None
    seconds_left: float | None = None
    attempts: Annotated[int, Field(ge=0)] = 0
    fruitless: Annotated[int, Field(ge=0)] = 0
    process: int | None = None
    started_at: AwareDatetime
    updated_at: AwareDatetime
    progress_at: AwareDatetime | None = None
    base_digest: Digest | None = None


class JobRecord(Document):
    """The result's birth certificate: which model came of which settings, tiles and code."""

    schema_version: Literal["pretraining-record/v1"] = "pretraining-record/v1"
    name: JobName
    settings: JobSettings
    base_digest: Digest
    tiles_digest: Digest
    public_tiles: Annotated[int, Field(ge=1)]
    code_digests: Annotated[tuple[Digest, ...], Field(min_length=1, max_length=1000)]
    steps: Annotated[int, Field(ge=1)]
    loss_first: float
    loss_last: float
    finished_at: AwareDatetime
