"""The round loop: what is counted, what a quorum means, and that a kill at any instant loses nothing."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from sqlalchemy import text, update

from pixcell_core.contracts.spool import arrays_digest
from pixcell_core.errors import BadInputError, RefusedError
from server.registry.sealed import seal
from server.registry.tables import RoundRow
from server.rounds.approvals_seen import ApprovalsSeen
from server.rounds.exchange import RoundOutcome, RoundQuestion
from server.rounds.loop import QuorumError
from server.rounds.requests import StopRequest
from server.rounds.screening import Rejection
from tests.server.consortium import SHAPES, SITES, Consortium, make_study, update_of


def expected_adapter(consortium: Consortium, rounds: int, sites: tuple[str, ...] = SITES) -> float:
    """Every coordinate after `rounds` rounds of scripted updates: the sum over rounds of the plain mean over sites."""
    first = next(iter(consortium.start()))
    return sum(
        float(np.mean([update_of(site, number)[first].flat[0] for site in sites]))
        for number in range(1, rounds + 1)
    )


def test_rounds_are_the_plain_mean_of_the_sites_updates_and_quick(consortium: Consortium) -> None:
    began = time.monotonic()
    done = consortium.loop().run(consortium.start())
    assert done.record.round == 3 and set(done.record.included) == set(SITES)
    for value in done.adapter.values():
        np.testing.assert_allclose(value, expected_adapter(consortium, 3), rtol=1e-6)
    assert (time.monotonic() - began) / 3 < 1.0
    state = consortium.board().read()
    assert state is not None and state.state == "completed" and state.committed == 3
    assert all(s.registered and s.approved and s.configured and not s.training for s in state.sites)
    assert [s.rounds_counted for s in state.sites] == [3, 3, 3]


def test_a_finished_study_is_not_trained_again(consortium: Consortium) -> None:
    first = consortium.loop().run(consortium.start())
    again = consortium.loop().run(consortium.start())
    assert again.record == first.record
    assert all(site.trained == [1, 2, 3] for site in consortium.sites.values())


def test_below_quorum_fails_and_says_what_each_site_lacks(consortium: Consortium) -> None:
    consortium.grid.offline = {consortium.nodes["east"]}
    consortium.sites["north"].configured = False
    with pytest.raises(
        QuorumError, match=r"1 of 3.*east: not registered \(not connected\).*north: not configured"
    ):
        consortium.loop(ready_timeout_s=1.5).run(consortium.start())


def test_a_quorum_goes_on_without_the_rest_and_records_why(consortium: Consortium) -> None:
    consortium.grid.offline = {consortium.nodes["east"]}
    done = consortium.loop(ready_timeout_s=1.5).run(consortium.start())
    assert done.record.included == ("north", "west")
    assert [(e.site, e.code) for e in done.record.excluded] == [("east", "not-connected")]
    for value in done.adapter.values():
        np.testing.assert_allclose(value, expected_adapter(consortium, 3, ("north", "west")), rtol=1e-6)


def test_denied_by_all_fails_at_once_instead_of_waiting(consortium: Consortium) -> None:
    for site in consortium.sites.values():
        site.decision = "deny"
    began = time.monotonic()
    with pytest.raises(QuorumError, match="not approved"):
        consortium.loop(ready_timeout_s=60.0).run(consortium.start())
    assert time.monotonic() - began < 5.0


@pytest.mark.parametrize(
    "change",
    [
        {"study_digest": "sha256:" + "0" * 64},
        {"study_id": "study-two"},
        {"site": "west"},
        {"decision": "revoke"},
        {"epsilon_cap": 9.0},
        {"expires_at": "2020-01-01T00:00:00Z"},
    ],
)
def test_an_approval_that_does_not_cover_the_study_does_not_count(
    consortium: Consortium, change: dict[str, Any]
) -> None:
    east = consortium.sites["east"]
    forged = east.approval(**change)
    east.approval = lambda **_: forged  # type: ignore[method-assign]
    done = consortium.loop(ready_timeout_s=1.5).run(consortium.start())
    assert "east" not in done.record.included and east.trained == []


def test_an_approval_signed_by_another_does_not_count(consortium: Consortium) -> None:
    consortium.sites["east"].key = consortium.sites["north"].key
    done = consortium.loop(ready_timeout_s=1.5).run(consortium.start())
    assert "east" not in done.record.included and consortium.sites["east"].trained == []


def test_a_straggler_costs_its_round_and_comes_back(consortium_of: Callable[..., Consortium]) -> None:
    consortium = consortium_of(round_timeout_s=0.6)
    slow = consortium.nodes["west"]

    def west_sleeps_once(question: Message, reply: Message) -> list[Message]:
        if question.metadata.dst_node_id == slow and question.metadata.group_id == "1":
            time.sleep(0.9)
        elif question.metadata.message_type == "train":
            time.sleep(0.2)
        return [reply]

    consortium.grid.tamper = west_sleeps_once
    done = consortium.loop().run(consortium.start())
    history = consortium.board().read().history  # type: ignore[union-attr]
    assert [e.code for e in history[1].excluded if e.site == "west"] == ["deadline"]
    assert "west" in done.record.included


class Hours:
    """A clock that only sleeping moves, and that lets real time pass for the sites' threads."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        time.sleep(0.002)


