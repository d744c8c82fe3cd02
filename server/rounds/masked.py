"""One masked round on a Flower grid: five exchanges with deadlines, and the sum of the updates or a clean abort.

A site that is silent, late or wrong at any stage drops out with its reason, and the others go on while enough are left.
Before any site is asked to open the sum, the attempt is on disk: a hub that comes back asks the same question again.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from flwr.app import Message, RecordDict
from flwr.app.message_type import MessageType
from flwr.serverapp import Grid

from pixcell_core.contracts.canonical import parse_document
from pixcell_core.contracts.masking import (
    KEYS,
    SHARES,
    SURVIVORS,
    UNMASK,
    KeysReply,
    MaskingReply,
    RoundAttempt,
    SharesReply,
    SurvivorsReply,
    UnmaskReply,
)
from pixcell_core.contracts.round import ARRAYS, FLAT, TensorPlace, TrainRequest
from pixcell_core.contracts.spool import Arrays
from pixcell_core.contracts.study import Study
from pixcell_core.errors import PixcellError
from pixcell_core.flower.messages import decode_words, document_of, pack
from pixcell_core.masking.hub import HubAttempt
from pixcell_core.masking.keys import MaskingRefusedError
from pixcell_core.masking.keystream import Words
from pixcell_core.masking.roster import Roster
from pixcell_core.masking.saved_attempt import drop_attempt, load_attempt, save_attempt
from server.rounds.exchange import content_bytes
from server.rounds.heads import HeadBook
from server.rounds.requests import look_pace
from server.rounds.screening import Expected, Rejection, of_error, plain, screen_document

PULLED_AT_ONCE = 4
"""Replies fetched in one call: so many updates at most are in memory, however many sites answer at once."""

Reply = TypeVar("Reply", bound=MaskingReply)
Heard = Callable[[str, Rejection | None], None]
"""`heard(site, why)`: a reply of a site was taken, or the site dropped out and why."""


@dataclass(frozen=True)
class MaskedSettings:
    """Seconds between polls, and until the stages without training end without those who did not answer.

    `round_timeout_s` is the deadline of the training itself; None takes the study's.
    """

    poll_s: float = 0.2
    stage_timeout_s: float = 60.0
    round_timeout_s: float | None = None


@dataclass(frozen=True)
class MaskedSum:
    """The opened sum: float64 of shape (parameters,), tensors in the order of their names; whose it is; who is not."""

    total: npt.NDArray[np.float64]
    sites: tuple[str, ...]
    excluded: Mapping[str, Rejection]

    def mean(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, npt.NDArray[np.float64]]:
        """The mean update by tensor name."""
        arrays, at = {}, 0
        for name in sorted(shapes):
            size = math.prod(shapes[name])
            arrays[name] = (self.total[at : at + size] / len(self.sites)).reshape(shapes[name])
            at += size
        return arrays


@dataclass(frozen=True)
class MaskedAbort:
    """No sum. With `asked_to_open` the same round is continued at the next call and no new attempt is possible."""

    code: str
    reason: str
    hint: str
    excluded: Mapping[str, Rejection]
    asked_to_open: bool = False


@dataclass
class _Stage:
    """One exchange: the message of each site, how an answer is taken, and until when."""

    messages: dict[str, Message]
    take: Callable[[str, Message], None]
    timeout_s: float
    grace_after: int | None = None
    grace_s: float = 0.0
    pending: dict[str, str] = field(default_factory=dict)


class MaskedExchange:
    """Masked rounds of one study. `folder` keeps the attempt that is being opened; `nodes` are asked at each stage."""

    def __init__(
        self,
        grid: Grid,
        study: Study,
        nodes: Callable[[], Mapping[str, int]],
        folder: Path,
        heads: HeadBook,
        settings: MaskedSettings | None = None,
        heard: Heard = lambda site, why: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._grid, self._study, self._nodes, self._folder = grid, study, nodes, folder
        self._heads, self._settings, self._heard = heads, settings or MaskedSettings(), heard
        self._clock, self._sleep = clock, sleep
        self._roster = Roster.of(study)
        self._excluded: dict[str, Rejection] = {}
        self._timeout = self._settings.round_timeout_s or study.round_timeout_s
        self.sent: dict[str, int] = {}
        """Bytes of all messages to each site in the last round."""
        self.received: dict[str, int] = {}
        """Bytes of each site's answers in the last round."""

    def collect(
        self, number: int, adapter: Arrays, input_digest: str, sites: Sequence[str]
    ) -> MaskedSum | MaskedAbort:
        """The sum of the updates of round `number`, trained from `adapter` by those of `sites` that stay to the end.

        Continues a kept attempt at this round where there is one, without asking anybody to train again. Raises what
        a broken folder raises; call `done` once the round is committed.
        """
        self._excluded, self.sent, self.received = {}, {}, {}
        kept = load_attempt(self._folder, self._roster)
        if kept is not None and (kept.attempt.round, kept.attempt.input_digest) == (number, input_digest):
            self._excluded = {
                site: Rejection("dropped-out", "the site dropped out before the hub was started again")
                for site in self._study.sites
                if site not in kept.survivors
            }
            return self._open(kept)
        nonce = secrets.token_hex(32)
        attempt = RoundAttempt(
            study_digest=self._study.digest, round=number, input_digest=input_digest, nonce=nonce
        )
        hub = HubAttempt(self._roster, attempt, sum(value.size for value in adapter.values()))
        try:
            self._ask_keys(hub, sites)
            self._ask_shares(hub)
            self._ask_updates(hub, adapter)
            self._ask_signatures(hub)
            hub.unmask_request()
        except MaskingRefusedError as error:
            return MaskedAbort(error.code, error.message, error.hint, dict(self._excluded))
        save_attempt(self._folder, hub)
        return self._open(hub)

    def done(self) -> None:
        """Forget the kept attempt: its round is committed."""
        drop_attempt(self._folder)

    def _ask_keys(self, hub: HubAttempt, sites: Sequence[str]) -> None:
        content = pack(hub.keys_request())
        self._run(
            _Stage(
                self._queries(KEYS, dict.fromkeys(sorted(sites), content)),
                lambda site, message: hub.take_keys(site, _read(KeysReply, message)),
                self._settings.stage_timeout_s,
            )
        )

    def _ask_shares(self, hub: HubAttempt) -> None:
        content = pack(hub.shares_request())
        self._run(
            _Stage(
                self._queries(SHARES, dict.fromkeys(sorted(hub.keys), content)),
                lambda site, message: hub.take_shares(site, _read(SharesReply, message)),
                self._settings.stage_timeout_s,
            )
        )

    def _ask_updates(self, hub: HubAttempt, adapter: Arrays) -> None:
        layout = tuple(TensorPlace(name=n, shape=adapter[n].shape) for n in sorted(adapter))
        expected = Expected(
            study_digest=self._study.digest,
            round=hub.attempt.round,
            input_digest=hub.attempt.input_digest,
            shapes={name: value.shape for name, value in adapter.items()},
            max_norm=math.inf,
        )
        flat = pack(hub.keys_request(), adapter)[ARRAYS]
        messages = {}
        for site in hub.sharers:
            request = TrainRequest(
                study_digest=self._study.digest,
                round=hub.attempt.round,
                input_digest=hub.attempt.input_digest,
                layout=layout,
                ledger_head=self._heads.last(site),
                masking=hub.masked_request(site),
            )
            content = pack(request)
            content[ARRAYS] = flat
            messages[site] = self._message(site, MessageType.TRAIN, content, self._timeout + 60.0)

        def take(site: str, message: Message) -> None:
            reply = screen_document(message, expected, self._heads.last(site))
            if isinstance(reply, Rejection):
                raise MaskingRefusedError(reply.reason, hint="", code=reply.code)
            words = _words(message, hub.size)
            self._heads.note(site, reply.ledger_head)
            hub.take_masked(site, words)

        grace = self._study.straggler_rule == "grace"
        self._run(
            _Stage(
                messages,
                take,
                self._timeout,
                max(self._study.quorum, self._roster.fewest) if grace else None,
                self._study.straggler_grace_s,
            )
        )

    def _ask_signatures(self, hub: HubAttempt) -> None:
        if len(hub.alive) < self._study.quorum:
            # Once opened, the round could not be tried again with more sites.
            raise MaskingRefusedError(
                f"{len(hub.alive)} sites sent an update, the quorum is {self._study.quorum}.",
                hint="Bring the sites up, then start the run again: committed rounds are kept.",
                code="below-quorum",
            )
        content = pack(hub.survivors_request())
        self._run(
            _Stage(
                self._queries(SURVIVORS, dict.fromkeys(hub.alive, content)),
                lambda site, message: hub.take_signature(site, _read(SurvivorsReply, message)),
                self._settings.stage_timeout_s,
            )
        )

    def _open(self, hub: HubAttempt) -> MaskedSum | MaskedAbort:
        try:
            content = pack(hub.unmask_request())
            self._run(
                _Stage(
                    self._queries(UNMASK, dict.fromkeys(sorted(hub.signatures), content)),
                    lambda site, message: hub.take_reveal(site, _read(UnmaskReply, message)),
                    self._settings.stage_timeout_s,
                ),
                enough=lambda: hub.can_open,
            )
            opened = hub.open()
        except MaskingRefusedError as error:
            return MaskedAbort(error.code, error.message, error.hint, dict(self._excluded), True)
        left_out = {site: why for site, why in self._excluded.items() if site not in opened.sites}
        return MaskedSum(opened.total, opened.sites, left_out)

    def _queries(self, name: str, contents: Mapping[str, RecordDict]) -> dict[str, Message]:
        kind, ttl = f"{MessageType.QUERY}.{name}", self._settings.stage_timeout_s + 60.0
        return {site: self._message(site, kind, content, ttl) for site, content in contents.items()}

    def _message(self, site: str, kind: str, content: RecordDict, ttl: float) -> Message:
        node = self._nodes().get(site)
        # A site without a node is a message to nobody; the grid would fail for all, so it is left out here.
        return Message(content, dst_node_id=node or 0, message_type=kind, ttl=ttl, group_id="masking")

    def _run(self, stage: _Stage, enough: Callable[[], bool] = lambda: False) -> None:
        """Send a stage's messages and take answers until all came, `enough` is true, or the time is over."""
        online = set(self._grid.get_node_ids())
        reachable = {s: m for s, m in stage.messages.items() if m.metadata.dst_node_id in online}
        for site in stage.messages.keys() - reachable.keys():
            self._drop(site, Rejection("site-offline", "the site is not connected"))
        sent = self._grid.push_messages(list(reachable.values()))
        for identity, site in zip(sent, reachable, strict=True):
            if identity:
                stage.pending[identity] = site
                self.sent[site] = self.sent.get(site, 0) + content_bytes(reachable[site])
            else:
                self._drop(site, Rejection("message-failed", "the message could not be sent"))
        end, answered = self._clock() + stage.timeout_s, 0
        pace = look_pace(self._settings.poll_s)
        while stage.pending and self._clock() < end and not enough():
            for few in _batched(list(stage.pending), PULLED_AT_ONCE):
                for message in self._grid.pull_messages(few):
                    pace.reset()
                    site = stage.pending.pop(message.metadata.reply_to_message_id, "")
                    self.received[site] = self.received.get(site, 0) + content_bytes(message)
                    if site and self._take(stage, site, message):
                        answered += 1
                        if answered == stage.grace_after:
                            end = min(end, self._clock() + stage.grace_s)
            if stage.pending and not enough():
                self._sleep(min(pace.pause(), max(0.0, end - self._clock())))
        if not enough():
            for site in stage.pending.values():
                self._drop(site, Rejection("deadline", f"no reply within {stage.timeout_s:g} s"))

    def _take(self, stage: _Stage, site: str, message: Message) -> bool:
        try:
            if message.has_error():
                why = of_error(message)
                raise MaskingRefusedError(why.reason, hint="", code=why.code)
            stage.take(site, message)
        except PixcellError as error:
            self._drop(site, Rejection(error.code, plain(error.message)))
            return False
        self._heard(site, None)
        return True

    def _drop(self, site: str, why: Rejection) -> None:
        self._excluded[site] = why
        self._heard(site, why)


