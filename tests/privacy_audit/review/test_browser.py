"""The page in a real browser: decided with the keyboard alone, looked at wide and narrow, closed to other pages."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from pixcell_core.trust.dsse import Envelope
from pixcell_core.trust.keys import SigningKey
from privacy_audit.review.session import DECISIONS, ReviewSession
from privacy_audit.review_queue import read_decisions
from tests.privacy_audit.review.browser import CHROMIUM, Browser
from tests.privacy_audit.review.queue_folder import kinds_of, make_queue, served

pytestmark = pytest.mark.skipif(
    CHROMIUM is None and os.environ.get("CI") != "true",
    reason="no Chromium here (Debian: apt-get install chromium)",
)
REVIEWER = SigningKey.generate()
PLACE = "Number(document.getElementById('place').textContent)"
DECIDED = "Number(document.getElementById('decided').textContent)"
LOADED = (
    "[...document.images].filter(i => i.getAttribute('src')).every(i => i.complete && i.naturalWidth === 96)"
)
READY = "document.body.dataset.ready === 'yes'"


@pytest.fixture
def session(tmp_path: Path) -> Iterator[ReviewSession]:
    made = ReviewSession(make_queue(tmp_path / "out", pairs=3, decoys=3), "Dr. A", REVIEWER)
    yield made
    made.close()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    made = Browser(tmp_path / "profile")
    yield made
    made.close()


def test_a_whole_review_with_the_keyboard_alone(
    session: ReviewSession, browser: Browser, tmp_path: Path
) -> None:
    kinds = kinds_of(session.out)
    order = [item.id for item in session.queue.items]
    with served(session) as (address, ended):
        browser.open(address)
        browser.wait(READY)
        browser.wait(LOADED)
        assert browser.run(PLACE) == 1
        browser.picture(tmp_path / "wide.png")
        browser.press("1")
        browser.wait(f"{DECIDED} === 1")
        assert session.calls == {order[0]: "same field"} and browser.run(PLACE) == 2
        browser.press("2", repeat=True)
        browser.press("x")
        assert browser.run(DECIDED) == 1, "a held key and a key without meaning decide nothing"
        browser.press("ArrowLeft")
        assert browser.run(PLACE) == 1
        assert browser.run("document.querySelector('.chosen').dataset.call") == "same field"
        browser.press("3")
        browser.wait("document.getElementById('place').textContent === '2'")
        assert session.calls == {order[0]: "unsure"}
        assert browser.run("document.getElementById('ready').hidden") is True
        browser.press("Enter")
        assert session.signed is None, "an unfinished review is not signed"
        for place, item in enumerate(order):
            browser.run(f"go({place})")
            browser.press("1" if kinds[item] == "pair" else "2")
            browser.wait(
                f"calls.get('{item}') === '{'same field' if kinds[item] == 'pair' else 'different'}'"
            )
        assert browser.run("document.getElementById('agreement').textContent") == "", (
            "nothing before the signature"
        )
        browser.press("Enter")
        browser.wait("!document.getElementById('result').hidden")
        assert "3 of 3, 95 % interval 0.29 to 1.00" in browser.text()
        browser.picture(tmp_path / "result.png")
    assert (ended, browser.complaints) == ([], []), (
        "no script error, nothing blocked by the page's own policy"
    )
    found = read_decisions(session.out, Envelope.load(session.out / DECISIONS), REVIEWER.verify_key).human
    assert (found.pair_same, found.decoy_same, found.open) == (3, 0, 0)


def test_single_tiles_are_asked_about_marks_with_keys_of_their_own(browser: Browser, tmp_path: Path) -> None:
    out = make_queue(tmp_path / "marked", pairs=1, decoys=1, marks=2, clean=2)
    session = ReviewSession(out, "Dr. A", REVIEWER)
    kinds, order = kinds_of(out), [item.id for item in session.queue.items]
    question = "document.getElementById('question').textContent"
    seen = "getComputedStyle(document.getElementById('{}')).display !== 'none'"
    with served(session) as (address, ended):
        browser.open(address)
        browser.wait(READY)
        assert "same field" in browser.run(question) and browser.run(seen.format("field-answers"))
        browser.press("f")
        for count in (1, 2):
            browser.press("2")
            browser.wait(f"{DECIDED} === {count}")
        assert browser.run(question) == "Does this tile bear text, ink or a label?"
        browser.wait(LOADED)
        assert browser.run(seen.format("mark-answers")) and not browser.run(seen.format("field-answers"))
        assert browser.run(seen.format("left")) and not browser.run(
            "document.getElementById('right').hasAttribute('src')"
        )
        assert not browser.run(
            "getComputedStyle(document.getElementById('right').closest('figure')).display !== 'none'"
        )
        browser.press("r")
        assert browser.run("view.turn") == 0, "there is nothing beside it to turn"
        browser.press("z")
        assert browser.run("view.zoom") is True
        browser.picture(tmp_path / "mark.png")
        for count, item in enumerate(order[2:], 3):
            browser.press("1" if kinds[item] == "mark" else "2")
            browser.wait(f"{DECIDED} === {count}")
        assert browser.run("document.querySelector('#mark-answers .chosen').dataset.call") in (
            "marked",
            "clean",
        )
        browser.press("Enter")
        browser.wait("!document.getElementById('result').hidden")
        assert browser.run("document.getElementById('marks').textContent") == "2 of 2"
        assert browser.run("document.getElementById('clean-marked').textContent") == "0 of 2"
    assert (ended, browser.complaints) == ([], [])
    session.close()
    read = read_decisions(out, Envelope.load(out / DECISIONS), REVIEWER.verify_key).marks
    assert read is not None and (read.marked, read.decoy_marked, read.open) == (2, 0, 0)


def test_a_stopped_review_goes_on_where_it_was(session: ReviewSession, browser: Browser) -> None:
    order = [item.id for item in session.queue.items]
    with served(session, idle_s=2.0) as (address, ended):
        browser.open(address)
        browser.wait(READY)
        browser.press("2")
        browser.wait(f"{DECIDED} === 1")
        browser.press("2")
        browser.wait(f"{DECIDED} === 2")
    assert len(ended) == 1
    browser.press("2")
    browser.wait("!document.getElementById('trouble').hidden")
    assert "every call so far is kept" in browser.text() and browser.run(DECIDED) == 2
    session.close()
    again = ReviewSession(session.out, "Dr. A", REVIEWER)
    with served(again) as (address, _):
        browser.open(address)
        browser.wait(READY)
        assert (browser.run(DECIDED), browser.run(PLACE)) == (2, 3)
        for count in range(3, len(order) + 1):
            browser.press("2")
            browser.wait(f"{DECIDED} === {count}")
        browser.run("document.getElementById('sign').click()")
        browser.wait("!document.getElementById('result').hidden")
    assert set(again.calls) == set(order)
    # The fixture closes the session it made; that one let go already.
    session._lock = again._lock


def test_views_move_pictures_and_decide_nothing(
    session: ReviewSession, browser: Browser, tmp_path: Path
) -> None:
    with served(session, idle_s=4.0) as (address, _):
        browser.open(address)
        browser.wait(READY)
        browser.wait(LOADED)
        shown = "getComputedStyle(document.getElementById('{}').closest('figure')).display !== 'none'"
        wide = browser.run("document.getElementById('left').getBoundingClientRect().width")
        assert wide >= 400, "large enough to compare nuclei"
        browser.press("f")
        assert browser.run(shown.format("left")) and not browser.run(shown.format("right"))
        browser.press(" ")
        assert browser.run(shown.format("right")) and not browser.run(shown.format("left"))
        browser.press("r")
        browser.press("m")
        transform = browser.run("getComputedStyle(document.getElementById('right')).transform")
        assert [round(float(x)) for x in transform[7:-1].split(",")] == [0, 1, 1, 0, 0, 0], (
            "turned, then mirrored"
        )
        browser.press("z")
        assert browser.run("document.getElementById('right').getBoundingClientRect().width") > 2 * wide * 0.9
        browser.press("0")
        assert browser.run("getComputedStyle(document.getElementById('right')).transform") in (
            "none",
            "matrix(1, 0, 0, 1, 0, 0)",
        )
        for width in (1280, 400):
            browser.size(width, 800, mobile=width == 400)
            assert browser.run("document.documentElement.scrollWidth") <= width, "nothing hangs over the edge"
            browser.picture(tmp_path / f"{width}.png")
            seen = np.asarray(Image.open(tmp_path / f"{width}.png").convert("RGB"))
            assert seen.shape[1] == width and seen.std() > 15, "something is drawn"
        assert session.calls == {} and browser.complaints == []


class _Evil(BaseHTTPRequestHandler):
    """A page of another origin on this machine."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>evil</title><body></body>")

    def log_message(self, *_: object) -> None:
        """Quiet."""


