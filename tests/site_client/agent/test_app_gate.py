"""The bundle behind a task: only one that a valid approval names, whatever the hub calls it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.task_identity import TaskIdentity

from pixcell_core.contracts.canonical import digest, parse_document
from pixcell_core.contracts.round import PREPARE, PrepareReply, PrepareRequest, TrainRequest
from pixcell_core.contracts.spool import arrays_digest
from pixcell_core.contracts.study import Study
from pixcell_core.flower.messages import document_of, pack
from server.hub.bundle import build_bundle
from site_client.agent.app_gate import PUBLIC_REASON, AppGate, AppRefusedError
from site_client.agent.client_app import create_refusing_app
from site_client.agent.handlers import Agent, AgentSettings
from site_client.agent.network import public_error
from site_client.approvals.book import ApprovalBook
from site_client.approvals.enrolment import enrol
from site_client.approvals.site_folder import SiteFolder
from tests.server.consortium import make_study
from tests.site_client.agent.test_handlers import ADAPTER, StandInTrainer, question, round_of
from tests.site_client.trainer.site_fixture import make_ca

BUNDLE = build_bundle()
HEX = digest(BUNDLE).removeprefix("sha256:")


@pytest.fixture
def folder(tmp_path: Path) -> SiteFolder:
    """An enrolled site named east."""
    made = SiteFolder(tmp_path / "east")
    enrol(made, "east", "h:1", make_ca(tmp_path / "ca.crt"))
    return made


@pytest.fixture
def named(folder: SiteFolder) -> Iterator[Study]:
    """A study that names the bundle, approved."""
    study = make_study(app_digest=digest(BUNDLE))
    ApprovalBook(folder).decide(study, "approve")
    yield study


def passes(folder: SiteFolder, content: bytes, announced: str) -> bool:
    """Whether a task with this bundle would run."""
    gate = AppGate(folder)
    gate.receive(content)
    try:
        gate.require(announced)
    except AppRefusedError as error:
        assert str(folder.root) not in str(error)
        return False
    return True


def events(folder: SiteFolder) -> list[str]:
    path = folder.logs / "events.jsonl"
    return [json.loads(line)["event"] for line in path.read_text().splitlines()] if path.exists() else []


def test_the_bundle_of_an_approved_study_passes(folder: SiteFolder, named: Study) -> None:
    assert passes(folder, BUNDLE, HEX) and events(folder) == []


def test_another_bundle_is_refused_and_logged_even_under_the_right_name(
    folder: SiteFolder, named: Study
) -> None:
    evil = BUNDLE + b"\0"
    assert not passes(folder, evil, digest(evil).removeprefix("sha256:"))
    # The digest is that of the bytes that came, not of what the hub says they are.
    assert not passes(folder, evil, HEX)
    assert not passes(folder, BUNDLE, digest(evil).removeprefix("sha256:"))
    assert events(folder) == ["app-refused", "app-refused", "app-altered", "app-altered"]


def test_no_approval_no_bundle(folder: SiteFolder) -> None:
    assert not passes(folder, BUNDLE, HEX)


@pytest.mark.parametrize("decision", ["revoke", "deny"])
def test_a_withdrawn_study_lets_its_bundle_in_no_more(
    folder: SiteFolder, named: Study, decision: str
) -> None:
    ApprovalBook(folder).decide(named, decision)  # type: ignore[arg-type]
    assert not passes(folder, BUNDLE, HEX)


def test_an_expired_approval_names_no_bundle(folder: SiteFolder, named: Study) -> None:
    later = named.expires_at + timedelta(seconds=1)
    assert ApprovalBook(folder).apps(later) == frozenset()


def test_a_study_without_an_app_names_no_bundle(folder: SiteFolder) -> None:
    ApprovalBook(folder).decide(make_study(), "approve")
    assert not passes(folder, BUNDLE, HEX)


def test_a_bundle_counts_for_its_own_study_only(folder: SiteFolder, named: Study) -> None:
    """Another approved study lets the bundle in at the gate; a round of this one still is refused."""
    other = make_study(id="other", app_digest=digest(b"another bundle"))
    none = make_study(id="none")
    for study in (other, none):
        ApprovalBook(folder).decide(study, "approve")
    agent = Agent(AgentSettings(folder, poll_s=0.005, app_digest=digest(BUNDLE)))
    with StandInTrainer(folder, named) as trainer:
        assert agent.prepare(question(named)).configured
        assert agent.train(round_of(named), ADAPTER)[0].status == "ok"
        for study in (other, none):
            reply = agent.prepare(question(study))
            assert (reply.code, reply.approval, reply.configured) == ("app-not-approved", "", False)
            # As if it had been remembered when its own bundle was sent.
            Agent(AgentSettings(folder)).prepare(question(study))
            refused, update = agent.train(round_of(study), ADAPTER)
            assert (refused.code, update) == ("app-not-approved", {})
        assert len(trainer.jobs) == 1
        # The mutant: an agent that is not told of the bundle trains the other study.
        assert Agent(AgentSettings(folder, poll_s=0.005)).train(round_of(other), ADAPTER)[0].status == "ok"


def message_of(kind: str, document: PrepareRequest | TrainRequest) -> Message:
    """A message as it would come from the hub."""
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    return Message(pack(document), dst_node_id=1, message_type=kind)


def test_the_refusing_app_answers_the_question_and_fails_at_all_else(folder: SiteFolder) -> None:
    study, app = make_study(), create_refusing_app()
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    reply = app(message_of(f"query.{PREPARE}", question(study)), context)
    answer = parse_document(PrepareReply, document_of(reply))
    assert (answer.code, answer.configured, answer.approval) == ("app-not-approved", False, "")
    assert answer.reason == PUBLIC_REASON
    request = TrainRequest(
        study_digest=study.digest,
        round=1,
        input_digest=arrays_digest(ADAPTER),
        layout=round_of(study).layout,
    )
    with pytest.raises(AppRefusedError):
        app(message_of("train", request), context)


def test_an_error_reply_says_nothing_of_what_went_wrong_at_the_site(folder: SiteFolder, named: Study) -> None:
    gate = AppGate(folder)
    secret = "<class 'OSError'>:<'/data/patients/Jane-Doe.svs'>"
    gate.receive(BUNDLE)
    assert "Jane" not in public_error(gate)(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, secret).reason
    gate.receive(b"another")
    refused = public_error(gate)(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, secret)
    assert refused.reason == f"[app-not-approved] {PUBLIC_REASON}"


def test_decisions_made_before_the_first_question_are_enough(folder: SiteFolder, named: Study) -> None:
    """The study lies beside its approval, so that the bundle can be judged before the hub ever asked."""
    assert not (folder.agent / "studies").exists()
    assert ApprovalBook(folder).apps(datetime.now(UTC)) == {digest(BUNDLE)}
