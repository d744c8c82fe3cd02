"""Planning a private study: the noise a target needs, what it does to the update, and whether the cohort is large enough.

Everything is computed from public settings. Nothing here looks at a patient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pixcell_core.contracts.study import Study
from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.private.accounting import Epsilon, calibrate_noise, epsilon
from pixcell_core.private.consortium import ConsortiumEpsilon, consortium_epsilon
from pixcell_core.private.events import GaussianEvent
from pixcell_core.private.filters import BudgetFilter
from pixcell_core.private.limits import check_cohort, check_delta, check_sample_rate, check_target
from pixcell_core.private.study_charges import condition_event
from pixcell_core.private.usefulness import (
    DEFAULT_CONSENSUS,
    USEFUL_COSINE,
    UpdateQuality,
    patients_needed,
    update_quality,
)

TABLE_EPSILONS = (1.0, 2.0, 4.0, 8.0)
TABLE_PATIENTS = (50, 100, 200, 400, 1000)
_MANY_STEPS = 1000
_FEW_STEPS = 5
_FULL_UP_TO = 500
_WEAK_PROMISE = 10.0
_UNUSED = 0.95


@dataclass(frozen=True)
class PlanRequest:
    """What is planned. All of it is public.

    Attributes:
        patients: N of one site (of the smallest, where they differ).
        rounds, steps: federated rounds, and private steps in each.
        sample_rate: q.
        epsilon, delta: the target per patient, for everything together.
        parameters: d, trained numbers of the adapter.
        max_grad_norm: C, for figures in absolute units.
        sites: S alike sites, whose updates are averaged.
        expected_patients: public divisor of the noisy sum; q N when None.
        consensus: rho, see `usefulness`.
        already_spent: earlier charges, oldest first.
        votes: charge of private conditions.
        noise_multiplier: sigma where it is given (a written study); None calibrates it.
    """

    patients: int
    rounds: int
    steps: int
    sample_rate: float
    epsilon: float
    delta: float
    parameters: int
    max_grad_norm: float = 1.0
    sites: int = 1
    expected_patients: float | None = None
    consensus: float = DEFAULT_CONSENSUS
    already_spent: tuple[GaussianEvent, ...] = ()
    votes: GaussianEvent | None = None
    noise_multiplier: float | None = None

    def __post_init__(self) -> None:
        check_cohort(self.patients)
        check_delta(self.delta, self.patients)
        check_target(self.epsilon)
        check_sample_rate(self.sample_rate)
        for name in ("rounds", "steps", "parameters", "sites"):
            if getattr(self, name) < 1:
                raise _unusable(f"{name} is {getattr(self, name)}", "Give at least 1.")
        if not 0.0 < self.consensus <= 1.0:
            raise _unusable(f"the consensus is {self.consensus:g}", "Give a share above 0, at most 1.")
        for name in ("max_grad_norm", "expected_patients"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0.0):
                raise _unusable(f"{name} is {value}", "Give a finite number above 0.")

    @property
    def total_steps(self) -> int:
        """T over all rounds."""
        return self.rounds * self.steps

    @property
    def beside(self) -> tuple[GaussianEvent, ...]:
        """Charges of the plan that are not training."""
        return () if self.votes is None else (self.votes,)


@dataclass(frozen=True)
class TableRow:
    """One cohort size at one target; `noise_multiplier` and `quality` are None where earlier charges leave no room."""

    epsilon: float
    patients: int
    noise_multiplier: float | None
    quality: UpdateQuality | None


@dataclass(frozen=True)
class Plan:
    """A plan and what it costs.

    Attributes:
        request: as asked, with sigma filled in.
        noise_multiplier: sigma.
        spent_before, training, conditions: epsilon of each alone, all at the plan's delta.
        calibrated: whether sigma was found here, and not given.
        together: one number for what was spent, training and private conditions: what a patient reads.
        admitted: whether a ledger with the target as its cap admits the whole plan.
        quality: what the update is expected to be worth.
        patients_needed: smallest N per site for a useful update at this target.
        consortium: over all sites, with its assumption and the alternative.
        table: rows over targets and cohort sizes.
        warnings: plain sentences, most serious first.
    """

    request: PlanRequest
    noise_multiplier: float
    calibrated: bool
    spent_before: Epsilon
    training: Epsilon
    conditions: Epsilon
    together: Epsilon
    admitted: bool
    quality: UpdateQuality
    patients_needed: int
    consortium: ConsortiumEpsilon
    table: tuple[TableRow, ...]
    warnings: tuple[str, ...]


def plan_training(request: PlanRequest) -> Plan:
    """Return the plan for `request`.

    Raises:
        RefusedError: what is spent or planned beside leaves no room for any noise.
    """
    sigma = request.noise_multiplier or _calibrated(request)
    training = GaussianEvent(request.sample_rate, sigma, request.total_steps)
    own = [training, *request.beside]
    everything = [*request.already_spent, *own]
    quality = expected_quality(request, sigma)
    plan = Plan(
        request=replace(request, noise_multiplier=sigma),
        noise_multiplier=sigma,
        calibrated=request.noise_multiplier is None,
        spent_before=epsilon(request.already_spent, request.delta),
        training=epsilon([training], request.delta),
        conditions=epsilon(request.beside, request.delta),
        together=epsilon(everything, request.delta),
        admitted=BudgetFilter(request.epsilon, request.delta).admits(everything),
        quality=quality,
        patients_needed=_needed(request, sigma),
        consortium=consortium_epsilon(
            {f"site {i + 1}": everything for i in range(request.sites)}, request.delta, disjoint=True
        ),
        table=_table(request, sigma),
        warnings=(),
    )
    return replace(plan, warnings=tuple(_warnings(plan)))


def request_for_study(
    study: Study,
    *,
    patients: int,
    parameters: int,
    consensus: float = DEFAULT_CONSENSUS,
    already_spent: Sequence[GaussianEvent] = (),
) -> PlanRequest:
    """Return the request that describes a written study at a site of `patients` patients."""
    return PlanRequest(
        patients=patients,
        rounds=study.rounds,
        steps=study.steps_per_round,
        sample_rate=study.sample_rate,
        epsilon=study.epsilon_cap,
        delta=study.delta,
        parameters=parameters,
        max_grad_norm=study.max_grad_norm,
        sites=len(study.sites),
        expected_patients=float(study.expected_patients),
        consensus=consensus,
        already_spent=tuple(already_spent),
        votes=condition_event(study),
        noise_multiplier=study.noise_multiplier,
    )


def expected_quality(
    request: PlanRequest,
    noise_multiplier: float,
    patients: int | None = None,
    sample_rate: float | None = None,
) -> UpdateQuality:
    """Return `update_quality` of a request; for another cohort size or rate, with the divisor that would suit it."""
    as_asked = patients is None and sample_rate is None
    return update_quality(
        noise_multiplier=noise_multiplier,
        steps=request.total_steps,
        sample_rate=sample_rate or request.sample_rate,
        patients=patients or request.patients,
        parameters=request.parameters,
        sites=request.sites,
        consensus=request.consensus,
        divisor=request.expected_patients if as_asked else None,
    )


def _calibrated(request: PlanRequest, target: float | None = None, sample_rate: float | None = None) -> float:
    return calibrate_noise(
        sample_rate or request.sample_rate,
        request.total_steps,
        target or request.epsilon,
        request.delta,
        already_spent=request.already_spent,
        planned_beside=request.beside,
    )


def _needed(request: PlanRequest, sigma: float) -> int:
    return patients_needed(
        noise_multiplier=sigma,
        steps=request.total_steps,
        sample_rate=request.sample_rate,
        parameters=request.parameters,
        sites=request.sites,
        consensus=request.consensus,
    )


def _table(request: PlanRequest, sigma: float) -> tuple[TableRow, ...]:
    """Every target with every cohort size; the sizes include the plan's own."""
    rows = []
    for target in sorted({*TABLE_EPSILONS, request.epsilon}):
        try:
            known = target == request.epsilon and request.noise_multiplier is None
            noise = sigma if known else _calibrated(request, target)
        except RefusedError:
            noise = None
        for patients in sorted({*TABLE_PATIENTS, request.patients}):
            quality = None if noise is None else expected_quality(request, noise, patients)
            rows.append(TableRow(target, patients, noise, quality))
    return tuple(rows)


