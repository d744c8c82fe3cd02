"""Counts of patients and tiles as others may see them: by public bands, never exactly.

One patient more or less hardly ever changes a band, and nothing else of the count leaves. A band is no differential
privacy: at its edge one patient decides. It is stated as what it is.
"""

from __future__ import annotations

SMALLEST = 10
"""Below this a count is only called small."""


def band_floor(count: int) -> int:
    """Lower edge of a count's band: 10, 20, 50, 100, 200, 500, 1000 …; 0 below 10."""
    if count < SMALLEST:
        return 0
    power = 10 ** (len(str(count)) - 1)
    return max(step * power for step in (1, 2, 5) if step * power <= count)


def band(count: int, smallest: int = SMALLEST) -> str:
    """The words for a count: "50 to 99", or "fewer than 10". `smallest` raises the lowest edge that is told."""
    floor = band_floor(count)
    if floor == 0 or count < smallest:
        return f"fewer than {max(smallest, SMALLEST)}"
    leading = int(str(floor)[0])
    width = floor // leading
    return f"{max(floor, smallest)} to {floor + {1: 1, 2: 3, 5: 5}[leading] * width - 1}"
