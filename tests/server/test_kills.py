"""Death at hundreds of random points of whole studies: what comes out is what an undisturbed run gives, bit for bit.

Five sites: three honest ones, one that never answers a round, one whose updates are not finite. The server dies by an
exception that nothing catches, before or after a push, a pull, a screening, a note of a ledger head, a step of a
commit, or a write of the board; then everything is built anew from disk. Time is a number that only sleeping moves.
"""

from __future__ import annotations

import copy
import hashlib
import os
import random
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from pixcell_core.contracts.canonical import digest, parse_document
from pixcell_core.contracts.round import (
    PREPARE,
    KnownHead,
    PrepareReply,
    RoundRecord,
    TrainReply,
    TrainRequest,
)
from pixcell_core.contracts.spool import Arrays
from pixcell_core.contracts.study import AggregationSettings
from pixcell_core.flower.messages import document_of, pack
from server.rounds import exchange as exchange_module
from server.rounds.aggregation import StreamingMean
from server.rounds.board import RunBoard
from server.rounds.heads import HeadBook
from server.rounds.requests import QUIET_FACTOR, StopRequest, When
from server.rounds.screening import Accepted, Expected, Rejection
from server.rounds.store import CommittedRound, RoundStore
from tests.server.consortium import SHAPES, Consortium, ScriptedSite, make_consortium
from tests.server.local_grid import LocalGrid

SITES = ("a", "b", "bad", "c", "mute")
COUNTED = ("a", "b", "c")
ROUNDS, TIMEOUT_S, POLL_S, READY_S = 3, 8.0, 1.0, 10.0


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, nothing is cleaned up."""


@dataclass
class Fuse:
    """Counts the points of a run, and kills at one of them."""

    kill_at: int | None = None
    seen: int = 0
    names: list[str] = field(default_factory=list)

    def at(self, name: str) -> None:
        """One more point."""
        self.seen += 1
        self.names.append(name)
        if self.seen == self.kill_at:
            raise Killed(name)


@dataclass
class World:
    """What outlives the server: the sites, the clock, and the order in which the network delivers."""

    consortium: Consortium
    rng: random.Random
    fuse: Fuse = field(default_factory=Fuse)
    now: float = 0.0
    inputs: dict[tuple[str, int], set[str]] = field(default_factory=lambda: defaultdict(set))
    charges: dict[tuple[str, int], int] = field(default_factory=lambda: defaultdict(int))
    on_round: Callable[[int], None] = lambda number: None

    def sleep(self, seconds: float) -> None:
        """The only thing that moves time."""
        assert 0.0 <= seconds <= QUIET_FACTOR * POLL_S
        self.now += seconds

    def attempt(self, kill_at: int | None) -> CommittedRound | None:
        """One life of the server; None where it died."""
        self.fuse = Fuse(kill_at)
        began = self.now
        try:
            loop = self.consortium.loop(
                on_step=lambda step: self.fuse.at(f"commit {step}"),
                clock=lambda: self.now,
                sleep=self.sleep,
                poll_s=POLL_S,
                ask_again_s=2.0,
                ready_timeout_s=READY_S,
            )
            return loop.run(self.consortium.start())
        except Killed:
            return None
        finally:
            assert self.now - began <= READY_S + ROUNDS * (TIMEOUT_S + POLL_S)

    def records(self) -> list[RoundRecord]:
        """What is committed."""
        return self.consortium.store().records()


class StillGrid(LocalGrid):
    """Delivers when asked to, in the world's order, without threads."""

    world: World
    boxes: dict[str, list[Message]]
    looked_for: set[str]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Deliver at once; a kill comes before or after each message."""
        ids = []
        for message in messages:
            self.world.fuse.at("push")
            if message.metadata.message_type == "train":
                self.world.on_round(int(message.metadata.group_id))
            identity = f"m{self.world.rng.getrandbits(64):016x}"
            sent = Message(
                copy.deepcopy(message.content),
                dst_node_id=message.metadata.dst_node_id,
                message_type=message.metadata.message_type,
                group_id=message.metadata.group_id,
                ttl=message.metadata.ttl,
            )
            sent.metadata.__dict__.update(_message_id=identity, _run_id=1, _src_node_id=1)
            self.boxes[identity] = self._deliver(sent)
            ids.append(identity)
            self.world.fuse.at("pushed")
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Each reply is there, or comes at the second look at the latest."""
        self.world.fuse.at("pull")
        found: list[Message] = []
        for identity in message_ids:
            if self.boxes.get(identity) and (identity in self.looked_for or self.world.rng.random() < 0.6):
                found += self.boxes.pop(identity)
            self.looked_for.add(identity)
        self.world.rng.shuffle(found)
        self.world.fuse.at("pulled")
        return found


