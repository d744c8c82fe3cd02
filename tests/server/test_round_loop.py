"""The round loop: what is counted, what a quorum means, and that a kill at any instant loses nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from pixcell_core.contracts.spool import arrays_digest
from server.rounds.loop import QuorumError
from server.rounds.store import RoundStore
from tests.server.consortium import SITES, Consortium, update_of


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
        consortium.loop(ready_timeout_s=0.3).run(consortium.start())


def test_a_quorum_goes_on_without_the_rest_and_records_why(consortium: Consortium) -> None:
    consortium.grid.offline = {consortium.nodes["east"]}
    done = consortium.loop(ready_timeout_s=0.3).run(consortium.start())
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
    done = consortium.loop(ready_timeout_s=0.3).run(consortium.start())
    assert "east" not in done.record.included and east.trained == []


def test_an_approval_signed_by_another_does_not_count(consortium: Consortium) -> None:
    consortium.sites["east"].key = consortium.sites["north"].key
    done = consortium.loop(ready_timeout_s=0.3).run(consortium.start())
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


def test_nothing_is_committed_below_the_quorum_of_replies(consortium: Consortium) -> None:
    consortium.sites["east"].refuse = consortium.sites["west"].refuse = "budget-exceeded"
    with pytest.raises(QuorumError, match="Round 1 counts 1 sites, the quorum is 2"):
        consortium.loop().run(consortium.start())
    assert [r.round for r in RoundStore(consortium.folder, consortium.study).records()] == [0]


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
        committed = len(RoundStore(consortium.folder, consortium.study).records())
        again = consortium.loop().run(consortium.start())
        assert arrays_digest(again.adapter) == arrays_digest(undisturbed.adapter), steps[kill_at]
        records = RoundStore(consortium.folder, consortium.study).records()
        assert [r.round for r in records] == [0, 1, 2, 3]
        # The rename is the commit: before it the round is asked again, after it never.
        assert committed == sum(step == "flush-folder" for step in steps[: kill_at + 1]), steps[kill_at]
        assert not list(consortium.folder.glob("rounds/.partial-*"))


def test_an_altered_round_stops_the_study(consortium: Consortium) -> None:
    consortium.loop().run(consortium.start())
    place = consortium.folder / "rounds" / "00002" / "round.json"
    record = json.loads(place.read_text())
    place.write_text(json.dumps(record | {"included": ["east"]}))
    with pytest.raises(Exception, match="gap or was altered"):
        consortium.loop().run(consortium.start())


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
