"""The trainer's process: poll the spool, train what this site approved, charge first, answer.

A trainer that was killed finds its unfinished job when it starts again. What was drawn is lost and stays charged;
the job is tried once more as a new charge where the budget allows, and refused where it does not.
"""

from __future__ import annotations

import os
import secrets
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pixcell_core.contracts.artifacts import base_digest, installed_code_digest
from pixcell_core.contracts.canonical import parse_document
from pixcell_core.contracts.round import KnownHead
from pixcell_core.contracts.spool import Arrays, TrainerBeat, TrainJob, TrainResult, arrays_digest
from pixcell_core.contracts.study import Study
from pixcell_core.errors import BadInputError, PixcellError, RefusedError
from pixcell_core.private.ledger_record import EVERY_PATIENT, head_of
from pixcell_core.private.parameters import LocalStepTrace
from pixcell_core.training.feature_store import FeatureStore
from site_client.approvals.book import ApprovalBook
from site_client.approvals.site_folder import SiteFolder
from site_client.ledger.cohorts import CohortBook
from site_client.ledger.ledger import Ledger, RoundCharge
from site_client.ledger.site import ledger_folder, ledger_public_key, open_site_ledger
from site_client.ledger.study_room import require_study_room
from site_client.ledger.view import BudgetCap, read_ledger
from site_client.trainer.patient_rows import latent_scaling
from site_client.trainer.rounds import RoundTrainer
from site_client.trainer.spool import Spool
from site_client.trainer.traces import TraceBook

BEAT_S = 1.0
LEDGER_WAIT_S = 20.0


@dataclass(frozen=True)
class TrainerSettings:
    """Where the site and the base model are, the device, seconds between looks at the spool, and who is charged.

    `cohort` names the patients of `features` in the ledger; `all` is every patient of the site.
    """

    folder: SiteFolder
    base: Path
    device: str = "cpu"
    poll_s: float = 0.1
    features: Path | None = None
    cohort: str = EVERY_PATIENT


