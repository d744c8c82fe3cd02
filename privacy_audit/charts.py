"""Inline SVG for the report: a null distribution with its threshold, and the sensitivity of each planted kind."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape

from privacy_audit.result import Detection, Histogram

WIDTH, HEIGHT = 480, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 12, 12, 26, 40
_ROW = 30


def histogram_svg(data: Histogram, description: str) -> Markup:
    """Bars of the null, an outline of the observed scores, the threshold, and a tick per flagged score."""
    low, high = data.edges[0], data.edges[-1]
    tallest = max(
        [
            *data.null,
            *(data.observed if len(data.marks) != 1 or max(data.observed) < 1 else ()),
            *(share for second in data.seconds for share in second.shares),
            1e-9,
        ]
    )
    base = HEIGHT - _BOTTOM

    def x(value: float) -> float:
        return _LEFT + (value - low) / (high - low) * (WIDTH - _LEFT - _RIGHT)

    def y(share: float) -> float:
        return base - min(share / tallest, 1.0) * (base - _TOP)

    parts = [_open(HEIGHT, description)]
    for index, share in enumerate(data.null):
        if share > 0:
            left, right = x(data.edges[index]), x(data.edges[index + 1])
            parts.append(
                f'<rect class="null" x="{left:.1f}" y="{y(share):.1f}" width="{max(right - left - 0.6, 0.4):.1f}" '
                f'height="{base - y(share):.1f}"/>'
            )
    single = max(data.observed) >= 1.0  # one observed number: a line says more than a bar

    def outline(shares: Sequence[float], name: str) -> str:
        points = [f"{x(data.edges[0]):.1f},{base}"]
        for index, share in enumerate(shares):
            points += [
                f"{x(data.edges[index]):.1f},{y(share):.1f}",
                f"{x(data.edges[index + 1]):.1f},{y(share):.1f}",
            ]
        points.append(f"{x(data.edges[-1]):.1f},{base}")
        return f'<polyline class="{name}" points="{" ".join(points)}"/>'

    for second in data.seconds:
        parts.append(outline(second.shares, "second"))
        if second.threshold is not None:
            at = x(second.threshold)
            parts.append(
                f'<line class="second-threshold" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{base}"/>'
            )
    if not single:
        parts.append(outline(data.observed, "observed"))
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>')
    for mark in data.marks:
        top = _TOP if single else base - 12
        parts.append(f'<line class="mark" x1="{x(mark):.1f}" x2="{x(mark):.1f}" y1="{base + 5}" y2="{top}"/>')
    if data.threshold is not None:
        at = x(data.threshold)
        anchor = "end" if at > WIDTH / 2 else "start"
        offset = -5 if anchor == "end" else 5
        parts.append(f'<line class="threshold" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP - 6}" y2="{base}"/>')
        parts.append(
            f'<text class="threshold-text" x="{at + offset:.1f}" y="{_TOP - 8}" text-anchor="{anchor}">'
            f"threshold {data.threshold:.3g}</text>"
        )
    parts.append(f'<text x="{_LEFT}" y="{base + 16}">{low:.3g}</text>')
    parts.append(f'<text x="{WIDTH - _RIGHT}" y="{base + 16}" text-anchor="end">{high:.3g}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(data.axis)}</text>')
    parts.append("</svg>")
    return Markup("".join(parts))


def detections_svg(detections: Sequence[Detection], description: str) -> Markup:
    """One row per planted kind: share found, its lower bound as a bar, the gate as a tick."""
    height = _ROW * len(detections) + 26
    start, end = _LEFT, WIDTH - 62

    def x(share: float) -> float:
        return start + share * (end - start)

    parts = [_open(height, description)]
    for row, item in enumerate(detections):
        top = row * _ROW + 2
        name = "met" if item.met else "short"
        parts.append(f'<text x="{start}" y="{top + 11}">{escape(item.words)}</text>')
        parts.append(f'<rect class="track" x="{start}" y="{top + 15}" width="{end - start}" height="7"/>')
        parts.append(
            f'<rect class="{name}" x="{start}" y="{top + 15}" width="{x(item.lower) - start:.1f}" height="7"/>'
        )
        if item.gate is not None:
            gate = x(item.gate)
            parts.append(
                f'<line class="threshold" x1="{gate:.1f}" x2="{gate:.1f}" y1="{top + 12}" y2="{top + 25}"/>'
            )
        parts.append(
            f'<text x="{WIDTH - _RIGHT}" y="{top + 22}" text-anchor="end">{item.found}/{item.planted}</text>'
        )
    parts.append(
        f'<text x="{start}" y="{height - 4}">bar: lower bound (95 %)   line: gate of the policy</text>'
    )
    parts.append("</svg>")
    return Markup("".join(parts))


def _open(height: int, description: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(description)}" xmlns="http://www.w3.org/2000/svg">'
    )
