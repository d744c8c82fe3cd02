"""The study's own cap: its training and its conditions together, whoever else charged what."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pixcell_core.contracts.study import Study
from pixcell_core.private.accounting import GaussianEvent
from pixcell_core.private.filters import BudgetFilter
from pixcell_core.private.study_charges import condition_event, planned_events, round_event
from site_client.ledger.ledger import Ledger, RoundCharge
from site_client.ledger.spending import Spending
from site_client.ledger.study_room import StudyBudgetError, require_study_room
from site_client.ledger.view import BudgetCap
from tests.site_client.ledger.studies import make_study

Opener = Callable[..., Ledger]
WIDE = BudgetCap(50.0, 1e-5)


def take(ledger: Ledger, study: Study, number: int, purpose: str = "training", cohort: str = "all") -> None:
    event = round_event(study) if purpose == "training" else condition_event(study)
    assert event is not None
    charge = RoundCharge(
        study.digest,
        number,
        event.sample_rate,
        event.noise_multiplier,
        event.steps,
        study.max_grad_norm,
        study.code_digest,
        purpose,
        cohort,
    )
    with ledger.reserve(charge, at_a_time=event.steps) as steps:
        steps(0)


def admitted(ledger: Ledger, study: Study, event: GaussianEvent, **more: object) -> bool:
    try:
        require_study_room(ledger.records, study, event, **more)  # type: ignore[arg-type]
    except StudyBudgetError as error:
        assert error.code == "study-budget-exceeded" and "Nothing was drawn" in error.message
        return False
    return True


def narrow(votes: bool = True, rounds: int = 3) -> Study:
    """A study whose cap is what its conditions and `rounds` rounds need, and no more."""
    study = make_study(votes)
    return study.model_copy(update={"epsilon_cap": smallest_cap(rounds * 10 + (2 if votes else 0))})


def smallest_cap(steps: int) -> float:
    """The smallest cap, to a thousandth, under which so many steps at sigma 20 are admitted."""
    low, high = 0.01, 9.0
    while high - low > 1e-3:
        middle = (low + high) / 2.0
        fits = BudgetFilter(middle, 1e-5).admits([GaussianEvent(1.0, 20.0, steps)])
        low, high = (low, middle) if fits else (middle, high)
    return high


def test_rounds_and_conditions_count_together_until_the_cap(open_ledger: Opener) -> None:
    study = narrow()
    with open_ledger(cap=WIDE) as ledger:
        take(ledger, study, 0, "conditions")
        for number in (1, 2, 3):
            assert admitted(ledger, study, round_event(study))
            take(ledger, study, number)
        assert not admitted(ledger, study, round_event(study))
        assert not admitted(ledger, study, GaussianEvent(1.0, 20.0, 1))
        assert len(Spending.of(ledger.records, study=study.digest).charges) == 4


def test_without_the_conditions_there_is_room_for_one_more_vote(open_ledger: Opener) -> None:
    """The counter-example: were conditions not counted, the last refusal above would not happen."""
    study = narrow()
    asked = condition_event(study)
    assert asked is not None
    with open_ledger(cap=WIDE) as ledger:
        for number in (1, 2, 3):
            take(ledger, study, number)
        assert admitted(ledger, study, asked)
        take(ledger, study, 0, "conditions")
        assert not admitted(ledger, study, asked)


def test_other_studies_do_not_use_up_this_ones_cap(open_ledger: Opener) -> None:
    study, other = narrow(), make_study(True, id="kidney")
    with open_ledger(cap=WIDE) as ledger:
        for number in range(6):
            take(ledger, other, number)
        assert admitted(ledger, study, round_event(study))
        mixed = [*ledger.totals(), round_event(study)]
        assert not BudgetFilter(study.epsilon_cap, study.delta).admits(mixed), (
            "added to the others it would not fit"
        )


def test_the_cap_holds_per_cohort(open_ledger: Opener) -> None:
    study = narrow(votes=False, rounds=2)
    with open_ledger(cap=WIDE) as ledger:
        take(ledger, study, 1, cohort="east")
        take(ledger, study, 2, cohort="east")
        assert not admitted(ledger, study, round_event(study), cohort="east")
        assert not admitted(ledger, study, round_event(study)), "everybody includes the east"
        assert admitted(ledger, study, round_event(study), cohort="west")


def test_a_narrower_approval_holds(open_ledger: Opener) -> None:
    study = make_study()
    one = smallest_cap(round_event(study).steps)
    with open_ledger(cap=WIDE) as ledger:
        assert admitted(ledger, study, round_event(study), epsilon_cap=one * 1.01)
        assert not admitted(ledger, study, round_event(study), epsilon_cap=one * 0.99)
        assert not admitted(
            ledger, study.model_copy(update={"epsilon_cap": one * 0.99}), round_event(study), epsilon_cap=9.0
        )


@pytest.mark.parametrize("votes", [False, True])
def test_a_plan_within_its_cap_is_admitted_to_its_end(open_ledger: Opener, votes: bool) -> None:
    """Whatever was planned as one is admitted round by round, in any order of conditions and rounds."""
    study = make_study(votes)
    planned = sum(event.steps for event in planned_events(study))
    study = study.model_copy(update={"epsilon_cap": smallest_cap(planned)})
    with open_ledger(cap=WIDE) as ledger:
        for number in range(1, study.rounds + 1):
            assert admitted(ledger, study, round_event(study)), number
            take(ledger, study, number)
            if votes and number == 2:
                take(ledger, study, 0, "conditions")
        assert not admitted(ledger, study, round_event(study))
        assert ledger.epsilon(study.delta).value <= study.epsilon_cap + 1e-3
