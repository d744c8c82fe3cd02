"""Linkability: can someone who holds one tile of a patient find that patient's other tiles through the release?

The structure is Anonymeter's (Giomi et al., PoPETs 2023): an attack on training patients, the same attack on patients
the generator never saw, and the risk that is left once the second is taken from the first. The intruder holds a tile of
a patient, takes the released tile nearest to it as a bridge, and names the patients in a gallery of other tiles
that lie nearest to the bridge. Training and holdout patients stand in one gallery, with equally many tiles each.

Legend: m attempts, P patients, d embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from privacy_audit.evidence_parts import LinkabilityEvidence
from privacy_audit.intervals import wilson
from privacy_audit.neighbours import Standardiser, nearest, patient_minima
from privacy_audit.policy import LinkabilityPolicy
from privacy_audit.result import Status, TestResult
from privacy_audit.subject import Cohort, Group

NAME = "linkability (motivated intruder)"
_MOST_TIMES = 100.0  # a forecast for more than a hundred times as many patients is none


@dataclass(frozen=True)
class Risk:
    """Residual risk R = (r_T - r_H) / (1 - r_H) with a 95 % interval, and the two attack rates."""

    value: float
    low: float
    high: float
    attack: float
    control: float


def gather(
    synthetic: Group,
    train: Group,
    holdout: Group,
    cohort: Cohort,
    standardise: Standardiser,
    policy: LinkabilityPolicy,
    rng: np.random.Generator,
) -> LinkabilityEvidence:
    """Let the intruder try with half of each patient's tiles, the other half being the gallery; then the other way round.

    So every tile is an attempt, and no attempt finds its own tile.
    Every patient gives the same number of gallery tiles where it has them, so that none is nearer by numbers alone.
    Patients with one tile cannot be linked and are left out.
    """
    embeddings = standardise(train.features.embeddings, holdout.features.embeddings)
    owner = np.concatenate([cohort.of_train, cohort.of_holdout])
    halves = _halves(owner, policy.tiles_per_patient, rng)
    if not len(halves[0]):
        return LinkabilityEvidence(owner[:0], owner[:0])
    released = standardise(synthetic.features.embeddings)
    ranks = []
    for targets, gallery in (halves, halves[::-1]):
        bridges = nearest(embeddings[targets], released, 1)[1][:, 0]
        used, inverse = torch.unique(bridges, return_inverse=True)
        distances = patient_minima(
            released[used], embeddings[gallery], torch.from_numpy(owner[gallery]), cohort.patients
        ).numpy()[inverse.numpy()]
        own = distances[np.arange(len(targets)), owner[targets]]
        ranks.append((distances < own[:, None]).sum(axis=1).astype(np.int64))
    return LinkabilityEvidence(owner=owner[np.concatenate(halves)], rank=np.concatenate(ranks))


def residual_risk(evidence: LinkabilityEvidence, cohort: Cohort, policy: LinkabilityPolicy) -> Risk:
    """Residual risk with its interval, propagated from Wilson intervals of the two rates (Anonymeter, section 4).

    Tiles of one patient are no independent attempts: the interval counts as many as the spread between patients allows.
    Wilson intervals of small rates are lopsided, and so is this one: its upper end takes the attack's upper and the
    control's lower end (Zou & Donner, Statist Med 27, 2008). One half-width for both ends would promise less risk than
    no hit at all can show.
    """
    rates = _rates(evidence, cohort, policy)
    if rates[1].rate >= 1.0:
        return Risk(0.0, -1.0, 1.0, rates[0].rate, rates[1].rate)
    value, low, high = _residual(*rates, 1.0)
    return Risk(value, max(low, -1.0), min(high, 1.0), rates[0].rate, rates[1].rate)


def patients_needed(evidence: LinkabilityEvidence, cohort: Cohort, policy: LinkabilityPolicy) -> int | None:
    """Patients a side with which, at the rates measured here, the interval would end at the policy's limit.

    The effective numbers of attempts grow with the patients; the rates, their spread and so the residual risk stay.
    Rounded up to tens: it is a forecast, and the report counts no patients. None where the risk itself is not below the
    limit, so that no number of patients would do, or where it would take more than a hundred times as many.
    """
    rates = _rates(evidence, cohort, policy)
    if rates[1].rate >= 1.0 or _residual(*rates, 1.0)[0] >= policy.max_risk:
        return None

    def ends_below(times: float) -> bool:
        return _residual(*rates, times)[2] <= policy.max_risk

    low, high = 1.0, _MOST_TIMES
    if not ends_below(high):
        return None
    while high - low > 1e-3 * high:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if ends_below(middle) else (middle, high)
    return int(np.ceil(high * max(rate.patients for rate in rates) / 10.0)) * 10


def result(evidence: LinkabilityEvidence, cohort: Cohort, policy: LinkabilityPolicy) -> TestResult:
    """The test: the upper bound of the residual risk against the policy's limits."""
    sides = cohort.is_train[evidence.owner]
    if not len(sides) or sides.all() or not sides.any():
        return _result(
            None,
            policy,
            Status.REVIEW,
            "Too few patients have two tiles, so no attempt to link them could be made.",
        )
    risk = residual_risk(evidence, cohort, policy)
    rates = (
        f"The intruder named the right patient in {risk.attack:.1%} of attempts on training patients and in "
        f"{risk.control:.1%} on patients the generator never saw"
    )
    if risk.high <= policy.max_risk:
        return _result(risk, policy, Status.PASS, f"{rates}: a residual risk of at most {risk.high:.2f}.")
    if risk.high > policy.fail_risk and risk.low > 0.0:
        return _result(
            risk,
            policy,
            Status.FAIL,
            f"{rates}: the residual risk is above zero and may be {risk.high:.2f}, over {policy.fail_risk:g}.",
        )
    needed = patients_needed(evidence, cohort, policy)
    advice = (
        f"At these rates the interval would end at {policy.max_risk:g} with about {needed} training and as many holdout "
        "patients."
        if needed is not None
        else f"The estimate itself is {risk.value:.2f}: more patients alone would not bring the interval below "
        f"{policy.max_risk:g}."
    )
    return _result(
        risk,
        policy,
        Status.REVIEW,
        f"{rates}: the residual risk may be {risk.high:.2f}, over {policy.max_risk:g}. A sample too small to decide "
        f"does not pass. {advice}",
        needed,
    )


