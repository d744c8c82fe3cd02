"""What the agent answers to the hub: is this site ready, and the update of one round.

The agent never sees a slide and never trains. It checks the site's signed approval, hands a job to the trainer
through the spool, and passes the update on. A reply holds the update and public constants, nothing measured, and it
leaves on a public grid of seconds: how long a round took would tell how many patients there are.

The agent remembers the heads of the ledger that it passed on, in a folder of its own. A ledger that no longer holds
them was put back to an earlier day.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from pixcell_core.contracts.atomic import write_atomically
from pixcell_core.contracts.canonical import canonical_bytes, load_document, parse_document
from pixcell_core.contracts.round import KnownHead, PrepareReply, PrepareRequest, TrainReply, TrainRequest
from pixcell_core.contracts.spool import Arrays, SpoolError, TrainerBeat, TrainJob, arrays_digest
from pixcell_core.contracts.study import Study
from pixcell_core.errors import PixcellError, RefusedError
from pixcell_core.masking.keys import MaskingRefusedError
from pixcell_core.masking.keystream import Words
from site_client.agent.log_exchange import LogExchange
from site_client.agent.masking import SiteMasking
from site_client.approvals.act_log import note_charge
from site_client.approvals.book import ApprovalBook
from site_client.approvals.site_folder import SiteFolder
from site_client.trainer.spool import Spool

STALE_BEAT_S = 15.0
"""A trainer whose sign of life is older is taken for gone. It writes one a second, from a thread of its own."""

MAX_STUDIES = 16


@dataclass(frozen=True)
class AgentSettings:
    """Where the site is; how often the spool is looked at; how long a vanished trainer is waited for.

    `app_digest` is that of the bundle that came with the task: studies that name another, or none, are refused. It is
    None only where no bundle exists, in a grid inside one process.
    """

    folder: SiteFolder
    poll_s: float = 0.05
    trainer_grace_s: float = 20.0
    app_digest: str | None = None


class Agent:
    """Answers the hub's questions for one site."""

    def __init__(
        self,
        settings: AgentSettings,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._settings, self._clock, self._sleep = settings, clock, sleep
        self._book = ApprovalBook(settings.folder)
        self._spool = Spool(settings.folder.spool)
        self._known = settings.folder.agent / "studies"
        self._head_file = settings.folder.agent / "ledger-head.json"
        self.masking = SiteMasking(settings.folder, self._study_for_masking, clock)
        """Answers the four questions of masked rounds."""

    def prepare(self, request: PrepareRequest) -> PrepareReply:
        """Whether this site approved the study, with the proof, and whether its trainer can train it."""
        try:
            study = parse_document(Study, canonical_bytes(request.study), name="study")
            if study.digest != request.study_digest:
                raise RefusedError("the study is not the one its digest names", hint="", code="study-altered")
            envelope = self._book.require(study, self._clock())
            self._require_app(study)
            log_offer = LogExchange(self._settings.folder).offer(request.heads)
        except PixcellError as error:
            reason = {
                "not-approved": "this site has not approved the study",
                "approval-denied": "this site denied the study",
                "approval-withdrawn": "this site withdrew its approval",
                "approval-expired": "the approval or the study expired",
                "approval-superseded": "this site's newest decision is not the one that lies there",
                "app-not-approved": "the hub sent another app than the study names",
                "coordinator-log-forked": "the coordinator's log is not the one this site was shown",
            }.get(error.code, "this site did not accept the study")
            return PrepareReply(study_digest=request.study_digest, code=error.code, reason=reason)
        self._remember(study)
        code, reason = self._readiness(study)
        return PrepareReply(
            study_digest=study.digest,
            approval=envelope.to_bytes().decode("ascii"),
            configured=code == "ok",
            code=code,
            reason=reason,
            log_offer=log_offer,
        )

    def train(self, request: TrainRequest, adapter: Arrays) -> tuple[TrainReply, Arrays | Words]:
        """One round: check, hand over, wait, pass on, on the study's grid of seconds. A refusal carries no tensors.

        In a study under masks the update leaves masked: one row of uint32.
        """
        asked_at = self._clock()
        try:
            study = self._remembered(request.study_digest)
        except PixcellError as error:
            return self._refusal(request, error.code, _PUBLIC.get(error.code, "the site refused the round"))
        answer = self._train(study, request, adapter)
        self._wait_for_the_grid(asked_at, study.reply_grid_s)
        return answer

    def _train(
        self, study: Study, request: TrainRequest, adapter: Arrays
    ) -> tuple[TrainReply, Arrays | Words]:
        try:
            self._book.require(study, self._clock())
            self._require_app(study)
            if arrays_digest(adapter) != request.input_digest:
                raise RefusedError("the adapter is not the one announced", hint="", code="adapter-altered")
            # Before anything is trained: a study under masks never answers a question for a plain update.
            masked = self.masking.accept(study, request)
            reply, update = self._hand_over(study, request, adapter)
            if masked and reply.status == "ok":
                return reply, self.masking.mask(study, request, update)
            return reply, update
        except MaskingRefusedError as error:
            # Its message names sites, rounds and public bounds.
            return self._refusal(request, error.code, error.message)
        except PixcellError as error:
            return self._refusal(request, error.code, _PUBLIC.get(error.code, "the site refused the round"))

    def _study_for_masking(self, digest: str) -> Study:
        study = self._remembered(digest)
        self._require_app(study)
        return study

    def _require_app(self, study: Study) -> None:
        """The bundle behind this task must be the very one the approved study names."""
        if self._settings.app_digest is not None and study.app_digest != self._settings.app_digest:
            raise RefusedError(
                "the hub sent another app than the study names", hint="", code="app-not-approved"
            )

    def _hand_over(self, study: Study, request: TrainRequest, adapter: Arrays) -> tuple[TrainReply, Arrays]:
        now = self._clock()
        job = TrainJob(
            job_id=job_id_of(study, request),
            study=study.model_dump(mode="json"),
            study_digest=study.digest,
            round=request.round,
            created_at=now,
            expires_at=now + timedelta(seconds=study.round_timeout_s),
            input_digest=request.input_digest,
            known_heads=tuple(h for h in (request.ledger_head, self._last_head()) if h is not None),
        )
        self._spool.open()
        self._spool.submit(job, adapter)
        last_seen = now
        try:
            while (moment := self._clock()) < job.expires_at:
                found = self._spool.result(job)
                if found is not None:
                    result, update = found
                    if result.status == "refused":
                        return self._refusal(request, result.code, result.reason)
                    self._remember_head(study, request.round, result.ledger_head)
                    return self._reply(request, result.ledger_head), update
                if alive(self._beat(), moment):
                    last_seen = moment
                elif (moment - last_seen).total_seconds() > self._settings.trainer_grace_s:
                    return self._refusal(
                        request, "trainer-lost", "the site's trainer stopped during the round"
                    )
                self._sleep(self._settings.poll_s)
            return self._refusal(request, "deadline", "the site's trainer did not finish in time")
        except SpoolError:
            return self._refusal(request, "bad-spool", "the site's trainer answered something unusable")
        finally:
            self._spool.close_job(job.job_id)

    def _readiness(self, study: Study) -> tuple[str, str]:
        beat = self._beat()
        if not alive(beat, self._clock()) or beat is None:
            return "no-trainer", "the site's trainer is not running"
        if not beat.ready:
            return "trainer-starting", "the site's trainer is starting"
        if beat.base_digest != study.base_digest:
            return "base-differs", "this site holds another base model"
        if beat.code_digest != study.code_digest:
            return "code-differs", "other training code is installed at this site"
        return "ok", ""

    def _beat(self) -> TrainerBeat | None:
        try:
            return self._spool.beat()
        except PixcellError:
            return None

    def _remember(self, study: Study) -> None:
        """Keep an approved study for the rounds that name it by digest only."""
        self._known.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._known / f"{study.digest.removeprefix('sha256:')}.json"
        if not path.exists():
            write_atomically(path, study.to_bytes())
            for old in sorted(self._known.glob("*.json"), key=lambda p: p.stat().st_mtime)[:-MAX_STUDIES]:
                old.unlink(missing_ok=True)

    def _remembered(self, digest: str) -> Study:
        path = self._known / f"{digest.removeprefix('sha256:')}.json"
        if not path.is_file():
            raise RefusedError(
                "a round of a study this site was not asked about", hint="", code="unknown-study"
            )
        study = parse_document(Study, path.read_bytes(), name="study")
        if study.digest != digest:
            raise RefusedError("the kept study was altered", hint="", code="study-altered")
        return study

    def _last_head(self) -> KnownHead | None:
        return load_document(KnownHead, self._head_file) if self._head_file.is_file() else None

    def _remember_head(self, study: Study, round_number: int, head: KnownHead | None) -> None:
        """Keep the ledger's head after a charge, and make it an event of the site's log."""
        if head is not None:
            if head != self._last_head():
                note_charge(self._settings.folder, study.digest, round_number, head, now=self._clock())
            write_atomically(self._head_file, head.to_bytes())

    def _wait_for_the_grid(self, asked_at: datetime, grid_s: float) -> None:
        """Sleep until a whole multiple of `grid_s` has passed since the question; at least one."""
        if grid_s <= 0.0:
            return
        passed = (self._clock() - asked_at).total_seconds()
        due = asked_at + timedelta(seconds=grid_s * max(1, math.ceil(passed / grid_s)))
        while (moment := self._clock()) < due:
            self._sleep((due - moment).total_seconds())

    def _reply(self, request: TrainRequest, head: KnownHead | None) -> TrainReply:
        return TrainReply(
            study_digest=request.study_digest,
            round=request.round,
            input_digest=request.input_digest,
            status="ok",
            ledger_head=head,
        )

    def _refusal(self, request: TrainRequest, code: str, reason: str) -> tuple[TrainReply, Arrays]:
        reply = TrainReply(
            study_digest=request.study_digest,
            round=request.round,
            input_digest=request.input_digest,
            status="refused",
            code=code,
            reason=reason,
        )
        return reply, {}


_PUBLIC = {
    "not-approved": "this site has not approved the study",
    "approval-denied": "this site denied the study",
    "approval-withdrawn": "this site withdrew its approval",
    "approval-expired": "the approval or the study expired",
    "approval-superseded": "this site's newest decision is not the one that lies there",
    "app-not-approved": "the hub sent another app than the study names",
    "adapter-altered": "the adapter that arrived is not the one announced",
    "unknown-study": "the site was not asked about this study first",
}


def job_id_of(study: Study, request: TrainRequest) -> str:
    """The same round from the same adapter is the same job, however often it is asked for."""
    text = f"{study.digest} {request.round} {request.input_digest}"
    return f"r{request.round:05d}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"


def alive(beat: TrainerBeat | None, now: datetime) -> bool:
    """Whether a sign of life is fresh."""
    return beat is not None and abs((now - beat.beat_at).total_seconds()) < STALE_BEAT_S
