"""One exchange of a round: the adapter out to the chosen sites, their replies back, and what they come to.

The loop knows nothing of how replies become an aggregate: it hands over a `RoundQuestion` and gets a `RoundOutcome`.
`PlainExchange` screens every reply in the open. An exchange under masks is another implementation of the same protocol.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

from flwr.app import Message, RecordDict
from flwr.app.message_type import MessageType
from flwr.serverapp import Grid

from pixcell_core.contracts.round import ARRAYS, SiteTraffic, TensorPlace, TrainRequest
from pixcell_core.contracts.spool import Arrays
from pixcell_core.contracts.study import Study
from pixcell_core.flower.messages import document_of, pack
from server.rounds.aggregation import Aggregate, Aggregator, make_aggregator
from server.rounds.board import LiveBoard
from server.rounds.heads import HeadBook
from server.rounds.requests import look_pace
from server.rounds.screening import Accepted, Expected, Rejection, screen

PULL_AT_ONCE = 4
"""Replies taken from the hub together. All that are ready could be all there are, each as large as the adapter."""

TTL_MARGIN_S = 60.0


@dataclass(frozen=True)
class RoundQuestion:
    """What is asked in one round. `nodes` maps the sites that are asked to their node ids; `timeout_s` is the deadline."""

    number: int
    adapter: Arrays
    input_digest: str
    nodes: Mapping[str, int]
    timeout_s: float

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape per tensor."""
        return {name: value.shape for name, value in self.adapter.items()}

    @property
    def size(self) -> int:
        """d: coordinates of all tensors."""
        return sum(value.size for value in self.adapter.values())


@dataclass(frozen=True)
class RoundOutcome:
    """What came back: the aggregate, shape (d,), None below the quorum; who counts, who does not and why, and bytes."""

    update: Aggregate | None
    included: tuple[str, ...]
    excluded: Mapping[str, Rejection]
    traffic: tuple[SiteTraffic, ...]


class RoundExchange(Protocol):
    """Asks the sites of a round and brings their replies together."""

    def collect(self, question: RoundQuestion, between: Callable[[], None]) -> RoundOutcome:
        """Ask, wait, screen, aggregate.

        Calls `between` between two looks at the hub, and lets through what it raises: the run is to stop. Returns at
        the deadline at the latest. A bad or missing reply excludes its site alone.
        """

    def committed(self) -> None:
        """The round that was collected last is in the store: what was kept to repeat it may go."""


@dataclass
class _Progress:
    """One round while it goes on: open questions (site per message id), who counts, who does not, bytes and times."""

    question: RoundQuestion
    expected: Expected
    aggregator: Aggregator
    began: float
    waiting: dict[str, str] = field(default_factory=dict)
    included: set[str] = field(default_factory=set)
    excluded: dict[str, Rejection] = field(default_factory=dict)
    out: dict[str, int] = field(default_factory=dict)
    back: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def traffic(self) -> tuple[SiteTraffic, ...]:
        """One entry per site that was asked."""
        return tuple(
            SiteTraffic(
                site=site,
                bytes_out=self.out[site],
                bytes_in=self.back.get(site, 0),
                reply_s=self.seconds.get(site),
            )
            for site in sorted(self.out)
        )