def _result(
    risk: Risk | None, policy: LinkabilityPolicy, status: Status, why: str, needed: int | None = None
) -> TestResult:
    return TestResult(
        name=NAME,
        section="attribution",
        claim="Someone who holds a tile of a patient does not find that patient's other tiles through the release.",
        statistic=f"residual risk that the right patient is among the first {policy.top_patients} named",
        value=risk.value if risk else None,
        interval=(risk.low, risk.high) if risk else None,
        interval_kind="95 %, propagated from Wilson intervals counted by patients" if risk else "",
        null="the same attempts on holdout patients",
        threshold=policy.max_risk,
        direction="lower is safer",
        status=status,
        why=why,
        cannot_show="An intruder with better eyes, or who knows more of the patient than tissue.",
        details={
            "attack_rate": round(risk.attack, 6) if risk else None,
            "control_rate": round(risk.control, 6) if risk else None,
            "patients_needed": needed,
        },
    )


@dataclass(frozen=True)
class _Rate:
    """Rate of hits over patients, each counting once, how far these differ, and how many attempts they had."""

    rate: float
    variance: float
    patients: int
    attempts: int

    def trials(self, times: float) -> float:
        """Effective number of attempts with so many times the patients: never more than clustering supports.

        The spread is taken as if two more patients had been seen, one always named and one never (Laplace's rule of
        succession): no spread among ten patients who were hardly ever named says little of the eleventh. So
        the number is that of the patients where nobody was named, and grows from there without a jump.
        """
        count = self.patients * times
        centre = (count * self.rate + 1.0) / (count + 2.0)
        squares = count * (self.variance + (self.rate - centre) ** 2) + (1.0 - centre) ** 2 + centre**2
        effective = centre * (1.0 - centre) * count * (count + 1.0) / squares
        return float(np.clip(effective, count, self.attempts * times))

    def limits(self, times: float) -> tuple[float, float]:
        """Wilson's interval with so many times the patients."""
        trials = self.trials(times)
        return wilson(self.rate * trials, trials)


def _rates(evidence: LinkabilityEvidence, cohort: Cohort, policy: LinkabilityPolicy) -> tuple[_Rate, _Rate]:
    """Of the attack (training patients) and of the control (holdout patients)."""
    hit = evidence.rank < policy.top_patients
    side = cohort.is_train[evidence.owner]
    return _rate(hit[side], evidence.owner[side]), _rate(hit[~side], evidence.owner[~side])


def _residual(attack: _Rate, control: _Rate, times: float) -> tuple[float, float, float]:
    """Residual risk and both ends of its interval with so many times the patients; the control must not hit always."""
    value = (attack.rate - control.rate) / (1.0 - control.rate)
    by_attack = 1.0 / (1.0 - control.rate)
    by_control = (1.0 - attack.rate) / (1.0 - control.rate) ** 2
    attack_low, attack_high = attack.limits(times)
    control_low, control_high = control.limits(times)
    below = np.hypot(by_attack * (attack.rate - attack_low), by_control * (control_high - control.rate))
    above = np.hypot(by_attack * (attack_high - attack.rate), by_control * (control.rate - control_low))
    return value, value - float(below), value + float(above)


def _rate(hit: npt.NDArray[np.bool_], owner: npt.NDArray[np.int64]) -> _Rate:
    patients = np.unique(owner)
    means = np.array([hit[owner == patient].mean() for patient in patients])
    return _Rate(float(means.mean()), float(means.var()), len(patients), len(hit))


def _halves(
    owner: npt.NDArray[np.int64], per_patient: int, rng: np.random.Generator
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows of the intruder's tiles and of the gallery, patient by patient, at most `per_patient` in all."""
    targets: list[int] = []
    gallery: list[int] = []
    for patient in np.unique(owner):
        rows = rng.permutation(np.flatnonzero(owner == patient))[: max(per_patient, 2)]
        if len(rows) < 2:
            continue
        half = len(rows) // 2
        targets += sorted(rows[:half].tolist())
        gallery += sorted(rows[half : 2 * half].tolist())
    return np.array(targets, dtype=np.int64), np.array(gallery, dtype=np.int64)
