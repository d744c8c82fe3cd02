"""Kills of real processes in a running federation, and that the judge of such runs sees what it must see."""

from __future__ import annotations

import dataclasses
import random
import signal
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import psutil
import pytest

from bench.real.findings import Standing, verdict
from bench.real.kills import Kill, Run, federation, finish, plan, strike
from pixcell_core.contracts.round import Exclusion, RoundRecord, RunState, SiteState
from pixcell_core.contracts.spool import arrays_digest
from tests.any_study import any_study

SITES = ("east", "north", "west")
NOW = datetime(2026, 1, 1, tzinfo=UTC)
DIGEST = "sha256:" + "0" * 64


def whole() -> Standing:
    """Two rounds of three sites; north is missing in the second, and its trainer was charged twice in the first."""
    study = any_study(
        id="judged",
        created_at=NOW,
        expires_at=NOW + timedelta(days=1),
        adapter={"rank": 1, "targets": ("attn1.to_q",)},
        rounds=2,
        steps_per_round=5,
        expected_patients=5,
        tiles_per_patient=1,
        sites=SITES,
    )
    rng = np.random.default_rng(0)
    first = {"w": rng.standard_normal((4, 2)).astype(np.float32)}
    answers = {site: {"w": rng.standard_normal((4, 2)).astype(np.float32)} for site in ("east", "west")}
    second = {"w": first["w"] + (answers["east"]["w"] + answers["west"]["w"]) / 2}
    records: list[RoundRecord] = []
    for number, included in enumerate(((), SITES, ("east", "west"))):
        gone = [site for site in SITES if number and site not in included]
        records.append(
            RoundRecord(
                study_id=study.id,
                study_digest=study.digest,
                round=number,
                previous=records[-1].digest if records else None,
                adapter_digest=arrays_digest(second if number == 2 else first),
                included=included,
                excluded=tuple(Exclusion(site=site, code="deadline", reason="late") for site in gone),
                started_at=NOW,
                committed_at=NOW,
            )
        )
    board = RunState(
        study_id=study.id,
        study_digest=study.digest,
        state="completed",
        rounds=2,
        committed=2,
        started_at=NOW,
        updated_at=NOW,
        sites=tuple(SiteState(site=site, rounds_counted=1 if site == "north" else 2) for site in SITES),
    )
    charged = {"east": {1: 5, 2: 5}, "north": {1: 10}, "west": {1: 5, 2: 5}}
    return Standing(study, board, tuple(records), charged, (first, second), answers)


def with_record(found: Standing, number: int, **changes: object) -> Standing:
    """A standing in which one record was altered after the fact."""
    records = list(found.records)
    records[number] = records[number].model_copy(update=changes)
    return dataclasses.replace(found, records=tuple(records))


def doubled(found: Standing) -> Standing:
    """The last round's step was taken twice."""
    before, after = found.adapters
    return dataclasses.replace(found, adapters=(before, {"w": after["w"] + (after["w"] - before["w"])}))


FAULTS: dict[str, tuple[Callable[[Standing], Standing], str]] = {
    "hidden charge": (
        lambda found: dataclasses.replace(found, charged=found.charged | {"west": {1: 5, 2: 4}}),
        "west counts in round 2 with 4 of 5 steps charged",
    ),
    "charge of another round": (
        lambda found: dataclasses.replace(found, charged=found.charged | {"west": {1: 10}}),
        "west counts in round 2 with 0 of 5 steps charged",
    ),
    "round lost": (
        lambda found: dataclasses.replace(found, records=(found.records[0], found.records[2])),
        "committed rounds are [0, 2]",
    ),
    "round twice": (
        lambda found: dataclasses.replace(found, records=(*found.records, found.records[2])),
        "committed rounds are [0, 1, 2, 2]",
    ),
    "chain broken": (
        lambda found: with_record(found, 1, adapter_digest=DIGEST),
        "round 2 does not follow round 1",
    ),
    "below quorum": (lambda found: with_record(found, 2, included=("east",)), "round 2 counts ('east',)"),
    "site left out in silence": (lambda found: with_record(found, 2, excluded=()), "leaves out ['north']"),
    "run not complete": (
        lambda found: dataclasses.replace(found, board=found.board.model_copy(update={"state": "failed"})),
        "the run is failed after 2 of 2 rounds",
    ),
    "step taken twice": (doubled, "the last step differs from the mean of the sites' updates"),
    "update of a site missing": (
        lambda found: dataclasses.replace(found, answers={"east": found.answers["east"]}),
        "['west'] count in the last round, and their trainers keep no answer",
    ),
    "masked attempt kept": (
        lambda found: dataclasses.replace(found, attempts_kept=1),
        "1 attempts of masked rounds",
    ),
}


def test_a_whole_study_has_nothing_wrong() -> None:
    assert verdict(whole()) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_the_judge_sees_a_planted_fault(fault: str) -> None:
    plant, words = FAULTS[fault]
    wrong = verdict(plant(whole()))
    assert any(words in text for text in wrong), wrong


def test_the_judge_sees_a_board_that_counts_otherwise() -> None:
    found = whole()
    sites = tuple(state.model_copy(update={"rounds_counted": 2}) for state in found.board.sites)
    wrong = verdict(dataclasses.replace(found, board=found.board.model_copy(update={"sites": sites})))
    assert wrong == ["the board counts 2 rounds of north, the records 1"]


def test_a_plan_is_its_seed_and_holds_every_kill_that_was_asked_for() -> None:
    parts = {"trainer": 3, "hub": 2}
    first, second = (plan(random.Random(7), parts) for _ in range(2))
    assert first == second
    assert sorted(kill.part for kill in first) == ["hub", "hub", "trainer", "trainer", "trainer"]
    assert all((kill.site in SITES) == (kill.part == "trainer") for kill in first)


def test_the_deadline_of_a_study_grows_with_what_was_done_to_it() -> None:
    calm, hit = Run("a", False, 0.0), Run("b", False, 0.0, resumes=1, kills=[Kill(1, "hub", "")])
    assert 0 < calm.deadline_s < hit.deadline_s


@pytest.mark.end_to_end
@pytest.mark.timeout(900)
def test_a_masked_study_outlives_an_executor_with_a_task_in_hand_a_supernode_and_the_hub(
    tmp_path: Path,
) -> None:
    """A trainer's and an agent's death stand in test_federation."""
    with federation(tmp_path) as (its, operator):
        run = operator.start("struck", masked=True)

        def in_hand() -> bool:
            board = its.board("struck", history=False)
            executor = its.process("executor", "north")
            busy = executor is not None and psutil.Process(executor).children()
            return board.state == "running" and board.round > board.committed and bool(busy)

        for number, (part, site) in enumerate((("executor", "north"), ("supernode", "west"), ("hub", "")), 1):
            operator.wait(in_hand, 240, f"a task in hand before kill {number}")
            kill = Kill(number, part, site)
            assert strike(its, operator, run, kill), f"there was no {part} to kill: {its.board('struck')}"
            assert kill.recovery_s is not None
        # Whatever else happened: the hub's death ended the run, and the round in hand was asked for again.
        assert run.resumes >= 1 and any("hub was stopped" in reason for reason in run.reasons), run.reasons
        assert finish(its, operator, run) == [], its.logs()
        its.processes.running["hub"].send_signal(signal.SIGTERM)
        assert its.processes.running["hub"].wait(60) == 0