def _read(kind: type[Reply], message: Message) -> Reply:
    """A site's answer; the query's answers carry no tensors and no metrics."""
    if message.content.array_records or message.content.metric_records:
        raise MaskingRefusedError("the answer carries more than its document", hint="", code="extra-record")
    return parse_document(kind, document_of(message), name="answer")


def _words(message: Message, size: int) -> Words:
    """The masked update of a reply: judged by its header before it is decoded, and never copied."""
    records = message.content.array_records
    if set(records) != {ARRAYS} or set(records[ARRAYS]) != {FLAT}:
        raise MaskingRefusedError("the reply does not carry one masked update", hint="", code="tensor-names")
    array = records[ARRAYS][FLAT]
    if array.dtype != "uint32" or tuple(array.shape) != (size,):
        raise MaskingRefusedError(
            f"the masked update is {plain(str(array.dtype))} {tuple(array.shape)}, not uint32 ({size},)",
            hint="",
            code="tensor-dtype" if array.dtype != "uint32" else "tensor-shape",
        )
    try:
        return decode_words(array.data, (size,))
    except (ValueError, TypeError, EOFError, OSError) as error:
        raise MaskingRefusedError(
            f"the masked update cannot be decoded: {type(error).__name__}", hint="", code="tensor-damaged"
        ) from error


def _batched(names: list[str], size: int) -> list[list[str]]:
    """The names in rows of at most `size`."""
    return [names[at : at + size] for at in range(0, len(names), size)]
