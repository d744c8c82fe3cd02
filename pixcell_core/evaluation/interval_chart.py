"""A chart of values with their intervals, as one SVG that stands alone: no script, no font, no file beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from pixcell_core.errors import BadInputError

WIDTH, ROW, TOP, LEFT, RIGHT, BOTTOM = 720, 30, 44, 300, 70, 34


@dataclass(frozen=True)
class ChartRow:
    """One line of the chart: a dot at `value`, a bar from `low` to `high` where an interval is known."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None


def interval_chart(
    rows: Sequence[ChartRow],
    title: str,
    *,
    axis: tuple[float, float] | None = None,
    mark: float | None = None,
) -> str:
    """SVG text of dots and interval bars on one shared axis.

    Args:
        axis: its ends; None takes what the rows need.
        mark: where a dashed line stands (0 for differences).

    Raises:
        BadInputError: no row.
    """
    if not rows:
        raise BadInputError(
            "A chart needs one row; none was given.", hint="Measure something first.", code="empty-chart"
        )
    ends = [v for r in rows for v in (r.value, r.low, r.high) if v is not None] + (
        [] if mark is None else [mark]
    )
    low, high = axis or (min(ends), max(ends))
    margin = 0.0 if axis else (high - low) * 0.06 or 0.5
    low, high = low - margin, high + margin
    height = TOP + ROW * len(rows) + BOTTOM

    def x(value: float) -> float:
        share = (min(max(value, low), high) - low) / (high - low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    base = TOP + ROW * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'role="img" font-family="sans-serif" font-size="13"><title>{escape(title)}</title>',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="12" y="24" font-size="15" font-weight="600" fill="#1b1f24">{escape(title)}</text>',
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}" stroke="#8b949e"/>',
    ]
    for index in range(5):
        value = low + (high - low) * index / 4
        parts.append(
            f'<line x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{base}" y2="{base + 4}" stroke="#8b949e"/>'
            f'<text x="{x(value):.1f}" y="{base + 19}" text-anchor="middle" fill="#57606a">{value:.3g}</text>'
        )
    if mark is not None:
        parts.append(
            f'<line x1="{x(mark):.1f}" x2="{x(mark):.1f}" y1="{TOP - 6}" y2="{base}" stroke="#57606a" '
            'stroke-dasharray="4 3"/>'
        )
    for index, row in enumerate(rows):
        y = TOP + ROW * index + ROW / 2
        parts.append(
            f'<text x="{LEFT - 12}" y="{y + 4:.1f}" text-anchor="end" fill="#1b1f24">{escape(row.label)}</text>'
        )
        if row.low is not None and row.high is not None:
            parts.append(
                f'<line class="interval" x1="{x(row.low):.1f}" x2="{x(row.high):.1f}" y1="{y}" y2="{y}" '
                'stroke="#0969da" stroke-width="5" stroke-opacity="0.35" stroke-linecap="round"/>'
            )
        parts.append(f'<circle class="value" cx="{x(row.value):.1f}" cy="{y}" r="4.5" fill="#0969da"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 12}" y="{y + 4:.1f}" fill="#1b1f24">{row.value:.3g}</text>')
    return "\n".join([*parts, "</svg>", ""])
