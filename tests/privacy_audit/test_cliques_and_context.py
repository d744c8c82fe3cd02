"""Cliques among released tiles, and the familiar numbers against slow computations of them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from privacy_audit import cliques, context, plants
from privacy_audit.evidence_parts import CliqueEvidence
from privacy_audit.neighbours import Standardiser, patient_minima
from privacy_audit.pairs import correlations
from privacy_audit.policy import load_policy
from privacy_audit.result import Status
from privacy_audit.subject import Cohort, Group, cohort_of
from tests.privacy_audit.conftest import Tile, stain_of, tissue_tile
from tests.privacy_audit.test_conditioning import group as tiles_group
from tests.privacy_audit.test_linkability_and_strata import group, world

POLICY = load_policy("core")


def release(repeats: int, seed: int = 0) -> Group:
    """30 tiles, of which `repeats` show one field: turned, noisy, shifted by a few pixels."""
    rng = np.random.default_rng(seed)
    tiles: list[Tile] = [tissue_tile(rng, stain_of(rng), 64) for _ in range(30)]
    for row in range(repeats):
        turned = np.roll(np.rot90(tiles[29], row % 4), row % 3, axis=0)
        tiles[row] = np.clip(turned + rng.normal(0, 6, turned.shape), 0, 255).astype(np.uint8)
    return tiles_group("synthetic", tiles, [""] * 30)


def found_groups(repeats: int) -> list[tuple[int, ...]]:
    synthetic = release(repeats)
    standardise = Standardiser.fit(synthetic.features.embeddings)
    return cliques.groups(cliques.gather(synthetic, standardise, POLICY), POLICY.cliques.group_tiles)


def test_a_field_that_returns_ten_times_is_one_group() -> None:
    assert found_groups(12) == [(*range(12), 29)]


def test_other_tiles_are_no_group() -> None:
    assert found_groups(0) == [] and found_groups(4) == []


@pytest.mark.parametrize("maker", [plants.turn, plants.zoom])
def test_a_field_that_returns_turned_or_zoomed_is_one_group(maker: plants.Maker) -> None:
    """Correlation over quarter turns and shifts sees none of these; keypoints hold the group together."""
    rng = np.random.default_rng(1)
    tiles: list[Tile] = [tissue_tile(rng, stain_of(rng), 128) for _ in range(30)]
    for row in range(12):
        tiles[row] = maker(tiles[29], tiles[row], rng)
    synthetic = tiles_group("synthetic", tiles, [""] * 30)
    standardise = Standardiser.fit(synthetic.features.embeddings)
    found = cliques.groups(cliques.gather(synthetic, standardise, POLICY), POLICY.cliques.group_tiles)
    assert len(found) == 1 and set(found[0]) <= {*range(12), 29} and len(found[0]) >= 10
    pairs = [(row, 29) for row in range(12)]
    assert (correlations(synthetic, synthetic, pairs, POLICY.copies.min_overlap).score < 0.75).sum() >= 10


def chain(*groups: range) -> CliqueEvidence:
    pairs = [(row, row + 1) for rows in groups for row in list(rows)[:-1]]
    return CliqueEvidence(
        np.array([a for a, _ in pairs]), np.array([b for _, b in pairs]), np.full(len(pairs), 0.9)
    )


@pytest.mark.parametrize(
    ("evidence", "flagged", "status"),
    [
        (chain(), [], Status.PASS),
        (chain(range(9)), [], Status.PASS),
        (chain(range(10)), [], Status.REVIEW),
        (chain(range(10), range(20, 30), range(40, 52)), [], Status.FAIL),
        (chain(range(10)), [3], Status.FAIL),
        (chain(range(10)), [15], Status.REVIEW),
    ],
)
def test_status_by_number_of_groups_and_by_what_they_hold(
    evidence: CliqueEvidence, flagged: list[int], status: Status
) -> None:
    assert cliques.result(evidence, flagged, 60, POLICY).status is status


def measured(leak: float = 0.0) -> tuple[Group, Group, Group, Cohort, np.ndarray, Standardiser]:
    train, holdout, synthetic = world(leak, patients=10)
    synthetic = group("synthetic", synthetic.features.embeddings.numpy()[:80].astype(float), [""] * 80)
    cohort = cohort_of(train, holdout)
    standardise = Standardiser.fit(train.features.embeddings, holdout.features.embeddings)
    import torch

    base = standardise(torch.cat([train.features.embeddings, holdout.features.embeddings]))
    owner = torch.from_numpy(np.concatenate([cohort.of_train, cohort.of_holdout]))
    distances = patient_minima(standardise(synthetic.features.embeddings), base, owner, cohort.patients)
    return train, holdout, synthetic, cohort, distances.double().numpy(), standardise


def test_each_number_is_what_its_paper_says() -> None:
    train, holdout, synthetic, cohort, distances, standardise = measured()
    evidence = context.gather(synthetic, train, holdout, cohort, standardise, 20)
    t, h, s = (standardise(g.features.embeddings).double().numpy() for g in (train, holdout, synthetic))
    s_t, s_h = cdist(s, t), cdist(s, h)
    sides = cohort.is_train
    assert context.dcr_share(distances, sides) == (s_t.min(1) < s_h.min(1)).mean()
    both = np.concatenate([t, h])
    owner = np.concatenate([cohort.of_train, cohort.of_holdout])
    nearest = s_t.argmin(1)
    apart = [np.min(cdist(t[row : row + 1], both[owner != owner[row]])) for row in nearest]
    assert context.authenticity(evidence, sides) == pytest.approx((s_t.min(1) > apart).mean())


def test_twins_in_training_do_not_silence_authenticity() -> None:
    """Near-duplicate training tiles of one patient made the published form read 1 over true copies."""
    train, holdout, _, cohort, _, standardise = measured()
    points = train.features.embeddings.numpy().astype(float)
    points[1::2] = points[::2] + 1e-3
    twins = group("train", points, list(train.patients))
    copies = group("synthetic", points[:80] + 2e-3, [""] * 80)
    evidence = context.gather(copies, twins, holdout, cohort, standardise, 20)
    assert context.authenticity(evidence, cohort.is_train) == 0.0


def test_context_never_gates_and_says_so() -> None:
    train, holdout, synthetic, cohort, distances, standardise = measured(0.5)
    evidence = context.gather(synthetic, train, holdout, cohort, standardise, 20)
    results = context.results(evidence, distances, cohort, POLICY, np.random.default_rng(0))
    assert len(results) == 4
    for one in results:
        assert not one.gating and one.section == "context" and "not a gate" in one.why
        assert one.p is not None and 0 < one.p <= 1 and one.threshold is not None
    assert results[0].p is not None and results[0].p < 0.05  # half of the release imitates training patients


def test_the_permutation_p_of_a_number_is_uniform_in_innocent_worlds() -> None:
    quick = POLICY.model_copy(update={"context": POLICY.context.model_copy(update={"permutations": 99})})
    train, holdout, synthetic, cohort, distances, standardise = measured()
    evidence = context.gather(synthetic, train, holdout, cohort, standardise, 8)
    rng = np.random.default_rng(0)
    low = 0
    for _ in range(60):
        shuffled = Cohort(
            cohort.of_train, cohort.of_holdout, rng.permutation(cohort.is_train), cohort.stratum
        )
        low += sum(
            one.p is not None and one.p <= 0.1
            for one in context.results(evidence, distances, shuffled, quick, rng)
        )
    assert low / 240 <= 0.17
