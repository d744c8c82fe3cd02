"""A site with and without one patient: whatever differs in what leaves it is covered by noise, byte for byte.

One round runs twice through the real agent, spool, trainer, engine and ledger, from equal folders, equal clocks, equal
draws and an equal (known) noise key; in the second run one patient is missing. Everything that leaves is compared: the
answer to the hub's question, the reply, its tensor, and the ledger's export. Only the tensor may differ, and by no more
than the sensitivity that its noise was made for.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pixcell_core.contracts.round import ARRAYS, CONTROL, FLAT, PrepareRequest, TrainRequest
from pixcell_core.contracts.spool import TrainResult, arrays_digest, flatten
from pixcell_core.contracts.study import Study
from pixcell_core.diffusion import training_loss
from pixcell_core.flower.messages import pack
from pixcell_core.private.noise import UnsafeFixedKeySource
from pixcell_core.private.parameters import PrivacyParameters
from pixcell_core.trust.keys import SigningKey
from site_client.agent.handlers import Agent, AgentSettings
from site_client.approvals.book import ApprovalBook
from site_client.approvals.site_folder import SiteFolder
from site_client.ledger.export import export_of
from site_client.ledger.site import ledger_folder, ledger_key_path, ledger_public_key
from site_client.ledger.view import read_ledger
from site_client.trainer import service
from site_client.trainer.rounds import RoundTrainer, parameters_of
from site_client.trainer.service import Trainer, TrainerSettings
from tests.site_client.trainer.site_fixture import (
    layout_of,
    make_base,
    make_ca,
    make_features,
    make_site,
    make_study,
    start_of,
)

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


class Noon(datetime):
    """A clock that stands still."""

    @classmethod
    def now(cls, tz: Any = None) -> Noon:
        return cls(2026, 3, 1, 12, tzinfo=tz)


def plain_loss(self: RoundTrainer, model: torch.nn.Module, rows: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The trainer's loss with a noise that does not depend on how many rows stand before this one."""
    latents, condition, timestep = rows
    noise = torch.linspace(-1.7, 1.7, latents[0].numel()).reshape(latents.shape[1:]).expand_as(latents)
    return training_loss(model, latents, condition, timestep=timestep, noise=noise)


@dataclass
class Outgoing:
    """All that left a site, and what its one tensor was noised with."""

    texts: dict[str, bytes]
    tensor: np.ndarray
    study: Study

    @property
    def sensitivity(self) -> float:
        """The most one patient may move the tensor: one step of SGD on a sum of gradients no longer than C."""
        return self.study.learning_rate * self.study.max_grad_norm / self.study.expected_patients


@dataclass
class Twins:
    """Two equal sites but for one patient, and one study that both approved."""

    with_patient: SiteFolder
    without: SiteFolder
    base: Path
    study: Study

    def run(self) -> tuple[Outgoing, Outgoing]:
        """One round at each."""
        return self._outgoing(self.with_patient), self._outgoing(self.without)

    def _outgoing(self, folder: SiteFolder) -> Outgoing:
        study, start = self.study, start_of(self.base, self.study)
        agent = Agent(AgentSettings(folder, poll_s=0.002), clock=lambda: NOON)
        trainer = Trainer(TrainerSettings(folder, self.base, poll_s=0.002), lambda _: None)
        served = threading.Thread(target=trainer.run)
        served.start()
        try:
            while not trainer._ready:
                served.join(0.005)
            prepared = agent.prepare(
                PrepareRequest(study=study.model_dump(mode="json"), study_digest=study.digest)
            )
            request = TrainRequest(
                study_digest=study.digest, round=1, input_digest=arrays_digest(start), layout=layout_of(start)
            )
            reply, update = agent.train(request, start)
        finally:
            trainer.stop()
            served.join()
        view = read_ledger(ledger_folder(folder.root), ledger_public_key(folder.root))
        message = pack(reply, update)
        assert set(message) <= {CONTROL, ARRAYS}
        texts = {
            "answer": pack(prepared).config_records[CONTROL]["document"],
            "reply": message.config_records[CONTROL]["document"],
            "export": export_of(ledger_folder(folder.root), view.require_whole()).model_dump_json(),
        }
        assert reply.status == "ok", reply
        assert message.array_records[ARRAYS][FLAT].numpy().nbytes == 4 * sum(v.size for v in start.values())
        return Outgoing({k: str(v).encode() for k, v in texts.items()}, flatten(update), study)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def twins(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Twins]:
    """Sites whose only difference is the last patient; nothing else is left to chance."""
    site = make_site(tmp_path, "east", base, make_ca(tmp_path / "ca.crt"), patients=5)
    study = make_study(
        base,
        steps_per_round=1,
        round_timeout_s=600.0,
        created_at=NOON - timedelta(days=1),
        expires_at=NOON + timedelta(days=900),
        noise_multiplier=8.0,
        max_grad_norm=1e-3,
    )
    ApprovalBook(site.folder).decide(study, "approve", NOON)
    SigningKey.load_or_create(ledger_key_path(site.folder.root))
    other = SiteFolder(tmp_path / "other" / "site-east")
    shutil.copytree(site.folder.root, other.root)
    for folder, patients in ((site.folder, 5), (other, 4)):
        shutil.rmtree(folder.train_features)
        torch.manual_seed(0)
        make_features(folder.train_features, "east", patients=patients)
    monkeypatch.setattr("site_client.ledger.ledger.datetime", Noon)
    monkeypatch.setattr("site_client.trainer.rounds.SystemNoiseSource", UnsafeFixedKeySource)
    monkeypatch.setattr(
        "pixcell_core.private.engine._system_seeded", lambda: torch.Generator().manual_seed(1)
    )
    monkeypatch.setattr(RoundTrainer, "_loss", plain_loss)
    # Read anew: the job's own clock is the agent's, and the trainer compares it with the time of day.
    monkeypatch.setattr("site_client.trainer.service.datetime", Noon)
    monkeypatch.setattr("site_client.agent.handlers.alive", lambda beat, now: beat is not None)
    yield Twins(site.folder, other, base, study)


