"""The round loop on a Flower grid: which sites are asked, how long, what counts, and when it is committed.

Sites are addressed by the node ids of their enrolled keys. A site takes part in a round when it is registered,
online, has signed an approval of exactly this study, and says that its trainer stands ready. Below the quorum the
run fails and says which site lacks what.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from flwr.app import Message
from flwr.app.message_type import MessageType
from flwr.serverapp import Grid

from pixcell_core.contracts.canonical import parse_document
from pixcell_core.contracts.enrolment import EnrolmentRequest
from pixcell_core.contracts.round import (
    PREPARE,
    Exclusion,
    PrepareReply,
    PrepareRequest,
    RoundRecord,
    TensorPlace,
    TrainRequest,
)
from pixcell_core.contracts.spool import Arrays, arrays_digest
from pixcell_core.contracts.study import Study, check_approval
from pixcell_core.errors import PixcellError, RefusedError
from pixcell_core.flower.messages import document_of, pack
from pixcell_core.trust.dsse import Envelope
from server.rounds.aggregation import StreamingMean
from server.rounds.board import LiveBoard
from server.rounds.heads import HeadBook
from server.rounds.screening import Expected, Rejection, plain, screen
from server.rounds.store import CommittedRound, RoundStore

UNANSWERED = 5
"""A question without an answer is asked again after this many times the pause: a second one makes the site slower."""


@dataclass(frozen=True)
class LoopSettings:
    """Waiting times: between polls, between two askings of a site, and for the sites to become ready at all."""

    poll_s: float = 0.2
    ask_again_s: float = 3.0
    ready_timeout_s: float = 180.0


HOPELESS = frozenset(
    {"approval-denied", "approval-withdrawn", "approval-expired", "base-differs", "code-differs"}
)
"""What waiting does not cure: a person at the site has to act, and then the run is started again."""


class QuorumError(RefusedError):
    """Too few sites to begin or to count a round."""

    default_code = "below-quorum"


@dataclass
class _Asked:
    """A question on its way to a site."""

    site: str
    since: float


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
    ) -> None:
        self._grid, self._study, self._sites, self._nodes = grid, study, sites, nodes
        self._store, self._board, self._settings = store, board, settings or LoopSettings()
        self._heads = heads
        self._clock, self._sleep = clock, sleep
        self._ready: set[str] = set()
        self._asked: dict[str, _Asked] = {}
        self._answers: dict[str, str] = {}
        self._last_asked: dict[str, float] = {}

    def run(self, start: Arrays) -> CommittedRound:
        """Train the rounds that are not yet committed; `start` is the adapter of round 0.

        Raises `QuorumError`, or what a broken store raises. Every committed round stays.
        """
        self._store.open()
        last = self._store.latest() or self._commit(0, start, None, (), (), datetime.now(UTC))
        self._board.run(committed=last.record.round, history=tuple(self._store.records()))
        if last.record.round < self._study.rounds:
            self._wait_for_sites()
        while last.record.round < self._study.rounds:
            last = self._round(last)
        self._board.run(state="completed", process=None, reason="", deadline_at=None)
        return last

    def _wait_for_sites(self) -> None:
        """Ask until every site is ready; at the deadline go on with a quorum, or fail."""
        end = self._clock() + self._settings.ready_timeout_s
        self._board.run(state="waiting", deadline_at=_later(self._settings.ready_timeout_s))
        while len(self._ready) < len(self._study.sites) and self._clock() < end:
            self._ask()
            self._hear()
            missing = [site for site in self._study.sites if site not in self._ready]
            if missing and all(self._answers.get(site) in HOPELESS for site in missing):
                break
            if missing:
                self._sleep(self._settings.poll_s)
        self._require_quorum()

    def _require_quorum(self) -> None:
        if len(self._ready) >= self._study.quorum:
            return
        lacking = "; ".join(
            f"{s.site}: {_lacks(s)}" for s in self._board.state.sites if s.site not in self._ready
        )
        raise QuorumError(
            f"{len(self._ready)} of {len(self._study.sites)} sites are ready, "
            f"the quorum is {self._study.quorum}. {lacking}.",
            hint="Bring the sites up, then start the run again: committed rounds are kept.",
        )

    def _ask(self) -> None:
        """Send the prepare question to every online site that is not ready and was not asked lately."""
        now = self._clock()
        patience = self._settings.ask_again_s
        waiting = {a.site for a in self._asked.values() if now - a.since < UNANSWERED * patience}
        waiting |= {site for site, since in self._last_asked.items() if now - since < patience}
        online, nodes = set(self._grid.get_node_ids()), self._nodes()
        for site in self._study.sites:
            node = nodes.get(site)
            self._board.site(site, registered=node in online)
            if node not in online:
                self._ready.discard(site)
                self._board.site(site, configured=False, note="not connected" if node else "not enrolled")
            elif site not in self._ready and site not in waiting:
                document = PrepareRequest(
                    study=self._study.model_dump(mode="json"), study_digest=self._study.digest
                )
                message = Message(
                    pack(document),
                    dst_node_id=node,
                    message_type=f"{MessageType.QUERY}.{PREPARE}",
                    ttl=self._study.round_timeout_s,
                    group_id="prepare",
                )
                for sent in self._grid.push_messages([message]):
                    self._asked[sent] = _Asked(site, now)
                self._last_asked[site] = now
        self._board.flush()

    def _hear(self) -> None:
        """Take the answers to prepare questions."""
        if not self._asked:
            return
        for message in self._grid.pull_messages(list(self._asked)):
            asked = self._asked.pop(message.metadata.reply_to_message_id, None)
            if asked is not None:
                self._judge_answer(asked.site, message)
        expired = [k for k, v in self._asked.items() if self._clock() - v.since > self._study.round_timeout_s]
        for key in expired:
            del self._asked[key]

    def _judge_answer(self, site: str, message: Message) -> None:
        self._board.site(site, last_reply_at=datetime.now(UTC), approved=False, configured=False)
        self._ready.discard(site)
        try:
            if message.has_error():
                raise RefusedError("the site's agent could not answer", hint="Its own log says why.")
            reply = parse_document(PrepareReply, document_of(message), name="answer")
            if reply.study_digest != self._study.digest:
                raise RefusedError("the answer is about another study", hint="")
            if not reply.approval:
                raise RefusedError(plain(reply.reason) or "no approval", hint="", code=reply.code)
            envelope = Envelope.from_bytes(reply.approval.encode(), name="approval")
            check_approval(envelope, self._sites[site].verify_key(), study=self._study, site=site)
            self._answers[site] = reply.code
            self._board.site(site, approved=True, configured=reply.configured, note=plain(reply.reason))
            if reply.configured:
                self._ready.add(site)
        except PixcellError as error:
            self._answers[site] = error.code
            self._board.site(site, note=plain(error.message))
        self._board.flush()

    def _round(self, last: CommittedRound) -> CommittedRound:
        number, started = last.record.round + 1, datetime.now(UTC)
        self._require_quorum()
        asked_sites = sorted(self._ready)
        self._board.run(
            state="running", round=number, deadline_at=_later(self._study.round_timeout_s), reason=""
        )
        pending = self._send(number, last, asked_sites)
        excluded = {
            s.site: Rejection("not-ready", s.note or _lacks(s))
            for s in self._board.state.sites
            if s.site not in pending.values()
        }
        shapes = {name: value.shape for name, value in last.adapter.items()}
        mean, included = StreamingMean(shapes), set[str]()
        expected = Expected(
            self._study.digest,
            number,
            last.record.adapter_digest,
            shapes,
            self._study.update_norm_bound(sum(v.size for v in last.adapter.values())),
        )
        end = self._clock() + self._study.round_timeout_s
        open_questions = dict(pending)
        while open_questions and self._clock() < end:
            # Sites that are not in this round are asked meanwhile, so that they can be in the next.
            self._hear()
            for message in self._grid.pull_messages(list(open_questions)):
                site = open_questions.pop(message.metadata.reply_to_message_id, None)
                if site is None:
                    # A second reply to an answered question, or a reply to a question of another round.
                    continue
                verdict = screen(message, expected, self._heads.last(site))
                self._board.site(site, training=False, last_reply_at=datetime.now(UTC))
                if isinstance(verdict, Rejection):
                    excluded[site] = verdict
                    self._ready.discard(site)
                    self._board.site(site, note=f"round {number}: {verdict.reason}")
                else:
                    self._heads.note(site, verdict.ledger_head)
                    mean.add(verdict.update)
                    included.add(site)
                    self._board.site(site, note="")
                self._board.flush()
            if open_questions:
                self._sleep(self._settings.poll_s)
        for site in open_questions.values():
            excluded[site] = Rejection("deadline", f"no reply within {self._study.round_timeout_s:g} s")
            self._ready.discard(site)
            self._board.site(site, training=False, note=f"round {number}: {excluded[site].reason}")
        if mean.count < self._study.quorum:
            reasons = "; ".join(f"{site}: {why.reason}" for site, why in sorted(excluded.items()))
            raise QuorumError(
                f"Round {number} counts {mean.count} sites, the quorum is {self._study.quorum}. {reasons}.",
                hint="Bring the sites up, then start the run again: committed rounds are kept.",
            )
        self._ask()
        why = tuple(
            Exclusion(site=s, code=r.code, reason=r.reason[:500]) for s, r in sorted(excluded.items())
        )
        done = self._commit(
            number, mean.applied_to(last.adapter), last, tuple(sorted(included)), why, started
        )
        for site in included:
            counted = next(s.rounds_counted for s in self._board.state.sites if s.site == site)
            self._board.site(site, rounds_counted=counted + 1)
        self._board.run(committed=number, history=(*self._board.state.history, done.record))
        return done

    def _send(self, number: int, last: CommittedRound, sites: list[str]) -> dict[str, str]:
        """Send the round to `sites`; returns the site per message id."""
        nodes = self._nodes()
        layout = tuple(TensorPlace(name=n, shape=last.adapter[n].shape) for n in sorted(last.adapter))
        messages = []
        for site in sites:
            document = TrainRequest(
                study_digest=self._study.digest,
                round=number,
                input_digest=last.record.adapter_digest,
                layout=layout,
                ledger_head=self._heads.last(site),
            )
            messages.append(
                Message(
                    pack(document, last.adapter),
                    dst_node_id=nodes[site],
                    message_type=MessageType.TRAIN,
                    ttl=self._study.round_timeout_s + 60.0,
                    group_id=str(number),
                )
            )
        pending = {
            sent: site for sent, site in zip(self._grid.push_messages(messages), sites, strict=True) if sent
        }
        for site in pending.values():
            self._board.site(site, training=True)
        self._board.flush()
        return pending

    def _commit(
        self,
        number: int,
        adapter: Arrays,
        last: CommittedRound | None,
        included: tuple[str, ...],
        excluded: tuple[Exclusion, ...],
        started: datetime,
    ) -> CommittedRound:
        record = RoundRecord(
            study_id=self._study.id,
            study_digest=self._study.digest,
            round=number,
            previous=last.record.digest if last is not None else None,
            adapter_digest=arrays_digest(adapter),
            included=included,
            excluded=excluded,
            started_at=started,
            committed_at=datetime.now(UTC),
        )
        return self._store.commit(record, adapter)


def _later(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


def _lacks(state: object) -> str:
    for column in ("registered", "approved", "configured"):
        if not getattr(state, column):
            note = str(getattr(state, "note", ""))
            return f"not {column}" + (f" ({note})" if note else "")
    return "not ready"
