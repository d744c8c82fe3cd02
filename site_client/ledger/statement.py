"""What a ledger's records add up to, in a form that cannot be read without its unit, delta and limits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from site_client.ledger.forecast import Forecast

if TYPE_CHECKING:
    from rich.console import RenderableType

    from site_client.ledger.view import LedgerView

_BAR_WIDTH = 30
_ROUNDS_SHOWN = 30


class _Result(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RoundSpending(_Result):
    """What one round of a study, or its private conditions, charged to one cohort."""

    study: str
    round: int
    purpose: str
    cohort: str
    sample_rate: float
    noise_multiplier: float
    max_grad_norm: float
    steps_charged: int


class CohortSpending(_Result):
    """What a patient of one cohort paid, over all studies: its own charges and those to every patient."""

    cohort: str
    epsilon_spent: float


class StudySpending(_Result):
    """What one study alone cost the cohort that paid most for it: training and private conditions as one number."""

    study: str
    purposes: list[str]
    steps_charged: int
    epsilon_spent: float


class BudgetStatement(_Result):
    """What is spent, with everything that has to be read beside it.

    `epsilon_spent` is one number: everything ever charged, for whatever purpose, composed, for the cohort that paid
    most. The numbers per study are no parts of it: composed they cost less than they add up to.
    """

    site: str | None
    unit: str
    adjacency: str
    accountant: str
    epsilon_spent: float
    epsilon_cap: float | None
    delta: float
    covers: str
    does_not_cover: str
    cohorts: list[CohortSpending]
    studies: list[StudySpending]
    rounds: list[RoundSpending]
    records: int
    head: str | None
    verified: bool
    forecast: Forecast | None = None

    def render(self) -> RenderableType:
        """A bar of spent against cap, the statement's limits, tables of cohorts, studies and rounds."""
        from rich.console import Group

        lines: list[RenderableType] = [f"Privacy budget of {self.site or 'this site'}", *self._spent()]
        lines.append(f"neighbouring cohorts: {self.adjacency}; accountant: {self.accountant}")
        lines.append(f"covers {self.covers}")
        lines.append(f"does not cover {self.does_not_cover}")
        if self.rounds:
            lines += [self._table_of_studies(), self._table_of_rounds()]
            lines.append(f"{self.records} records, head {self.head}")
        if self.forecast is not None:
            lines.append(self.forecast.render())
        return Group(*lines)

    def _spent(self) -> list[str]:
        spent = rounded_up(self.epsilon_spent)
        if self.epsilon_cap is None:
            return [
                f"epsilon {spent} per {self.unit} at delta {self.delta:g}; no ledger yet, nothing was charged"
            ]
        said = [f"{_bar(self.epsilon_spent / self.epsilon_cap)} epsilon {spent} of {self.epsilon_cap:g}"]
        said.append(f"per {self.unit}: all slides and tiles of one {self.unit}, at delta {self.delta:g}")
        if len(self.cohorts) > 1:
            said.append("the cap holds for every cohort; above is the one that paid most:")
            said += [
                f"  {_bar(c.epsilon_spent / self.epsilon_cap)} epsilon {rounded_up(c.epsilon_spent)}  cohort {c.cohort}"
                for c in self.cohorts
            ]
        return said

    def _table_of_studies(self) -> RenderableType:
        from rich.table import Table

        table = Table(
            "study", "for", "steps charged", f"epsilon alone, per {self.unit} at delta {self.delta:g}"
        )
        for s in self.studies:
            table.add_row(
                _short(s.study), " + ".join(s.purposes), str(s.steps_charged), rounded_up(s.epsilon_spent)
            )
        return table

    def _table_of_rounds(self) -> RenderableType:
        from rich.table import Table

        several = len(self.cohorts) > 1
        heads = ["study", "round", "purpose", "sample rate", "noise multiplier", "C", "steps"]
        left_out = len(self.rounds) - _ROUNDS_SHOWN
        title = f"the last {_ROUNDS_SHOWN} rounds; --format json lists all" if left_out > 0 else None
        table = Table(title=title)
        for head in (*heads, *(["cohort"] if several else [])):
            longest_word = max(map(len, head.split()))
            table.add_column(head, overflow="fold", no_wrap=head == "purpose", min_width=longest_word)
        for r in self.rounds[-_ROUNDS_SHOWN:]:
            cells = (r.round, r.purpose, r.sample_rate, r.noise_multiplier, r.max_grad_norm, r.steps_charged)
            texts = [f"{c:g}" if isinstance(c, float) else str(c) for c in cells]
            table.add_row(_short(r.study), *texts, *([r.cohort] if several else []))
        return table


def statement_of(view: LedgerView, forecast: Forecast | None = None) -> BudgetStatement:
    """Add up what `view` holds; nothing of it depends on anything but its records."""
    from pixcell_core.private.accounting import LARGEST_DELTA

    cap = view.cap
    delta = cap.delta if cap else LARGEST_DELTA
    spent = view.epsilon(delta)
    return BudgetStatement(
        site=view.site,
        unit=spent.unit,
        adjacency=spent.adjacency,
        accountant=spent.accountant,
        epsilon_spent=spent.value,
        epsilon_cap=cap.epsilon if cap else None,
        delta=spent.delta,
        covers=spent.covers,
        does_not_cover=spent.does_not_cover,
        cohorts=[
            CohortSpending(cohort=name, epsilon_spent=view.epsilon(delta, name).value)
            for name in view.cohorts()
        ],
        studies=_studies(view, delta),
        rounds=_rounds(view),
        records=len(view.records),
        head=f"{view.head.sequence} {view.head.hash}" if view.head else None,
        verified=view.check.ok,
        forecast=forecast,
    )


def rounded_up(value: float) -> str:
    """Return epsilon to two places, rounded up: a statement may not promise more than was computed."""
    return f"{math.ceil(value * 100.0) / 100.0:.2f}"


def _studies(view: LedgerView, delta: float) -> list[StudySpending]:
    from site_client.ledger.spending import Spending

    found = []
    for study in dict.fromkeys(r.study for r in view.spending.charges):
        alone = Spending.of(view.records, study=study)
        found.append(
            StudySpending(
                study=study,
                purposes=list(dict.fromkeys(r.purpose for r in alone.charges)),
                steps_charged=sum(r.steps for r in alone.charges),
                epsilon_spent=alone.epsilon(delta).value,
            )
        )
    return found


def _rounds(view: LedgerView) -> list[RoundSpending]:
    names = ("study", "round", "purpose", "cohort", "sample_rate", "noise_multiplier", "max_grad_norm")
    steps: dict[tuple[Any, ...], int] = {}
    for r in view.spending.charges:
        key = tuple(getattr(r, name) for name in names)
        steps[key] = steps.get(key, 0) + r.steps
    return [RoundSpending(**dict(zip(names, key, strict=True)), steps_charged=n) for key, n in steps.items()]


def _short(study: str) -> str:
    """A digest is shortened for the eye; the whole of it stands in the JSON."""
    return study.removeprefix("sha256:")[:8] if study.startswith("sha256:") else study


def _bar(share: float) -> str:
    filled = min(_BAR_WIDTH, max(0, round(share * _BAR_WIDTH)))
    return "█" * filled + "░" * (_BAR_WIDTH - filled)
