"""Linkability and isolated patients in hierarchical Gaussian worlds: innocent, leaking, and too small to say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, hypergeom

from privacy_audit import linkability, strata
from privacy_audit.evidence_parts import LinkabilityEvidence, StrataEvidence
from privacy_audit.features import TileFeatures
from privacy_audit.intervals import wilson
from privacy_audit.keypoints import Keypoints
from privacy_audit.neighbours import Standardiser, patient_minima
from privacy_audit.policy import load_policy
from privacy_audit.result import Status
from privacy_audit.subject import Cohort, Group, cohort_of

POLICY = load_policy("core")
WIDTH = 12


def features(points: npt.NDArray[np.float64]) -> TileFeatures:
    names = tuple(f"sha256:{row:064x}" for row in range(len(points)))
    return TileFeatures(
        names,
        names,
        torch.zeros(len(points), 1, 1),
        torch.ones(len(points)),
        torch.from_numpy(points).float(),
        Keypoints(
            torch.zeros(len(points), 1, 4).half(),
            torch.zeros(len(points), 1, 8, dtype=torch.uint8),
            torch.zeros(len(points), dtype=torch.int16),
        ),
    )


def group(name: str, points: npt.NDArray[np.float64], patients: list[str], classes: str = "") -> Group:
    ids = tuple(f"{row}" for row in range(len(points)))
    return Group(name, ids, tuple(patients), (classes,) * len(ids), features(points))


def world(leak: float, patients: int = 60, seed: int = 0, own: float = 1.0) -> tuple[Group, Group, Group]:
    """Patients around their own centres; a share `leak` of 600 released tiles imitates a training patient."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(0, own, (2 * patients, WIDTH))
    tiles = centres[:, None] + rng.normal(0, 0.5, (2 * patients, 20, WIDTH))
    drawn = rng.normal(0, own, (600, WIDTH)) + rng.normal(0, 0.5, (600, WIDTH))
    for row in range(round(leak * 600)):
        drawn[row] = centres[rng.integers(patients)] + rng.normal(0, 0.2, WIDTH)
    names = [f"p{number:03d}" for number in range(patients) for _ in range(20)]
    return (
        group("train", tiles[:patients].reshape(-1, WIDTH), names),
        group("holdout", tiles[patients:].reshape(-1, WIDTH), [f"h{name}" for name in names]),
        group("synthetic", drawn, [""] * 600),
    )


def link(leak: float, **given: int) -> tuple[LinkabilityEvidence, Cohort]:
    train, holdout, synthetic = world(leak, **given)
    cohort = cohort_of(train, holdout)
    standardise = Standardiser.fit(train.features.embeddings, holdout.features.embeddings)
    rng = np.random.default_rng(1)
    return linkability.gather(synthetic, train, holdout, cohort, standardise, POLICY.linkability, rng), cohort


def test_a_release_that_imitates_patients_fails() -> None:
    found = linkability.result(*link(0.5), POLICY.linkability)
    assert found.status is Status.FAIL
    assert (
        found.value is not None and found.value > 0.2 and found.interval is not None and found.interval[0] > 0
    )


def test_an_innocent_release_has_a_risk_about_zero() -> None:
    risks = [linkability.residual_risk(*link(0.0, seed=seed), POLICY.linkability) for seed in range(12)]
    assert abs(np.mean([risk.value for risk in risks])) < 0.06
    assert (
        sum(risk.low <= 0.0 <= risk.high for risk in risks) >= 10
    )  # the interval is a 95 % one: 38 of 40 measured
    found = linkability.result(*link(0.0), POLICY.linkability)
    assert found.status is not Status.FAIL


def test_too_few_patients_are_a_review_and_never_a_pass() -> None:
    found = linkability.result(*link(0.0, patients=8), POLICY.linkability)
    assert found.status is Status.REVIEW and "too small" in found.why


