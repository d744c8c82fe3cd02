"""Text that shows all that it holds: no control, zero-width, direction or tag characters in what somebody signs.

A character that nobody sees can make a signed text look like another, or carry a message past a reader.
"""

from __future__ import annotations

import unicodedata
from typing import Annotated

from pydantic import AfterValidator, StringConstraints

_UNSEEN_CATEGORIES = frozenset({"Cc", "Cf", "Co", "Cs", "Zl", "Zp"})
"""Control, format, private, surrogate, line and paragraph separator (Unicode Standard, table 4-4)."""

_UNSEEN_BESIDES = frozenset(
    map(
        chr,
        (
            *(0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2065, 0x3164, 0xFFA0),
            *range(0x180B, 0x1810),
            *range(0xFE00, 0xFE10),
            *range(0xFFF0, 0xFFF9),
            *range(0xE0000, 0xE1000),
        ),
    )
)
"""Letters, marks and free places that are drawn as nothing (Default_Ignorable_Code_Point, DerivedCoreProperties)."""


def unseen(text: str) -> str:
    """The characters of a text that a reader does not see, in their order; tab and line feed are none of them."""
    if text.isascii() and text.isprintable():
        return ""
    return "".join(
        character
        for character in text
        if character not in "\t\n"
        and (unicodedata.category(character) in _UNSEEN_CATEGORIES or character in _UNSEEN_BESIDES)
    )


def without_unseen(text: str) -> str:
    """The text as a reader sees it."""
    hidden = frozenset(unseen(text))
    return "".join(character for character in text if character not in hidden) if hidden else text


def _all_seen(text: str) -> str:
    hidden = unseen(text)
    if hidden:
        raise ValueError(f"it holds a character that nobody sees: U+{ord(hidden[0]):04X}")
    return text


Line = Annotated[
    str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\t\n]*$"), AfterValidator(_all_seen)
]
"""One line."""
Prose = Annotated[str, StringConstraints(min_length=1, max_length=4000), AfterValidator(_all_seen)]
"""A text of several lines."""
TileLabel = Annotated[
    str, StringConstraints(min_length=1, max_length=80, pattern=r"^[^\t\n/\\]+$"), AfterValidator(_all_seen)
]
"""A tile's label: one line, and no path."""
