"""Canonical bytes against published vectors, and strict reading of hostile documents."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pixcell_core.contracts.canonical import (
    Document,
    DocumentError,
    canonical_bytes,
    digest,
    file_digest,
    load_document,
    parse_document,
    parse_json,
)


class Note(Document):
    schema_version: Literal["test-note/v1"] = "test-note/v1"
    title: str
    weight: float = 1.0


JSON_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def test_vector_of_the_rfc() -> None:
    # RFC 8785, section 3.2.2 and 3.2.4.
    value = json.loads(
        r"""{"numbers": [333333333.33333329, 1E30, 4.50, 2e-3, 0.000000000000000000000000001],
             "string": "\u20ac$\u000F\u000aA'\u0042\u0022\u005c\\\"\/",
             "literals": [null, true, false]}"""
    )
    assert canonical_bytes(value) == (
        b'{"literals":[null,true,false],"numbers":[333333333.3333333,1e+30,4.5,0.002,1e-27],'
        b'"string":"\xe2\x82\xac$\\u000f\\nA\'B\\"\\\\\\\\\\"/"}'
    )


def test_keys_are_sorted_by_utf16() -> None:
    # RFC 8785, section 3.2.3: the emoji (a surrogate pair) sorts before U+FB33.
    value = {"\ufb33": 1, "\U0001f600": 2, "\u20ac": 3, "\r": 4, "1": 5}
    assert list(json.loads(canonical_bytes(value))) == ["\r", "1", "\u20ac", "\U0001f600", "\ufb33"]


@given(JSON_VALUES)
@settings(max_examples=150, deadline=None)
def test_canonical_form_is_a_fixed_point_and_keeps_the_value(value: Any) -> None:
    once = canonical_bytes(value)
    again = parse_json(once)
    assert canonical_bytes(again) == once
    assert again == json.loads(json.dumps(value))


@given(
    st.dictionaries(st.text(max_size=6), st.integers(-9, 9), max_size=8), st.randoms(use_true_random=False)
)
@settings(max_examples=60, deadline=None)
def test_the_order_of_keys_does_not_change_a_digest(value: dict[str, int], random: Any) -> None:
    items = list(value.items())
    random.shuffle(items)
    assert digest(dict(items)) == digest(value)


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, 2**53, -(2**53), "\ud800", {1: "x"}, object()]
)
def test_values_without_a_canonical_form(value: Any) -> None:
    with pytest.raises(DocumentError):
        canonical_bytes(value if isinstance(value, dict) else {"x": value})


def test_digests_of_bytes_models_and_files_agree(tmp_path: Path) -> None:
    note = Note(title="a", weight=2.0)
    wanted = (
        "sha256:" + hashlib.sha256(b'{"schema_version":"test-note/v1","title":"a","weight":2}').hexdigest()
    )
    path = tmp_path / "note.json"
    path.write_bytes(note.to_bytes())
    assert note.digest == digest(note) == digest(note.to_bytes()) == file_digest(path) == wanted
    assert load_document(Note, path) == note
    assert file_digest(Path(__file__)) == digest(Path(__file__).read_bytes())


def test_documents_are_frozen_and_closed() -> None:
    note = Note(title="a")
    with pytest.raises(ValidationError):
        note.title = "b"  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Note(title="a", colour="red")  # type: ignore[call-arg]
    with pytest.raises(ValidationError):
        Note(title="a", weight=math.inf)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"nothing",
        b"\xff\xfe{}",
        b"\xef\xbb\xbf{}",
        b'{"title":"a","title":"b"}',
        b'{"title":NaN}',
        b'{"title":Infinity}',
        b'{"title":"a","weight":1e999}',
        b'{"title":"a","weight":' + b"9" * 5000 + b"}",
        b'{"title":"\\ud800',
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b'{"title":"a"} trailing',
        b'{"title":"a","unknown":1}',
        b'{"title":1}',
        b'{"schema_version":"test-note/v2","title":"a"}',
        b"[]",
        b"null",
    ],
)
def test_hostile_documents(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(DocumentError) as refused:
        parse_document(Note, data, name="note.json")
    assert "note.json" in refused.value.message
    assert len(refused.value.message) < 400
    path = tmp_path / "note.json"
    path.write_bytes(data)
    with pytest.raises(DocumentError):
        load_document(Note, path)


def test_reading_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "big.json"
    path.write_bytes(b'"' + b"x" * 5000 + b'"')
    with pytest.raises(DocumentError) as refused:
        load_document(Note, path, max_bytes=1000)
    assert refused.value.code == "document-too-large"
    with pytest.raises(DocumentError):
        parse_json(b" " * 50, max_bytes=10)
    for wrong in (tmp_path, tmp_path / "absent", Path("/dev/zero")):
        with pytest.raises(DocumentError):
            load_document(Note, wrong)
