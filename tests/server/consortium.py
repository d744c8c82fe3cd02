"""A consortium in memory: three enrolled sites that answer with scripted updates, and a study they approved."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from pixcell_core.contracts.canonical import parse_document
from pixcell_core.contracts.enrolment import EnrolmentRequest
from pixcell_core.contracts.round import PREPARE, PrepareReply, TrainReply, TrainRequest
from pixcell_core.contracts.spool import Arrays
from pixcell_core.contracts.study import AdapterSettings, Approval, Study
from pixcell_core.flower.messages import document_of, pack
from pixcell_core.trust.keys import SigningKey
from server.registry.opening import open_registry
from server.registry.registry import Registry
from server.rounds.board import LiveBoard, RunBoard
from server.rounds.exchange import RoundExchange
from server.rounds.heads import HeadBook
from server.rounds.loop import LoopSettings, RoundLoop
from server.rounds.store import RoundStore
from tests.any_study import any_study
from tests.server.local_grid import LocalGrid

SITES = ("east", "north", "west")
SHAPES = {"block.lora_B.default.weight": (6, 2), "other.lora_B.default.weight": (4, 2)}


def make_study(**changes: Any) -> Study:
    """A small study that three sites can train."""
    settings: dict[str, Any] = {
        "id": "study-one",
        "adapter": AdapterSettings(rank=2, targets=("block", "other")),
        "sites": SITES,
        "round_timeout_s": 5.0,
        "reply_grid_s": 0.0,
    }
    return any_study(**settings | changes)


def make_node_key() -> str:
    """A public node key in text form."""
    public = ec.generate_private_key(ec.SECP384R1()).public_key()
    return public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def update_of(site: str, number: int) -> Arrays:
    """The update a scripted site sends in a round; exact in float32."""
    value = (SITES.index(site) + 1) * number / 64
    return {name: np.full(shape, value, dtype=np.float32) for name, shape in SHAPES.items()}


@dataclass
class ScriptedSite:
    """Answers as an honest agent would, without a trainer. What it sends can be replaced."""

    name: str
    key: SigningKey
    study: Study
    decision: str = "approve"
    configured: bool = True
    code: str = "ok"
    update: Callable[[int], Arrays] | None = None
    refuse: str = ""
    trained: list[int] = field(default_factory=list)

    def approval(self, **changes: Any) -> str:
        """The signed approval as text."""
        settings = {
            "study_id": self.study.id,
            "study_digest": self.study.digest,
            "site": self.name,
            "decision": self.decision,
            "epsilon_cap": self.study.epsilon_cap,
            "decided_at": datetime.now(UTC),
            "expires_at": self.study.expires_at,
        }
        return Approval.model_validate(settings | changes).sign(self.key).to_bytes().decode()

    def app(self) -> ClientApp:
        """The site's ClientApp."""
        made = ClientApp()

        @made.query(PREPARE)
        def prepare(message: Message, context: Context) -> Message:
            reply = PrepareReply(
                study_digest=self.study.digest,
                approval=self.approval(),
                configured=self.configured,
                code=self.code,
                reason="" if self.configured else "the site's trainer is not running",
            )
            return Message(pack(reply), reply_to=message)

        @made.train()
        def train(message: Message, context: Context) -> Message:
            request = parse_document(TrainRequest, document_of(message))
            self.trained.append(request.round)
            update = (self.update or (lambda number: update_of(self.name, number)))(request.round)
            reply = TrainReply(
                study_digest=request.study_digest,
                round=request.round,
                input_digest=request.input_digest,
                status="refused" if self.refuse else "ok",
                code=self.refuse or "ok",
            )
            return Message(pack(reply, {} if self.refuse else update), reply_to=message)

        return made


@dataclass
class Consortium:
    """Everything a round loop needs, in a temporary folder."""

    folder: Path
    study: Study
    sites: dict[str, ScriptedSite]
    enrolled: dict[str, EnrolmentRequest]
    nodes: dict[str, int]
    grid: LocalGrid

    def loop(
        self,
        on_step: Callable[[str], None] = lambda step: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        exchange: RoundExchange | None = None,
        **settings: float,
    ) -> RoundLoop:
        """A fresh loop on the same folder, as after a restart."""
        waits = {"poll_s": 0.002, "ask_again_s": 0.05, "ready_timeout_s": 1.0} | settings
        return RoundLoop(
            self.grid,
            self.study,
            self.enrolled,
            lambda: self.nodes,
            self.store(on_step),
            LiveBoard(self.board(), self.study),
            HeadBook(self.registry),
            LoopSettings(**waits),
            clock,
            sleep,
            folder=self.folder,
            exchange=exchange,
        )

    def start(self) -> Arrays:
        """The adapter of round 0."""
        return {name: np.zeros(shape, dtype=np.float32) for name, shape in SHAPES.items()}

    def board(self) -> RunBoard:
        """The board."""
        return RunBoard(self.registry, self.study.id)

    def store(self, on_step: Callable[[str], None] = lambda step: None) -> RoundStore:
        """The committed rounds."""
        return RoundStore(self.registry, self.folder, self.study, on_step)

    @property
    def registry(self) -> Registry:
        """The registry in the folder."""
        return open_registry(self.folder)


def make_consortium(folder: Path, **changes: Any) -> Consortium:
    """Three honest sites; keyword arguments change the study."""
    study = make_study(**changes)
    keys = {name: SigningKey.generate() for name in study.sites}
    sites = {name: ScriptedSite(name, key, study) for name, key in keys.items()}
    enrolled = {
        name: EnrolmentRequest(
            site=name,
            node_key=make_node_key(),
            approval_key=key.verify_key.to_pem().decode(),
            created_at=datetime.now(UTC),
        )
        for name, key in keys.items()
    }
    nodes = {name: 100 + i for i, name in enumerate(study.sites)}
    grid = LocalGrid({nodes[name]: site.app() for name, site in sites.items()})
    return Consortium(folder, study, sites, enrolled, nodes, grid)