@pytest.mark.parametrize("rule", ["deadline", "grace"])
def test_a_round_waits_for_a_straggler_as_long_as_the_study_says(
    consortium_of: Callable[..., Consortium], rule: str
) -> None:
    consortium = consortium_of(
        rounds=1, round_timeout_s=600.0, straggler_rule=rule, straggler_grace_s=30.0, reply_grid_s=0.0
    )
    slow, hours = consortium.nodes["west"], Hours()
    consortium.grid.tamper = lambda question, reply: (
        [] if question.metadata.dst_node_id == slow and question.metadata.message_type == "train" else [reply]
    )
    loop = consortium.loop(clock=lambda: hours.now, sleep=hours.sleep, poll_s=1.0, ready_timeout_s=900.0)
    done = loop.run(consortium.start())
    assert done.record.included == ("east", "north")
    assert [(e.site, e.code) for e in done.record.excluded] == [
        ("west", "deadline" if rule == "deadline" else "straggler")
    ]
    assert all(e.remedy for e in done.record.excluded)
    waited = max(t.reply_s or 0.0 for t in done.record.traffic)
    wanted = 600.0 if rule == "deadline" else waited + 30.0
    assert hours.now == pytest.approx(wanted, abs=60.0) and hours.now >= wanted - 60.0
    assert (hours.now < 300.0) == (rule == "grace")


def test_the_grace_does_not_begin_below_the_quorum(consortium_of: Callable[..., Consortium]) -> None:
    consortium = consortium_of(rounds=1, round_timeout_s=100.0, straggler_rule="grace", straggler_grace_s=1.0)
    hours = Hours()
    consortium.grid.tamper = lambda question, reply: (
        []
        if question.metadata.dst_node_id != consortium.nodes["east"]
        and question.metadata.message_type == "train"
        else [reply]
    )
    loop = consortium.loop(clock=lambda: hours.now, sleep=hours.sleep, poll_s=1.0, ready_timeout_s=900.0)
    with pytest.raises(QuorumError, match=r"counts 1 sites.*no reply within 100 s"):
        loop.run(consortium.start())
    assert hours.now >= 100.0


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [({"rule": "median"}, "median"), ({"rule": "trimmed-mean", "trim": 0.34}, "median"), ({}, "mean")],
)
def test_the_studys_rule_decides(
    consortium_of: Callable[..., Consortium], settings: dict[str, Any], wanted: str
) -> None:
    """Of three sites the trimmed mean without one at either end is the median."""
    consortium = consortium_of(rounds=1, aggregation=settings)
    consortium.sites["west"].update = lambda number: {
        n: np.full(s, 0.2, np.float32) for n, s in SHAPES.items()
    }
    values = [update_of("east", 1), update_of("north", 1), consortium.sites["west"].update(1)]
    rule = np.median if wanted == "median" else np.mean
    done = consortium.loop().run(consortium.start())
    for name, value in done.adapter.items():
        np.testing.assert_allclose(value, rule([v[name] for v in values], axis=0), rtol=1e-6)
    assert not (consortium.folder / "spill").exists()


def test_the_servers_optimiser_travels_with_the_round(consortium_of: Callable[..., Consortium]) -> None:
    consortium = consortium_of(aggregation={"server_optimizer": "adam", "server_learning_rate": 0.1})
    done = consortium.loop().run(consortium.start())
    assert done.state is not None and set(done.state) == {"m", "v"}
    assert done.record.state_digest == arrays_digest(done.state)
    moment = 0.0
    for number in (1, 2, 3):
        mean = float(
            np.mean([update_of(site, number)["other.lora_B.default.weight"].flat[0] for site in SITES])
        )
        moment = 0.9 * moment + 0.1 * mean
    np.testing.assert_allclose(done.state["m"], moment, rtol=1e-6)


