"""The round loop on a Flower grid: which sites are asked, how long, what counts, and when it is committed.

Sites are addressed by the node ids of their enrolled keys. A site takes part in a round when it is registered,
online, has signed an approval of exactly this study, and says that its trainer stands ready. Below the quorum the
run fails and says which site lacks what.

Everything a later round depends on is in the store: the adapter, the server optimiser's tensors, the chain of records.
A loop that was killed is built anew and asks for the round that is not committed; sites answer the same question with
the same update.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from flwr.serverapp import Grid

from pixcell_core.contracts.enrolment import EnrolmentRequest
from pixcell_core.contracts.round import HISTORY, Exclusion, RoundRecord, SiteTraffic
from pixcell_core.contracts.spool import Arrays, arrays_digest
from pixcell_core.contracts.study import Study
from pixcell_core.errors import BadInputError, RefusedError
from server.log_anchor.desk import HeadDesk
from server.rounds.approvals_seen import ApprovalsSeen
from server.rounds.board import LiveBoard
from server.rounds.exchange import PlainExchange, RoundExchange, RoundOutcome, RoundQuestion
from server.rounds.heads import HeadBook
from server.rounds.readiness import Readiness, lacks
from server.rounds.requests import LoopSettings, StopRequest
from server.rounds.screening import Rejection
from server.rounds.server_step import server_step
from server.rounds.store import CommittedRound, RoundStore

__all__ = ["LoopSettings", "QuorumError", "RoundLoop", "require_start_fits"]


class QuorumError(RefusedError):
    """Too few sites to begin or to count a round."""

    default_code = "below-quorum"


class _StopNow(Exception):
    """The coordinator wants the run to stop: the round in hand is left."""


class RoundLoop:
    """Runs a study to its last round, from wherever its store stands."""

    def __init__(
        self,
        grid: Grid,
        study: Study,
        sites: Mapping[str, EnrolmentRequest],
        nodes: Callable[[], Mapping[str, int]],
        store: RoundStore,
        board: LiveBoard,
        heads: HeadBook,
        settings: LoopSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        *,
        folder: Path | None = None,
        exchange: RoundExchange | None = None,
        logs: HeadDesk | None = None,
    ) -> None:
        """`folder` is the run's: wishes to stop are read and approvals kept there, and large replies wait in it.

        Raises `RefusedError` where the study wants masks and no `exchange` under masks is given, `BadInputError` where
        `settings` would let a round wait longer than the study says.
        """
        self._study, self._store, self._board = study, store, board
        self._study_digest = study.digest
        self._settings = settings or LoopSettings()
        self._clock, self._sleep = clock, sleep
        self._timeout = self._settings.timeout_of(study)
        self._stop = StopRequest(folder) if folder is not None else None
        self._readiness = Readiness(
            grid,
            study,
            sites,
            nodes,
            board,
            ask_again_s=self._settings.ask_again_s,
            clock=clock,
            approvals=ApprovalsSeen(folder) if folder is not None else None,
            logs=logs,
        )
        if exchange is None and study.aggregation.masking is not None:
            raise RefusedError(
                f"Study {study.id} wants secure aggregation, and this coordinator runs without it.",
                hint="Update the coordinator. Its updates are never asked for in the open.",
                code="masking-unavailable",
            )
        self._exchange = exchange or PlainExchange(
            grid,
            study,
            heads,
            board,
            spill=(folder or Path(tempfile.mkdtemp(prefix="pixcell-round-"))) / "spill",
            poll_s=self._settings.poll_s,
            clock=clock,
            sleep=sleep,
        )

    def run(self, start: Arrays) -> CommittedRound:
        """Train the rounds that are not yet committed; `start` is the adapter of round 0.

        Returns the last committed round, of the study's end or of where it was told to stop. Raises `QuorumError`, or
        what a broken store raises. Every committed round stays.
        """
        require_start_fits(self._study, start)
        self._store.open()
        last = self._store.latest() or self._commit(0, start, None, None, (), (), (), datetime.now(UTC))
        self._show_committed(self._store.records())
        try:
            if last.record.round < self._study.rounds:
                self._wait_for_sites()
            while last.record.round < self._study.rounds:
                if self._wish() is not None:
                    raise _StopNow
                last = self._round(last)
        except _StopNow:
            return self._stopped(last)
        self._board.run(state="completed", process=None, reason="", deadline_at=None)
        return last

    def _wish(self) -> str | None:
        return self._stop.wanted() if self._stop is not None else None

    def _between(self) -> None:
        """Between two looks at the hub: hear sites that are not in the round, and whether the run is to stop."""
        if self._wish() == "now":
            raise _StopNow
        # Asked meanwhile, so that they can be in the next round.
        self._readiness.hear()

    def _stopped(self, last: CommittedRound) -> CommittedRound:
        for site in self._study.sites:
            self._board.site(site, training=False)
        self._board.run(
            state="stopped",
            process=None,
            deadline_at=None,
            reason=f"Stopped by the coordinator after {last.record.round} of {self._study.rounds} rounds.",
        )
        if self._stop is not None:
            self._stop.clear()
        return last

    def _wait_for_sites(self) -> None:
        """Ask until every site is ready; at the deadline go on with a quorum, or fail."""
        patience = self._settings.ready_timeout_s
        end = self._clock() + patience
        self._board.run(state="waiting", deadline_at=_later(patience))
        while len(self._readiness.ready) < len(self._study.sites) and self._clock() < end:
            if self._wish() is not None:
                raise _StopNow
            self._readiness.ask()
            self._readiness.hear()
            if self._readiness.hopeless:
                break
            if len(self._readiness.ready) < len(self._study.sites):
                self._sleep(self._settings.poll_s)
        self._require_quorum()

    def _require_quorum(self) -> None:
        ready = self._readiness.ready
        if len(ready) >= self._study.quorum:
            return
        lacking = "; ".join(f"{s.site}: {lacks(s)}" for s in self._board.state.sites if s.site not in ready)
        raise QuorumError(
            f"{len(ready)} of {len(self._study.sites)} sites are ready, "
            f"the quorum is {self._study.quorum}. {lacking}.",
            hint="Bring the sites up, then start the run again: committed rounds are kept.",
        )

    def _round(self, last: CommittedRound) -> CommittedRound:
        number, started = last.record.round + 1, datetime.now(UTC)
        self._require_quorum()
        nodes = self._readiness.nodes()
        self._board.run(
            state="running", round=number, replies=0, deadline_at=_later(self._timeout), reason=""
        )
        excluded = self._readiness.lacking(set(nodes))
        question = RoundQuestion(number, last.adapter, last.record.adapter_digest, nodes, self._timeout)
        outcome = self._exchange.collect(question, self._between)
        for site in outcome.excluded:
            self._readiness.doubt(site)
        excluded |= outcome.excluded
        if outcome.update is None or len(outcome.included) < self._study.quorum:
            reasons = "; ".join(f"{site}: {why.reason}" for site, why in sorted(excluded.items()))
            raise QuorumError(
                f"Round {number} counts {len(outcome.included)} sites, the quorum is {self._study.quorum}. "
                f"{reasons}.",
                hint="Bring the sites up, then start the run again: committed rounds are kept.",
            )
        self._readiness.ask()
        done = self._count(number, last, outcome, excluded, started)
        self._exchange.committed()
        self._show_committed((*self._board.state.history, done.record))
        return done

    def _count(
        self,
        number: int,
        last: CommittedRound,
        outcome: RoundOutcome,
        excluded: Mapping[str, Rejection],
        started: datetime,
    ) -> CommittedRound:
        """Step and commit."""
        assert outcome.update is not None
        stepped = server_step(self._study.aggregation, last.adapter, outcome.update, last.state)
        why = tuple(
            Exclusion(site=s, code=r.code, reason=r.reason[:500]) for s, r in sorted(excluded.items())
        )
        return self._commit(
            number, stepped.adapter, stepped.state, last, outcome.included, why, outcome.traffic, started
        )

    def _show_committed(self, records: tuple[RoundRecord, ...] | list[RoundRecord]) -> None:
        """Write the board from the records; at a start from all of them, then from one more a round."""
        last = records[-1]
        known = {state.site: state for state in self._board.state.sites}
        fresh = records if self._board.state.committed == 0 and not self._board.state.history else [last]
        for site in self._study.sites:
            counted = known[site].rounds_counted + sum(site in record.included for record in fresh)
            changes: dict[str, int] = {"rounds_counted": counted}
            if fresh is records:
                spent = [t for record in fresh for t in record.traffic if t.site == site]
                changes |= {
                    "bytes_out": sum(t.bytes_out for t in spent),
                    "bytes_in": sum(t.bytes_in for t in spent),
                }
            self._board.site(site, **changes)
        self._board.run(committed=last.round, history=tuple(records[-HISTORY:]))

    def _commit(
        self,
        number: int,
        adapter: Arrays,
        state: Arrays | None,
        last: CommittedRound | None,
        included: tuple[str, ...],
        excluded: tuple[Exclusion, ...],
        traffic: tuple[SiteTraffic, ...],
        started: datetime,
    ) -> CommittedRound:
        record = RoundRecord(
            study_id=self._study.id,
            study_digest=self._study_digest,
            round=number,
            previous=last.record.digest if last is not None else None,
            adapter_digest=arrays_digest(adapter),
            state_digest=arrays_digest(state) if state is not None else None,
            included=included,
            excluded=excluded,
            traffic=traffic,
            started_at=started,
            committed_at=datetime.now(UTC),
        )
        return self._store.commit(record, adapter, state)


def require_start_fits(study: Study, start: Arrays) -> None:
    """Refuse a start adapter of another rank or kind than the study's, before any site is asked."""
    kind, rank = study.adapter.kind, study.adapter.rank
    for name, value in start.items():
        first = ".lora_A." in name
        found = value.shape[0] if first else value.shape[-1]
        if first and kind == "ffa-lora":
            raise _unfit_start(f"it trains A ({name}), and the study's adapter trains B alone")
        if (first or ".lora_B." in name) and found != rank:
            raise _unfit_start(f"{name} has rank {found}, and the study says {rank}")


def _unfit_start(why: str) -> BadInputError:
    return BadInputError(
        f"The run's start adapter does not fit the study: {why}.",
        hint="It was made for another study or base. Create the study again with --base FOLDER under a new --id.",
        code="start-differs",
    )


def _later(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)
