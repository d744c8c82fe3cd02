"""Heads exchanged with the prepare question: the site's real side and the coordinator's real side, and each one's lies."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pixcell_core.contracts.canonical import load_document, parse_document
from pixcell_core.contracts.log_heads import AnchorNews, AnchorReceipt, HeadOffer
from pixcell_core.contracts.remedies import REMEDIES
from pixcell_core.errors import PixcellError
from pixcell_core.trust.dsse import Envelope
from pixcell_core.trust.keys import SigningKey
from pixcell_core.trust.log import EventLog, read_entries
from pixcell_core.trust.log_proof import make_offer
from server.log_anchor.act_log import CoordinatorLog
from server.log_anchor.desk import HeadDesk
from site_client.agent.log_exchange import LogExchange
from site_client.approvals.act_log import note_act
from tests.server.enrolled import make_enrolment


class Pair:
    """One site and its coordinator, asking and answering as in a study."""

    def __init__(self, root: Path) -> None:
        self.made = make_enrolment(root)
        self.site = self.made.party("north")
        self.log = self.site.root / "log"
        self.said: list[str] = []
        self.desk = HeadDesk(self.made.layout, self.said.append)

    def ask(self) -> AnchorNews | None:
        """One question and its answer; gives what the site was told."""
        news = self.desk.news("north")
        sent = parse_document(AnchorNews, news.to_bytes()) if news else None
        self.desk.take("north", LogExchange(self.site).offer(sent))
        return news

    def kept(self) -> AnchorReceipt:
        return load_document(AnchorReceipt, self.log / "anchor.json")

    def rewritten(self, change: Callable[[list[bytes]], list[bytes]]) -> None:
        """The site's log anew with its own key, its events changed."""
        entries = read_entries(self.log)
        (self.log / "log.jsonl").unlink()
        log = EventLog(self.log, SigningKey.load(self.site.keys / "release"))
        for place in change([str(number).encode() for number in range(len(entries))]):
            found = entries[int(place.split(b"!")[0])]
            log.append(found.kind, {**found.data, **({"x": 1} if b"!" in place else {})})


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


def code_of(act: Callable[[], object]) -> str:
    with pytest.raises(PixcellError) as refused:
        act()
    assert refused.value.code in REMEDIES, "a site that is left out is told what to do"
    return refused.value.code


def test_heads_go_back_and_forth(pair: Pair) -> None:
    first = pair.ask()
    assert first is not None and first.anchored == 0
    for number in range(3):
        note_act(pair.site, "test.event", {"number": number})
        news = pair.ask()
        assert news is not None and news.anchored == 2 + number
        assert pair.kept() == news.receipt
    entries = CoordinatorLog(pair.made.layout).events().entries()
    anchored = len([entry for entry in entries if entry.kind == "log.anchored"])
    assert anchored == 4
    pair.ask()
    pair.ask()
    assert CoordinatorLog(pair.made.layout).events().entries()[-1].index <= len(entries) + 1, (
        "no news, no events"
    )
    assert pair.said == []


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda lines: [lines[0] + b"!", *lines[1:]], "log-forked"),
        (lambda lines: [lines[1], lines[0], *lines[2:], *lines[2:]], "log-forked"),
        (lambda lines: lines[:-1], "log-rolled-back"),
    ],
)
def test_a_site_that_rewrote_its_log_is_refused_by_name(
    pair: Pair, change: Callable[[list[bytes]], list[bytes]], code: str
) -> None:
    note_act(pair.site, "test.event", {})
    pair.ask()
    pair.rewritten(change)
    assert code_of(pair.ask) == code
    assert code_of(pair.ask) == code, "it is asked again, and refused again"


def test_a_site_that_falls_silent_is_missed(pair: Pair) -> None:
    pair.ask()
    (pair.log / "log.jsonl").write_bytes(b"damaged\n")
    assert code_of(pair.ask) == "log-not-offered"
    shutil.rmtree(pair.log)
    assert code_of(pair.ask) == "log-not-offered"


def test_a_site_whose_log_is_lost_begins_anew_with_a_reason(pair: Pair) -> None:
    pair.ask()
    pair.rewritten(lambda lines: lines[:1])
    assert code_of(pair.ask) == "log-rolled-back"
    ended = pair.desk._book.restart("north", "disk failed")
    assert ended.head.tree_size == 2
    (pair.log / "anchor.json").unlink(missing_ok=True)
    pair.ask()
    news = pair.ask()
    assert news is not None and news.anchored == 1 and pair.kept() == news.receipt
    told = [
        entry
        for entry in read_entries(CoordinatorLog(pair.made.layout).folder)
        if entry.kind == "log.restarted"
    ]
    assert [entry.data["reason"] for entry in told] == ["disk failed"]
    with pytest.raises(PixcellError):
        pair.desk._book.restart("nobody", "")


def test_a_coordinator_that_forks_its_log_loses_the_site(pair: Pair) -> None:
    pair.ask()
    note_act(pair.site, "test.event", {})
    pair.ask()
    own = CoordinatorLog(pair.made.layout)
    shutil.rmtree(own.folder)
    shutil.rmtree(pair.made.layout.root / "anchors")
    fork = Pair.__new__(Pair)
    fork.__dict__ |= pair.__dict__
    fork.desk = HeadDesk(pair.made.layout, pair.said.append)
    # The site shows the head it was shown, and the coordinator finds that its own past is gone.
    assert code_of(fork.ask) == "coordinator-log-rewritten"
    # One that ignores that, and answers from its new log, is left by the site.
    key = SigningKey.load(pair.site.approval_key)
    fork.desk._book.anchor(make_offer(pair.log, "north", key))
    assert code_of(fork.ask) == "coordinator-log-forked"
    (pair.made.layout.secrets / "log").unlink()
    shutil.rmtree(own.folder)
    fork.desk = HeadDesk(pair.made.layout, pair.said.append)
    fork.desk._book.anchor(make_offer(pair.log, "north", key))
    assert code_of(fork.ask) == "coordinator-log-forked"


def test_an_offer_in_another_sites_name_is_not_taken(pair: Pair) -> None:
    other = pair.made.party("south")
    news = pair.desk.news("north")
    offer = LogExchange(other).offer(news)
    assert (
        HeadOffer.model_validate_json(Envelope.from_bytes(offer.encode()).unsafe_unverified_payload()).party
        == "south"
    )
    pair.desk.take("north", offer)
    pair.desk.take("north", "not an envelope")
    pair.desk.take("north", "ä")
    assert pair.desk._book.all() == {} and len(pair.said) == 2


def test_the_receipt_of_an_overtaken_offer_raises_no_alarm(pair: Pair) -> None:
    """An offer made before a newer receipt was accepted, anchored after it: its growth begins too early."""
    pair.ask()
    pair.ask()
    note_act(pair.site, "test.event", {})
    early = LogExchange(pair.site).offer(pair.desk.news("north"))
    pair.ask()
    pair.ask()
    kept = pair.kept()
    assert pair.desk._book.anchor(Envelope.from_bytes(early.encode())).again
    news = pair.desk.news("north")
    assert news is not None and news.receipt is not None and news.receipt != kept
    assert LogExchange(pair.site).offer(news) and pair.kept() == kept