def test_bytes_and_times_are_recorded(consortium: Consortium) -> None:
    done = consortium.loop().run(consortium.start())
    tensors = 4 * sum(v.size for v in done.adapter.values())
    for record in consortium.store().records()[1:]:
        assert [t.site for t in record.traffic] == list(SITES)
        for site in record.traffic:
            assert tensors < site.bytes_in < tensors + 2_000 and tensors < site.bytes_out < tensors + 2_000
            assert site.reply_s is not None and site.reply_s < 5.0
    state = consortium.board().read()
    assert state is not None
    total = sum(r.bytes_in for r in state.history)
    assert sum(s.bytes_in for s in state.sites) == total
    # A loop that starts anew counts them again from the records, once.
    consortium.loop().run(consortium.start())
    again = consortium.board().read()
    assert again is not None and [s.bytes_in for s in again.sites] == [s.bytes_in for s in state.sites]
    assert [s.rounds_counted for s in again.sites] == [3, 3, 3]


def test_a_wish_to_stop_is_heard_while_waiting_for_sites(consortium: Consortium) -> None:
    consortium.grid.offline = set(consortium.nodes.values())
    StopRequest(consortium.folder).ask("after-round")
    done = consortium.loop(ready_timeout_s=60.0).run(consortium.start())
    state = consortium.board().read()
    assert done.record.round == 0 and state is not None and state.state == "stopped"
    assert StopRequest(consortium.folder).wanted() is None


def test_a_damaged_wish_to_stop_is_a_wish(consortium: Consortium) -> None:
    StopRequest(consortium.folder).ask("now")
    (consortium.folder / "stop.json").write_bytes(b"{")
    assert StopRequest(consortium.folder).wanted() == "now"


def test_a_start_of_another_rank_or_kind_is_refused_before_a_site_is_asked(
    consortium_of: Callable[..., Consortium],
) -> None:
    consortium = consortium_of()
    for bad, words in (
        ({"block.lora_B.default.weight": np.zeros((6, 3), np.float32)}, "rank 3, and the study says 2"),
        ({"block.lora_A.default.weight": np.zeros((2, 6), np.float32)}, "trains A"),
    ):
        with pytest.raises(BadInputError, match=words) as refused:
            consortium.loop().run(bad)
        assert refused.value.code == "start-differs"
    assert not consortium.grid.sent


@pytest.mark.parametrize(
    ("seconds", "fits"), [(1.0, True), (5.0, True), (6.0, False), (0.0, False), (-1.0, False)]
)
def test_a_run_may_shorten_the_deadline_and_not_lengthen_it(
    consortium: Consortium, seconds: float, fits: bool
) -> None:
    if fits:
        assert consortium.loop(round_timeout_s=seconds).run(consortium.start()).record.round == 3
    else:
        with pytest.raises(BadInputError) as refused:
            consortium.loop(round_timeout_s=seconds)
        assert refused.value.code == "round-timeout"


def masked(consortium_of: Callable[..., Consortium]) -> Consortium:
    """A consortium whose study wants masks."""
    plain = consortium_of()
    keys = [{"site": name, "approval_key": plain.enrolled[name].approval_key} for name in SITES]
    masking = {"threshold": 2, "coordinate_bound": 1.0, "identities": keys}
    plain.study = make_study(aggregation={"masking": masking})
    return plain


def test_a_study_under_masks_is_never_asked_for_in_the_open(
    consortium_of: Callable[..., Consortium],
) -> None:
    consortium = masked(consortium_of)
    with pytest.raises(RefusedError) as refused:
        consortium.loop()
    assert refused.value.code == "masking-unavailable" and not consortium.grid.sent


def test_another_exchange_takes_the_place_of_the_plain_one(
    consortium_of: Callable[..., Consortium],
) -> None:
    """What the loop needs of an exchange: an aggregate, who counts, who does not and why, and bytes."""

    class Fixed:
        def __init__(self) -> None:
            self.asked: list[RoundQuestion] = []
            self.counted: list[int] = []

        def collect(self, question: RoundQuestion, between: Callable[[], None]) -> RoundOutcome:
            self.asked.append(question)
            between()
            return RoundOutcome(
                np.full(question.size, 0.25), ("east", "north"), {"west": Rejection("deadline", "late")}, ()
            )

        def committed(self) -> None:
            self.counted.append(len(self.asked))

    consortium, exchange = consortium_of(), Fixed()
    done = consortium.loop(exchange=exchange).run(consortium.start())
    assert [q.number for q in exchange.asked] == [1, 2, 3] == exchange.counted
    assert set(exchange.asked[0].nodes) == set(SITES)
    assert all((value == 0.75).all() for value in done.adapter.values())
    assert [e.code for e in done.record.excluded if e.site == "west"]


