"""Whole studies under masks on the in-process grid: the real loop, the agents' real masking, and a hub that dies."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from pixcell_core.contracts.canonical import parse_document
from pixcell_core.contracts.enrolment import EnrolmentRequest
from pixcell_core.contracts.round import PREPARE, PrepareReply, PrepareRequest
from pixcell_core.contracts.study import AdapterSettings
from pixcell_core.errors import PixcellError
from pixcell_core.flower.messages import document_of, pack
from pixcell_core.masking import saved_attempt
from pixcell_core.trust.keys import SigningKey
from server.registry.opening import open_registry
from server.rounds import masked as masked_module
from server.rounds.board import LiveBoard, RunBoard
from server.rounds.exchange import PlainExchange, RoundQuestion
from server.rounds.heads import HeadBook
from server.rounds.loop import LoopSettings, RoundLoop
from server.rounds.masked_rounds import MaskedRoundError, MaskedRounds
from server.rounds.store import CommittedRound, RoundStore
from site_client.approvals.book import ApprovalBook
from tests.pixcell_core.masking.parties import BOUND
from tests.server.consortium import make_node_key
from tests.server.masked_consortium import MaskedConsortium, make_masked_consortium

ROUNDS, SIZE = 2, 40
ADAPTER = AdapterSettings(rank=SIZE, targets=("block",))


class Killed(BaseException):
    """Stands for SIGKILL."""


@dataclass
class World:
    """A masked consortium with a loop that can be killed at numbered points."""

    sites: MaskedConsortium
    enrolled: dict[str, EnrolmentRequest]
    kill_at: int | None = None
    seen: int = 0
    names: list[str] = field(default_factory=list)

    def point(self, name: str) -> None:
        """One more place where the hub may die."""
        self.seen += 1
        self.names.append(name)
        if self.seen == self.kill_at:
            raise Killed(name)

    @property
    def folder(self) -> Path:
        return self.sites.folder

    def attempt(self, kill_at: int | None = None) -> CommittedRound | None:
        """One life of the hub; None where it died."""
        self.kill_at, self.seen, self.names = kill_at, 0, []
        study, grid = self.sites.study, self.sites.grid
        registry = open_registry(self.folder)
        board, heads = LiveBoard(RunBoard(registry, study.id), study), HeadBook(registry)
        exchange = MaskedRounds(
            grid, study, heads, board, folder=self.folder / "masked", poll_s=0.002, stage_timeout_s=20.0
        )
        try:
            loop = RoundLoop(
                grid,
                study,
                self.enrolled,
                lambda: self.sites.nodes,
                RoundStore(registry, self.folder, study, lambda step: self.point(f"commit {step}")),
                board,
                heads,
                LoopSettings(poll_s=0.002, ask_again_s=0.05, ready_timeout_s=10.0),
                folder=self.folder,
                exchange=exchange,
            )
            return loop.run(self.sites.adapter)
        except Killed:
            self.sites.settle()
            return None

    def expected(self) -> np.ndarray:
        """The adapter that the plain means of the clipped updates give."""
        adapter = np.zeros(self.sites.size)
        for number in range(1, ROUNDS + 1):
            adapter += self.sites.plain(list(self.sites.sites), number) / len(self.sites.sites)
        return adapter


def app_of(world: World, site: str) -> ClientApp:
    """The site's masked app, which also answers whether it is ready, and notes what it is asked to open."""
    masked, folder = world.sites.app(site), world.sites.sites[site]
    made = ClientApp()

    @made.query(PREPARE)
    def prepare(message: Message, context: Context) -> Message:
        parse_document(PrepareRequest, document_of(message), name="question")
        approval = ApprovalBook(folder).require(world.sites.study).to_bytes().decode()
        reply = PrepareReply(study_digest=world.sites.study.digest, approval=approval, configured=True)
        return Message(pack(reply), reply_to=message)

    def others(message: Message, context: Context) -> Message:
        return masked(message, context)

    class Both:
        """The questions of the loop, and those under masks."""

        def __call__(self, message: Message, context: Context) -> Message:
            ready = message.metadata.message_type == f"query.{PREPARE}"
            return made(message, context) if ready else others(message, context)

    return Both()  # type: ignore[return-value]