class Trainer:
    """Answers the jobs of one site's spool, one at a time."""

    def __init__(self, settings: TrainerSettings, say: Callable[[str], None]) -> None:
        self._settings, self._say = settings, say
        self._spool = Spool(settings.folder.spool)
        self._book = ApprovalBook(settings.folder)
        self._site = settings.folder.identity().site
        self._instance = secrets.token_hex(8)
        self._base_digest = base_digest(settings.base)
        self._code_digest = installed_code_digest()
        self._traces = TraceBook(settings.folder.root)
        self._stop = threading.Event()
        self._ready = False
        self._head: KnownHead | None = None
        store = FeatureStore.open(settings.features or settings.folder.train_features)
        self._patients = tuple(store.patients)
        self._rounds = RoundTrainer(settings.base, store, latent_scaling(store.meta), settings.device)

    def stop(self) -> None:
        """Leave after the step in hand."""
        self._stop.set()

    def run(self) -> None:
        """Serve until `stop`."""
        self._require_cohort()
        self._spool.open()
        pulse = threading.Thread(target=self._pulse, daemon=True)
        pulse.start()
        self._rounds.warm_up()
        for job_id in self._spool.unfinished():
            self._say(f"job {job_id} was not finished when the trainer ended; what it drew stays charged")
            self.handle(job_id, again=True)
        self._ready = True
        self._beat()
        self._say(f"ready: base {self._base_digest[:19]}, code {self._code_digest[:19]}")
        while not self._stop.is_set():
            taken = self._spool.take()
            if taken is None:
                self._stop.wait(self._settings.poll_s)
            else:
                self.handle(taken)

    def handle(self, job_id: str, *, again: bool = False) -> None:
        """Answer one taken job: an update, or a refusal with its reason."""
        try:
            job, start = self._spool.read_job(job_id)
        except PixcellError as error:
            self._say(f"job {job_id} cannot be read and is dropped: {error.message}")
            self._spool.drop(job_id)
            return
        if datetime.now(UTC) >= job.expires_at or self._spool.given_up(job_id):
            self._say(f"job {job_id} is no longer waited for; nothing was drawn")
            self._spool.drop(job_id)
            return
        try:
            earlier = self._spool.earlier_answer(job)
            update = earlier[1] if earlier is not None else self._train(job, start, again)
            if earlier is not None:
                self._say(f"round {job.round} was asked again; the same update is sent, nothing is charged")
            head = earlier[0].ledger_head if earlier is not None else self._head
            self._spool.answer(_result(job, update_digest=arrays_digest(update), head=head), update)
        except PixcellError as error:
            self._say(f"round {job.round} refused [{error.code}]: {error.message}")
            self._spool.answer(_result(job, code=public_code(error), reason=public_reason(error)))
        except _Stopped:
            raise
        except Exception as error:
            self._say("".join(traceback.format_exception(error)))
            self._spool.answer(
                _result(job, code="trainer-failed", reason="the trainer failed; its own log says why")
            )

    def _train(self, job: TrainJob, start: Arrays, again: bool) -> Arrays:
        study = read_study_of(job)
        # The agent asked the same questions. The trainer asks again: its ledger and its patients are at stake.
        approval = self._book.approval(study)
        self._check_fit(study)
        self._require_cohort()
        cap = BudgetCap(approval.epsilon_cap, study.delta)
        with self._ledger(cap) as ledger:
            require_known_heads(ledger, job.known_heads)
            charge = RoundCharge(
                study.digest,
                job.round,
                study.sample_rate,
                study.noise_multiplier,
                study.steps_per_round,
                study.max_grad_norm,
                self._code_digest,
                cohort=self._settings.cohort,
            )
            require_study_room(
                ledger.records, study, charge.event, cohort=charge.cohort, epsilon_cap=approval.epsilon_cap
            )
            began = time.monotonic()

            def traced(trace: LocalStepTrace) -> None:
                self._traces.add(study.id, job.round, study.max_grad_norm, trace)

            with ledger.reserve(charge) as steps:
                update = self._rounds.train(study, start, self._stoppable(steps), traced)
            self._head = KnownHead(sequence=ledger.head.sequence, hash=ledger.head.hash)
        again_text = ", a second charge for the same round" if again else ""
        self._say(f"round {job.round} of {study.id} trained in {time.monotonic() - began:.1f} s{again_text}")
        return update

    def _require_cohort(self) -> None:
        """These patients may be charged as the cohort: enough of them, and none in another cohort."""
        root = self._settings.folder.root
        charged = read_ledger(ledger_folder(root), ledger_public_key(root)).cohorts()
        CohortBook.open(root, charged=charged).require(self._settings.cohort, self._patients)

    def _ledger(self, cap: BudgetCap) -> Ledger:
        """The site's ledger; a new one takes the study's cap, an existing one keeps its owner's."""
        try:
            return self._open_ledger(None)
        except BadInputError as error:
            if error.code != "budget-cap":
                raise
            return self._open_ledger(cap)

    def _open_ledger(self, cap: BudgetCap | None) -> Ledger:
        return open_site_ledger(
            self._settings.folder.root,
            site=self._site,
            cap=cap,
            patients=len(self._patients),
            wait_seconds=LEDGER_WAIT_S,
        )

    def _stoppable(self, reserve: Callable[[int], None]) -> Callable[[int], None]:
        def before_step(step: int) -> None:
            if self._stop.is_set():
                raise _Stopped
            reserve(step)

        return before_step

    def _check_fit(self, study: Study) -> None:
        if study.base_digest != self._base_digest:
            raise RefusedError(
                "This site holds another base model than the study names.",
                hint="Fetch the study's base and start the trainer with --base.",
                code="base-differs",
            )
        if study.code_digest != self._code_digest:
            raise RefusedError(
                "The training code installed here is not the code the study names.",
                hint="Install the release that the study was written for.",
                code="code-differs",
            )

    def _pulse(self) -> None:
        while not self._stop.wait(BEAT_S):
            self._beat()

    def _beat(self) -> None:
        self._spool.write_beat(
            TrainerBeat(
                process=os.getpid(),
                instance=self._instance,
                beat_at=datetime.now(UTC),
                base_digest=self._base_digest,
                code_digest=self._code_digest,
                ready=self._ready,
            )
        )