def _warnings(plan: Plan) -> list[str]:
    request, said = plan.request, []
    if not plan.admitted:
        said.append(
            f"A ledger with the cap epsilon {request.epsilon:g} per patient at delta {request.delta:g} will refuse this "
            f"plan before its end: together it costs {_number(plan.together)}."
        )
    elif plan.together.value < _UNUSED * request.epsilon and request.sample_rate < 1.0 and plan.calibrated:
        said.append(
            f"Only {_number(plan.together)} of {request.epsilon:g} can be spent: sampled steps and other charges are "
            "unlike, and a budget that has to hold whatever later charges are chosen by admits less of those. With all "
            "patients in every step (sample rate 1) nothing is lost."
        )
    if plan.quality.verdict != "useful":
        most = int(request.parameters * (plan.quality.snr / _snr(USEFUL_COSINE)) ** 2)
        said.append(
            f"{request.patients} patients are too few for this promise to be useful: the update would be "
            f"{'mostly noise' if plan.quality.verdict == 'noise' else 'weak'} (expected cosine "
            f"{plan.quality.cosine:.2f} with what it would be without noise). About {plan.patients_needed} patients at "
            f"each site, or an adapter of at most {max(1, most)} numbers, would give {USEFUL_COSINE:g}."
        )
    if request.sample_rate < 1.0:
        said += _about_sampling(plan)
    if request.total_steps > _MANY_STEPS:
        said.append(
            f"{request.total_steps} steps: beyond some tens, more steps need as much more noise and take longer "
            "(with all patients in every step the signal-to-noise ratio does not depend on them)."
        )
    if request.total_steps < _FEW_STEPS:
        said.append(
            f"{request.total_steps} steps teach an adapter little, however small the noise; 20 to 60 are usual."
        )
    if request.epsilon > _WEAK_PROMISE:
        said.append(
            f"A target of epsilon {request.epsilon:g} per patient at delta {request.delta:g} promises little."
        )
    divisor, taking_part = request.expected_patients, request.sample_rate * request.patients
    if divisor is not None and not 0.5 <= divisor / taking_part <= 2.0:
        said.append(
            f"The divisor expected-patients {divisor:g} is far from q N = {taking_part:g}: every step is scaled by "
            f"{taking_part / divisor:.2g}, signal and noise alike. Set the learning rate for it."
        )
    return said


