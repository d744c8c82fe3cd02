"""The two curves of a plan as one standalone SVG: what noise buys, and what a cohort of a size can expect.

No script, no style sheet from elsewhere, text as text; it prints in black and white (lines differ by dashes).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from pixcell_core.private.composition import pld_epsilon
from pixcell_core.private.events import GaussianEvent
from pixcell_core.private.planning import Plan, expected_quality
from pixcell_core.private.usefulness import USEFUL_COSINE, WEAK_COSINE

WIDTH, HEIGHT = 760, 900
_LEFT, _RIGHT = 78, 40
_COLOURS = ("#5b3a8c", "#1f6f8b", "#2c7a3f", "#a8551c", "#8c1c2c")
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2")
_POINTS = 13
_SIZES = 24


@dataclass(frozen=True)
class _Axis:
    """A logarithmic or linear axis from `low` to `high` between two positions in pixels."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = True

    def place(self, value: float) -> float:
        """Position of a value."""
        f: Callable[[float], float] = math.log10 if self.logarithmic else float
        share = (f(value) - f(self.low)) / (f(self.high) - f(self.low))
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values within the axis: 1, 2, 5 of each decade, or tenths."""
        if not self.logarithmic:
            return [i / 5 for i in range(6)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        marks = [m * 10.0**d for d in decades for m in (1, 2, 5)]
        return [m for m in marks if self.low * 0.999 <= m <= self.high * 1.001]


def plan_curve(plan: Plan) -> str:
    """Return the SVG of a plan: epsilon against noise multiplier, and expected cosine against patients."""
    request = plan.request
    title = (
        f"q = {request.sample_rate:g}, {request.rounds} rounds of {request.steps} steps, "
        f"unit patient, delta {request.delta:g}, {request.parameters:,} trained numbers"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="13" role="img">',
        f"<title>Plan of a private study: {escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        _text(_LEFT, 30, "Plan of a private study", size=18, weight="bold"),
        _text(_LEFT, 51, title),
        *_noise_panel(plan),
        *_cohort_panel(plan),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _noise_panel(plan: Plan) -> list[str]:
    request, sigma = plan.request, plan.noise_multiplier
    sigmas = [sigma * 4.0 ** (i / (_POINTS - 1) * 2 - 1) for i in range(_POINTS)]
    spent = [
        pld_epsilon(
            [
                *request.already_spent,
                GaussianEvent(request.sample_rate, s, request.total_steps),
                *request.beside,
            ],
            request.delta,
        )
        for s in sigmas
    ]
    x = _Axis(sigmas[0], sigmas[-1], _LEFT, WIDTH - _RIGHT)
    y = _Axis(max(0.01, 0.8 * min(spent)), 1.25 * max(spent), 420, 110)
    together = plan.together.value
    return [
        _text(
            _LEFT,
            88,
            f"What noise buys: epsilon per patient at delta {request.delta:g}, everything together",
            size=14,
            weight="bold",
        ),
        *_frame(x, y, "noise multiplier sigma (noise of a step in units of C)", "epsilon per patient"),
        _line([(x.place(s), y.place(e)) for s, e in zip(sigmas, spent, strict=True)], 0),
        f'<circle cx="{x.place(sigma):.1f}" cy="{y.place(together):.1f}" r="5" fill="#111"/>',
        _text(
            x.place(sigma) + 10,
            y.place(together) - 8,
            f"this plan: sigma {sigma:.4g}, epsilon {math.ceil(together * 100) / 100:.2f}",
        ),
    ]


def _cohort_panel(plan: Plan) -> list[str]:
    rows = [row for row in plan.table if row.quality is not None]
    sizes = sorted({row.patients for row in rows}) or [plan.request.patients]
    x = _Axis(min(sizes) * 0.8, max(sizes) * 1.25, _LEFT, WIDTH - _RIGHT)
    y = _Axis(0.0, 1.0, 810, 520, logarithmic=False)
    parts = [
        _text(
            _LEFT,
            498,
            "What a cohort can expect: cosine of the noisy update with the clean one",
            size=14,
            weight="bold",
        ),
        *_frame(x, y, "patients at each site", "expected cosine"),
        *_threshold(y, USEFUL_COSINE, "useful above"),
        *_threshold(y, WEAK_COSINE, "noise below"),
    ]
    noise = {row.epsilon: row.noise_multiplier for row in rows if row.noise_multiplier}
    for index, (target, sigma) in enumerate(sorted(noise.items())):
        curve = [
            (n, expected_quality(plan.request, sigma, n).cosine) for n in _between(min(sizes), max(sizes))
        ]
        parts.append(_line([(x.place(n), y.place(c)) for n, c in curve], index))
        left = _LEFT + index * 125.0
        parts.append(_line([(left, 867), (left + 30, 867)], index))
        parts.append(_text(left + 36, 871, f"epsilon {target:g}"))
    request = plan.request
    parts.append(
        f'<circle cx="{x.place(request.patients):.1f}" cy="{y.place(plan.quality.cosine):.1f}" r="5" fill="#111"/>'
    )
    parts.append(
        _text(
            _LEFT,
            892,
            f"Assumes a consensus of {request.consensus:g} between patients' gradients, {request.sites} site(s). "
            "The dot is this plan.",
            size=11,
        )
    )
    return parts


def _between(low: int, high: int) -> list[int]:
    """Cohort sizes at equal ratios, both ends included."""
    return sorted({round(low * (high / low) ** (i / _SIZES)) for i in range(_SIZES + 1)})


def _frame(x: _Axis, y: _Axis, across: str, up: str) -> list[str]:
    parts = []
    for tick in x.ticks():
        at = x.place(tick)
        parts.append(f'<path d="M{at:.1f} {y.start}V{y.end}" stroke="#e2e2e2"/>')
        parts.append(_text(at, y.start + 18, f"{tick:g}", anchor="middle"))
    for tick in y.ticks():
        at = y.place(tick)
        parts.append(f'<path d="M{x.start} {at:.1f}H{x.end}" stroke="#e2e2e2"/>')
        parts.append(_text(x.start - 8, at + 4, f"{tick:g}", anchor="end"))
    middle = (y.start + y.end) / 2
    parts.append(f'<path d="M{x.start} {y.end}V{y.start}H{x.end}" fill="none" stroke="#333"/>')
    parts.append(_text((x.start + x.end) / 2, y.start + 38, across, anchor="middle"))
    parts.append(
        f'<text x="22" y="{middle:.1f}" text-anchor="middle" transform="rotate(-90 22 {middle:.1f})">{escape(up)}</text>'
    )
    return parts


def _threshold(y: _Axis, value: float, words: str) -> list[str]:
    at = y.place(value)
    return [
        f'<path d="M{_LEFT} {at:.1f}H{WIDTH - _RIGHT}" stroke="#777" stroke-dasharray="3 3"/>',
        _text(_LEFT + 6, at - 5, f"{words} {value:g}", size=11),
    ]


def _line(points: Sequence[tuple[float, float]], index: int) -> str:
    path = " ".join(f"{'L' if i else 'M'}{a:.1f} {b:.1f}" for i, (a, b) in enumerate(points))
    dash = _DASHES[index % len(_DASHES)]
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<path d="{path}" fill="none" stroke="{_COLOURS[index % len(_COLOURS)]}" stroke-width="2"{dashed}/>'
    )


def _text(
    x: float, y: float, words: str, *, size: int = 13, weight: str = "normal", anchor: str = "start"
) -> str:
    bold = ' font-weight="bold"' if weight == "bold" else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"{bold}>{escape(words)}</text>'