class _Stopped(Exception):
    """The trainer was told to stop between two steps; the job is left as unfinished."""


def read_study_of(job: TrainJob) -> Study:
    """The study inside a job, whose digest must be the one the job names."""
    from pixcell_core.contracts.canonical import canonical_bytes

    study = parse_document(Study, canonical_bytes(job.study), name="study")
    if study.digest != job.study_digest:
        raise RefusedError(
            "The job's study is not the one its digest names.",
            hint="Someone changed it on its way. Tell the coordinator.",
            code="study-altered",
        )
    return study


def require_known_heads(ledger: Ledger, heads: Sequence[KnownHead]) -> None:
    """Refuse to charge a ledger that lacks a record somebody outside has seen: it was put back or written anew."""
    records = ledger.records
    for head in heads:
        if head.sequence >= len(records) or head_of(records[head.sequence]).hash != head.hash:
            raise RefusedError(
                f"The privacy ledger no longer holds record {head.sequence} that was shown to others before: it was "
                "put back to an earlier day or written anew. Nothing was drawn and nothing was charged.",
                hint="Restore the newest copy of the ledger folder. What it lost was spent all the same.",
                code="ledger-rewound",
            )


_LEDGER_NEEDS_ITS_OWNER = (
    "clock-backwards",
    "ledger-broken",
    "ledger-busy",
    "ledger-changed",
    "ledger-key-missing",
    "ledger-of-another-site",
    "ledger-unreadable",
    "ledger-write",
    "witness-broken",
    "witness-unwritten",
)
"""A site's machine or ledger, not its patients: the coordinator may know that a person has to act there."""

PUBLIC_REASONS = dict.fromkeys(
    _LEDGER_NEEDS_ITS_OWNER, "the site's privacy ledger needs its owner; the site's own log says why"
) | {
    "not-approved": "this site has not approved the study",
    "approval-denied": "this site denied the study",
    "approval-withdrawn": "this site withdrew its approval",
    "approval-expired": "the approval or the study expired",
    "approval-superseded": "this site's newest decision is not the one that lies there",
    "base-differs": "this site holds another base model",
    "code-differs": "other training code is installed at this site",
    "features-differ": "the site's features were made with other settings",
    "adapter-mismatch": "the adapter does not fit the base model",
    "ledger-rewound": "the site's privacy ledger is behind the one it showed before",
    "budget-exceeded": "the round would pass the site's privacy budget",
    "study-budget-exceeded": "the round would pass the study's privacy budget",
}


def public_code(error: PixcellError) -> str:
    """The code the hub is told: only those that stand for public settings; others could tell about the patients."""
    return error.code if error.code in PUBLIC_REASONS else "site-refused"


def public_reason(error: PixcellError) -> str:
    """What the hub is told: a fixed sentence per code, never the message, which may name patients or numbers."""
    return PUBLIC_REASONS.get(error.code, "the site refused; its own log says why")


def _result(
    job: TrainJob,
    *,
    code: str = "ok",
    reason: str = "",
    update_digest: str | None = None,
    head: KnownHead | None = None,
) -> TrainResult:
    return TrainResult(
        job_id=job.job_id,
        study_digest=job.study_digest,
        round=job.round,
        input_digest=job.input_digest,
        status="refused" if update_digest is None else "ok",
        code=code,
        reason=reason,
        update_digest=update_digest,
        ledger_head=head,
    )


def serve_trainer(settings: TrainerSettings, say: Callable[[str], None]) -> None:
    """Run a trainer until SIGTERM or SIGINT."""
    trainer = Trainer(settings, say)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: trainer.stop())
    try:
        trainer.run()
    except _Stopped:
        say("stopped between two steps; the round stays charged")
