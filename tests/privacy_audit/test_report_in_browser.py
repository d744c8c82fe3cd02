"""Both pages of a finished audit in a real browser: wide, on a phone, and on paper."""

from __future__ import annotations

import base64
import math
import os
import re
import zlib
from collections.abc import Iterator

import pytest

from privacy_audit.report import PAGE, SITE_MARK, SITE_PAGE
from tests.privacy_audit.conftest import Audited
from tests.privacy_audit.review.browser import CHROMIUM, Browser

pytestmark = pytest.mark.skipif(
    CHROMIUM is None and os.environ.get("CI") != "true",
    reason="no Chromium here (Debian: apt-get install chromium)",
)
OVERHANGING = """[...document.querySelectorAll('body *')].filter(one => {
    const box = one.getBoundingClientRect();
    return box.width > 0 && box.left >= 0 && box.right > innerWidth + 0.5;
}).map(one => one.tagName + ': ' + one.textContent.slice(0, 60))"""
PLACED = re.compile(rb"([-\d.]+) ([-\d.]+) [-\d.]+ [-\d.]+ [-\d.]+ [-\d.]+ cm\b")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    made = Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


def show(browser: Browser, audited: Audited, name: str) -> None:
    browser.tell("Emulation.setEmulatedMedia", media="screen")
    browser.size(1280, 800)
    browser.open((audited.out / name).resolve().as_uri())


@pytest.mark.parametrize("name", [PAGE, SITE_PAGE])
@pytest.mark.parametrize("width", [400, 794, 1280])
def test_nothing_hangs_over_the_edge(browser: Browser, dishonest: Audited, name: str, width: int) -> None:
    show(browser, dishonest, name)
    browser.size(width, 900, mobile=width == 400)
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run(OVERHANGING) == []
    assert browser.complaints == []


def test_every_pair_says_what_it_is_and_carries_the_mark(browser: Browser, dishonest: Audited) -> None:
    show(browser, dishonest, SITE_PAGE)
    pairs = browser.run("[...document.querySelectorAll('.pair')].map(one => one.innerText)")
    flagged = {flag.synthetic for flag in dishonest.report.flagged}
    assert len(pairs) >= 12
    for text in pairs:
        name = re.search(r"(s\d{3}\.\w+) ↔", text)
        assert name and text.startswith("flagged" if name[1] in flagged else "not flagged")
    marks = browser.run(
        "[...document.querySelectorAll('.pair .tiles, .pair .matches')].map("
        "one => getComputedStyle(one, '::after').content)"
    )
    assert len(marks) > len(pairs) and set(marks) == {f'"{SITE_MARK}"'}


def test_copies_have_match_lines_between_their_tiles(browser: Browser, dishonest: Audited) -> None:
    show(browser, dishonest, SITE_PAGE)
    drawn = browser.run(
        "Object.fromEntries([...document.querySelectorAll('.pair')].map(one => ["
        "one.innerText.match(/(\\S+) ↔/)[1], one.querySelectorAll('.matches circle').length]))"
    )
    exact = [flag.synthetic for flag in dishonest.report.flagged if flag.kind == "exact copy"]
    assert exact and all(drawn[name] >= 8 for name in exact), drawn
    inside = browser.run(
        "[...document.querySelectorAll('.matches svg')].every(one => [...one.querySelectorAll('circle')].every("
        "dot => dot.cx.baseVal.value >= 0 && dot.cx.baseVal.value <= one.viewBox.baseVal.width))"
    )
    assert inside
    sizes = browser.run("[...document.querySelectorAll('.tiles svg')].map(one => one.clientWidth)")
    assert min(sizes) >= 340, "two tiles of a pair are large enough to compare"


def test_the_mark_stays_in_sight_when_one_scrolls(browser: Browser, dishonest: Audited) -> None:
    show(browser, dishonest, SITE_PAGE)
    for share in (0.0, 0.5, 0.9):
        browser.run(f"window.scrollTo(0, {share} * document.documentElement.scrollHeight)")
        box = browser.run("document.querySelector('.site-bar').getBoundingClientRect().top")
        assert -1 <= box < 30 and SITE_MARK in browser.run("document.querySelector('.site-bar').innerText")


def test_no_row_no_card_and_no_pair_is_torn_between_pages(browser: Browser, dishonest: Audited) -> None:
    show(browser, dishonest, SITE_PAGE)
    browser.tell("Emulation.setEmulatedMedia", media="print")
    whole = browser.run(
        "[...document.querySelectorAll('tr, .test, .pair')].every(one => getComputedStyle(one).breakInside === 'avoid')"
    )
    kept = browser.run(
        "[...document.querySelectorAll('h2, h3')].every(one => getComputedStyle(one).breakAfter === 'avoid')"
    )
    assert whole and kept


def test_the_mark_is_on_every_printed_page_of_the_sites_report_alone(
    browser: Browser, dishonest: Audited
) -> None:
    show(browser, dishonest, SITE_PAGE)
    pages, marked = printed(browser)
    assert pages >= 5 and marked == pages
    show(browser, dishonest, PAGE)
    pages, marked = printed(browser)
    assert pages >= 5 and marked == 0


def printed(browser: Browser) -> tuple[int, int]:
    """Pages of the printed A4 document, and pages on which the turned watermark is drawn."""
    browser.tell("Emulation.setEmulatedMedia", media="")
    answer = browser.tell("Page.printToPDF", printBackground=True, preferCSSPageSize=True)
    document = base64.b64decode(answer["data"])
    boxes = re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", document)
    assert {(round(float(w)), round(float(h))) for w, h in boxes} == {(595, 842)}, "A4 in points"
    marked = 0
    for stream in re.findall(rb"stream\r?\n(.*?)\r?\nendstream", document, re.S):
        try:
            drawing = zlib.decompress(stream)
        except zlib.error:
            continue  # a picture or a font that is packed otherwise
        placed = [(float(a), float(b)) for a, b in PLACED.findall(drawing)]
        # Only the watermark is turned by 35 degrees.
        marked += any(a > 0 and abs(abs(b / a) - math.tan(math.radians(35))) < 1e-3 for a, b in placed)
    return len(re.findall(rb"/Type /Page\b", document)), marked
