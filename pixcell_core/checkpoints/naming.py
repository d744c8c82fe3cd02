"""How errors about many tensors name a few of them."""

from __future__ import annotations

from collections.abc import Iterable


def a_few(names: Iterable[str]) -> str:
    """The first three names in order, and how many more there are."""
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
