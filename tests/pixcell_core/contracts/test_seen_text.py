"""What somebody signs shows all that it holds."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from pixcell_core.contracts.seen_text import Line, Prose, TileLabel, unseen, without_unseen

KINDS = [TypeAdapter(Line), TypeAdapter(Prose), TypeAdapter(TileLabel)]
UNSEEN = {
    "a control": "\x07",
    "carriage return": "\r",
    "delete": "\x7f",
    "soft hyphen": "\u00ad",
    "Arabic letter mark": "\u061c",
    "Mongolian vowel separator": "\u180e",
    "zero-width space": "\u200b",
    "right-to-left override": "\u202e",
    "line separator": "\u2028",
    "word joiner": "\u2060",
    "byte order mark": "\ufeff",
    "variation selector": "\ufe0f",
    "Hangul filler": "\u3164",
    "private use": "\ue000",
    "a language tag": "\U000e0001",
    "a tag letter": "\U000e0041",
    "a variation selector of plane 14": "\U000e0100",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", UNSEEN)
def test_what_nobody_sees_is_signed_by_nobody(kind: TypeAdapter[str], name: str) -> None:
    for text in (f"tumour{UNSEEN[name]}", f"{UNSEEN[name]}tumour", f"tu{UNSEEN[name]}mour"):
        with pytest.raises(ValidationError):
            kind.validate_python(text)
        assert without_unseen(text) == "tumour"


def test_a_message_in_tags_behind_a_label() -> None:
    hidden = "".join(chr(0xE0000 + ord(letter)) for letter in "patient 7")
    with pytest.raises(ValidationError, match=r"U\+E0070"):
        KINDS[2].validate_python("tumour" + hidden)


@pytest.mark.parametrize(
    "text", ["Tumour, grade 2", "Grüße aus Zürich", "腫瘍", "ورم", "ε ≤ 8.0 – δ 10⁻⁵", "nævus"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_words_of_all_scripts_stay(kind: TypeAdapter[str], text: str) -> None:
    assert kind.validate_python(text) == text and without_unseen(text) == text


def test_lines_and_paths() -> None:
    assert KINDS[1].validate_python("two\n\tlines") == "two\n\tlines"
    for text in ("two\nlines", "a\ttab"):
        for kind in (KINDS[0], KINDS[2]):
            with pytest.raises(ValidationError):
                kind.validate_python(text)
    for text in ("a/b", "a\\b"):
        with pytest.raises(ValidationError):
            KINDS[2].validate_python(text)


@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_what_is_left_is_drawn(text: str) -> None:
    left = without_unseen(text)
    assert not unseen(left) and without_unseen(left) == left
    assert all(unicodedata.category(c) not in ("Cc", "Cf", "Co", "Zl", "Zp") for c in left if c not in "\t\n")
