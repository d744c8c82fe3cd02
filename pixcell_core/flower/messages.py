"""How our documents and tensors travel in a Flower message: one text record and at most one tensor record."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from pixcell_core.contracts.canonical import Document
from pixcell_core.contracts.round import ARRAYS, CONTROL, DOCUMENT, MAX_CONTROL_BYTES
from pixcell_core.contracts.spool import Arrays


def pack(document: Document, arrays: Arrays | None = None) -> RecordDict:
    """The content of a message."""
    content = RecordDict({CONTROL: ConfigRecord({DOCUMENT: document.to_bytes().decode("utf-8")})})
    if arrays:
        content[ARRAYS] = ArrayRecord({name: Array(value) for name, value in arrays.items()})
    return content


def document_of(message: Message) -> bytes:
    """The text document of a message; empty where the message is not as agreed."""
    records = message.content.config_records
    if set(records) != {CONTROL}:
        return b""
    value = records[CONTROL].get(DOCUMENT)
    return value.encode("utf-8") if isinstance(value, str) and len(value) <= MAX_CONTROL_BYTES else b""
