"""The folder between agent and trainer: what a job and its result say, and the limits on what is read.

The agent has the network and no slides; the trainer has slides and no network. Both treat what lies in the spool as
hostile until read through this module: bounded sizes, plain files, checked digests, float32 tensors by name.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, StringConstraints

from pixcell_core.contracts.canonical import Digest, Document, Moment, digest, read_bounded
from pixcell_core.contracts.round import KnownHead, Reason, RefusalCode
from pixcell_core.errors import BadInputError

MAX_ARRAY_BYTES = 512 * 1024 * 1024
"""Largest tensor file accepted in the spool or from a round."""

MAX_TENSORS = 20_000

JobId = Annotated[str, StringConstraints(pattern=r"^r[0-9]{5}-[0-9a-f]{24}$")]
"""`r<round>-<24 hex digits>`; never a path."""

Arrays = dict[str, npt.NDArray[np.float32]]

_TENSOR_NAME = re.compile(r"^[A-Za-z0-9_.\-]{1,300}$")


class SpoolError(BadInputError):
    """Something in the spool is not a job or a result as this version writes them."""

    default_code = "bad-spool"


class TrainJob(Document):
    """Agent to trainer: one round of one approved study. `known_heads`: what hub and agent last saw of the ledger."""

    schema_version: Literal["train-job/v1"] = "train-job/v1"
    job_id: JobId
    study: dict[str, object]
    study_digest: Digest
    round: Annotated[int, Field(ge=1)]
    created_at: Moment
    expires_at: Moment
    input_digest: Digest
    known_heads: Annotated[tuple[KnownHead, ...], Field(max_length=4)] = ()


class TrainResult(Document):
    """Trainer to agent: an update of the adapter, or a refusal. Public constants only: it goes to the hub."""

    schema_version: Literal["train-result/v1"] = "train-result/v1"
    job_id: JobId
    study_digest: Digest
    round: Annotated[int, Field(ge=1)]
    input_digest: Digest
    status: Literal["ok", "refused"]
    code: RefusalCode = "ok"
    reason: Reason = ""
    update_digest: Digest | None = None
    ledger_head: KnownHead | None = None


class TrainerBeat(Document):
    """The trainer's sign of life, rewritten every second or so."""

    schema_version: Literal["trainer-beat/v1"] = "trainer-beat/v1"
    process: int
    instance: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
    beat_at: Moment
    base_digest: Digest
    code_digest: Digest
    ready: bool
    code: RefusalCode = "ok"
    reason: Reason = ""


def arrays_to_bytes(arrays: Arrays) -> bytes:
    """Safetensors bytes of float32 tensors, in the order of their names: those that the library writes.

    The library copies every tensor three times; a round serialises and digests its adapter more than once.
    """
    return b"".join(_parts(arrays))


def _parts(arrays: Arrays) -> list[bytes | memoryview]:
    """The header and the tensors of a safetensors file (format 0.3), the tensors as they lie in memory."""
    header: dict[str, object] = {}
    tensors: list[bytes | memoryview] = []
    at = 0
    for name in sorted(arrays):
        value = np.ascontiguousarray(arrays[name], dtype="<f4")
        # `ascontiguousarray` makes a vector of a number.
        header[name] = {
            "dtype": "F32",
            "shape": list(arrays[name].shape),
            "data_offsets": [at, at + value.nbytes],
        }
        if value.nbytes:
            tensors.append(value.reshape(-1).view(np.uint8).data)
        at += value.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *tensors]


def arrays_from_bytes(data: bytes, *, name: str = "tensors") -> Arrays:
    """Strictly read float32 tensors: bounded count, plain names, finite values.

    Raises `SpoolError`.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        loaded = load(data)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise SpoolError(
            f"{name} is not a safetensors file: {type(error).__name__}.",
            hint="It was damaged on its way. The round is asked for again.",
        ) from error
    if not loaded or len(loaded) > MAX_TENSORS:
        raise SpoolError(
            f"{name} holds {len(loaded)} tensors.", hint=f"Between 1 and {MAX_TENSORS} are expected."
        )
    for key, value in loaded.items():
        if not _TENSOR_NAME.match(key):
            raise SpoolError(f"{name} holds a tensor whose name is not plain.", hint="Update both ends.")
        if value.dtype != np.float32:
            raise SpoolError(f"{name}: {key} is {value.dtype}, not float32.", hint="Send float32.")
        if not bool(np.isfinite(value).all()):
            raise SpoolError(f"{name}: {key} holds values that are not finite.", hint="The sender diverged.")
    return loaded


def read_arrays(path: Path, expected: str | None = None, max_bytes: int = MAX_ARRAY_BYTES) -> Arrays:
    """Read a tensor file of at most `max_bytes` whose digest is `expected` (if given); never follows a link."""
    if path.is_symlink():
        raise SpoolError(f"{path.name} is a link.", hint="The spool holds plain files only.")
    data = read_bounded(path, max_bytes)
    if expected is not None and digest(data) != expected:
        raise SpoolError(
            f"{path.name} is not the file its document names.", hint="It was changed or damaged."
        )
    return arrays_from_bytes(data, name=path.name)


def arrays_digest(arrays: Arrays) -> str:
    """`sha256:<hex>` of the tensors' safetensors bytes, which are not put together for it."""
    state = hashlib.sha256()
    for part in _parts(arrays):
        state.update(part)
    return f"sha256:{state.hexdigest()}"


def flatten(arrays: Arrays) -> npt.NDArray[np.float32]:
    """All tensors end to end, in the order of their names."""
    return np.concatenate([arrays[name].reshape(-1) for name in sorted(arrays)])


def unflatten(flat: npt.NDArray[np.float32], shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
    """The tensors that `flatten` put end to end. Raises `SpoolError` where the length is another."""
    if flat.shape != (sum(math.prod(shape) for shape in shapes.values()),):
        raise SpoolError("The flat tensor has another length than its layout.", hint="Update both ends.")
    arrays: Arrays = {}
    at = 0
    for name in sorted(shapes):
        size = math.prod(shapes[name])
        arrays[name] = flat[at : at + size].reshape(shapes[name])
        at += size
    return arrays


def l2_norm(arrays: Arrays) -> float:
    """Euclidean norm over all tensors, accumulated in float64."""
    return math.sqrt(sum(float(np.sum(np.square(a, dtype=np.float64))) for a in arrays.values()))
