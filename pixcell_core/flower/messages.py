"""How our documents and tensors travel in a Flower message: one text record and at most one flat tensor.

Flower sends every tensor of a message as a request of its own, so an adapter of forty tensors would cost hundreds of
requests a round. End to end it is one.
"""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.constant import SType

from pixcell_core.contracts.canonical import Document
from pixcell_core.contracts.round import ARRAYS, CONTROL, DOCUMENT, FLAT, MAX_CONTROL_BYTES
from pixcell_core.contracts.spool import Arrays


def pack(document: Document, arrays: Arrays | None = None) -> RecordDict:
    """The content of a message."""
    # Not canonical: nothing signs or digests this text, and a layout of hundreds of tensors is read by every site.
    content = RecordDict({CONTROL: ConfigRecord({DOCUMENT: document.model_dump_json()})})
    if arrays:
        content[ARRAYS] = ArrayRecord({FLAT: encode_flat(arrays)})
    return content


def pack_words(document: Document, words: npt.NDArray[np.uint32]) -> RecordDict:
    """The content of a message with a masked update: one row of uint32 in the place of the flat tensor."""
    content = pack(document)
    content[ARRAYS] = ArrayRecord({FLAT: Array(words)})
    return content


def encode_flat(arrays: Arrays) -> Array:
    """All tensors end to end, in the order of their names, as Flower encodes one tensor; copied once instead of thrice."""
    parts = [np.ascontiguousarray(arrays[name], dtype="<f4").reshape(-1) for name in sorted(arrays)]
    size = sum(part.size for part in parts)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (size,)})
    data = b"".join([header.getvalue(), *(part.view(np.uint8).data for part in parts)])
    return Array(dtype="float32", shape=(size,), stype=SType.NUMPY, data=data)


def document_of(message: Message) -> bytes:
    """The text document of a message; empty where the message is not as agreed."""
    records = message.content.config_records
    if set(records) != {CONTROL}:
        return b""
    value = records[CONTROL].get(DOCUMENT)
    return value.encode("utf-8") if isinstance(value, str) and len(value) <= MAX_CONTROL_BYTES else b""


def decode_array(data: bytes, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Decode an .npy buffer whose own header must agree; numpy would allocate what a lying header asks for."""
    return _decode(data, shape, "<f4").astype(np.float32, copy=False)


def decode_words(data: bytes, shape: tuple[int, ...]) -> npt.NDArray[np.uint32]:
    """Decode a masked update as `decode_array` does an update; a view of `data`, read-only."""
    return _decode(data, shape, "<u4")


def _decode(data: bytes, shape: tuple[int, ...], kind: str) -> npt.NDArray[Any]:
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError("unexpected version of the array format")
    claimed, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    wanted = 4 * math.prod(shape)
    if claimed != shape or dtype != np.dtype(kind) or len(data) - stream.tell() != wanted:
        raise ValueError("the array is not what its header says")
    # A view of the message's own bytes, read-only.
    flat = np.frombuffer(data, dtype=kind, offset=stream.tell())
    return flat.reshape(shape, order="F" if fortran else "C")
