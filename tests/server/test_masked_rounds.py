"""Masked rounds on the grid: real agents' masking on real folders, every fault of a site, and a hub that dies."""

from __future__ import annotations

import copy
import time
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pixcell_core.contracts.canonical import parse_document
from pixcell_core.contracts.masking import SharesReply, SurvivorsReply, UnmaskReply
from pixcell_core.contracts.round import ARRAYS, CONTROL, DOCUMENT, FLAT, KnownHead, TrainReply
from pixcell_core.flower.messages import document_of
from pixcell_core.masking import saved_attempt
from server.rounds.masked import PULLED_AT_ONCE, MaskedAbort, MaskedSum
from site_client.agent.masking import load_state
from site_client.approvals.book import ApprovalBook
from tests.server.masked_consortium import NAME, Make, MaskedConsortium, make_masked_consortium


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes a consortium; keyword arguments change it."""
    made: list[MaskedConsortium] = []

    def of(**changes: object) -> MaskedConsortium:
        made.append(make_masked_consortium(tmp_path, **changes))
        return made[-1]

    yield of
    for consortium in made:
        consortium.grid.close()


def collect(c: MaskedConsortium, number: int = 1, **settings: float) -> MaskedSum | MaskedAbort:
    """One round of all sites."""
    return c.exchange(**settings).collect(number, c.adapter, c.input_digest, list(c.sites))


def check(
    c: MaskedConsortium, found: MaskedSum | MaskedAbort, sites: list[str], number: int = 1
) -> MaskedSum:
    """The sum, which is that of exactly `sites`, to a millionth."""
    assert isinstance(found, MaskedSum), found
    assert list(found.sites) == sites
    wanted = c.plain(sites, number)
    assert np.linalg.norm(found.total - wanted) < 1e-6 * np.linalg.norm(wanted)
    return found


def kind_of(message: Message) -> str:
    """The stage of a question."""
    return message.metadata.message_type.removeprefix("query.masking_")


def rounds_opened(c: MaskedConsortium) -> list[int]:
    """The last opened round at each site."""
    states = [load_state(next(folder.masking.glob("*.json"))) for folder in c.sites.values()]
    return [state.opened for state in states if state is not None]


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


def rewrite(reply: Message, document: bytes | None = None, tensor: np.ndarray | None = None) -> list[Message]:
    """The reply with another document or another tensor."""
    if document is not None:
        reply.content[CONTROL] = ConfigRecord({DOCUMENT: document.decode()})
    if tensor is not None:
        reply.content[ARRAYS] = ArrayRecord({FLAT: Array(tensor)})
    return [reply]


BAD_UPDATES = {
    "tensor-dtype": lambda size: np.zeros(size, np.float32),
    "tensor-shape": lambda size: np.zeros(1, np.uint32),
}


@pytest.mark.parametrize("code", BAD_UPDATES)
def test_a_wrong_tensor_costs_its_own_site_the_round(make: Make, code: str) -> None:
    c = make()
    c.grid.tamper = lambda asked, reply: (
        rewrite(reply, tensor=BAD_UPDATES[code](c.size))
        if kind_of(asked) == "train" and asked.metadata.dst_node_id == c.nodes["s001"]
        else [reply]
    )
    found = collect(c)
    check(c, found, ["s000", "s002", "s003", "s004"])
    assert isinstance(found, MaskedSum) and found.excluded["s001"].code == code


@pytest.mark.parametrize("stage", ["keys", "shares", "train", "survivors", "unmask"])
@pytest.mark.parametrize("text", [b"", b"{}", b'{"attempt": 1}', b"\xff".decode("latin1").encode()])
def test_a_document_that_is_none_costs_its_own_site_the_place(make: Make, stage: str, text: bytes) -> None:
    c = make()
    c.grid.tamper = lambda asked, reply: (
        rewrite(reply, text)
        if kind_of(asked) == stage and asked.metadata.dst_node_id == c.nodes["s001"]
        else [reply]
    )
    late = stage in ("survivors", "unmask")
    found = check(c, collect(c), [s for s in c.sites if late or s != "s001"])
    assert set(found.excluded) == (set() if late else {"s001"})


def test_replies_that_come_twice_count_once(make: Make) -> None:
    c = make()
    c.grid.tamper = lambda asked, reply: [reply, reply]
    assert check(c, collect(c), list(c.sites)).sites == tuple(c.sites)


class AnyCommitment:
    """Equal to everything."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]


