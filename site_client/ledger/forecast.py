"""What the next charges of a study would cost, and whether they would be admitted; asks, and charges nothing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from pixcell_core.contracts.study import Study
    from pixcell_core.private.accounting import GaussianEvent
    from site_client.ledger.view import LedgerView


class ForecastCharge(BaseModel):
    """One charge that the study would ask for: the site's epsilon after it, and the answer of both caps."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    what: str
    steps: int
    epsilon_after: float
    admitted: bool
    reason: str


class Forecast(BaseModel):
    """The next charges of one study."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    study: str
    study_digest: str
    unit: str
    delta: float
    epsilon_cap: float
    study_epsilon_cap: float
    charges: list[ForecastCharge]

    def render(self) -> RenderableType:
        """A table: what, steps, epsilon after, admitted or the reason."""
        from rich.table import Table

        if not self.charges:
            return f"study {self.study}: every round and what else it charges is charged already; nothing is left"
        table = Table(
            "next",
            "steps",
            f"epsilon after, per {self.unit} at delta {self.delta:g}",
            "answer",
            title=f"study {self.study}: caps of epsilon per {self.unit}, the site's {self.epsilon_cap:g} and the study's "
            f"{self.study_epsilon_cap:g}",
        )
        for c in self.charges:
            after = f"{math.ceil(c.epsilon_after * 100.0) / 100.0:.2f}"
            table.add_row(c.what, str(c.steps), after, "admitted" if c.admitted else f"refused: {c.reason}")
        return table


def forecast_of(view: LedgerView, study: Study) -> Forecast:
    """Return what the study's next round, its private conditions and all that is left of it would cost here.

    Args:
        view: the site's ledger. A site without one would make it with the study's cap.
        study: the study; rounds that it charged already are not counted again in what is left.
    """
    from pixcell_core.private.accounting import GaussianEvent
    from pixcell_core.private.study_charges import condition_event, round_event
    from site_client.ledger.view import BudgetCap

    cap = view.cap or BudgetCap(study.epsilon_cap, study.delta)
    mine = [r for r in view.spending.charges if r.study == study.digest]
    conditions = None if any(r.purpose == "conditions" for r in mine) else condition_event(study)
    rounds_left = study.rounds - len({r.round for r in mine if r.purpose == "training"})
    asked: list[tuple[str, list[GaussianEvent]]] = []
    if rounds_left > 0:
        asked.append(("one round", [round_event(study)]))
    if conditions is not None:
        asked.append(("private conditions", [conditions]))
    rest = [] if conditions is None else [conditions]
    if rounds_left > 0:
        steps = rounds_left * study.steps_per_round
        rest.insert(0, GaussianEvent(study.sample_rate, study.noise_multiplier, steps))
    if rounds_left > 1 or len(asked) > 1:
        asked.append(("all that is left", rest))
    return Forecast(
        study=study.id,
        study_digest=study.digest,
        unit=study.unit,
        delta=cap.delta,
        epsilon_cap=cap.epsilon,
        study_epsilon_cap=study.epsilon_cap,
        charges=[_charge(view, study, cap.epsilon, cap.delta, what, events) for what, events in asked],
    )


def _charge(
    view: LedgerView, study: Study, cap: float, delta: float, what: str, events: Sequence[GaussianEvent]
) -> ForecastCharge:
    from pixcell_core.private.accounting import epsilon
    from pixcell_core.private.filters import BudgetFilter
    from pixcell_core.private.ledger_record import EVERY_PATIENT
    from site_client.ledger.spending import Spending

    whole = view.spending.sequences_after(events, EVERY_PATIENT)
    alone = Spending.of(view.records, study=study.digest).sequences_after(events, EVERY_PATIENT)
    reason = ""
    if not all(BudgetFilter(cap, delta).admits(sequence) for sequence in whole):
        reason = "over the site's cap"
    elif not all(BudgetFilter(study.epsilon_cap, study.delta).admits(sequence) for sequence in alone):
        reason = "over the study's cap"
    return ForecastCharge(
        what=what,
        steps=sum(event.steps for event in events),
        epsilon_after=max(epsilon(sequence, delta).value for sequence in whole),
        admitted=not reason,
        reason=reason,
    )
