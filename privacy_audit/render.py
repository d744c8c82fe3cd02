"""Renders the report as one HTML page that stands alone: no script, no outside file, fit for paper and a phone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from privacy_audit.charts import Place, histogram_svg, pair_svg, sensitivity_bar
from privacy_audit.plain_words import answer, sentence
from privacy_audit.report import SITE_MARK, AuditReport
from privacy_audit.result import TestResult

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Picture:
    """One tile as a data URI, with its size in pixels."""

    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Pair:
    """A released tile beside its nearest training tile; only the site's page shows it.

    `aligned` is the released tile turned as the search turned it, `released` the tile as it is. `lines` join (x, y) in
    the released tile with (x, y) in the training tile, in pixels of each; empty where no places agree.
    """

    synthetic: str
    training_tile: str
    score: float
    p_value: float
    flagged: bool
    alignment: str
    aligned: Picture
    released: Picture
    training: Picture
    lines: tuple[tuple[Place, Place], ...] = ()
    matches: int = 0


def render_page(report: AuditReport, pairs: Sequence[Pair] | None = None) -> str:
    """The shareable page, or with `pairs` (also empty) the site's own, watermarked.

    Equal reports give equal pages: the time on the page is the report's.
    """
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            settings=report.policy.settings,
            pairs=pairs,
            site_only=pairs is not None,
            mark=SITE_MARK,
            style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        )
    )


def number(value: float | int | str | None) -> str:
    """A number as people read it: integers whole, small numbers with three digits, none as a dash."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if float(value).is_integer() and abs(value) < 1e7:
        return f"{int(value):,}".replace(",", " ")
    return f"{value:.3g}"


def chart(test: TestResult) -> Markup:
    """The drawing of a test, or nothing."""
    if test.histogram is not None:
        return histogram_svg(
            test.histogram,
            f"{test.name}: {test.histogram.null_name} in grey, {test.histogram.observed_name} drawn over it",
        )
    return Markup("")


def legend(test: TestResult) -> str:
    """Words under a histogram: what lies along the axis, what each mark is."""
    if test.histogram is None:
        return ""
    drawn = test.histogram
    parts = [f"Grey bars: {drawn.null_name}"]
    if max(drawn.observed) >= 1:
        parts.append(f"red line: {drawn.observed_name}")
    else:
        parts.append(f"blue outline: {drawn.observed_name}")
        parts += [f"dotted brown outline: {second.name}" for second in drawn.seconds]
        if drawn.marks:
            parts.append("red strokes: flagged tiles")
    if drawn.threshold is not None:
        parts.append("dashed line: threshold on this axis")
    return f"Along the axis: {drawn.axis}. {', '.join(parts)}."


def aligned(pair: Pair) -> Markup:
    """The released tile as the search turned it beside the training tile."""
    return pair_svg(_parts(pair.aligned), _parts(pair.training), (), "released tile beside its training tile")


def joined(pair: Pair) -> Markup:
    """The released tile as it is beside the training tile, with lines between matching places."""
    words = f"{pair.matches} matching places, joined by lines"
    return pair_svg(_parts(pair.released), _parts(pair.training), pair.lines, words)


def _parts(tile: Picture) -> tuple[str, int, int]:
    return tile.uri, tile.width, tile.height


def short_digest(value: str) -> str:
    """The first twelve hexadecimal digits of a digest."""
    return value.removeprefix("sha256:")[:12]


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=number,
        chart=chart,
        legend=legend,
        aligned=aligned,
        joined=joined,
        bar=sensitivity_bar,
        short_digest=short_digest,
        plain=sentence,
        answer=answer,
    )
    return environment
