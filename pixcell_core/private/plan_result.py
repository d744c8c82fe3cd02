"""A plan as `pixcell private plan` prints it: every number beside its unit, delta and what it does not cover."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from pixcell_core.private.adapter_size import AdapterSize
from pixcell_core.private.planning import Plan

if TYPE_CHECKING:
    from rich.console import RenderableType


class _Result(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Cost(_Result):
    """Epsilon per patient of one part of the plan alone, and of all together; all at the plan's delta."""

    spent_before: float
    training: float
    private_conditions: float
    together: float
    target: float
    within_target: bool
    unit: str
    delta: float
    adjacency: str
    accountant: str
    covers: str
    does_not_cover: str


class OverSites(_Result):
    """What several sites say together, with the assumption it rests on and what holds without it."""

    sites: int
    stated_epsilon: float
    assumption: str
    without_assumption_epsilon: float
    unit: str
    delta: float


class ExpectedUpdate(_Result):
    """What the signal model expects; lengths in units of the clipping bound C."""

    noise_per_coordinate: float
    noise_per_coordinate_absolute: float
    noise_length: float
    signal_length: float
    signal_to_noise: float
    cosine: float
    verdict: Literal["useful", "weak", "noise"]
    consensus: float
    patients_needed: int
    model: str = (
        "patients' clipped gradients share one direction to the extent of the consensus; signal adds up over steps, "
        "noise adds its squares; the cosine is between the released update and the same update without noise"
    )


class PlanRow(_Result):
    """One target and cohort size; null where earlier charges leave no room."""

    epsilon: float
    patients: int
    noise_multiplier: float | None
    noise_per_coordinate: float | None
    cosine: float | None
    verdict: Literal["useful", "weak", "noise"] | None


