"""The agent: it answers for what its site signed, hands rounds to the trainer, and tells nothing else."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from pixcell_core.contracts.canonical import digest
from pixcell_core.contracts.round import KnownHead, PrepareRequest, TrainRequest
from pixcell_core.contracts.spool import Arrays, SpoolError, TrainerBeat, TrainResult, arrays_digest
from pixcell_core.contracts.study import Study
from site_client.agent.handlers import Agent, AgentSettings, job_id_of
from site_client.agent.network import replace_names
from site_client.approvals.book import ApprovalBook
from site_client.approvals.enrolment import enrol
from site_client.approvals.site_folder import SiteFolder
from site_client.trainer.spool import Spool
from tests.server.consortium import make_study
from tests.site_client.trainer.site_fixture import layout_of, make_ca

ADAPTER: Arrays = {"a.lora_B.default.weight": np.zeros((3, 2), np.float32)}
UPDATE: Arrays = {"a.lora_B.default.weight": np.ones((3, 2), np.float32)}


def write_beat(
    folder: SiteFolder, study: Study, *, age_s: float = 0.0, ready: bool = True, **other: str
) -> None:
    """A trainer's sign of life."""
    settings = {"base_digest": study.base_digest, "code_digest": study.code_digest} | other
    spool = Spool(folder.spool)
    spool.open()
    spool.write_beat(
        TrainerBeat(
            process=1,
            instance=secrets.token_hex(8),
            beat_at=datetime.now(UTC) - timedelta(seconds=age_s),
            ready=ready,
            **settings,
        )
    )


class StandInTrainer:
    """Answers every job in a thread with a fixed update, as the trainer would through the spool."""

    def __init__(self, folder: SiteFolder, study: Study, status: str = "ok", code: str = "ok") -> None:
        self._spool, self._folder, self._study, self._status, self._code = (
            Spool(folder.spool),
            folder,
            study,
            status,
            code,
        )
        self.jobs: list[str] = []
        self.head: KnownHead | None = None
        self.told: list[tuple[KnownHead, ...]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> StandInTrainer:
        self._spool.open()
        write_beat(self._folder, self._study)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.005):
            taken = self._spool.take()
            if taken is None:
                continue
            self.jobs.append(taken)
            job, _ = self._spool.read_job(taken)
            self.told.append(job.known_heads)
            good = self._status == "ok"
            result = TrainResult(
                job_id=job.job_id,
                study_digest=job.study_digest,
                round=job.round,
                input_digest=job.input_digest,
                status="ok" if good else "refused",
                code=self._code,
                reason="" if good else "the round would pass the site's privacy budget",
                update_digest=arrays_digest(UPDATE) if good else None,
                ledger_head=self.head if good else None,
            )
            self._spool.answer(result, UPDATE if good else None)


@pytest.fixture
def folder(tmp_path: Path) -> SiteFolder:
    """An enrolled site named east."""
    made = SiteFolder(tmp_path / "east")
    enrol(made, "east", "h:1", make_ca(tmp_path / "ca.crt"))
    return made


@pytest.fixture
def agent(folder: SiteFolder) -> Iterator[Agent]:
    """An agent that looks often and waits little for a lost trainer."""
    return Agent(AgentSettings(folder, poll_s=0.005, trainer_grace_s=0.3))


def question(study: Study) -> PrepareRequest:
    """The hub's question."""
    return PrepareRequest(study=study.model_dump(mode="json"), study_digest=study.digest)


def round_of(study: Study, number: int = 1, adapter: Arrays = ADAPTER) -> TrainRequest:
    """A round of the study."""
    return TrainRequest(
        study_digest=study.digest,
        round=number,
        input_digest=arrays_digest(adapter),
        layout=layout_of(adapter),
    )


def test_an_unapproved_study_gets_no_proof_and_no_round(agent: Agent, folder: SiteFolder) -> None:
    study = make_study()
    write_beat(folder, study)
    reply = agent.prepare(question(study))
    assert (reply.approval, reply.configured, reply.code) == ("", False, "not-approved")
    refused, arrays = agent.train(round_of(study), ADAPTER)
    assert (refused.status, refused.code, arrays) == ("refused", "unknown-study", {})
    assert not list(folder.spool.glob("inbox/*"))


