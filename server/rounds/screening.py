"""Screens every reply before it may count. A bad reply costs its own site the round, and nobody else.

Checked in this order: error, form, study, round, input, refusal, ledger head, names, dtypes, shapes, finiteness, norm
bound. The bound comes from public settings of the study.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from flwr.app import Message
from flwr.common.constant import ErrorCode

from pixcell_core.contracts.canonical import parse_document
from pixcell_core.contracts.round import ARRAYS, FLAT, KnownHead, TrainReply
from pixcell_core.errors import PixcellError
from pixcell_core.flower.messages import decode_array, document_of
from server.rounds.aggregation import BLOCK, Flat

MAX_REASON = 300
_TINY = 1e-12
"""Below this bound the squares of values that matter leave the range of float32."""

MAX_RANK = 256
"""The largest rank a study may have."""


@dataclass(frozen=True)
class Rejection:
    """Why a reply does not count: a code for programs, a reason for people."""

    code: str
    reason: str


@dataclass(frozen=True)
class Accepted:
    """A reply that counts: its update, end to end in the order of the names, and the head of the site's ledger after it."""

    update: Flat
    ledger_head: KnownHead | None


@dataclass(frozen=True)
class Expected:
    """What a reply of this round must look like. `shapes` maps tensor names to their shapes, `rank` is the study's."""

    study_digest: str
    round: int
    input_digest: str
    shapes: Mapping[str, tuple[int, ...]]
    max_norm: float
    rank: int | None = None

    @property
    def size(self) -> int:
        """d: coordinates of all tensors."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def plain(text: str) -> str:
    """One line of printable text of bounded length: what a peer wrote, fit for a terminal and a log."""
    return "".join(c if c.isprintable() else " " for c in text)[:MAX_REASON]


def screen(message: Message, expected: Expected, known: KnownHead | None = None) -> Accepted | Rejection:
    """The update a reply carries, or why it does not count.

    `known` is the last head of this site's ledger that was heard of. A ledger only grows: a head before it, or another
    one at the same place, means that the ledger was put back or written anew.
    """
    reply = screen_document(message, expected, known)
    if isinstance(reply, Rejection):
        return reply
    update = _screen_arrays(message, expected)
    return update if isinstance(update, Rejection) else Accepted(update, reply.ledger_head)


def screen_document(
    message: Message, expected: Expected, known: KnownHead | None = None
) -> TrainReply | Rejection:
    """The document of a reply whose sender trained this round, or why it does not count; tensors are not looked at."""
    if message.has_error():
        return of_error(message)
    if message.content.metric_records:
        return Rejection("extra-record", "the reply carries metrics; a site sends its update alone")
    try:
        reply = parse_document(TrainReply, document_of(message), name="reply")
    except PixcellError as error:
        return Rejection("bad-form", f"the reply's document cannot be read: {plain(error.message)}")
    if reply.study_digest != expected.study_digest:
        return Rejection("other-study", "the reply is for another study")
    if reply.round != expected.round:
        return Rejection("stale", f"the reply is for round {reply.round}, not {expected.round}")
    if reply.input_digest != expected.input_digest:
        return Rejection("other-input", "the reply starts from another adapter than the one sent")
    if reply.status == "refused":
        return Rejection(reply.code, plain(reply.reason) or "the site refused without a reason")
    head = reply.ledger_head
    if known is not None and (
        head is None or head.sequence < known.sequence or (head.sequence == known.sequence and head != known)
    ):
        return Rejection("ledger-rewound", "the site's privacy ledger is behind the one it showed before")
    return reply


def _screen_arrays(message: Message, expected: Expected) -> Flat | Rejection:
    records = message.content.array_records
    if set(records) != {ARRAYS}:
        return Rejection("bad-form", f"the reply carries {len(records)} tensor records instead of one")
    record = records[ARRAYS]
    if set(record) != {FLAT}:
        return Rejection("tensor-names", f"the reply carries {len(record)} tensors, or one of another name")
    shape = (expected.size,)
    # Looked at before it is decoded: a wrong header must not cost memory, nor a wrong shape broadcast.
    if record[FLAT].dtype != "float32":
        return Rejection("tensor-dtype", f"the update is {plain(str(record[FLAT].dtype))}, not float32")
    if tuple(record[FLAT].shape) != shape:
        return _of_shape(tuple(record[FLAT].shape), expected)
    try:
        flat = decode_array(record[FLAT].data, shape)
    except (ValueError, TypeError, EOFError, OSError) as error:
        return Rejection("tensor-damaged", f"the update cannot be decoded: {type(error).__name__}")
    if not surely_shorter(flat, expected.max_norm):
        length = flat_norm(flat)
        if not math.isfinite(length):
            return Rejection("not-finite", "the update holds values that are not finite")
        # Norms of updates are private once masked; here the message says only that the public bound was passed.
        if length > expected.max_norm:
            return Rejection(
                "norm-bound", f"the update is longer than the public bound of {expected.max_norm:.4g}"
            )
    return flat


def surely_shorter(flat: Flat, bound: float) -> bool:
    """Whether a quick look in float32 leaves no doubt that the norm is below `bound` and every value finite.

    A sum of squares that is finite holds no value that is not. Its relative error over a block is below 2^-9, so one
    percent is room enough; where squares could vanish below the smallest float32 there is always doubt.
    """
    if bound < _TINY:
        return False
    with np.errstate(over="ignore", invalid="ignore"):
        total = sum(
            float(np.dot(part, part))
            for part in (flat[start : start + BLOCK] for start in range(0, flat.size, BLOCK))
        )
    return math.isfinite(total) and total < 0.99 * bound**2


def flat_norm(flat: Flat) -> float:
    """Euclidean norm in float64; not finite exactly where a value is not: squares of float32 fit into float64."""
    total = 0.0
    wide = np.empty(min(BLOCK, flat.size), dtype=np.float64)
    for start in range(0, flat.size, BLOCK):
        part = flat[start : start + BLOCK]
        block = wide[: part.size]
        np.copyto(block, part)
        total += float(np.dot(block, block))
    return math.sqrt(total) if total >= 0.0 else math.nan


def _of_shape(found: tuple[int, ...], expected: Expected) -> Rejection:
    """Every tensor of an adapter is proportional to its rank: a size that is another multiple tells which one it has."""
    if expected.rank is not None and len(found) == 1 and expected.size % expected.rank == 0:
        other, rest = divmod(found[0], expected.size // expected.rank)
        if not rest and 1 <= other <= MAX_RANK and other != expected.rank:
            return Rejection(
                "tensor-rank",
                f"the update is that of an adapter of rank {other}; the study's has rank {expected.rank}",
            )
    return Rejection(
        "tensor-shape",
        f"the update has shape {found[:4]}, not {(expected.size,)}: another base model or other targets",
    )


def of_error(message: Message) -> Rejection:
    """Why a message that carries an error instead of a reply does not count."""
    error = message.error
    if error.code == ErrorCode.NODE_UNAVAILABLE:
        return Rejection("site-offline", "the hub lost contact with the site")
    if error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION:
        return Rejection("site-failed", "the site's agent failed; its own log says why")
    return Rejection("message-failed", f"the exchange failed (Flower error {int(error.code)})")
