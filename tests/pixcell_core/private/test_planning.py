"""Plans: the published table, every warning, every refusal, a written study as one number, the rest of a budget."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from xml.etree import ElementTree

import pytest

from pixcell_core.contracts.study import Study
from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.private.accounting import GaussianEvent, epsilon
from pixcell_core.private.filters import BudgetFilter
from pixcell_core.private.plan_curve import plan_curve
from pixcell_core.private.planning import Plan, PlanRequest, plan_training, request_for_study
from pixcell_core.private.study_charges import planned_events
from tests.any_study import any_study

REQUEST = PlanRequest(
    patients=200, rounds=5, steps=10, sample_rate=1.0, epsilon=8.0, delta=1e-5, parameters=20_000, sites=3
)
DIGEST = "sha256:" + "0" * 64


def study(**changes: Any) -> Study:
    votes = {"noise_multiplier": 20.0, "iterations": 2, "candidates_digest": DIGEST}
    settings: dict[str, Any] = {
        "id": "planned",
        "created_at": datetime(2026, 1, 1, tzinfo=UTC),
        "expires_at": datetime(2027, 1, 1, tzinfo=UTC),
        "base_digest": DIGEST,
        "code_digest": DIGEST,
        "adapter": {"targets": ["attn1.to_v"]},
        "rounds": 4,
        "steps_per_round": 10,
        "noise_multiplier": 5.0,
        "max_grad_norm": 0.01,
        "expected_patients": 100,
        "tiles_per_patient": 8,
        "mpp": 0.5,
        "sites": ["north", "south"],
        "conditioning": {"mode": "private", "votes": votes},
    }
    return any_study(**settings | changes)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_training(REQUEST)


@pytest.mark.parametrize(
    ("patients", "noise"),
    [(50, (0.53, 0.153, 0.085)), (200, (0.132, 0.038, 0.0213)), (1000, (0.0264, 0.0076, 0.0043))],
)
def test_the_published_table_of_noise_per_coordinate(
    plan: Plan, patients: int, noise: tuple[float, ...]
) -> None:
    rows = {(r.epsilon, r.patients): r for r in plan.table}
    for target, expected in zip((1.0, 4.0, 8.0), noise, strict=True):
        quality = rows[target, patients].quality
        assert quality is not None
        assert quality.noise_per_coordinate == pytest.approx(expected, rel=0.015)


def test_a_plan_spends_its_target_and_no_more(plan: Plan) -> None:
    assert plan.admitted and 7.98 < plan.together.value <= 8.0
    assert not [w for w in plan.warnings if "refuse" in w]
    for row in plan.table:
        assert row.noise_multiplier is not None
        event = GaussianEvent(1.0, row.noise_multiplier, 50)
        assert epsilon([event], 1e-5).value <= row.epsilon
        assert BudgetFilter(row.epsilon, 1e-5).admits([event])


def test_several_sites_state_their_assumption_and_what_holds_without_it(plan: Plan) -> None:
    over = plan.consortium
    assert over.stated.value == plan.together.value < over.composed.value
    assert "not proved" in over.assumption


def test_conditions_and_earlier_charges_come_out_of_the_same_budget(plan: Plan) -> None:
    beside = replace(REQUEST, votes=GaussianEvent(1.0, 4.0, 2), already_spent=(GaussianEvent(1.0, 10.0, 50),))
    tight = plan_training(beside)
    assert tight.noise_multiplier > plan.noise_multiplier
    assert tight.admitted and 7.98 < tight.together.value <= 8.0
    parts = (tight.training.value, tight.conditions.value, tight.spent_before.value)
    assert all(0.0 < part < 8.0 for part in parts) and sum(parts) > tight.together.value
    assert [r for r in tight.table if r.epsilon == 1.0 and r.noise_multiplier is None], "no room at epsilon 1"
    with pytest.raises(RefusedError, match="already spent"):
        plan_training(replace(beside, epsilon=2.0))


def test_a_written_study_costs_training_and_conditions_as_one_number() -> None:
    written = study()
    found = plan_training(request_for_study(written, patients=100, parameters=10_000))
    assert found.together == epsilon(planned_events(written), 1e-5)
    assert max(found.training.value, found.conditions.value) < found.together.value
    assert found.noise_multiplier == 5.0 and found.request.sites == 2
    assert found.quality.noise_per_coordinate == pytest.approx(0.05)
    assert found.admitted
    loud = plan_training(request_for_study(study(noise_multiplier=2.0), patients=100, parameters=10_000))
    assert not loud.admitted and "will refuse this plan before its end" in loud.warnings[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"patients": 30, "epsilon": 1.0},
            "30 patients are too few for this promise to be useful: .* mostly noise",
        ),
        ({"patients": 60, "sites": 1}, "would be weak .* About \\d+ patients"),
        ({"sample_rate": 0.2}, "not worth it: with all of them in every step"),
        (
            {"patients": 600, "sample_rate": 0.1, "epsilon": 0.5},
            "Sampling saves time and costs signal: .* takes 10 times as long",
        ),
        ({"rounds": 200, "steps": 20}, "4000 steps: beyond some tens"),
        ({"rounds": 1, "steps": 2}, "2 steps teach an adapter little"),
        ({"epsilon": 12.0}, "epsilon 12 per patient at delta 1e-05 promises little"),
        ({"expected_patients": 2000.0}, "divisor expected-patients 2000 is far from q N = 200"),
    ],
)
def test_warnings(changes: dict[str, Any], words: str) -> None:
    warned = plan_training(replace(REQUEST, **changes)).warnings
    assert len(warned) <= 2
    with pytest.raises(ValueError, match=words):
        raise ValueError(warned[-1])


def test_what_unlike_charges_leave_unused_is_said() -> None:
    request = replace(REQUEST, patients=5000, sample_rate=0.05, votes=GaussianEvent(1.0, 15.0, 2))
    found = plan_training(request)
    assert found.admitted and 0.7 * 8.0 < found.together.value < 0.95 * 8.0
    assert "per patient at delta 1e-05 of 8 can be spent" in found.warnings[0]


def test_the_suggestion_of_a_warning_is_enough() -> None:
    request = replace(REQUEST, patients=60, sites=1)
    needed = plan_training(request).patients_needed
    assert plan_training(request).quality.verdict == "weak"
    assert plan_training(replace(request, patients=needed)).quality.verdict == "useful"


def test_a_sound_plan_is_not_warned_of(plan: Plan) -> None:
    assert plan.warnings == ()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"patients": 1}, "no cohort"),
        ({"patients": 0}, "no cohort"),
        ({"delta": 0.0}, "delta"),
        ({"delta": math.nan}, "delta"),
        ({"delta": 1e-4}, "at most 1e-05"),
        ({"patients": 20_000}, "at most 5e-06"),
        ({"patients": 200_000}, "publish one of the 200000 patients outright"),
        ({"epsilon": 0.0}, "target epsilon"),
        ({"epsilon": -1.0}, "target epsilon"),
        ({"epsilon": math.nan}, "target epsilon"),
        ({"epsilon": 1e3}, "target epsilon"),
        ({"sample_rate": 0.0}, "sample rate"),
        ({"sample_rate": 1.01}, "sample rate"),
        ({"sample_rate": math.nan}, "sample rate"),
        ({"rounds": 0}, "rounds is 0"),
        ({"steps": -1}, "steps is -1"),
        ({"parameters": 0}, "parameters is 0"),
        ({"sites": 0}, "sites is 0"),
        ({"consensus": 0.0}, "consensus"),
        ({"consensus": 1.5}, "consensus"),
        ({"max_grad_norm": math.inf}, "max_grad_norm"),
        ({"expected_patients": -3.0}, "expected_patients"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_the_reason(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInputError, match=words) as caught:
        replace(REQUEST, **changes)
    assert caught.value.hint and caught.value.exit_code == 4


def test_the_curve_is_one_standalone_picture_without_script(plan: Plan) -> None:
    text = plan_curve(plan)
    picture = ElementTree.fromstring(text)
    kinds = {element.tag.rsplit("}", 1)[-1] for element in picture.iter()}
    assert kinds <= {"svg", "title", "rect", "text", "path", "circle"}
    assert "href" not in text and "script" not in text
    words = " ".join(e.text or "" for e in picture.iter())
    for part in (
        "epsilon per patient",
        "delta 1e-05",
        "noise multiplier sigma",
        "patients at each site",
        "epsilon 4",
    ):
        assert part in words, part
    dots = [e for e in picture.iter() if e.tag.endswith("circle")]
    assert all(0 <= float(d.attrib["cx"]) <= 760 and 0 <= float(d.attrib["cy"]) <= 900 for d in dots)
