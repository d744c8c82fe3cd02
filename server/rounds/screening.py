"""Screens every reply before it may count. A bad reply costs its own site the round, and nobody else.

Checked in this order: error, form, study, round, input, refusal, names, dtypes, shapes, finiteness, norm bound. The
bound comes from public settings of the study.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from flwr.app import Message
from flwr.common.constant import ErrorCode

from pixcell_core.contracts.canonical import parse_document
from pixcell_core.contracts.round import ARRAYS, TrainReply
from pixcell_core.contracts.spool import Arrays, l2_norm
from pixcell_core.errors import PixcellError
from pixcell_core.flower.messages import document_of

MAX_REASON = 300


@dataclass(frozen=True)
class Rejection:
    """Why a reply does not count: a code for programs, a reason for people."""

    code: str
    reason: str


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


def screen(message: Message, expected: Expected) -> Arrays | Rejection:
    """The update a reply carries, or why it does not count."""
    if message.has_error():
        return _of_error(message)
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
    return _screen_arrays(message, expected)


def _screen_arrays(message: Message, expected: Expected) -> Arrays | Rejection:
    records = message.content.array_records
    if set(records) != {ARRAYS}:
        return Rejection("bad-form", f"the reply carries {len(records)} tensor records instead of one")
    record = records[ARRAYS]
    if set(record) != set(expected.shapes):
        extra, missing = len(set(record) - set(expected.shapes)), len(set(expected.shapes) - set(record))
        return Rejection("tensor-names", f"{extra} tensors too many, {missing} missing")
    update: Arrays = {}
    for name in sorted(expected.shapes):
        shape = expected.shapes[name]
        # Looked at before it is decoded: a wrong header must not cost memory, nor a wrong shape broadcast.
        if record[name].dtype != "float32":
            return Rejection("tensor-dtype", f"{name} is {plain(str(record[name].dtype))}, not float32")
        if tuple(record[name].shape) != shape:
            return Rejection("tensor-shape", f"{name} has shape {tuple(record[name].shape)}, not {shape}")
        try:
            value = _decode(record[name].data, shape)
        except (ValueError, TypeError, EOFError, OSError) as error:
            return Rejection("tensor-damaged", f"{name} cannot be decoded: {type(error).__name__}")
        if not bool(np.isfinite(value).all()):
            return Rejection("not-finite", f"{name} holds values that are not finite")
        update[name] = value
    # Norms of updates are private once masked; here the message says only that the public bound was passed.
    if l2_norm(update) > expected.max_norm:
        return Rejection(
            "norm-bound", f"the update is longer than the public bound of {expected.max_norm:.4g}"
        )
    return update


def _decode(data: bytes, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Decode an .npy buffer whose own header must agree; numpy would allocate what a lying header asks for."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError("unexpected version of the array format")
    claimed, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    wanted = 4 * math.prod(shape)
    if claimed != shape or dtype != np.dtype("<f4") or len(data) - stream.tell() != wanted:
        raise ValueError("the array is not what its header says")
    flat = np.frombuffer(data, dtype="<f4", offset=stream.tell())
    return flat.reshape(shape, order="F" if fortran else "C").astype(np.float32)


def _of_error(message: Message) -> Rejection:
    error = message.error
    if error.code == ErrorCode.NODE_UNAVAILABLE:
        return Rejection("site-offline", "the hub lost contact with the site")
    if error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION:
        return Rejection("site-failed", "the site's agent failed; its own log says why")
    return Rejection("message-failed", f"the exchange failed (Flower error {int(error.code)})")
