"""The masked exchange as the loop knows exchanges: a question in, an outcome out, the board kept up to date.

No reply is screened here for what it holds: nobody but the site can. What comes out is the mean of at least the
study's quorum, or the reason why there is none.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from flwr.serverapp import Grid

from pixcell_core.contracts.round import SiteTraffic
from pixcell_core.contracts.study import Study
from pixcell_core.errors import RefusedError
from server.rounds.board import LiveBoard
from server.rounds.exchange import RoundOutcome, RoundQuestion
from server.rounds.heads import HeadBook
from server.rounds.masked import MaskedAbort, MaskedExchange, MaskedSettings
from server.rounds.screening import Rejection


class MaskedRoundError(RefusedError):
    """A masked round came to no sum. Committed rounds are kept."""

    default_code = "masked-round-failed"


class MaskedRounds:
    """A `RoundExchange` under masks. `folder` keeps the attempt that is being opened over a restart of the hub."""

    def __init__(
        self,
        grid: Grid,
        study: Study,
        heads: HeadBook,
        board: LiveBoard,
        *,
        folder: Path,
        poll_s: float = 0.2,
        stage_timeout_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._grid, self._study, self._heads, self._board = grid, study, heads, board
        self._folder, self._poll_s, self._stage_timeout_s = folder, poll_s, stage_timeout_s
        self._clock, self._sleep = clock, sleep
        self._exchange: MaskedExchange | None = None

    def collect(self, question: RoundQuestion, between: Callable[[], None]) -> RoundOutcome:
        """One masked round. Raises `MaskedRoundError` where there is no sum, and what `between` raises."""

        def sleep(seconds: float) -> None:
            between()
            self._sleep(seconds)

        def heard(site: str, why: Rejection | None) -> None:
            self._show(site, why, question.number)

        self._exchange = MaskedExchange(
            self._grid,
            self._study,
            lambda: question.nodes,
            self._folder,
            self._heads,
            MaskedSettings(self._poll_s, self._stage_timeout_s, question.timeout_s),
            heard,
            self._clock,
            sleep,
        )
        for site in question.nodes:
            self._board.site(site, training=True)
        self._board.run(replies=0)
        found = self._exchange.collect(
            question.number, question.adapter, question.input_digest, sorted(question.nodes)
        )
        traffic = self._traffic()
        if isinstance(found, MaskedAbort):
            reasons = "; ".join(f"{site}: {why.reason}" for site, why in sorted(found.excluded.items()))
            raise MaskedRoundError(
                f"Round {question.number} under masks came to no sum: {found.reason}"
                + (f" {reasons}." if reasons else ""),
                hint=found.hint or "Start the run again: committed rounds are kept.",
                code=found.code,
            )
        for site in question.nodes:
            self._board.site(site, training=False)
        self._board.run(replies=len(found.sites))
        return RoundOutcome(
            found.total / len(found.sites), tuple(sorted(found.sites)), found.excluded, traffic
        )

    def committed(self) -> None:
        """Forget the attempt: its round is in the store."""
        if self._exchange is not None:
            self._exchange.done()

    def _traffic(self) -> tuple[SiteTraffic, ...]:
        assert self._exchange is not None
        sent, received = self._exchange.sent, self._exchange.received
        for site, count in sent.items():
            state = next(s for s in self._board.state.sites if s.site == site)
            self._board.site(
                site,
                bytes_out=state.bytes_out + count,
                bytes_in=state.bytes_in + received.get(site, 0),
            )
        return tuple(
            SiteTraffic(site=site, bytes_out=sent[site], bytes_in=received.get(site, 0))
            for site in sorted(sent)
        )

    def _show(self, site: str, why: Rejection | None, number: int) -> None:
        if why is None:
            self._board.site(site, last_reply_at=datetime.now(UTC), code="ok", note="")
        else:
            self._board.site(site, training=False, code=why.code, note=f"round {number}: {why.reason}")
        self._board.flush()
