"""The documents that parties exchange: versioned, frozen, with one canonical byte form each.

Every document is a pydantic model with unknown fields forbidden. Its identity is the SHA-256 of its
canonical JSON (RFC 8785), written ``sha256:<hex>``; two parties that hold the same document hold the same digest.
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
]