def test_a_wrong_share_is_known_by_its_commitment_and_would_otherwise_spoil_the_sum(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = make()

    def lie(asked: Message, reply: Message) -> list[Message]:
        if kind_of(asked) != "unmask" or asked.metadata.dst_node_id != c.nodes["s000"]:
            return [reply]
        said = parse_document(UnmaskReply, document_of(reply))
        first = said.seeds[0].model_copy(update={"share": "00" + "5" * 130})
        return rewrite(reply, said.model_copy(update={"seeds": (first, *said.seeds[1:])}).to_bytes())

    c.grid.tamper = lie
    check(c, collect(c), list(c.sites))
    # The check taken out: every share fits every commitment.
    monkeypatch.setattr("pixcell_core.masking.hub.commitment_of", lambda *_: AnyCommitment())
    found = collect(c, 2)
    assert isinstance(found, MaskedAbort) and found.code in ("inconsistent-shares", "sum-out-of-range")


def test_a_sharer_whose_boxes_do_not_open_is_found_before_anything_is_opened(make: Make) -> None:
    c = make()

    def garble(asked: Message, reply: Message) -> list[Message]:
        if kind_of(asked) != "shares" or asked.metadata.dst_node_id != c.nodes["s003"]:
            return [reply]
        said = parse_document(SharesReply, document_of(reply))
        boxes = tuple(b.model_copy(update={"box": "A" * 214 + "=="}) for b in said.sealed)
        return rewrite(reply, said.model_copy(update={"sealed": boxes}).to_bytes())

    c.grid.tamper = garble
    found = collect(c)
    assert isinstance(found, MaskedAbort) and found.code == "shares-not-opened" and "s003" in found.reason
    assert not found.asked_to_open and rounds_opened(c) == [0] * 5
    # Without the site the round goes on.
    kept = [s for s in c.sites if s != "s003"]
    check(c, c.exchange().collect(1, c.adapter, c.input_digest, kept), kept)


def test_a_signature_of_other_survivors_is_not_counted(make: Make) -> None:
    c = make()

    def forge(asked: Message, reply: Message) -> list[Message]:
        if kind_of(asked) != "survivors" or asked.metadata.dst_node_id != c.nodes["s003"]:
            return [reply]
        said = parse_document(SurvivorsReply, document_of(reply))
        return rewrite(reply, said.model_copy(update={"signature": "A" * 86 + "=="}).to_bytes())

    c.grid.tamper = forge
    assert not check(c, collect(c), list(c.sites)).excluded


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


FAULTS = ("none", "none", "none", "error", "garbage", "anothers", "earlier", "twice", "metrics", "tensor")
STAGES = ("keys", "shares", "train", "survivors", "unmask")


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from(FAULTS), min_size=25, max_size=25))
def test_whatever_sites_answer_the_sum_is_right_or_the_round_ends_cleanly(
    tmp_path_factory: pytest.TempPathFactory, faults: list[str]
) -> None:
    """Each of five sites gives each of five answers right or wrong, two rounds in a row; nothing is raised."""
    c = make_masked_consortium(tmp_path_factory.mktemp("any"), size=20)
    wrong = {(s, n): faults[5 * i + n] for i, s in enumerate(STAGES) for n in range(5)}
    last: dict[str, Message] = {}
    first: dict[tuple[str, int], Message] = {}

    def lie(asked: Message, reply: Message) -> list[Message]:
        stage, site = kind_of(asked), asked.metadata.dst_node_id - 100
        other, before = last.get(stage, reply), first.setdefault((stage, site), copy.deepcopy(reply))
        last[stage] = copy.deepcopy(reply)
        match wrong[(stage, site)]:
            case "error":
                return [Message(Error(ErrorCode.NODE_UNAVAILABLE, "gone"), reply_to=asked)]
            case "garbage":
                return rewrite(reply, b"{}")
            case "anothers":
                return [Message(other.content, reply_to=asked)]
            case "earlier":
                return [Message(before.content, reply_to=asked)]
            case "twice":
                return [reply, reply]
            case "metrics":
                reply.content["more"] = MetricRecord({"patients": 3})
            case "tensor":
                return rewrite(reply, tensor=np.zeros(3, np.uint32))
        return [reply]

    c.grid.tamper = lie
    for number in (1, 2):
        found = collect(c, number, stage_timeout_s=20.0)
        if isinstance(found, MaskedSum):
            check(c, found, list(found.sites), number)
            assert len(found.sites) >= 3 and set(found.sites) | set(found.excluded) == set(c.sites)
        elif found.code == "sum-out-of-range":
            # A vector sent in another's name hides under no mask of its own: it is seen, in the sum alone.
            assert "anothers" in {wrong[("train", n)] for n in range(5)} and found.asked_to_open
        else:
            assert (
                found.code in {"too-few-sites", "below-quorum", "unmasking-incomplete"}
                and found.reason
                and found.hint
            )
            # Whoever is to blame is named; an opened round stays the round to be opened.
            assert found.excluded and (found.asked_to_open or number not in rounds_opened(c))
    c.grid.close()


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


def test_a_ledger_that_was_put_back_costs_its_site_the_round(make: Make) -> None:
    c = make()
    head = KnownHead(sequence=7, hash="sha256:" + "7" * 64)

    def with_head(asked: Message, reply: Message) -> list[Message]:
        if kind_of(asked) != "train" or asked.metadata.dst_node_id != c.nodes["s001"]:
            return [reply]
        said = parse_document(TrainReply, document_of(reply))
        return rewrite(reply, said.model_copy(update={"ledger_head": head}).to_bytes())

    c.grid.tamper = with_head
    check(c, collect(c), list(c.sites))
    c.grid.tamper = lambda asked, reply: [reply]
    found = collect(c, 2)
    check(c, found, ["s000", "s002", "s003", "s004"], 2)
    assert isinstance(found, MaskedSum) and found.excluded["s001"].code == "ledger-rewound"


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


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("text", ["", "{}", "[" * 3000, '{"attempt":{"round":-1}}', "x" * (2 << 20)])
def test_a_question_that_is_none_is_an_error_reply_and_changes_nothing(
    make: Make, stage: str, text: str
) -> None:
    c = make(count=3, threshold=2)
    content = RecordDict({CONTROL: ConfigRecord({DOCUMENT: text})})
    kind = "train" if stage == "train" else f"query.masking_{stage}"
    asked = Message(content, dst_node_id=c.nodes["s000"], message_type=kind, ttl=60.0)
    (identity,) = c.grid.push_messages([asked])
    while not (replies := c.grid.pull_messages([identity])):
        time.sleep(0.002)
    assert replies[0].has_error()
    assert not list(c.sites["s000"].masking.glob("*.json"))
    check(c, collect(c), list(c.sites))