def test_approvals_that_were_seen_are_kept_and_checked_again(consortium: Consortium) -> None:
    consortium.sites["west"].decision = "deny"
    consortium.loop(ready_timeout_s=1.5).run(consortium.start())
    seen = ApprovalsSeen(consortium.folder).read(consortium.study, consortium.enrolled)
    assert [(s.site, s.code) for s in seen] == [("east", "ok"), ("north", "ok"), ("west", "not-seen")]
    assert seen[0].approval is not None and seen[0].approval.expires_at == consortium.study.expires_at
    late = consortium.study.expires_at
    assert [
        s.code for s in ApprovalsSeen(consortium.folder).read(consortium.study, consortium.enrolled, late)
    ] == [
        "approval-expired",
        "approval-expired",
        "not-seen",
    ]
    file = consortium.folder / "approvals" / "east.json"
    file.write_bytes(file.read_bytes().replace(b"a", b"b", 1))
    assert ApprovalsSeen(consortium.folder).read(consortium.study, consortium.enrolled)[0].approval is None


def test_nothing_is_committed_below_the_quorum_of_replies(consortium: Consortium) -> None:
    consortium.sites["east"].refuse = consortium.sites["west"].refuse = "budget-exceeded"
    with pytest.raises(QuorumError, match="Round 1 counts 1 sites, the quorum is 2"):
        consortium.loop().run(consortium.start())
    assert [r.round for r in consortium.store().records()] == [0]


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, nothing is cleaned up."""


def test_a_kill_at_every_step_of_every_commit_loses_nothing(consortium_of: Callable[..., Consortium]) -> None:
    plain = consortium_of(id="undisturbed")
    plain.folder = plain.folder.with_name("plain")
    undisturbed = plain.loop().run(plain.start())
    steps: list[str] = []
    plain.folder = plain.folder.with_name("counting")
    plain.loop(on_step=steps.append).run(plain.start())
    assert len(steps) == 4 * 9
    for kill_at in range(len(steps)):
        consortium = consortium_of(id="killed")
        consortium.folder = consortium.folder.with_name(f"killed-{kill_at}")
        seen = 0

        def maybe_kill(_step: str, kill_at: int = kill_at) -> None:
            nonlocal seen
            seen += 1
            if seen == kill_at + 1:
                raise Killed

        with pytest.raises(Killed):
            consortium.loop(on_step=maybe_kill).run(consortium.start())
        committed = len(consortium.store().records())
        again = consortium.loop().run(consortium.start())
        assert arrays_digest(again.adapter) == arrays_digest(undisturbed.adapter), steps[kill_at]
        records = consortium.store().records()
        assert [r.round for r in records] == [0, 1, 2, 3]
        # The row is the commit: before it the round is asked again, after it never.
        assert committed == sum(step == "done" for step in steps[: kill_at + 1]), steps[kill_at]
        assert not list(consortium.folder.glob("rounds/.partial-*"))


def test_an_altered_round_stops_the_study(consortium: Consortium) -> None:
    consortium.loop().run(consortium.start())
    altered = consortium.store().records()[2].model_copy(update={"included": ("east",)})
    with consortium.registry.write() as connection:
        connection.execute(text("DROP TRIGGER rounds_update_refused"))
        # The digest of the row is made to fit; the next round still names the one before.
        connection.execute(text("PRAGMA defer_foreign_keys=ON"))
        connection.execute(update(RoundRow).where(RoundRow.round == 3).values(previous=altered.digest))
        connection.execute(update(RoundRow).where(RoundRow.round == 2).values(**seal(altered)))
    with pytest.raises(BadInputError, match="altered") as caught:
        consortium.loop().run(consortium.start())
    assert caught.value.code == "rounds-broken"


def test_a_round_without_its_files_stops_the_study(consortium: Consortium) -> None:
    consortium.loop().run(consortium.start())
    shutil.rmtree(consortium.folder / "rounds" / "00002")
    with pytest.raises(BadInputError, match="tensors are not in the run's folder") as caught:
        consortium.loop().run(consortium.start())
    assert caught.value.code == "rounds-broken"


def test_an_altered_adapter_stops_the_study(consortium: Consortium) -> None:
    consortium.loop().run(consortium.start())
    place = consortium.folder / "rounds" / "00003" / "adapter.safetensors"
    data = bytearray(place.read_bytes())
    data[-1] ^= 1
    place.write_bytes(data)
    with pytest.raises(Exception, match="not the file its document names"):
        consortium.loop().run(consortium.start())


def test_only_enrolled_nodes_are_addressed(consortium: Consortium) -> None:
    consortium.loop().run(consortium.start())
    assert {m.metadata.dst_node_id for m in consortium.grid.sent} == set(consortium.nodes.values())