def fresh(patients: int, seed: int, own: float) -> tuple[LinkabilityEvidence, Cohort]:
    """A perfect generator: 1,000 tiles, each of somebody of the same population who is in neither side."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(0, own, (2 * patients, WIDTH))
    tiles = centres[:, None] + rng.normal(0, 0.5, (2 * patients, 20, WIDTH))
    drawn = rng.normal(0, own, (1000, WIDTH)) + rng.normal(0, 0.5, (1000, WIDTH))
    names = [f"p{number:03d}" for number in range(patients) for _ in range(20)]
    train = group("train", tiles[:patients].reshape(-1, WIDTH), names)
    holdout = group("holdout", tiles[patients:].reshape(-1, WIDTH), [f"h{name}" for name in names])
    cohort = cohort_of(train, holdout)
    standardise = Standardiser.fit(train.features.embeddings, holdout.features.embeddings)
    synthetic = group("synthetic", drawn, [""] * 1000)
    rng = np.random.default_rng(1)
    return linkability.gather(synthetic, train, holdout, cohort, standardise, POLICY.linkability, rng), cohort


def test_a_perfect_generator_passes_where_patients_are_not_told_by_their_tissue_alone() -> None:
    """60 + 60 patients, 1,000 tiles. Three of four pass where tissue alone tells a patient in 15 % of attempts."""
    results = [linkability.result(*fresh(60, seed, 0.6), POLICY.linkability) for seed in range(12)]
    assert sum(found.status is Status.PASS for found in results) >= 8
    assert not any(found.status is Status.FAIL for found in results)


def test_every_tile_is_an_attempt_and_none_finds_itself() -> None:
    evidence, cohort = fresh(10, 0, 0.6)
    assert np.bincount(evidence.owner).tolist() == [POLICY.linkability.tiles_per_patient] * cohort.patients
    # Attempts from one half alone: the interval from both is shorter, by what the second half adds.
    evidence, cohort = fresh(60, 0, 0.6)
    first = np.arange(len(evidence.owner)) < len(evidence.owner) // 2
    half = LinkabilityEvidence(evidence.owner[first], evidence.rank[first])
    whole, part = (linkability.residual_risk(one, cohort, POLICY.linkability) for one in (evidence, half))
    assert whole.high - whole.low < 0.95 * (part.high - part.low)


def test_a_wide_interval_says_how_many_patients_it_would_take() -> None:
    """The forecast, from rates at 60 + 60 patients, against an audit with that many patients."""
    checked = 0
    for seed in range(6):
        evidence, cohort = fresh(60, seed, 1.0)
        found = linkability.result(evidence, cohort, POLICY.linkability)
        needed = found.details["patients_needed"]
        if found.status is not Status.REVIEW or not isinstance(needed, int) or needed > 400:
            continue
        assert needed > 60 and needed % 10 == 0 and f"with about {needed} training" in found.why
        risk = linkability.residual_risk(evidence, cohort, POLICY.linkability)
        room = POLICY.linkability.max_risk - risk.value
        larger = linkability.residual_risk(*fresh(needed, seed + 100, 1.0), POLICY.linkability)
        assert larger.high - larger.value == pytest.approx(room, rel=0.3)
        checked += 1
    assert checked >= 2


def test_a_forecast_is_the_smallest_number_and_none_where_none_would_do() -> None:
    owner = np.repeat(np.arange(40), 4)
    cohort = Cohort(owner[:0], owner[:0], np.arange(40) < 20, np.zeros(40, dtype=np.int64))

    def evidence(attack: float, control: float) -> LinkabilityEvidence:
        hits = np.zeros(160, dtype=bool)
        hits[: round(80 * attack)] = hits[80 : 80 + round(80 * control)] = True
        return LinkabilityEvidence(owner, np.where(hits, 0, 9))

    needed = linkability.patients_needed(evidence(0.2, 0.2), cohort, POLICY.linkability)
    assert needed is not None
    rates = linkability._rates(evidence(0.2, 0.2), cohort, POLICY.linkability)
    ends = [linkability._residual(*rates, count / 20)[2] for count in (needed, needed - 10)]
    assert ends[0] <= POLICY.linkability.max_risk < ends[1]
    over = linkability.result(evidence(0.3, 0.2), cohort, POLICY.linkability)
    assert over.status is Status.REVIEW and "more patients alone would not" in over.why
    assert over.details["patients_needed"] is None
    always = linkability.patients_needed(evidence(1.0, 1.0), cohort, POLICY.linkability)
    assert always is None


def test_swapping_the_sides_turns_the_risk_round() -> None:
    """The mutant: attack and control exchanged must read as no risk, so the sign is not an accident."""
    evidence, cohort = link(0.5)
    swapped = replace(cohort, is_train=~cohort.is_train)
    assert linkability.result(evidence, swapped, POLICY.linkability).status is not Status.FAIL
    assert linkability.residual_risk(evidence, swapped, POLICY.linkability).value < 0


def test_patients_with_one_tile_cannot_be_linked() -> None:
    train = group("train", np.zeros((4, WIDTH)) + np.arange(4)[:, None], ["a", "b", "c", "d"])
    holdout = group("holdout", np.ones((4, WIDTH)) + np.arange(4)[:, None], ["e", "f", "g", "h"])
    cohort = cohort_of(train, holdout)
    standardise = Standardiser.fit(train.features.embeddings, holdout.features.embeddings)
    found = linkability.gather(
        train, train, holdout, cohort, standardise, POLICY.linkability, np.random.default_rng(0)
    )
    assert linkability.result(found, cohort, POLICY.linkability).status is Status.REVIEW


def test_the_residual_risk_is_anonymeters_formula() -> None:
    owner = np.repeat(np.arange(4), 10)
    rank = np.ones(40, dtype=np.int64)
    rank[:8] = 0  # patient 0: 8 of 10; patient 1: 0; so the attack rate is .4
    rank[20:22] = 0  # patient 2: 2 of 10: the control rate is .1
    cohort = Cohort(owner[:0], owner[:0], np.array([True, True, False, False]), np.zeros(4, dtype=np.int64))
    risk = linkability.residual_risk(LinkabilityEvidence(owner, rank), cohort, POLICY.linkability)
    assert risk.value == pytest.approx((0.4 - 0.1) / (1 - 0.1))


@given(hits=st.integers(0, 80), extra=st.integers(0, 80))
def test_wilson_is_the_textbook_interval(hits: int, extra: int) -> None:
    if hits + extra == 0:
        assert wilson(0, 0) == (0.0, 1.0)
        return
    oracle = binomtest(hits, hits + extra).proportion_ci(0.95, method="wilson")
    assert wilson(hits, hits + extra) == pytest.approx((oracle.low, oracle.high), abs=1e-9)


def isolated_world(leak: int, seed: int = 0) -> tuple[StrataEvidence, npt.NDArray[np.float64], Cohort]:
    """60 + 60 patients; sixteen lie far out; `leak` released tiles imitate isolated training patients."""
    rng = np.random.default_rng(seed)
    train, holdout, synthetic = world(0.0, seed=seed)
    points = [g.features.embeddings.numpy().reshape(60, 20, WIDTH).copy() for g in (train, holdout)]
    for side in points:
        side[:8] += 4.0 * rng.choice([-1.0, 1.0], (8, 1, WIDTH))
    drawn = synthetic.features.embeddings.numpy().copy()
    for row in range(leak):
        drawn[row] = points[0][row % 8, 0] + rng.normal(0, 0.05, WIDTH)
    train, holdout = (
        replace(g, features=features(p.reshape(-1, WIDTH).astype(float)))
        for g, p in zip((train, holdout), points, strict=True)
    )
    cohort = cohort_of(train, holdout)
    standardise = Standardiser.fit(train.features.embeddings, holdout.features.embeddings)
    base = standardise(torch.cat([train.features.embeddings, holdout.features.embeddings]))
    owner = torch.from_numpy(np.concatenate([cohort.of_train, cohort.of_holdout]))
    distances = (
        patient_minima(standardise(torch.from_numpy(drawn)), base, owner, cohort.patients).double().numpy()
    )
    evidence = StrataEvidence(
        strata.isolation(train, holdout, cohort, standardise),
        np.zeros(600, dtype=np.int64),
        np.zeros(1200, dtype=np.int64),
        np.array([30, 4]),
        ("common", "rare"),
    )
    return evidence, distances, cohort


def test_the_isolated_are_those_who_lie_far_out() -> None:
    evidence, _, cohort = isolated_world(0)
    assert set(np.flatnonzero(strata.isolated(evidence, cohort, POLICY))) == {*range(8), *range(60, 68)}


def test_a_leak_of_isolated_patients_is_seen_among_them() -> None:
    p = {
        leak: strata.attribution_p(*isolated_world(leak), POLICY, np.random.default_rng(0))
        for leak in (0, 24)
    }
    assert p[24] is not None and p[0] is not None
    assert p[24] < 0.01 < p[0]


def test_the_permutation_among_isolated_patients_is_exact() -> None:
    quick = POLICY.model_copy(update={"patients": POLICY.patients.model_copy(update={"permutations": 99})})
    evidence, distances, cohort = isolated_world(0)
    rng = np.random.default_rng(0)
    rejected = 0
    for _ in range(200):  # labels drawn anew: an innocent world each time
        shuffled = replace(cohort, is_train=rng.permutation(cohort.is_train))
        found = strata.attribution_p(evidence, distances, shuffled, quick, rng)
        rejected += found is not None and found <= 0.05
    assert rejected / 200 <= 0.10


@given(top=st.integers(1, 6), released=st.integers(6, 40), null=st.integers(1, 40))
def test_outscoring_has_the_hypergeometric_chance(top: int, released: int, null: int) -> None:
    evidence = StrataEvidence(
        np.array([1.0, 0.0]),
        np.zeros(released, dtype=np.int64),
        np.zeros(null, dtype=np.int64),
        np.array([]),
        (),
    )
    cohort = Cohort(np.array([]), np.array([]), np.array([True, False]), np.zeros(2, dtype=np.int64))
    scores = np.concatenate([np.full(top, 0.9), np.full(released - top, 0.1)])
    p, found, here, there = strata.copies_p(evidence, scores, np.full(null, 0.5), cohort, POLICY)
    assert (found, here, there) == (top, released, null)
    # The top k of the pool are all released: k draws without replacement, all of one kind.
    assert p == pytest.approx(hypergeom.pmf(top, released + null, released, top))


def test_a_rare_class_is_a_review_and_no_class_is_said_aloud() -> None:
    evidence, _, cohort = isolated_world(0)
    adjusted = {strata.ISOLATED_COPIES: 1.0, strata.ISOLATED_PATIENTS: 1.0}

    def rare(one: StrataEvidence) -> tuple[Status, bool]:
        found = strata.results(one, 1.0, (1.0, 0, 1, 1), adjusted, cohort, POLICY)[2]
        return found.status, found.gating

    assert rare(evidence) == (Status.REVIEW, True)
    assert rare(replace(evidence, class_patients=np.array([30, 10]))) == (Status.PASS, True)
    assert rare(replace(evidence, class_patients=np.array([]), class_names=())) == (Status.REVIEW, False)


def test_few_copies_of_isolated_patients_fail_after_holm() -> None:
    adjusted = {strata.ISOLATED_COPIES: 0.002, strata.ISOLATED_PATIENTS: 0.002}
    evidence, _, cohort = isolated_world(0)
    copies, patients, _ = strata.results(evidence, 0.001, (0.001, 9, 20, 20), adjusted, cohort, POLICY)
    assert copies.status is Status.FAIL and patients.status is Status.FAIL
    assert copies.threshold is not None and copies.threshold < 9


def test_isolated_patients_on_one_side_are_a_review() -> None:
    evidence, distances, cohort = isolated_world(0)
    lopsided = replace(cohort, is_train=np.isin(np.arange(120), [*range(8), *range(60, 68)]))
    assert strata.attribution_p(evidence, distances, lopsided, POLICY, np.random.default_rng(0)) is None
    found = strata.results(evidence, None, (1.0, 0, 1, 1), {strata.ISOLATED_COPIES: 1.0}, lopsided, POLICY)
    assert found[1].status is Status.REVIEW and found[1].gating


def test_a_handful_of_isolated_patients_is_a_review_that_says_how_many_would_do() -> None:
    """Ten isolated patients, six tests: the smallest p there is, at best 1 in 252, times six never lies below .01."""
    evidence, distances, cohort = isolated_world(24)
    fewer = POLICY.strata.model_copy(update={"min_isolated_patients": 10, "isolated_share": 0.01})
    few = POLICY.model_copy(update={"strata": fewer})
    ways = strata.labellings(cohort, np.flatnonzero(strata.isolated(evidence, cohort, few)))
    p = strata.attribution_p(evidence, distances, cohort, few, np.random.default_rng(0))
    assert p is not None and 1 / 252 <= 1 / ways <= p < 0.05  # planted copies, and yet no failure can be had
    names = [strata.ISOLATED_COPIES, strata.ISOLATED_PATIENTS, *"abcd"]
    adjusted = dict.fromkeys(names, 1.0) | {strata.ISOLATED_PATIENTS: min(6 * p, 1.0)}
    found = strata.results(evidence, p, (1.0, 0, 1, 1), adjusted, cohort, few)[1]
    assert (
        found.status is Status.REVIEW and "could not have failed. 12 isolated patients would do" in found.why
    )
    assert strata.patients_needed(6, 0.01) == 12 and strata.patients_needed(10, 0.01) == 14


@pytest.mark.parametrize("split", range(4, 13))
def test_the_shipped_number_of_isolated_patients_can_fail_at_any_likely_split(split: int) -> None:
    sides = np.arange(16) < split
    cohort = Cohort(np.array([]), np.array([]), sides, np.zeros(16, dtype=np.int64))
    ways = strata.labellings(cohort, np.arange(POLICY.strata.min_isolated_patients))
    assert 10 / ways < POLICY.strata.p_fail


def test_isolated_patients_are_permuted_within_their_strata() -> None:
    """Training and holdout of two hospitals that differ: across strata this would read as a leak."""
    evidence, distances, cohort = isolated_world(24)
    rows = np.flatnonzero(strata.isolated(evidence, cohort, POLICY))
    confounded = replace(cohort, stratum=cohort.is_train.astype(np.int64))
    assert strata.labellings(confounded, rows) == 1
    assert strata.attribution_p(evidence, distances, confounded, POLICY, np.random.default_rng(0)) is None
    half = np.arange(120) % 2
    ways = strata.labellings(replace(cohort, stratum=half), rows)
    assert 1 < ways < strata.labellings(cohort, rows)


def test_between_pass_and_failure_of_the_isolated_lies_a_review() -> None:
    evidence, _, cohort = isolated_world(0)
    adjusted = dict.fromkeys([strata.ISOLATED_COPIES, strata.ISOLATED_PATIENTS], 0.03)
    copies, patients, _ = strata.results(evidence, 0.015, (0.015, 6, 20, 20), adjusted, cohort, POLICY)
    assert {copies.status, patients.status} == {Status.REVIEW}
    assert "REVIEW below 0.05" in copies.why and "REVIEW below 0.05" in patients.why


@pytest.mark.parametrize(("null", "status"), [(0, Status.REVIEW), (1, Status.REVIEW), (40, Status.FAIL)])
def test_copies_of_the_isolated_need_holdout_tiles_to_be_compared_with(null: int, status: Status) -> None:
    """Twenty planted copies: with no holdout tile there p is 1, which is no reason to pass."""
    evidence, _, cohort = isolated_world(0)
    who = int(np.flatnonzero(strata.isolated(evidence, cohort, POLICY) & cohort.is_train)[0])
    near = replace(
        evidence,
        released_match=np.full(20, who),
        null_match=np.concatenate([np.full(null, who), np.full(40, 59)]),
    )
    found = strata.copies_p(near, np.full(20, 0.9), np.full(null + 40, 0.3), cohort, POLICY)
    adjusted = {strata.ISOLATED_COPIES: min(6 * found[0], 1.0)} | dict.fromkeys("abcde", 1.0)
    copies = strata.results(near, None, found, adjusted, cohort, POLICY)[0]
    assert copies.status is status and (status is Status.FAIL or "holdout tiles there" in copies.why)
    # Nothing that outscores them is nothing to look at.
    none = strata.copies_p(near, np.full(20, 0.1), np.full(null + 40, 0.3), cohort, POLICY)
    if null:
        clean = strata.results(near, None, none, dict.fromkeys(adjusted, 1.0), cohort, POLICY)[0]
        assert clean.status is Status.PASS
