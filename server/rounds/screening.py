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
from pixcell_core.contracts.spool import Arrays, l2_norm, unflatten
from pixcell_core.errors import PixcellError
from pixcell_core.flower.messages import decode_array, document_of

MAX_REASON = 300


@dataclass(frozen=True)
class Rejection:
    """Why a reply does not count: a code for programs, a reason for people."""

    code: str
    reason: str


@dataclass(frozen=True)
class Accepted:
    """A reply that counts: its update, and the head of the site's privacy ledger after it."""

    update: Arrays
    ledger_head: KnownHead | None


@dataclass(frozen=True)
class Expected:
    """What a reply of this round must look like. `shapes` maps tensor names to their shapes."""

    study_digest: str
    round: int
    input_digest: str
    shapes: Mapping[str, tuple[int, ...]]
    max_norm: float


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


def _screen_arrays(message: Message, expected: Expected) -> Arrays | Rejection:
    records = message.content.array_records
    if set(records) != {ARRAYS}:
        return Rejection("bad-form", f"the reply carries {len(records)} tensor records instead of one")
    record = records[ARRAYS]
    if set(record) != {FLAT}:
        return Rejection("tensor-names", f"the reply carries {len(record)} tensors, or one of another name")
    shape = (sum(math.prod(s) for s in expected.shapes.values()),)
    # Looked at before it is decoded: a wrong header must not cost memory, nor a wrong shape broadcast.
    if record[FLAT].dtype != "float32":
        return Rejection("tensor-dtype", f"the update is {plain(str(record[FLAT].dtype))}, not float32")
    if tuple(record[FLAT].shape) != shape:
        return Rejection("tensor-shape", f"the update has shape {tuple(record[FLAT].shape)}, not {shape}")
    try:
        flat = decode_array(record[FLAT].data, shape)
    except (ValueError, TypeError, EOFError, OSError) as error:
        return Rejection("tensor-damaged", f"the update cannot be decoded: {type(error).__name__}")
    if not bool(np.isfinite(flat).all()):
        return Rejection("not-finite", "the update holds values that are not finite")
    update = unflatten(flat, expected.shapes)
    # Norms of updates are private once masked; here the message says only that the public bound was passed.
    if l2_norm(update) > expected.max_norm:
        return Rejection(
            "norm-bound", f"the update is longer than the public bound of {expected.max_norm:.4g}"
        )
    return update


def of_error(message: Message) -> Rejection:
    """Why a message that carries an error instead of a reply does not count."""
    error = message.error
    if error.code == ErrorCode.NODE_UNAVAILABLE:
        return Rejection("site-offline", "the hub lost contact with the site")
    if error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION:
        return Rejection("site-failed", "the site's agent failed; its own log says why")
    return Rejection("message-failed", f"the exchange failed (Flower error {int(error.code)})")