def test_only_the_noised_tensor_differs_and_by_no_more_than_its_sensitivity(twins: Twins) -> None:
    full, less = twins.run()
    assert full.texts == less.texts
    moved = float(np.linalg.norm((full.tensor - less.tensor).astype(np.float64)))
    assert 0.2 * full.sensitivity < moved <= full.sensitivity * (1 + 1e-4), "one patient, clipped to C"
    # The noise that covers it is there, and at the size that the ledger was charged for.
    noise = full.sensitivity * full.study.noise_multiplier
    assert 0.8 * noise < float(full.tensor.std()) < 1.2 * noise
    charged = json.loads(full.texts["export"])["lines"][-2]["record"]
    assert (charged["kind"], charged["noise_multiplier"]) == ("reserve", full.study.noise_multiplier)


def test_no_name_of_a_patient_or_a_tile_is_in_what_leaves(twins: Twins) -> None:
    for out in twins.run():
        for text in (*out.texts.values(), out.tensor.tobytes()):
            assert b"secret-patient" not in text and b"slide-" not in text and b"stroma" not in text


def leaking_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer adds how many patients it saw to its answer."""
    real = Trainer.handle
    made = service._result

    def handle(self: Trainer, job_id: str, **again: bool) -> None:
        def result(*args: Any, **named: Any) -> TrainResult:
            return made(*args, **named).model_copy(
                update={"ledger_head": None, "reason": str(len(self._patients))}
            )

        service._result = result
        real(self, job_id, **again)
        service._result = made

    monkeypatch.setattr(Trainer, "handle", handle)
    monkeypatch.setattr(
        Agent,
        "_reply",
        lambda self, request, head: _told(self, request),
    )


def _told(agent: Agent, request: TrainRequest) -> Any:
    from pixcell_core.contracts.round import TrainReply

    place = next((agent._spool.root / "outbox").iterdir())
    reason = json.loads((place / "result.json").read_text())["reason"]
    return TrainReply(
        study_digest=request.study_digest,
        round=request.round,
        input_digest=request.input_digest,
        status="ok",
        reason=reason,
    )


def weights_by_patients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum is divided by how many patients there are."""
    real = RoundTrainer.train

    def train(self: RoundTrainer, study: Study, *args: Any) -> Any:
        def counted(study: Study) -> PrivacyParameters:
            return replace(parameters_of(study), expected_patients=float(len(self._source.patients)))

        monkeypatch.setattr("site_client.trainer.rounds.parameters_of", counted)
        return real(self, study, *args)

    monkeypatch.setattr(RoundTrainer, "train", train)


def no_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    """A patient's gradient goes into the sum as long as it is."""
    monkeypatch.setattr("pixcell_core.private.clipping.clip_scale", lambda norm, bound: 1.0)


def charge_by_patients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger is charged with a rate that follows from the count."""
    real = service.RoundCharge

    def charge(self: Trainer, job: Any, start: Any, again: bool) -> Any:
        count = len(self._patients)
        monkeypatch.setattr(
            service, "RoundCharge", lambda *a, **k: real(*a[:5], a[5] * (1 + count / 100), *a[6:], **k)
        )
        return trained(self, job, start, again)

    trained = Trainer._train
    monkeypatch.setattr(Trainer, "_train", charge)


@pytest.mark.parametrize("plant", [leaking_count, weights_by_patients, no_clipping, charge_by_patients])
def test_the_comparison_sees_what_it_should(
    twins: Twins, monkeypatch: pytest.MonkeyPatch, plant: Any
) -> None:
    plant(monkeypatch)
    full, less = twins.run()
    moved = float(np.linalg.norm((full.tensor - less.tensor).astype(np.float64)))
    assert full.texts != less.texts or moved > full.sensitivity * 1.01