@pytest.fixture
def world_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., World]:
    """Makes worlds; their hubs die before and after each push, each save of an attempt, each step of a commit."""
    worlds: list[World] = []
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    real_save, real_drop = saved_attempt.save_attempt, saved_attempt.drop_attempt

    def save(folder: Path, hub: Any) -> None:
        worlds[-1].point("save")
        real_save(folder, hub)
        worlds[-1].point("saved")

    def drop(folder: Path) -> None:
        worlds[-1].point("drop")
        real_drop(folder)

    monkeypatch.setattr(masked_module, "save_attempt", save)
    monkeypatch.setattr(masked_module, "drop_attempt", drop)

    def make(**changes: Any) -> World:
        number = len(worlds)
        sites = make_masked_consortium(
            tmp_path / f"w{number}", 3, 2, size=SIZE, rounds=ROUNDS, quorum=3, adapter=ADAPTER, **changes
        )
        enrolled = {
            name: EnrolmentRequest(
                site=name,
                node_key=make_node_key(),
                approval_key=SigningKey.load(folder.approval_key).verify_key.to_pem().decode(),
                created_at=sites.study.created_at,
            )
            for name, folder in sites.sites.items()
        }
        world = World(sites, enrolled)
        for site in sites.sites:
            sites.grid._apps[sites.nodes[site]] = app_of(world, site)
        push = sites.grid.push_messages

        def counted(messages: Any) -> list[str]:
            world.point("push")
            sent = push(messages)
            world.point("pushed")
            return sent

        sites.grid.push_messages = counted  # type: ignore[method-assign]
        worlds.append(world)
        return world

    return make


def adapter_of(done: CommittedRound | None) -> np.ndarray:
    assert done is not None
    return np.concatenate([done.adapter[n].ravel() for n in sorted(done.adapter)])


def test_a_study_under_masks_gives_the_mean_of_the_clipped_updates(world_of: Callable[..., World]) -> None:
    world = world_of()
    found = adapter_of(world.attempt())
    wanted = world.expected()
    assert np.linalg.norm(found - wanted) <= 1e-6 * np.linalg.norm(wanted)
    records = RoundStore(open_registry(world.folder), world.folder, world.sites.study).records()
    assert [len(r.included) for r in records] == [0, 3, 3]
    assert all(t.bytes_in > 4 * world.sites.size and t.bytes_out > 0 for r in records[1:] for t in r.traffic)
    assert sorted(world.sites.trained) == sorted([*world.sites.sites] * ROUNDS)


def test_a_hub_that_dies_anywhere_comes_to_the_same_adapter_and_opens_each_round_once(
    world_of: Callable[..., World],
) -> None:
    calm = world_of()
    undisturbed, points = adapter_of(calm.attempt()), calm.seen
    assert {"push", "pushed", "save", "saved", "drop", "commit rename", "commit done"} <= set(calm.names)
    rng = random.Random(5)
    died = 0
    for kill_at in sorted(rng.sample(range(1, points + 1), 14)):
        world = world_of()
        died += world.attempt(kill_at) is None
        found = adapter_of(world.attempt())
        assert np.allclose(found, undisturbed, atol=2 * BOUND * 2**-28 * 3 * ROUNDS), calm.names[kill_at - 1]
        records = RoundStore(open_registry(world.folder), world.folder, world.sites.study).records()
        assert [r.round for r in records] == list(range(ROUNDS + 1))
    assert died >= 12


def test_without_the_kept_attempt_a_death_after_the_opening_ends_the_study(
    world_of: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant: sites open a round once, so a hub that forgot what it was opening cannot try it again."""
    calm = world_of()
    assert calm.attempt() is not None
    # The push that asks to open follows the save.
    kill_at = calm.names.index("saved") + 3
    assert calm.names[kill_at - 1] == "pushed"
    world = world_of()
    assert world.attempt(kill_at) is None
    saved_attempt.drop_attempt(world.folder / "masked")
    with pytest.raises(PixcellError):
        world.attempt()


def test_a_site_that_is_asked_for_a_plain_update_sends_none(world_of: Callable[..., World]) -> None:
    world = world_of()
    study = world.sites.study
    registry = open_registry(world.folder)
    board = LiveBoard(RunBoard(registry, study.id), study)
    plain = PlainExchange(
        world.sites.grid, study, HeadBook(registry), board, spill=world.folder / "spill", poll_s=0.002
    )
    question = RoundQuestion(1, world.sites.adapter, world.sites.input_digest, world.sites.nodes, 20.0)
    outcome = plain.collect(question, lambda: None)
    assert outcome.update is None and {why.code for why in outcome.excluded.values()} == {"masking-missing"}
    assert world.sites.trained == []


def test_too_few_under_masks_is_a_failure_with_its_reasons(world_of: Callable[..., World]) -> None:
    world = world_of()
    world.sites.grid.tamper = lambda question, reply: (
        [] if question.metadata.message_type == "train" and question.metadata.dst_node_id == 100 else [reply]
    )
    study = world.sites.study
    registry = open_registry(world.folder)
    board = LiveBoard(RunBoard(registry, study.id), study)
    exchange = MaskedRounds(
        world.sites.grid, study, HeadBook(registry), board, folder=world.folder / "masked", poll_s=0.002
    )
    question = RoundQuestion(1, world.sites.adapter, world.sites.input_digest, world.sites.nodes, 1.0)
    with pytest.raises(MaskedRoundError) as failed:
        exchange.collect(question, lambda: None)
    assert failed.value.code == "below-quorum" and "s000: no reply within 1 s" in failed.value.message
    assert failed.value.hint