def test_another_page_learns_nothing_even_if_it_knows_the_address(
    session: ReviewSession, browser: Browser
) -> None:
    other = ThreadingHTTPServer(("127.0.0.1", 0), _Evil)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    item = session.queue.items[0].id
    try:
        with served(session, idle_s=5.0) as (address, _):
            browser.open(f"http://127.0.0.1:{other.server_port}/")
            fetched = "fetch('{}state', {{mode: '{}'}}).then(r => r.text()).catch(() => 'refused')"
            assert browser.run(fetched.format(address, "cors")) == "refused"
            assert browser.run(fetched.format(address, "no-cors")) in ("", "refused")
            loaded = (
                "new Promise(done => {{ const i = new Image(); i.onload = () => done('seen'); "
                "i.onerror = () => done('refused'); i.src = '{}tile/{}/left.png'; }})"
            )
            assert browser.run(loaded.format(address, item)) == "refused"
            post = (
                f"fetch('{address}call', {{method: 'POST', mode: 'no-cors', headers: {{'content-type': 'text/plain'}}, "
                f"body: JSON.stringify({{id: '{item}', call: 'same field'}})}}).then(() => 'sent').catch(() => 'refused')"
            )
            browser.run(post)
            assert session.calls == {}
            # A name that its owner points at this machine: the browser asks, the page does not answer.
            port = urlsplit(address).port
            browser.open(f"http://evil.example:{port}{urlsplit(address).path}")
            assert "own address alone" in browser.text() and "Dr. A" not in browser.text()
    finally:
        other.shutdown()
        other.server_close()
