"""Inline SVG for the report: a null distribution with its threshold, a bar per planted kind, a pair with match lines."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape

from privacy_audit.result import Detection, Histogram

WIDTH, HEIGHT = 480, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 12, 12, 44, 24
_BAR = (120, 12)
_LINE_COLOURS = ("#00a37a", "#e06c00", "#2d6cdf", "#b3008f", "#8a8a00", "#00a0b8")
_INK, _GREY, _TRACK, _BLUE, _RED, _GREEN, _VIOLET, _BROWN = (
    # Said in each element: programs that print pages to PDF do not look into a style sheet for drawings.
    "#1b1f24",
    "#aeb6bf",
    "#d0d7de",
    "#0a5cad",
    "#b3261e",
    "#1a6e37",
    "#6b2fa0",
    "#8a5a00",
)
GAP = 4  # between the two tiles of a pair, in pixels

Place = tuple[float, float]


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
                f'<rect fill="{_GREY}" x="{left:.1f}" y="{y(share):.1f}" width="{max(right - left - 0.6, 0.4):.1f}" '
                f'height="{base - y(share):.1f}"/>'
            )
    single = max(data.observed) >= 1.0  # one observed number: a line says more than a bar

    def outline(shares: Sequence[float], stroke: str) -> str:
        points = [f"{x(data.edges[0]):.1f},{base}"]
        for index, share in enumerate(shares):
            points += [
                f"{x(data.edges[index]):.1f},{y(share):.1f}",
                f"{x(data.edges[index + 1]):.1f},{y(share):.1f}",
            ]
        points.append(f"{x(data.edges[-1]):.1f},{base}")
        return f'<polyline fill="none" {stroke} points="{" ".join(points)}"/>'

    for second in data.seconds:
        parts.append(outline(second.shares, f'stroke="{_BROWN}" stroke-width="1.4" stroke-dasharray="2 2"'))
        if second.threshold is not None:
            at = x(second.threshold)
            parts.append(
                f'<line stroke="{_BROWN}" stroke-width="1.3" stroke-dasharray="4 3" x1="{at:.1f}" x2="{at:.1f}" '
                f'y1="{_TOP}" y2="{base}"/>'
            )
    if not single:
        parts.append(outline(data.observed, f'stroke="{_BLUE}" stroke-width="1.8"'))
    parts.append(f'<line stroke="{_INK}" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>')
    for mark in data.marks:
        top = _TOP if single else base - 12
        parts.append(
            f'<line stroke="{_RED}" stroke-width="2" x1="{x(mark):.1f}" x2="{x(mark):.1f}" y1="{base + 5}" y2="{top}"/>'
        )
    if single and len(data.marks) == 1:
        name = f"{data.observed_name} {data.marks[0]:.3g}"
        parts.append(_label(_RED, x(data.marks[0]), _TOP - 5, name))
    if data.threshold is not None:
        at = x(data.threshold)
        parts.append(
            f'<line stroke="{_INK}" stroke-width="1.5" stroke-dasharray="4 3" x1="{at:.1f}" x2="{at:.1f}" '
            f'y1="{_TOP - 24}" y2="{base}"/>' + _label(_INK, at, _TOP - 26, f"threshold {data.threshold:.3g}")
        )
    parts.append(f'<text x="{_LEFT}" y="{base + 16}">{low:.3g}</text>')
    parts.append(f'<text x="{WIDTH - _RIGHT}" y="{base + 16}" text-anchor="end">{high:.3g}</text>')
    parts.append("</svg>")
    return Markup("".join(parts))


def sensitivity_bar(item: Detection) -> Markup:
    """The lower bound of one planted kind's sensitivity as a bar from 0 to 1, the policy's gate as a tick."""
    width, height = _BAR
    colour = _GREEN if item.met else _VIOLET
    gate = (
        ""
        if item.gate is None
        else f'<line stroke="{_INK}" stroke-width="2" x1="{item.gate * width:.1f}" x2="{item.gate * width:.1f}" '
        f'y1="0" y2="{height}"/>'
    )
    return Markup(
        f'<svg class="bar" viewBox="0 0 {width} {height}" role="img" xmlns="http://www.w3.org/2000/svg" '
        f'aria-label="{escape(item.words)}: at least {item.lower:.2f}">'
        f'<rect fill="{_TRACK}" x="0" y="2" width="{width}" height="{height - 4}"/>'
        f'<rect fill="{colour}" x="0" y="2" width="{item.lower * width:.1f}" height="{height - 4}"/>{gate}</svg>'
    )


def pair_svg(
    left: tuple[str, int, int],
    right: tuple[str, int, int],
    lines: Sequence[tuple[Place, Place]],
    description: str,
) -> Markup:
    """Two tiles side by side with lines between the places that match, sharp at every zoom.

    Args:
        left, right: data URI, width and height in pixels of each tile. lines: (x, y) in the left tile and (x, y) in
            the right tile, pixels of each.
    """
    (left_uri, left_width, left_height), (right_uri, right_width, right_height) = left, right
    width, height = left_width + GAP + right_width, max(left_height, right_height)
    shift, stroke = left_width + GAP, width / 400
    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(description)}" '
        'xmlns="http://www.w3.org/2000/svg">'
        f'<image href="{escape(left_uri)}" x="0" y="0" width="{left_width}" height="{left_height}"/>'
        f'<image href="{escape(right_uri)}" x="{shift}" y="0" width="{right_width}" height="{right_height}"/>'
    ]
    for number, ((x1, y1), (x2, y2)) in enumerate(lines):
        colour = _LINE_COLOURS[number % len(_LINE_COLOURS)]
        path = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2 + shift:.1f}" y2="{y2:.1f}"'
        # A white line below the coloured one: tissue has every colour a line could have.
        parts.append(f'<line {path} stroke="#fff" stroke-width="{2.4 * stroke:.2f}"/>')
        parts.append(f'<line {path} stroke="{colour}" stroke-width="{1.2 * stroke:.2f}"/>')
        for x, y in ((x1, y1), (x2 + shift, y2)):
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{3 * stroke:.2f}" fill="{colour}" stroke="#fff" '
                f'stroke-width="{0.8 * stroke:.2f}"/>'
            )
    return Markup("".join(parts) + "</svg>")


def _label(colour: str, at: float, y: float, words: str) -> str:
    """Text beside a vertical line, on the side with more room."""
    anchor, offset = ("end", -5) if at > WIDTH / 2 else ("start", 5)
    return (
        f'<text fill="{colour}" font-weight="600" x="{at + offset:.1f}" y="{y}" '
        f'text-anchor="{anchor}">{escape(words)}</text>'
    )


def _open(height: int, description: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" font-size="12" font-family="sans-serif" '
        f'aria-label="{escape(description)}" xmlns="http://www.w3.org/2000/svg">'
    )