def update_for(site: str, request: TrainRequest) -> Arrays:
    """What a site sends: a function of its name, the round and the input, of sizes that float sums confuse."""
    seed = hashlib.sha256(f"{site} {request.round} {request.input_digest}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(seed[:8], "big"))
    return {
        name: (rng.standard_normal(shape) * 10.0 ** rng.integers(-9, 1, shape) * 1e-2).astype(np.float32)
        for name, shape in SHAPES.items()
    }


def app_of(world: World, site: ScriptedSite) -> ClientApp:
    """A site with a ledger: the first time it is asked for a round from an input it charges, later it repeats itself."""
    made, ledger = ClientApp(), [digest(site.name.encode())]
    known: dict[tuple[int, str], tuple[Arrays, KnownHead]] = {}

    @made.query(PREPARE)
    def prepare(message: Message, context: Context) -> Message:
        reply = PrepareReply(study_digest=site.study.digest, approval=approval_of(site), configured=True)
        return Message(pack(reply), reply_to=message)

    @made.train()
    def train(message: Message, context: Context) -> Message:
        request = parse_document(TrainRequest, document_of(message))
        head = request.ledger_head
        assert head is None or ledger[head.sequence] == head.hash, "the hub knows a head the site never had"
        world.inputs[site.name, request.round].add(request.input_digest)
        key = (request.round, request.input_digest)
        if key not in known:
            world.charges[site.name, request.round] += 1
            ledger.append(digest(f"{ledger[-1]} {key}".encode()))
            known[key] = (
                update_for(site.name, request),
                KnownHead(sequence=len(ledger) - 1, hash=ledger[-1]),
            )
        update, head = known[key]
        if site.name == "bad":
            update = {name: np.full_like(value, np.nan) for name, value in update.items()}
        reply = TrainReply(
            study_digest=request.study_digest,
            round=request.round,
            input_digest=request.input_digest,
            status="ok",
            # Of a repeated answer it is the head of then; the ledger has not grown since, in a study alone.
            ledger_head=head,
        )
        return Message(pack(reply, update), reply_to=message)

    return made


_signed: dict[tuple[str, str], str] = {}


def approval_of(site: ScriptedSite) -> str:
    """The site's approval, signed once: signatures are not what is tested here."""
    key = (site.study.digest, site.name)
    if key not in _signed:
        _signed[key] = site.approval(decided_at=datetime.now(UTC))
    return _signed[key]


RULES = {
    "fedavg": AggregationSettings(),
    "fedadam": AggregationSettings(server_optimizer="adam", server_learning_rate=0.1),
    "median": AggregationSettings(rule="median"),
}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Consortium]:
    """One consortium per rule; its keys are made once."""
    made: dict[str, Consortium] = {}

    def of(rule: str) -> Consortium:
        if rule not in made:
            made[rule] = make_consortium(
                tmp_path_factory.mktemp(rule),
                sites=SITES,
                quorum=3,
                rounds=ROUNDS,
                round_timeout_s=TIMEOUT_S,
                aggregation=RULES[rule],
            )
            made[rule].grid.close()
        return made[rule]

    return of


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: a study's board is replaced some hundred times."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="pixcell-kills-") as folder:
        yield Path(folder)


@pytest.fixture
def world_of(
    template: Callable[[str], Consortium], quick: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, int], World]:
    """Makes a world whose server can be killed everywhere; the number seeds the order of deliveries."""
    worlds: list[World] = []

    def around(kind: type, name: str, point: str) -> None:
        real = getattr(kind, name)

        def act(self: Any, *args: Any, **named: Any) -> Any:
            worlds[-1].fuse.at(point)
            result = real(self, *args, **named)
            worlds[-1].fuse.at(f"{point} done")
            return result

        monkeypatch.setattr(kind, name, act)

    # A process dies here, not the machine: what was written stays written without a flush.
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    around(RunBoard, "write", "board")
    around(HeadBook, "note", "head")
    real_screen = exchange_module.screen

    def screen(message: Message, expected: Expected, known: KnownHead | None) -> Accepted | Rejection:
        worlds[-1].fuse.at("screen")
        verdict = real_screen(message, expected, known)
        worlds[-1].fuse.at("screened")
        return verdict

    monkeypatch.setattr(exchange_module, "screen", screen)

    def make(rule: str, seed: int) -> World:
        old = template(rule)
        folder = quick / f"{rule}-{len(worlds)}"
        grid = StillGrid({}, workers=1)
        world = World(
            Consortium(folder, old.study, old.sites, old.enrolled, old.nodes, grid), random.Random(seed)
        )
        apps = {old.nodes[name]: app_of(world, site) for name, site in old.sites.items()}
        StillGrid.__init__(grid, apps, workers=1)
        grid.world, grid.boxes, grid.looked_for = world, {}, set()
        mute = old.nodes["mute"]
        grid.tamper = lambda question, reply: (
            []
            if question.metadata.dst_node_id == mute and question.metadata.message_type == "train"
            else [reply]
        )
        worlds.append(world)
        return world

    return make