def _about_sampling(plan: Plan) -> list[str]:
    """Whether sampling patients is worth its assumption, compared with everybody in every step at the same cost."""
    request = plan.request
    full = expected_quality(request, _calibrated(request, sample_rate=1.0), sample_rate=1.0)
    compared = (
        f"with all of them in every step the signal-to-noise ratio is {full.snr:.2g} instead of {plan.quality.snr:.2g}, "
        "and no assumption about secret sampling is needed"
    )
    if request.patients <= _FULL_UP_TO:
        return [
            f"Sampling {request.sample_rate:g} of {request.patients} patients is not worth it: {compared}."
        ]
    if plan.quality.verdict == "useful" or full.snr <= plan.quality.snr:
        return []
    slower = 1.0 / request.sample_rate
    return [
        f"Sampling saves time and costs signal: {compared}; a step then takes {slower:.3g} times as long."
    ]


def _snr(cosine: float) -> float:
    return cosine / math.sqrt(1.0 - cosine * cosine)


def _number(value: Epsilon) -> str:
    return f"epsilon {math.ceil(value.value * 100.0) / 100.0:.2f} per {value.unit} at delta {value.delta:g}"


def _unusable(what: str, hint: str) -> BadInputError:
    return BadInputError(f"Cannot plan: {what}.", hint=hint, code="privacy-setting")
