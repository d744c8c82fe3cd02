"""The cap holds per patient: charges to a patient's own cohort and to everybody add up, charges to others do not."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pixcell_core.errors import BadInputError
from pixcell_core.private.accounting import GaussianEvent, epsilon, group_events
from pixcell_core.private.filters import BudgetExceededError, BudgetFilter
from pixcell_core.private.ledger_record import ReserveRecord
from site_client.ledger.cohorts import CohortBook
from site_client.ledger.ledger import Ledger, RoundCharge
from site_client.ledger.spending import Spending
from site_client.ledger.view import BudgetCap, read_ledger

CODE = "sha256:" + "c0de" * 16
CAP = BudgetCap(2.0, 1e-5)
Opener = Callable[..., Ledger]


def charge(steps: int, cohort: str = "all", sigma: float = 20.0, **more: object) -> RoundCharge:
    return RoundCharge("lung", 1, 1.0, sigma, steps, 0.1, CODE, cohort=cohort, **more)  # type: ignore[arg-type]


def take(ledger: Ledger, wanted: RoundCharge) -> None:
    with ledger.reserve(wanted, at_a_time=wanted.steps) as steps:
        steps(0)


def largest(cap: BudgetCap, sigma: float = 20.0) -> int:
    """The most steps that fit under the cap."""
    allowed = BudgetFilter(cap.epsilon, cap.delta)
    low, high = 0, 1024
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if allowed.admits([GaussianEvent(1.0, sigma, middle)]) else (low, middle)
    return low


def test_each_cohort_has_the_whole_cap_and_everybody_has_what_the_poorest_has(open_ledger: Opener) -> None:
    room = largest(CAP)
    with open_ledger(cap=CAP) as ledger:
        take(ledger, charge(room, "east"))
        before = ledger.head
        for poor in (charge(1, "east"), charge(1)):
            with pytest.raises(BudgetExceededError, match="is spent already"):
                ledger.reserve(poor)
        assert ledger.head == before
        take(ledger, charge(room, "west"))
        take(ledger, charge(5, "south"))
        assert ledger.view.cohorts() == ("east", "south", "west")
        worst = epsilon([GaussianEvent(1.0, 20.0, room)], CAP.delta).value
        assert (
            ledger.epsilon(CAP.delta).value == ledger.epsilon(CAP.delta, "east").value == worst <= CAP.epsilon
        )
        assert ledger.epsilon(CAP.delta, "south") == epsilon([GaussianEvent(1.0, 20.0, 5)], CAP.delta)
        assert ledger.epsilon(CAP.delta, "nobody").value == 0.0
        assert sum(e.steps for e in ledger.totals()) == 2 * room + 5, "None: everything that was ever charged"


def test_a_charge_to_everybody_is_in_every_cohorts_sum(open_ledger: Opener) -> None:
    room = largest(CAP)
    with open_ledger(cap=CAP) as ledger:
        take(ledger, charge(10))
        take(ledger, charge(room - 10, "east"))
        for cohort in ("east", "all"):
            with pytest.raises(BudgetExceededError):
                ledger.reserve(charge(1, cohort))
        take(ledger, charge(room - 10, "west"))
        assert ledger.totals("new") == (GaussianEvent(1.0, 20.0, 10),)


def chaos(seed: int) -> list[tuple[str, float, float, int]]:
    chance = random.Random(seed)
    return [
        (
            chance.choice(("all", "east", "west", "south")),
            chance.choice((0.25, 1.0)),
            chance.choice((8.0, 9.0)),
            chance.randint(1, 4),
        )
        for _ in range(chance.randint(1, 25))
    ]


def record(number: int, cohort: str, rate: float, sigma: float, steps: int) -> ReserveRecord:
    return ReserveRecord(
        sequence=number,
        previous_hash="sha256:" + "0" * 64,
        site="north",
        time="2026-01-02T03:04:05+00:00",
        study="lung",
        round=1,
        purpose="training",
        sample_rate=rate,
        noise_multiplier=sigma,
        steps=steps,
        max_grad_norm=1.0,
        code_digest=CODE,
        cohort=cohort,
    )


def patients_own_account(plan: list[tuple[str, float, float, int]], home: str) -> list[GaussianEvent]:
    """What one patient took part in, step by step, written down by the patient."""
    return [
        GaussianEvent(q, s, 1)
        for cohort, q, s, steps in plan
        for _ in range(steps)
        if cohort in ("all", home)
    ]


def differing(spending: Spending, plan: list[tuple[str, float, float, int]]) -> list[str]:
    """Homes whose patients' own account is another one than the ledger's, in sum or in order."""
    wrong = []
    for home in ("east", "west", "south", "none of them"):
        own = patients_own_account(plan, home)
        steps = [
            GaussianEvent(e.sample_rate, e.noise_multiplier, 1)
            for e in spending.events(home)
            for _ in range(e.steps)
        ]
        if steps != own or list(spending.totals(home)) != group_events(own):
            wrong.append(home)
    return wrong


def test_the_ledgers_sum_is_every_patients_own_account() -> None:
    for seed in range(200):
        plan = chaos(seed)
        spending = Spending.of([record(n, *entry) for n, entry in enumerate(plan)])
        assert differing(spending, plan) == [], seed


def test_a_ledger_that_forgot_charges_to_everybody_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("site_client.ledger.spending.EVERY_PATIENT", "nobody")
    plan = chaos(3)
    assert differing(Spending.of([record(n, *entry) for n, entry in enumerate(plan)]), plan)


def test_the_worst_cohorts_epsilon_is_the_largest_over_all_patients() -> None:
    plan = chaos(5)
    spending = Spending.of([record(n, *entry) for n, entry in enumerate(plan)])
    homes = ("east", "west", "south", "none of them")
    found = [epsilon(own, 1e-5).value for home in homes if (own := patients_own_account(plan, home))]
    assert spending.epsilon(1e-5).value == pytest.approx(max(found), rel=1e-9)


def test_a_charge_to_everybody_has_to_fit_each_cohort_and_those_in_none() -> None:
    plan = [("east", 1.0, 9.0, 3), ("all", 1.0, 8.0, 1), ("west", 0.25, 8.0, 2)]
    spending = Spending.of([record(n, *entry) for n, entry in enumerate(plan)])
    more = GaussianEvent(1.0, 7.0, 1)
    everybody = GaussianEvent(1.0, 8.0, 1)
    assert set(spending.sequences_after([more], "all")) == {
        (everybody, more),
        (GaussianEvent(1.0, 9.0, 3), everybody, more),
        (everybody, GaussianEvent(0.25, 8.0, 2), more),
    }
    assert spending.sequences_after([more], "west") == [(everybody, GaussianEvent(0.25, 8.0, 2), more)]
    assert spending.sequences_after([more], "new") == [(everybody, more)]


def test_training_and_conditions_share_one_cap_and_one_number(open_ledger: Opener) -> None:
    room = largest(CAP)
    with open_ledger(cap=CAP) as ledger:
        take(ledger, charge(room - 4))
        assert "own and blend" not in ledger.epsilon(CAP.delta).does_not_cover
        take(ledger, charge(4, purpose="conditions"))
        for purpose in ("training", "conditions"):
            with pytest.raises(BudgetExceededError):
                ledger.reserve(charge(1, purpose=purpose))
        spent = ledger.epsilon(CAP.delta)
        assert spent.value == epsilon([GaussianEvent(1.0, 20.0, room)], CAP.delta).value
        assert "votes of private conditions" in spent.covers
        assert "own and blend" in spent.does_not_cover and "another site" in spent.does_not_cover
        before = ledger.head
        with pytest.raises(BadInputError, match="cannot be charged for 'marketing'"):
            ledger.reserve(charge(1, purpose="marketing"))
        assert ledger.head == before


def test_the_cohort_stands_in_the_record_only_where_it_is_not_everybody(
    open_ledger: Opener, tmp_path: Path
) -> None:
    """Records made before there were cohorts keep their hash: they are charges to every patient."""
    with open_ledger() as ledger:
        take(ledger, charge(1))
        take(ledger, charge(1, "east"))
    everybody, east = (r for r in read_ledger(tmp_path / "ledger").records if isinstance(r, ReserveRecord))
    assert "cohort" not in everybody.model_dump() and everybody.cohort == "all"
    assert east.model_dump()["cohort"] == "east"


def test_the_ledger_holds_no_patient_no_tag_and_no_count(open_ledger: Opener, tmp_path: Path) -> None:
    patients = [f"Patient-{n:04d}" for n in range(173)]
    book = CohortBook.open(tmp_path)
    with open_ledger() as ledger:
        book.require("east", patients)
        take(ledger, charge(1, "east"))
    kept = b"".join(p.read_bytes() for p in (tmp_path / "ledger").iterdir())
    tags = re.findall(r"[0-9a-f]{64}", (tmp_path / "private" / "cohorts.json").read_text())
    assert len(tags) >= 173
    assert not [word for word in (*patients, *tags, ":173", "173 ") if word.encode() in kept]


@pytest.mark.parametrize("name", ["", "east wing", "../x", "given name, 1950"])
def test_a_cohort_that_cannot_be_recorded_is_refused(open_ledger: Opener, name: str) -> None:
    with open_ledger() as ledger:
        before = ledger.head
        with pytest.raises(BadInputError, match="cannot be charged"):
            ledger.reserve(charge(1, name))
        assert ledger.head == before