def test_ready_means_a_living_trainer_with_the_studys_base_and_code(agent: Agent, folder: SiteFolder) -> None:
    study = make_study()
    ApprovalBook(folder).decide(study, "approve")
    assert agent.prepare(question(study)).code == "no-trainer"
    write_beat(folder, study, age_s=60)
    assert agent.prepare(question(study)).code == "no-trainer"
    write_beat(folder, study, ready=False)
    assert agent.prepare(question(study)).code == "trainer-starting"
    write_beat(folder, study, base_digest="sha256:" + "1" * 64)
    assert agent.prepare(question(study)).code == "base-differs"
    write_beat(folder, study, code_digest="sha256:" + "1" * 64)
    assert agent.prepare(question(study)).code == "code-differs"
    write_beat(folder, study)
    ready = agent.prepare(question(study))
    assert ready.configured and ready.approval and ready.code == "ok"


def test_a_study_whose_digest_lies_is_refused(agent: Agent, folder: SiteFolder) -> None:
    study = make_study()
    ApprovalBook(folder).decide(study, "approve")
    weaker = study.model_copy(update={"noise_multiplier": 0.01})
    reply = agent.prepare(PrepareRequest(study=weaker.model_dump(mode="json"), study_digest=study.digest))
    assert (reply.code, reply.approval) == ("study-altered", "")


def test_a_round_goes_to_the_trainer_and_its_update_back(agent: Agent, folder: SiteFolder) -> None:
    study = make_study()
    ApprovalBook(folder).decide(study, "approve")
    agent.prepare(question(study))
    with StandInTrainer(folder, study) as trainer:
        reply, update = agent.train(round_of(study), ADAPTER)
    assert reply.status == "ok" and arrays_digest(update) == arrays_digest(UPDATE)
    assert set(type(reply).model_fields) == {
        "schema_version",
        "study_digest",
        "round",
        "input_digest",
        "status",
        "code",
        "reason",
        "ledger_head",
    }
    assert trainer.jobs == [job_id_of(study, round_of(study))]
    assert not list(folder.spool.glob("outbox/*")) and not list(folder.spool.glob("inbox/*"))


def test_a_withdrawal_takes_effect_at_the_next_round(agent: Agent, folder: SiteFolder) -> None:
    study = make_study()
    book = ApprovalBook(folder)
    book.decide(study, "approve")
    agent.prepare(question(study))
    with StandInTrainer(folder, study) as trainer:
        assert agent.train(round_of(study), ADAPTER)[0].status == "ok"
        book.decide(study, "revoke")
        reply, update = agent.train(round_of(study, 2), ADAPTER)
    assert (reply.code, update) == ("approval-withdrawn", {}) and len(trainer.jobs) == 1


def test_an_adapter_that_is_not_the_announced_one_is_refused(agent: Agent, folder: SiteFolder) -> None:
    study = make_study()
    ApprovalBook(folder).decide(study, "approve")
    agent.prepare(question(study))
    with StandInTrainer(folder, study) as trainer:
        reply, _ = agent.train(round_of(study), UPDATE)
    assert reply.code == "adapter-altered" and trainer.jobs == []


def test_a_refusal_of_the_trainer_is_passed_on_without_tensors(agent: Agent, folder: SiteFolder) -> None:
    study = make_study()
    ApprovalBook(folder).decide(study, "approve")
    agent.prepare(question(study))
    with StandInTrainer(folder, study, "refused", "budget-exceeded"):
        reply, update = agent.train(round_of(study), ADAPTER)
    assert (reply.status, reply.code, update) == ("refused", "budget-exceeded", {})


def test_a_trainer_that_vanishes_is_reported_within_its_grace_and_the_job_withdrawn(
    agent: Agent, folder: SiteFolder
) -> None:
    study = make_study(round_timeout_s=30.0)
    ApprovalBook(folder).decide(study, "approve")
    write_beat(folder, study, age_s=60)
    agent.prepare(question(study))
    began = time.monotonic()
    reply, _ = agent.train(round_of(study), ADAPTER)
    assert reply.code == "trainer-lost" and time.monotonic() - began < 5
    assert Spool(folder.spool).take() is None


def test_a_trainer_that_is_too_slow_costs_the_round(agent: Agent, folder: SiteFolder) -> None:
    study = make_study(round_timeout_s=0.3)
    ApprovalBook(folder).decide(study, "approve")
    write_beat(folder, study)
    agent.prepare(question(study))
    spool = Spool(folder.spool)
    taken: list[str | None] = []
    threading.Timer(0.1, lambda: taken.append(spool.take())).start()
    reply, _ = agent.train(round_of(study), ADAPTER)
    assert reply.code == "deadline"
    assert taken == [job_id_of(study, round_of(study))] and spool.given_up(str(taken[0]))


