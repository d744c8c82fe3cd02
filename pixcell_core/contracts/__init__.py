"""The documents that parties exchange: versioned, frozen, with one canonical byte form each.

Every document is a pydantic model with unknown fields forbidden. Its identity is the SHA-256 of its
canonical JSON (RFC 8785), written ``sha256:<hex>``: the same document, the same digest, everywhere.
"""

from pixcell_core.contracts.canonical import (
    Digest,
    Document,
    canonical_bytes,
    digest,
    file_digest,
    load_document,
    parse_document,
    parse_json,
    read_bounded,
)

__all__ = [
    "Digest",
    "Document",
    "canonical_bytes",
    "digest",
    "file_digest",
    "load_document",
    "parse_document",
    "parse_json",
    "read_bounded",
]
