"""How often linkability passes whom: simulated attempts of innocent generators, and of ones that give a tenth away."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import beta

from privacy_audit import linkability
from privacy_audit.evidence_parts import LinkabilityEvidence
from privacy_audit.policy import load_policy
from privacy_audit.result import Status
from privacy_audit.subject import Cohort

POLICY = load_policy("core").linkability
TILES = POLICY.tiles_per_patient
SEEDS = 300


def attempts(named: npt.NDArray[np.int64], patients: int) -> tuple[LinkabilityEvidence, Cohort]:
    """Evidence in which patient i is named in `named[i]` of its attempts; training patients first."""
    owner = np.repeat(np.arange(2 * patients), TILES)
    rank = np.where(np.tile(np.arange(TILES), 2 * patients) < named[owner], 0, 9)
    cohort = Cohort(
        owner[:0], owner[:0], np.arange(2 * patients) < patients, np.zeros(2 * patients, dtype=np.int64)
    )
    return LinkabilityEvidence(owner, rank), cohort


def drawn(patients: int, seed: int, *, control: float, risk: float, clustered: bool) -> Status:
    """Status of one release; who is given away is so in every attempt (`clustered`), or everybody is in some."""
    rng = np.random.default_rng([seed, patients])
    # Patients differ: some are told by their tissue alone more often than others.
    own = rng.beta(4.0 * control, 4.0 * (1.0 - control), 2 * patients) if control else np.zeros(2 * patients)
    gone = np.arange(2 * patients) < patients
    given = (rng.random(2 * patients) < risk) * gone if clustered else risk * gone
    named = rng.binomial(TILES, own + (1.0 - own) * given)
    return linkability.result(*attempts(named, patients), POLICY).status


def passes(patients: int, **world: object) -> float:
    found = [drawn(patients, seed, **world) for seed in range(SEEDS)]  # type: ignore[arg-type]
    return float(np.mean([one is Status.PASS for one in found]))


@pytest.mark.parametrize("clustered", [True, False])
@pytest.mark.parametrize("control", [0.0, 0.05, 0.15])
@pytest.mark.parametrize("patients", [10, 30, 60])
def test_a_risk_of_a_tenth_seldom_passes(patients: int, control: float, clustered: bool) -> None:
    """True risk .10 is over the limit of .09: a 95 % interval lets it pass in one of forty runs, or thereabouts."""
    assert passes(patients, control=control, risk=0.10, clustered=clustered) <= 0.03


@pytest.mark.parametrize(
    ("patients", "control", "least"), [(60, 0.0, 0.99), (60, 0.05, 0.85), (60, 0.15, 0.45), (150, 0.15, 0.9)]
)
def test_innocent_generators_pass_with_patients_enough(patients: int, control: float, least: float) -> None:
    assert passes(patients, control=control, risk=0.0, clustered=False) >= least


@pytest.mark.parametrize("patients", [10, 30, 60])
def test_one_hit_does_not_make_the_patients_many(patients: int) -> None:
    """Nobody named, then one patient a side once: the second says no less of the patients who were not seen."""
    none = np.zeros(2 * patients, dtype=np.int64)
    once = none.copy()
    once[[0, patients]] = 1
    without, with_one = (linkability.residual_risk(*attempts(n, patients), POLICY) for n in (none, once))
    assert with_one.high >= 0.95 * without.high
    # No hit at all cannot promise less than Clopper and Pearson's bound for the attack alone.
    assert without.high >= beta.ppf(0.95, 1, patients)