def test_a_result_for_another_job_or_with_other_tensors_is_not_passed_on(
    agent: Agent, folder: SiteFolder
) -> None:
    study = make_study()
    spool = Spool(folder.spool)
    spool.open()
    request = round_of(study)
    ApprovalBook(folder).decide(study, "approve")
    agent.prepare(question(study))
    with StandInTrainer(folder, study):
        agent.train(request, ADAPTER)
    job_id = job_id_of(study, request)
    place = spool.root / "outbox" / job_id
    place.mkdir()
    result = TrainResult(
        job_id=job_id,
        study_digest=study.digest,
        round=1,
        input_digest=request.input_digest,
        status="ok",
        update_digest="sha256:" + "0" * 64,
    )
    (place / "result.json").write_bytes(result.to_bytes())
    (place / "arrays.safetensors").write_bytes(b"not tensors")
    reply, update = agent.train(request, ADAPTER)
    assert (reply.code, update) == ("bad-spool", {})


def test_the_spool_follows_no_links(folder: SiteFolder, tmp_path: Path) -> None:
    spool = Spool(folder.spool)
    spool.open()
    name = "r00001-" + "0" * 24
    (tmp_path / "elsewhere").mkdir()
    (spool.root / "inbox" / name).symlink_to(tmp_path / "elsewhere")
    assert spool.take() is None
    (spool.root / "inbox" / ".." / "working" / name).mkdir()
    (spool.root / "working" / name / "job.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(SpoolError, match="is a link"):
        spool.read_job(name)


def test_the_names_we_replace_in_flower_exist_and_another_release_stops_us() -> None:
    from flwr.supernode.runtime import run_clientapp

    before = run_clientapp.install_from_fab
    replace_names("flwr.supernode.runtime.run_clientapp", {"install_from_fab": before})
    for module, name in (
        ("flwr.supernode.runtime.run_clientapp", "get_load_client_app_fn"),
        ("flwr.supernode.runtime.run_clientapp", "Error"),
        ("flwr.supernode.start_client_internal", "get_fused_config_from_fab"),
        ("flwr.supernode.fleet_http_connection", "FleetHttpClient"),
        ("flwr.supercore.telemetry", "create_event"),
        ("flwr.supernode.start_client_internal", "time"),
        ("flwr.supernode.fleet_http_connection", "HEARTBEAT_DEFAULT_INTERVAL"),
        ("flwr.supercore.heartbeat", "HEARTBEAT_DEFAULT_INTERVAL"),
    ):
        import importlib

        assert hasattr(importlib.import_module(module), name)
    with pytest.raises(RuntimeError, match="not the one that was tested"):
        replace_names("flwr.supernode.runtime.run_clientapp", {"no_such_name": None})


def test_heads_of_the_ledger_are_remembered_and_shown_to_the_trainer(
    agent: Agent, folder: SiteFolder
) -> None:
    study = make_study()
    ApprovalBook(folder).decide(study, "approve")
    agent.prepare(question(study))
    first = KnownHead(sequence=4, hash=digest(b"four"))
    with StandInTrainer(folder, study) as trainer:
        trainer.head = first
        reply, _ = agent.train(round_of(study), ADAPTER)
        assert reply.ledger_head == first and trainer.told == [()]
        hubs = KnownHead(sequence=2, hash=digest(b"two"))
        later = round_of(study).model_copy(update={"round": 2, "ledger_head": hubs})
        # Another agent process, after a restart: what was passed on before is still known.
        Agent(AgentSettings(folder, poll_s=0.002)).train(later, ADAPTER)
    assert trainer.told[1] == (hubs, first)


class Hours:
    """A clock that moves only by what is slept, and by what a round is said to have taken."""

    def __init__(self) -> None:
        self.now = datetime.now(UTC)

    def __call__(self) -> datetime:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@pytest.mark.parametrize(("took", "left_after"), [(0.1, 5.0), (4.9, 5.0), (5.1, 10.0), (14.0, 15.0)])
def test_replies_leave_on_a_public_grid_of_seconds_however_long_the_round_took(
    folder: SiteFolder, took: float, left_after: float
) -> None:
    hours = Hours()
    study = make_study(reply_grid_s=5.0, round_timeout_s=60.0)
    ApprovalBook(folder).decide(study, "approve")
    agent = Agent(AgentSettings(folder), clock=hours, sleep=hours.sleep)
    agent.prepare(question(study))

    def refused_after_a_while(*_: object) -> object:
        hours.sleep(took)
        raise SpoolError("no", hint="")

    agent._hand_over = refused_after_a_while  # type: ignore[method-assign, assignment]
    began = hours.now
    reply, _ = agent.train(round_of(study), ADAPTER)
    assert reply.status == "refused"
    assert (hours.now - began).total_seconds() == pytest.approx(left_after, abs=1e-3)
