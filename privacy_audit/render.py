"""Renders the report as one HTML page that stands alone: no script, no outside file, fit for paper and a phone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from privacy_audit.charts import detections_svg, histogram_svg
from privacy_audit.plain_words import sentence
from privacy_audit.report import SITE_MARK, AuditReport
from privacy_audit.result import TestResult

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Pair:
    """A released tile beside its nearest training tile, as data URIs; only the site's page shows it."""

    synthetic: str
    training_tile: str
    score: float
    p_value: float
    flagged: bool
    alignment: str
    synthetic_uri: str
    training_uri: str
    matches_uri: str = ""  # both side by side with lines between matching keypoints; empty where none agree
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
    if test.detections:
        return detections_svg(test.detections, f"{test.name}: share of planted copies found, kind by kind")
    if test.histogram is not None:
        return histogram_svg(
            test.histogram,
            f"{test.name}: {test.histogram.null_name} in grey, {test.histogram.observed_name} drawn over it",
        )
    return Markup("")


def legend(test: TestResult) -> str:
    """Words under a histogram."""
    if test.histogram is None:
        return ""
    seconds = "".join(f" · dotted: {second.name}" for second in test.histogram.seconds)
    return f"grey: {test.histogram.null_name}{seconds} · coloured: {test.histogram.observed_name} · dashed: threshold"


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
        number=number, chart=chart, legend=legend, short_digest=short_digest, plain=sentence
    )
    return environment