def result_of(world: World) -> list[tuple[str, str | None, tuple[str, ...]]]:
    """What a study came to: per round the digests of adapter and optimiser, and who counts."""
    return [(r.adapter_digest, r.state_digest, r.included) for r in world.records()]


def live_through(world: World, kills: list[int]) -> int:
    """Start the server again after every death; returns how often it died."""
    deaths = 0
    for kill_at in kills:
        if world.attempt(kill_at) is None:
            deaths += 1
    assert world.attempt(None) is not None
    return deaths


def check(world: World, undisturbed: list[tuple[str, str | None, tuple[str, ...]]]) -> None:
    """Everything a death must not change."""
    assert result_of(world) == undisturbed
    assert [r.round for r in world.records()] == list(range(ROUNDS + 1))
    for site in COUNTED:
        for number in range(1, ROUNDS + 1):
            assert len(world.inputs[site, number]) == 1, "a site saw another input for the same round"
            assert world.charges[site, number] == 1, "a round was charged twice"
    folder = world.consortium.folder
    assert not list(folder.glob("rounds/.partial-*")) and not (folder / "spill").exists()
    state = world.consortium.board().read()
    assert state is not None and state.state == "completed" and state.committed == ROUNDS
    assert {s.site: s.rounds_counted for s in state.sites} == {
        site: ROUNDS if site in COUNTED else 0 for site in SITES
    }


@pytest.mark.parametrize(("rule", "runs", "seed"), [("fedavg", 90, 1), ("fedadam", 90, 2), ("median", 20, 3)])
def test_death_anywhere_gives_the_undisturbed_result(
    world_of: Callable[[str, int], World], rule: str, runs: int, seed: int
) -> None:
    calm = world_of(rule, seed)
    assert calm.attempt(None) is not None
    undisturbed = result_of(calm)
    check(calm, undisturbed)
    points = calm.fuse.seen
    kinds = set(calm.fuse.names)
    assert {"push", "pushed", "pull", "pulled", "screen", "screened", "head", "head done", "board"} <= kinds
    assert {"commit rename", "commit flush-folder", "commit half-adapter.safetensors"} <= kinds
    rng, deaths = random.Random(seed), 0
    for number in range(runs):
        # Every fourth server dies again on its way back.
        kills = [rng.randint(1, points) for _ in range(2 if number % 4 == 0 else 1)]
        world = world_of(rule, 1000 * seed + number)
        deaths += live_through(world, kills)
        check(world, undisturbed)
    assert deaths >= runs


def naive_result(self: StreamingMean) -> Any:
    """The mean in float32, in the order of arrival."""
    return (np.add.reduce(self.kept) / np.float32(self.count)).astype(np.float64)  # type: ignore[attr-defined]


def naive_add(self: StreamingMean, site: str, update: Any) -> None:
    """Keeps the update for `naive_result`."""
    self.kept = [*getattr(self, "kept", []), update]  # type: ignore[attr-defined]
    self.count += 1


def test_the_check_sees_a_sum_that_depends_on_the_order(
    world_of: Callable[[str, int], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StreamingMean, "add", naive_add)
    monkeypatch.setattr(StreamingMean, "result", naive_result)
    results = set()
    for seed in range(12):
        world = world_of("fedavg", seed)
        assert world.attempt(None) is not None
        results.add(tuple(result_of(world)))
    assert len(results) > 1


def test_the_check_sees_an_optimiser_that_forgets(
    world_of: Callable[[str, int], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = world_of("fedadam", 2)
    assert calm.attempt(None) is not None
    second = [i for i, n in enumerate(calm.fuse.names, 1) if n == "commit done"][2]
    world = world_of("fedadam", 7)
    latest = RoundStore.latest

    def forgetful(self: RoundStore) -> CommittedRound | None:
        found = latest(self)
        return None if found is None else CommittedRound(found.record, found.adapter, None)

    monkeypatch.setattr(RoundStore, "latest", forgetful)
    live_through(world, [second])
    with pytest.raises(AssertionError):
        check(world, result_of(calm))


@pytest.mark.parametrize(("when", "kept"), [("now", 1), ("after-round", 2)])
def test_a_study_that_was_stopped_and_resumed_is_an_undisturbed_one(
    world_of: Callable[[str, int], World], when: When, kept: int
) -> None:
    calm = world_of("fedadam", 2)
    assert calm.attempt(None) is not None
    world = world_of("fedadam", 11)
    stop = StopRequest(world.consortium.folder)
    world.on_round = lambda number: stop.ask(when) if number == 2 else None
    first = world.attempt(None)
    assert first is not None and first.record.round == kept
    state = world.consortium.board().read()
    assert state is not None and state.state == "stopped" and state.process is None
    assert "Stopped by the coordinator" in state.reason and stop.wanted() is None
    assert max(number for _, number in world.inputs) == 2, "a site was told something after the stop"
    world.on_round = lambda number: None
    assert world.attempt(None) is not None
    check(world, result_of(calm))
