"""Masked rounds on the grid: real agents' masking on real folders, sites that leave, and a hub that dies."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

from pixcell_core.masking import saved_attempt
from server.rounds.masked import PULLED_AT_ONCE, MaskedAbort, MaskedSum
from site_client.agent.masking import load_state
from site_client.approvals.book import ApprovalBook
from tests.server.masked.rounds import check, collect, kind_of, rounds_opened
from tests.server.masked_consortium import NAME, Make


def test_rounds_are_the_plain_sums_and_leave_no_secret(make: Make) -> None:
    c = make()
    for number in (1, 2):
        found = collect(c, number)
        check(c, found, list(c.sites), number)
        assert isinstance(found, MaskedSum) and not found.excluded
        np.testing.assert_allclose(found.mean({NAME: (c.size,)})[NAME], found.total / 5)
    c.grid.close()
    for folder in c.sites.values():
        (path,) = folder.masking.glob("*.json")
        state = load_state(path)
        assert state is not None and path.stat().st_mode & 0o777 == 0o600
        assert (state.stage, state.opened, state.held) == ("opened", 2, ())
        assert (state.channel_private, state.mask_private, state.seed) == (None, None, None)


@pytest.mark.parametrize("stage", ["keys", "shares", "train", "survivors", "unmask"])
def test_a_site_that_goes_silent_at_any_stage_costs_nobody_else_the_round(make: Make, stage: str) -> None:
    c = make(round_timeout_s=0.4)
    lost = c.nodes["s002"]
    c.grid.tamper = lambda asked, reply: (
        [] if kind_of(asked) == stage and asked.metadata.dst_node_id == lost else [reply]
    )
    found = collect(c)
    late = stage in ("survivors", "unmask")
    check(c, found, [s for s in c.sites if late or s != "s002"])
    assert isinstance(found, MaskedSum)
    assert late or (set(found.excluded), found.excluded["s002"].code) == ({"s002"}, "deadline")


@pytest.mark.parametrize("stage", ["keys", "shares", "train", "survivors"])
def test_below_the_threshold_the_round_ends_before_anything_is_opened(make: Make, stage: str) -> None:
    c = make(round_timeout_s=0.3)
    lost = {c.nodes[s] for s in ("s000", "s002", "s004")}
    c.grid.tamper = lambda asked, reply: (
        [] if kind_of(asked) == stage and asked.metadata.dst_node_id in lost else [reply]
    )
    found = collect(c, stage_timeout_s=0.3)
    assert isinstance(found, MaskedAbort) and not found.asked_to_open
    assert (
        found.code == ("below-quorum" if stage == "train" else "too-few-sites")
        and found.hint
        and set(found.excluded) == {"s000", "s002", "s004"}
    )
    assert rounds_opened(c) == [0] * 5
    # With the sites back the same round is tried anew, with new keys.
    c.grid.tamper = lambda asked, reply: [reply]
    check(c, collect(c), list(c.sites))


def test_shares_that_are_missing_at_the_end_are_asked_for_again_not_trained_again(make: Make) -> None:
    c = make()
    lost = {c.nodes[s] for s in ("s000", "s002", "s004")}
    c.grid.tamper = lambda asked, reply: (
        [] if kind_of(asked) == "unmask" and asked.metadata.dst_node_id in lost else [reply]
    )
    found = collect(c)
    assert isinstance(found, MaskedAbort) and found.asked_to_open and found.code == "unmasking-incomplete"
    c.grid.tamper = lambda asked, reply: [reply]
    check(c, collect(c), list(c.sites))
    assert sorted(c.trained) == list(c.sites)


class HubDied(Exception):
    """The process of the hub ends here."""


@pytest.mark.parametrize("stage", ["keys", "shares", "train", "survivors", "unmask"])
@pytest.mark.parametrize("after", [0, 2])
def test_a_hub_that_dies_at_any_stage_comes_back_to_the_same_round(
    make: Make, stage: str, after: int
) -> None:
    c = make()
    seen = []

    def die(message: Message) -> None:
        if kind_of(message) == stage:
            seen.append(message)
            if len(seen) > after:
                raise HubDied

    c.grid.on_push = die
    with pytest.raises(HubDied):
        collect(c)
    c.grid.on_push = lambda message: None
    c.settle()
    trained = len(c.trained)
    check(c, collect(c), list(c.sites))
    # Once the opening was prepared, no site trains the round again.
    assert len(c.trained) - trained == (0 if stage == "unmask" else 5)
    c.exchange().done()
    assert not list((c.folder / "masked").iterdir())
    check(c, collect(c, 2), list(c.sites), 2)


def test_a_committed_round_is_never_opened_a_second_time(make: Make) -> None:
    c = make()
    check(c, collect(c), list(c.sites))
    c.exchange().done()
    found = collect(c)
    assert isinstance(found, MaskedAbort) and not found.asked_to_open
    assert {why.code for why in found.excluded.values()} == {"already-opened"}
    assert sorted(c.trained) == list(c.sites)


def test_a_kept_attempt_of_another_round_does_not_disturb_the_next(make: Make) -> None:
    c = make()
    check(c, collect(c), list(c.sites))
    assert not check(c, collect(c, 2), list(c.sites), 2).excluded


def test_a_site_that_withdrew_or_left_is_not_waited_for(make: Make) -> None:
    c = make()
    ApprovalBook(c.sites["s000"]).decide(c.study, "revoke")
    c.grid.offline = {c.nodes["s001"]}
    began = time.monotonic()
    found = collect(c, stage_timeout_s=30.0)
    check(c, found, ["s002", "s003", "s004"])
    assert isinstance(found, MaskedSum)
    assert {s: why.code for s, why in found.excluded.items()} == {
        "s000": "approval-withdrawn",
        "s001": "site-offline",
    }
    assert time.monotonic() - began < 10.0


def test_the_grace_rule_ends_a_round_soon_after_the_quorum(make: Make) -> None:
    c = make(straggler_rule="grace", straggler_grace_s=0.2, round_timeout_s=60.0)
    c.grid.tamper = lambda asked, reply: (
        [] if kind_of(asked) == "train" and asked.metadata.dst_node_id == c.nodes["s004"] else [reply]
    )
    began = time.monotonic()
    check(c, collect(c), ["s000", "s001", "s002", "s003"])
    assert time.monotonic() - began < 10.0


def test_forty_sites_of_which_five_leave(make: Make) -> None:
    c = make(count=40, threshold=27, size=20, round_timeout_s=120.0)
    leaving = {c.nodes[f"s{i:03d}"] for i in range(0, 40, 8)}
    lost = Error(ErrorCode.NODE_UNAVAILABLE, "no heartbeat")
    c.grid.tamper = lambda asked, reply: (
        [Message(lost, reply_to=asked)]
        if kind_of(asked) == "train" and asked.metadata.dst_node_id in leaving
        else [reply]
    )
    found = collect(c, stage_timeout_s=120.0)
    check(c, found, [s for s in c.sites if c.nodes[s] not in leaving])
    assert isinstance(found, MaskedSum)
    assert {why.code for why in found.excluded.values()} == {"site-offline"}


def test_a_site_that_is_not_enrolled_is_left_out_and_named(make: Make) -> None:
    c = make()
    del c.nodes["s004"]
    found = collect(c)
    check(c, found, ["s000", "s001", "s002", "s003"])
    assert isinstance(found, MaskedSum) and found.excluded["s004"].code == "site-offline"


def test_the_hub_holds_few_replies_at_once_however_many_sites(make: Make) -> None:
    c = make(count=12, threshold=7)
    pull = c.grid.pull_messages
    most, replies, alive = [], [], []

    def counted(identities: Iterable[str]) -> list[Message]:
        asked = list(identities)
        found = pull(asked)
        most.append(len(asked))
        replies.extend(weakref.ref(message) for message in found)
        alive.append(sum(reply() is not None for reply in replies))
        return found

    c.grid.pull_messages = counted  # type: ignore[method-assign]
    check(c, collect(c, stage_timeout_s=20.0), list(c.sites))
    # Those just fetched, and the one that was looked at last.
    assert max(most) == PULLED_AT_ONCE and max(alive) <= PULLED_AT_ONCE + 1 and len(replies) >= 43


def test_below_the_quorum_nothing_is_opened_so_that_the_round_can_be_tried_again(make: Make) -> None:
    c = make(quorum=5)
    c.grid.tamper = lambda asked, reply: (
        [Message(Error(ErrorCode.NODE_UNAVAILABLE, "gone"), reply_to=asked)]
        if kind_of(asked) == "train" and asked.metadata.dst_node_id == c.nodes["s001"]
        else [reply]
    )
    found = collect(c)
    assert isinstance(found, MaskedAbort) and found.code == "below-quorum" and not found.asked_to_open
    c.grid.tamper = lambda asked, reply: [reply]
    check(c, collect(c), list(c.sites))


def test_a_hub_that_died_while_it_kept_the_attempt_had_asked_nobody_to_open(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = make()
    real = saved_attempt.write_whole

    def dies(path: Path, data: bytes, **how: Any) -> None:
        if path.name == saved_attempt.DOCUMENT:
            raise HubDied
        real(path, data, **how)

    monkeypatch.setattr(saved_attempt, "write_whole", dies)
    with pytest.raises(HubDied):
        collect(c)
    monkeypatch.undo()
    assert rounds_opened(c) == [0] * 5
    check(c, collect(c), list(c.sites))