class PlainExchange:
    """Every site's update is seen, screened and added to the aggregate, then forgotten."""

    def __init__(
        self,
        grid: Grid,
        study: Study,
        heads: HeadBook,
        board: LiveBoard,
        *,
        spill: Path,
        poll_s: float = 0.2,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._grid, self._study, self._heads, self._board = grid, study, heads, board
        self._spill, self._poll_s, self._clock, self._sleep = spill, poll_s, clock, sleep
        self._study_digest = study.digest

    def collect(self, question: RoundQuestion, between: Callable[[], None]) -> RoundOutcome:
        """Ask all sites at once and take replies until all are there, the deadline, or the end of the grace."""
        bound = self._study.update_norm_bound(question.size)
        expected = Expected(
            self._study_digest,
            question.number,
            question.input_digest,
            question.shapes,
            bound,
            rank=self._study.adapter.rank,
        )
        aggregator = make_aggregator(self._study, question.size, bound, self._spill)
        try:
            progress = _Progress(question, expected, aggregator, self._clock())
            self._send(progress)
            late = self._wait(progress, between)
            for site in progress.waiting.values():
                progress.excluded[site] = late
                self._board.site(
                    site, training=False, code=late.code, note=f"round {question.number}: {late.reason}"
                )
            enough = aggregator.count >= self._study.quorum
            return RoundOutcome(
                aggregator.result() if enough else None,
                tuple(sorted(progress.included)),
                progress.excluded,
                progress.traffic(),
            )
        finally:
            aggregator.close()

    def committed(self) -> None:
        """Nothing is kept over the end of a round."""

    def _wait(self, progress: _Progress, between: Callable[[], None]) -> Rejection:
        """Take replies as long as the study says; returns what is said of those that did not come."""
        timeout = progress.question.timeout_s
        end, late = progress.began + timeout, Rejection("deadline", f"no reply within {timeout:g} s")
        graced, pace = self._study.straggler_rule != "grace", look_pace(self._poll_s)
        while progress.waiting and self._clock() < end:
            between()
            # Nothing here holds on to a reply: those of the last look are gone before the next ones come.
            heard = self._take(self._pull(list(progress.waiting), end), progress)
            if not graced and len(progress.included) >= self._study.quorum:
                graced, grace = True, self._study.straggler_grace_s
                if self._clock() + grace < end:
                    end = self._clock() + grace
                    late = Rejection(
                        "straggler", f"no reply within {grace:g} s after the quorum had answered"
                    )
                    self._board.run(deadline_at=datetime.now(UTC) + timedelta(seconds=grace))
            if progress.waiting and not heard:
                self._sleep(min(pace.pause(), max(0.0, end - self._clock())))
            elif heard:
                pace.reset()
        return late

    def _take(self, messages: list[Message], progress: _Progress) -> bool:
        """Screen and add what was pulled; whether anything was."""
        heard = bool(messages)
        while messages:
            message = messages.pop(0)
            site = self._asked(message, progress)
            if site is None:
                continue
            progress.back[site] = content_bytes(message)
            progress.seconds[site] = round(max(0.0, self._clock() - progress.began), 1)
            verdict = screen(message, progress.expected, self._heads.last(site))
            if isinstance(verdict, Accepted):
                # On disk before the update counts: a ledger that goes back behind it is met by somebody who remembers.
                self._heads.note(site, verdict.ledger_head)
                progress.aggregator.add(site, verdict.update)
                progress.included.add(site)
            else:
                progress.excluded[site] = verdict
            self._show(site, verdict, progress)
        if heard:
            self._board.run(replies=len(progress.included))
        return heard

    def _send(self, progress: _Progress) -> None:
        """Send the round to its sites and note the open questions. All messages share one tensor record."""
        question = progress.question
        layout = tuple(TensorPlace(name=n, shape=question.adapter[n].shape) for n in sorted(question.adapter))
        sites = sorted(question.nodes)
        messages: list[Message] = []
        tensors = None
        for site in sites:
            document = TrainRequest(
                study_digest=self._study_digest,
                round=question.number,
                input_digest=question.input_digest,
                layout=layout,
                ledger_head=self._heads.last(site),
            )
            content = pack(document, question.adapter if tensors is None else None)
            if tensors is None:
                tensors = content.array_records[ARRAYS]
            else:
                content[ARRAYS] = tensors
            messages.append(
                Message(
                    content,
                    dst_node_id=question.nodes[site],
                    message_type=MessageType.TRAIN,
                    ttl=question.timeout_s + TTL_MARGIN_S,
                    group_id=str(question.number),
                )
            )
        size = content_bytes(messages[0]) if messages else 0
        for site, sent in zip(sites, list(self._grid.push_messages(messages)), strict=False):
            if sent:
                progress.waiting[sent] = site
                progress.out[site] = size
                self._board.site(site, training=True, bytes_out=self._state_of(site, "bytes_out") + size)
        for site in set(sites) - set(progress.waiting.values()):
            progress.excluded[site] = Rejection("not-sent", "the hub did not take the message to the site")
        self._board.run(replies=0)

    def _pull(self, ids: list[str], end: float) -> list[Message]:
        """At most `PULL_AT_ONCE` replies that are ready, none after `end`."""
        for start in range(0, len(ids), PULL_AT_ONCE):
            if self._clock() >= end:
                break
            found = list(self._grid.pull_messages(ids[start : start + PULL_AT_ONCE]))
            if found:
                return found
        return []

    def _asked(self, message: Message, progress: _Progress) -> str | None:
        """The site whose open question this answers; None for a second reply, or another round's, or another node's."""
        identity = message.metadata.reply_to_message_id
        site = progress.waiting.get(identity)
        if site is None:
            return None
        if not message.has_error() and message.metadata.src_node_id != progress.question.nodes[site]:
            # Somebody else's reply under this site's question must not cost the site its round.
            return None
        del progress.waiting[identity]
        return site

    def _show(self, site: str, verdict: Accepted | Rejection, progress: _Progress) -> None:
        rejected = verdict if isinstance(verdict, Rejection) else None
        self._board.site(
            site,
            training=False,
            last_reply_at=datetime.now(UTC),
            bytes_in=self._state_of(site, "bytes_in") + progress.back[site],
            code=rejected.code if rejected else "ok",
            note=f"round {progress.question.number}: {rejected.reason}" if rejected else "",
        )

    def _state_of(self, site: str, column: str) -> int:
        return next(int(getattr(s, column)) for s in self._board.state.sites if s.site == site)


def content_bytes(message: Message) -> int:
    """Bytes of a message's tensors and document; 0 for an error. The header around them is a few hundred more."""
    if message.has_error():
        return 0
    content: RecordDict = message.content
    tensors = sum(len(array.data) for record in content.array_records.values() for array in record.values())
    return tensors + len(document_of(message))
