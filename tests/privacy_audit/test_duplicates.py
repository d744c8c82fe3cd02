"""Fields shown twice are found, different fields stay apart, and the patient test sees tissue of a patient."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pixcell_core.procedural import patient_look, render_field, site_look
from privacy_audit.copies import Conformal, Nulls, near_copies
from privacy_audit.duplicates import Duplicates, duplicates_result, find_duplicates
from privacy_audit.features import describe
from privacy_audit.identity import SHARES, identity_curve, identity_distances, identity_rows
from privacy_audit.patients import View
from privacy_audit.result import Status
from privacy_audit.spectrum import ShapeSpectra
from privacy_audit.subject import Cohort, Group
from tests.privacy_audit.conftest import TextureEye, small_policy

SIDE, FIELD = 96, 288


@pytest.fixture(scope="module")
def fields() -> list[np.ndarray]:
    return [
        render_field(
            FIELD, FIELD, site=site_look(1), patient=patient_look(1, n), tissue=None, seed=n, coverage=1.0
        ).rgb
        for n in range(3)
    ]


def group(fields: list[np.ndarray], stride: int) -> Group:
    tiles, patients = [], []
    for number, field in enumerate(fields):
        for top in range(0, FIELD - SIDE + 1, stride):
            for left in range(0, FIELD - SIDE + 1, stride):
                tiles.append(field[top : top + SIDE, left : left + SIDE])
                patients.append(f"p{number}")
    pixels = torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2).contiguous()
    names = tuple(f"{patient}/{row}" for row, patient in enumerate(patients))
    return Group("training", names, tuple(patients), ("",) * len(tiles), describe(pixels, TextureEye()))


def test_tiles_without_overlap_are_fields_of_their_own(fields: list[np.ndarray]) -> None:
    train = group(fields, SIDE)
    found = find_duplicates(train, ShapeSpectra.fit(train.features.thumbs), 0.5)
    assert found.fields == len(train) == 27 and found.share == 0.0


def test_overlapping_strides_become_one_field_for_each_patient(fields: list[np.ndarray]) -> None:
    train = group(fields, SIDE // 2)
    found = find_duplicates(train, ShapeSpectra.fit(train.features.thumbs), 0.5)
    clusters = [set(found.cluster[np.array(train.patients) == f"p{n}"].tolist()) for n in range(3)]
    assert not clusters[0] & clusters[1] and not clusters[1] & clusters[2]
    assert found.fields <= 9 and found.share >= 0.9 and found.largest >= 10


def test_the_same_tile_in_two_patients_is_no_duplicate_here(fields: list[np.ndarray]) -> None:
    train = group([fields[0], fields[0]], SIDE)
    assert find_duplicates(train, ShapeSpectra.fit(train.features.thumbs), 0.5).fields == len(train)


def test_the_report_tells_bands_and_not_counts() -> None:
    result = duplicates_result(Duplicates(np.arange(137) // 2), 60)
    text = result.model_dump_json()
    assert not result.gating and result.status is Status.PASS
    assert "137" not in text and "69" not in text


def test_copies_planted_from_few_fields_prove_nothing() -> None:
    few = duplicates_result(Duplicates(np.arange(137) // 14), 60)
    assert few.gating and few.status is Status.INVALID and "fewer than 60" in few.why


def world(
    rng: np.random.Generator, patients: int = 30, tiles: int = 8
) -> tuple[torch.Tensor, torch.Tensor, Cohort]:
    """Vectors of tiles around their patient, patients around nothing."""
    centres = rng.normal(size=(2 * patients, 1, 12)) * 1.5
    points = torch.from_numpy(centres + 0.4 * rng.normal(size=(2 * patients, tiles, 12))).float()
    owner = np.repeat(np.arange(2 * patients), tiles)
    half = patients * tiles
    is_train = np.arange(2 * patients) < patients
    cohort = Cohort(owner[:half], owner[half:], is_train, np.zeros(2 * patients, dtype=np.int64))
    flat = points.reshape(-1, 12)
    return flat[:half], flat[half:], cohort


def test_planted_patients_are_noticed_the_more_the_larger_their_share() -> None:
    rng = np.random.default_rng(2)
    train, holdout, cohort = world(rng)
    nothing_shared = Duplicates(np.arange(len(train)))
    rows = identity_rows(cohort.of_train, 120, rng)
    planted = identity_distances(rows, torch.cat([train, holdout]), cohort, nothing_shared)
    # A planted tile lies near its own patient's other tiles and not at distance nought from itself.
    own = planted[np.arange(len(rows)), cohort.of_train[rows]]
    assert (own > 0).all() and (planted.argmin(axis=1) == cohort.of_train[rows]).mean() > 0.9
    generated = rng.normal(size=(200, 12)) * 1.6
    base = torch.cat([train, holdout]).numpy().reshape(60, 8, 12)
    released = np.linalg.norm(generated[:, None, None] - base[None], axis=-1).min(axis=2)
    policy = small_policy(patients__power_simulations=20).patients
    views, owners = [View(released, planted)], cohort.of_train[rows]
    result = identity_curve(views, owners, cohort, policy, rng, 1)
    curve = [d.sensitivity for d in result.detections]
    assert [d.kind for d in result.detections] == [f"identity{share:g}" for share in SHARES]
    assert curve[-1] >= 0.8 and curve[0] <= 0.5 and not result.gating
    # The audit adjusts many p-values together; a curve at the level of one alone would promise what it cannot keep.
    strict = identity_curve(views, owners, cohort, policy, np.random.default_rng(3), 60)
    loose = identity_curve(views, owners, cohort, policy, np.random.default_rng(3), 1)
    assert sum(d.found for d in strict.detections) < sum(d.found for d in loose.detections)
    assert strict.detections[-1].found  # sixty p-values leave a limit that the permutations drawn can reach


def test_identity_leaves_out_every_tile_of_the_planted_field() -> None:
    train = torch.tensor([[0.0], [0.1], [5.0], [9.0]])
    cohort = Cohort(
        np.array([0, 0, 0, 1]), np.array([2]), np.array([True, True, False]), np.zeros(3, dtype=np.int64)
    )
    found = identity_distances(
        np.array([0]), torch.cat([train, torch.tensor([[-3.0]])]), cohort, Duplicates(np.array([0, 0, 1, 2]))
    )
    assert found.tolist() == [[5.0, 9.0, 3.0]]


def test_identity_draws_patients_in_turn_and_only_those_with_a_second_tile() -> None:
    rows = identity_rows(np.array([0, 0, 1, 2, 2, 2]), 10, np.random.default_rng(0))
    patients = np.array([0, 0, 1, 2, 2, 2])[rows]
    assert set(patients[:2]) == {0, 2} and len(rows) == 5 and 1 not in patients


def test_a_second_null_only_adds_suspicion() -> None:
    rng = np.random.default_rng(0)
    holdout, twins = Conformal(rng.uniform(0, 0.6, 999)), Conformal(rng.uniform(0, 0.3, 999))
    both = Nulls((("holdout tiles", holdout), ("twins from the base model", twins)))
    scores = np.array([0.1, 0.5, 0.9])
    assert (both.p_values(scores) <= holdout.p_values(scores)).all()
    policy = small_policy().copies
    alone = near_copies(scores, Nulls((("holdout tiles", holdout),)), policy, unrecognisable=0.0)
    found = near_copies(scores, both, policy, unrecognisable=0.0)
    assert alone.flagged.tolist() == [2] and found.flagged.tolist() == [1, 2]
    by = [part.excess(scores, policy.flag_p) for part in (holdout, twins)]
    assert alone.excess_p == by[0] and found.excess_p == min(by[0], 2 * by[1]) <= alone.excess_p
    few = Nulls(
        (("holdout tiles", holdout), ("twins from the base model", Conformal(rng.uniform(0, 0.3, 5))))
    )
    assert few.excess(scores, policy.flag_p) == by[0]  # one twin takes nothing from what the holdout says
    assert "base model" in found.result.null
    assert both.threshold(0.01) == twins.threshold(0.01)
