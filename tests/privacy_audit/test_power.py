"""What power would take: the forecast from a small cohort against a cohort of that size, and none where none would do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from privacy_audit import power
from privacy_audit.evidence import Evidence
from privacy_audit.judge import judge
from privacy_audit.patients import TAIL_EYE, View, count_caught
from privacy_audit.policy import load_policy
from privacy_audit.report import EVIDENCE
from privacy_audit.result import Status
from privacy_audit.subject import Cohort
from tests.privacy_audit.conftest import Audited, small_policy

POLICY = load_policy("core").patients.model_copy(update={"power_simulations": 30})
FAMILY = 6
World = tuple[dict[str, View], power.Integers, Cohort]


def world(patients: int, released: int, seed: int, noise: float) -> World:
    """Patients' tiles in six dimensions, a release of nobody's, and planted tiles `noise` away from their source."""
    rng = np.random.default_rng(seed)
    none = np.empty(0, dtype=np.int64)
    centres = rng.normal(size=(patients, 6))
    tiles = centres[:, None] + rng.normal(size=(patients, 12, 6)) * 0.6
    owner = (np.arange(300) % patients).astype(np.int64)
    planted = tiles[owner, rng.integers(12, size=300)] + rng.normal(size=(300, 6)) * noise
    drawn = rng.normal(size=(released, 6)) + rng.normal(size=(released, 6)) * 0.6

    def distances(points: power.Floats) -> power.Floats:
        return np.asarray(np.linalg.norm(points[:, None, None] - tiles[None], axis=3).min(axis=2))

    cohort = Cohort(none, none, np.arange(patients) < patients // 2, np.zeros(patients, dtype=np.int64))
    return {TAIL_EYE: View(distances(drawn), distances(planted))}, owner, cohort


def caught(found: World, seed: int = 3) -> float:
    return count_caught(*found, POLICY, np.random.default_rng(seed), FAMILY, 30) / 30


def test_the_forecast_of_patients_holds_in_a_cohort_of_that_size() -> None:
    small = world(12, 80, 0, 0.05)
    assert caught(small) < POLICY.min_power
    found = power.enough(*small, POLICY, np.random.default_rng(2), FAMILY)
    assert found.patients is not None and 12 < found.patients <= 60 and found.patients % 10 == 0
    assert caught(world(found.patients, 80, 5, 0.05)) >= POLICY.min_power - 0.1
    assert f"about {found.patients} patients" in found.words(POLICY.min_power)


def test_copies_that_look_like_anyone_are_beyond_any_number() -> None:
    found = power.enough(*world(12, 60, 0, 1.5), POLICY, np.random.default_rng(2), FAMILY)
    assert (found.tiles, found.patients) == (None, None)
    assert f"neither {found.tried_tiles} released tiles nor {found.tried_patients} patients" in found.words(
        0.8
    )


def test_more_tiles_keep_the_distances_of_the_release() -> None:
    views, _, _ = world(12, 50, 1, 0.1)
    larger = power.more_tiles(views, 130, np.random.default_rng(0))[TAIL_EYE]
    assert larger.released.shape == (130, 12) and (larger.released[:50] == views[TAIL_EYE].released).all()
    known = {row.tobytes() for row in views[TAIL_EYE].released}
    assert {row.tobytes() for row in larger.released} <= known


def test_further_patients_are_like_those_there_are() -> None:
    views, owner, cohort = world(12, 400, 1, 0.05)
    larger, owners, people = power.more_patients(views, owner, cohort, 3.0, np.random.default_rng(0))
    view, before = larger[TAIL_EYE], views[TAIL_EYE]
    assert view.released.shape == (400, 36) and view.planted.shape == (300, 36)
    assert (view.released[:, :12] == before.released).all()
    assert people.patients == 36 and people.is_train.sum() == 18
    # As near as the others are, tile by tile: the level of a tile stays its own.
    old, new = np.log(before.released).mean(axis=1), np.log(view.released[:, 12:]).mean(axis=1)
    assert abs(old.mean() - new.mean()) < 0.05 and np.corrcoef(old, new)[0, 1] > 0.8
    # Copies come from all of them, as near to their patient as the planted tiles were.
    assert len(np.unique(owners)) == 36
    rows = np.arange(300)
    assert (view.planted[rows, owners] == before.planted[rows, owner]).all()
    moved = owners != owner
    assert np.median(view.planted[rows[moved], owner[moved]]) > 3 * np.median(before.planted[rows, owner])


def test_counting_stops_when_the_answer_is_known() -> None:
    sure, never = world(40, 80, 0, 0.01), world(12, 60, 0, 1.5)
    assert count_caught(*sure, POLICY, np.random.default_rng(0), FAMILY, 30, 5) == 5
    assert count_caught(*never, POLICY, np.random.default_rng(0), FAMILY, 30, 24) < 24


@pytest.mark.parametrize("demanded", [0.1, 1.0])
def test_the_report_says_what_would_do_where_power_is_short(honest: Audited, demanded: float) -> None:
    evidence = Evidence.load(honest.out / EVIDENCE)
    # Planted tiles as near to their patient as released tiles are to anyone: nothing catches such copies.
    blunt = replace(
        evidence,
        planted_distances=evidence.released_distances[np.arange(len(evidence.planted_kind)) % 40],
        planted_shape_distances=evidence.released_shape_distances[np.arange(len(evidence.planted_kind)) % 40],
    )
    policy = small_policy(
        patients__min_power=0.99 if demanded == 1.0 else demanded, patients__power_permutations=99
    )
    for given in (evidence, blunt) if demanded == 1.0 else (evidence,):
        tails = [test for test in judge(given, policy, 3).tests if test.name.startswith("patient tail")]
        short = [float(str(test.details["power"])) < policy.patients.min_power for test in tails]
        for test, too_little in zip(tails, short, strict=True):
            assert ("Simulated with more of the same" in test.why) == too_little
            assert not too_little or test.status is not Status.PASS
    if demanded == 1.0:
        assert short[0], "blunt copies are not caught"
