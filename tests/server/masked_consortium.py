"""A masked consortium on the in-process grid: the agents' real masking on real folders, with scripted updates."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from pixcell_core.contracts.canonical import parse_document
from pixcell_core.contracts.round import TrainReply, TrainRequest
from pixcell_core.contracts.spool import Arrays, arrays_digest, unflatten
from pixcell_core.contracts.study import Study
from pixcell_core.errors import PixcellError
from pixcell_core.flower.messages import document_of, pack, pack_words
from pixcell_core.trust.keys import SigningKey
from server.registry.opening import open_registry
from server.rounds.heads import HeadBook
from server.rounds.masked import MaskedExchange, MaskedSettings
from site_client.agent.masking import SiteMasking, answer_masking
from site_client.approvals.book import ApprovalBook
from site_client.approvals.site_folder import SiteFolder, SiteIdentity
from tests.pixcell_core.masking.parties import BOUND, make_masked_study
from tests.server.local_grid import LocalGrid

Make = Callable[..., "MaskedConsortium"]
NAME = "block.lora_B.default.weight"


def train_reply(request: TrainRequest, code: str = "ok", reason: str = "") -> TrainReply:
    """The document of a reply."""
    return TrainReply(
        study_digest=request.study_digest,
        round=request.round,
        input_digest=request.input_digest,
        status="ok" if code == "ok" else "refused",
        code=code,
        reason=reason,
    )


def make_site(folder: Path, name: str, key: SigningKey) -> SiteFolder:
    """The files that the agent's masking needs of an enrolled site."""
    made = SiteFolder(folder)
    made.keys.mkdir(parents=True)
    key.save(made.approval_key)
    identity = SiteIdentity(site=name, hub="h:1")
    made.identity_file.write_bytes(identity.to_bytes())
    return made


class IdleClock:
    """Time passes only while no site is at work: a deadline cuts off those who never answer, however slow the machine."""

    def __init__(self, grid: LocalGrid) -> None:
        self._grid, self._now = grid, 0.0

    def now(self) -> float:
        """Seconds."""
        return self._now

    def sleep(self, seconds: float) -> None:
        """Wait for sites at work; otherwise let the time pass."""
        if all(job.done() for job in list(self._grid._jobs.values())):
            self._now += seconds
        else:
            time.sleep(seconds)


@dataclass
class MaskedConsortium:
    """Sites, their folders, and a grid between them and the hub's exchange."""

    folder: Path
    study: Study
    sites: dict[str, SiteFolder]
    size: int
    trained: list[str] = field(default_factory=list)
    masked: bool = True

    def __post_init__(self) -> None:
        self.nodes = {name: 100 + i for i, name in enumerate(self.sites)}
        self.names = {node: name for name, node in self.nodes.items()}
        self.grid = LocalGrid({self.nodes[name]: self.app(name) for name in self.sites}, workers=2)

    def settle(self) -> None:
        """Wait until no site is at work any more."""
        while not all(job.done() for job in list(self.grid._jobs.values())):
            time.sleep(0.002)

    def masking(self, site: str) -> SiteMasking:
        """The masking of one site, as a new process of its agent would make it."""
        return SiteMasking(self.sites[site], lambda digest: self.study)

    def app(self, site: str) -> ClientApp:
        """The site's app: the masking questions, and a round without a trainer."""
        made, masking = ClientApp(), self.masking(site)
        answer_masking(made, masking)

        @made.train()
        def train(message: Message, context: Context) -> Message:
            request = parse_document(TrainRequest, document_of(message))
            update = unflatten(self.update(site, request.round), {NAME: (self.size,)})
            try:
                if not masking.accept(self.study, request):
                    return Message(pack(train_reply(request), update), reply_to=message)
                self.trained.append(site)
                words = masking.mask(self.study, request, update)
            except PixcellError as error:
                refused = train_reply(request, error.code, error.message)
                return Message(pack(refused), reply_to=message)
            return Message(pack_words(train_reply(request), words), reply_to=message)

        return made

    def update(self, site: str, number: int) -> npt.NDArray[np.float32]:
        """A site's update of a round."""
        draw = np.random.default_rng([list(self.sites).index(site), number])
        return draw.normal(0, BOUND / 4, self.size).astype(np.float32)

    def plain(self, sites: Sequence[str], number: int = 1) -> npt.NDArray[np.float64]:
        """The sum without masks."""
        return np.sum(
            [np.clip(self.update(s, number).astype(np.float64), -BOUND, BOUND) for s in sites], axis=0
        )

    @property
    def adapter(self) -> Arrays:
        """The adapter that a round starts from."""
        return {NAME: np.zeros(self.size, np.float32)}

    @property
    def input_digest(self) -> str:
        """Its digest."""
        return arrays_digest(self.adapter)

    def exchange(self, **settings: Any) -> MaskedExchange:
        """A fresh exchange on the same folder, as after a restart."""
        waits = {"poll_s": 0.002, "stage_timeout_s": 0.4} | settings
        clock = IdleClock(self.grid)
        return MaskedExchange(
            self.grid,
            self.study,
            lambda: self.nodes,
            self.folder / "masked",
            HeadBook(open_registry(self.folder)),
            MaskedSettings(**waits),
            clock=clock.now,
            sleep=clock.sleep,
        )


def make_masked_consortium(
    folder: Path, count: int = 5, threshold: int = 3, size: int = 50, **changes: Any
) -> MaskedConsortium:
    """`count` sites that approved the study."""
    keys = {f"s{i:03d}": SigningKey.generate() for i in range(count)}
    now = datetime.now(UTC).replace(microsecond=0)
    dates = {"created_at": now, "expires_at": now + timedelta(days=1), "max_update_norm": 1e6}
    study = make_masked_study(keys, threshold, **(dates | changes))
    sites = {name: make_site(folder / name, name, key) for name, key in keys.items()}
    for site in sites.values():
        ApprovalBook(site).decide(study, "approve")
    return MaskedConsortium(folder / "hub", study, sites, size)