class PrivatePlan(_Result):
    """The whole plan."""

    study: str | None
    patients: int
    sites: int
    rounds: int
    steps_per_round: int
    sample_rate: float
    noise_multiplier: float
    max_grad_norm: float
    expected_patients: float
    trainable_parameters: int
    adapter: str
    cost: Cost
    over_sites: OverSites
    expected_update: ExpectedUpdate
    table: list[PlanRow]
    warnings: list[str]
    curve: str | None

    def render(self) -> RenderableType:
        """The plan in words, then the table over targets and cohort sizes, then the warnings."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        cost, update = self.cost, self.expected_update
        lines = [
            f"Plan of a private study{f' {self.study}' if self.study else ''}: {self.rounds} rounds of "
            f"{self.steps_per_round} steps, {self.patients} patients at a site, sample rate {self.sample_rate:g}",
            f"noise multiplier {self.noise_multiplier:.5g} (standard deviation of a step's noise in units of C = "
            f"{self.max_grad_norm:g})",
            f"trains {self.trainable_parameters:,} numbers ({self.adapter})",
            "",
            f"epsilon {_up(cost.together)} per {cost.unit} (all slides and tiles of one {cost.unit}) at delta "
            f"{cost.delta:g}, everything together; target {cost.target:g}: "
            + ("kept" if cost.within_target else "NOT KEPT"),
            f"  training {_up(cost.training)}, private conditions {_up(cost.private_conditions)}, "
            f"spent before {_up(cost.spent_before)}; they compose, they do not add up",
            f"  neighbouring cohorts: {cost.adjacency}; accountant: {cost.accountant}",
            f"  covers {cost.covers}",
            f"  does not cover {cost.does_not_cover}",
        ]
        if self.over_sites.sites > 1:
            over = self.over_sites
            lines.append(
                f"  over {over.sites} sites: epsilon {_up(over.stated_epsilon)} per {over.unit} at delta "
                f"{over.delta:g}, {over.assumption}. Without that: {_up(over.without_assumption_epsilon)}"
            )
        lines += [
            "",
            f"noise per coordinate of a step {update.noise_per_coordinate:.3g} C = "
            f"{update.noise_per_coordinate_absolute:.3g}; its length {update.noise_length:.3g} C against a common signal "
            f"of {update.signal_length:.3g} C",
            f"expected after all steps: signal to noise {update.signal_to_noise:.2f}, cosine {update.cosine:.2f} "
            f"({update.verdict}), at a consensus of {update.consensus:g}; {update.patients_needed} patients a site "
            "would be enough",
            "",
        ]
        parts: list[RenderableType] = [Text("\n".join(lines))]
        parts += [
            self._table(Table),
            Text("cells: noise per coordinate of a step in units of C; expected cosine, and what that means"),
        ]
        parts += [Text(f"warning: {w}", style="bold") for w in self.warnings]
        if self.curve:
            parts.append(Text(f"curve written to {self.curve}"))
        return Group(*parts)

    def _table(self, table: type) -> RenderableType:
        sizes = sorted({row.patients for row in self.table})
        shown = table("epsilon", "sigma", *(f"{n} patients" for n in sizes))
        for target in sorted({row.epsilon for row in self.table}):
            rows = {row.patients: row for row in self.table if row.epsilon == target}
            sigma = rows[sizes[0]].noise_multiplier
            cells = [
                "no room"
                if row.noise_per_coordinate is None
                else f"{row.noise_per_coordinate:.3g}\n{row.cosine:.2f} {row.verdict}"
                for row in (rows[n] for n in sizes)
            ]
            shown.add_row(f"{target:g}", "-" if sigma is None else f"{sigma:.4g}", *cells)
        return shown


def plan_result(
    plan: Plan,
    *,
    adapter: AdapterSize | None,
    source: str,
    study: str | None = None,
    curve: str | None = None,
) -> PrivatePlan:
    """Return `plan` in its printed form.

    Args:
        plan: the plan.
        adapter: what was counted; None where the number of parameters was given.
        source: where the count comes from, in words.
        study: name of the written study, if it is one.
        curve: where the SVG was written.
    """
    request, quality, together = plan.request, plan.quality, plan.together
    divisor = request.expected_patients or request.sample_rate * request.patients
    counted = (
        "as given"
        if adapter is None
        else f"{adapter.kind}, rank {adapter.rank}, {adapter.layers} layers of {source}"
    )
    return PrivatePlan(
        study=study,
        patients=request.patients,
        sites=request.sites,
        rounds=request.rounds,
        steps_per_round=request.steps,
        sample_rate=request.sample_rate,
        noise_multiplier=plan.noise_multiplier,
        max_grad_norm=request.max_grad_norm,
        expected_patients=divisor,
        trainable_parameters=request.parameters,
        adapter=counted,
        cost=Cost(
            spent_before=plan.spent_before.value,
            training=plan.training.value,
            private_conditions=plan.conditions.value,
            together=together.value,
            target=request.epsilon,
            within_target=plan.admitted,
            unit=together.unit,
            delta=together.delta,
            adjacency=together.adjacency,
            accountant=together.accountant,
            covers=together.covers,
            does_not_cover=together.does_not_cover,
        ),
        over_sites=OverSites(
            sites=request.sites,
            stated_epsilon=plan.consortium.stated.value,
            assumption=plan.consortium.assumption,
            without_assumption_epsilon=plan.consortium.composed.value,
            unit=together.unit,
            delta=together.delta,
        ),
        expected_update=ExpectedUpdate(
            noise_per_coordinate=quality.noise_per_coordinate,
            noise_per_coordinate_absolute=quality.noise_per_coordinate * request.max_grad_norm,
            noise_length=quality.noise_length,
            signal_length=quality.signal,
            signal_to_noise=quality.snr,
            cosine=quality.cosine,
            verdict=quality.verdict,
            consensus=request.consensus,
            patients_needed=plan.patients_needed,
        ),
        table=[
            PlanRow(
                epsilon=row.epsilon,
                patients=row.patients,
                noise_multiplier=row.noise_multiplier,
                noise_per_coordinate=row.quality.noise_per_coordinate if row.quality else None,
                cosine=row.quality.cosine if row.quality else None,
                verdict=row.quality.verdict if row.quality else None,
            )
            for row in plan.table
        ],
        warnings=list(plan.warnings),
        curve=curve,
    )


def _up(value: float) -> str:
    # Rounded up: a statement may not promise more than was computed.
    return f"{math.ceil(value * 100.0) / 100.0:.2f}"
