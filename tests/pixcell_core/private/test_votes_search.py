"""From noisy histograms to conditions: post-processing alone, thresholds, variations, and what it is good for."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pixcell_core.contracts.study import PatientVotes
from pixcell_core.errors import RefusedError
from pixcell_core.private.condition_search import (
    Interpolation,
    VotedConditions,
    public_seed,
    replayed,
    search_conditions,
    winning_shares,
)
from pixcell_core.private.noise import UnsafeFixedKeySource
from pixcell_core.private.votes import NoisyVotes, PatientTiles

from .test_votes import LABELS, Cohort

DIGEST = "sha256:" + "0" * 64
Array = npt.NDArray[np.float64]


def settings_of(**changes: object) -> PatientVotes:
    plain = {"noise_multiplier": 1.0, "iterations": 2, "candidates": 16, "labels": LABELS}
    return PatientVotes.model_validate(plain | {"candidates_digest": DIGEST} | changes)


def bank_of(count: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 1, 6, generator=torch.Generator().manual_seed(seed))


def no_charge(step: int) -> None:
    """Nobody pays in these tests."""


def vote(
    cohort: Cohort, votes: PatientVotes, bank: torch.Tensor, key: int = 0, seed: int = 5
) -> VotedConditions:
    source = UnsafeFixedKeySource(key=key.to_bytes(32, "big"))
    ask = NoisyVotes(
        lambda: cohort,
        votes.labels,
        noise_multiplier=votes.noise_multiplier,
        source=source,
        reserve=no_charge,
    )
    return search_conditions(bank, votes, ask, Interpolation(bank), seed=seed)


def patients_near(bank: torch.Tensor, places: dict[tuple[int, str], int]) -> Cohort:
    """So many patients at a candidate, of a label, two tiles each."""
    cohort = Cohort()
    for (place, label), count in places.items():
        for number in range(count):
            tiles = PatientTiles(bank[place][None].repeat(2, 1, 1) * 1.01, (label, label))
            cohort.everyone[f"{place}-{label}-{number}"] = tiles
    return cohort


def test_shares_drop_what_is_under_the_threshold() -> None:
    noisy = np.array([[10.0, 3.9, -50.0], [0.0, 4.0, 6.0]])
    found = winning_shares(noisy, settings_of(noise_multiplier=2.0, threshold=2.0))
    assert np.array_equal(found.shares, np.array([[10, 0, 0], [0, 4, 6]]) / 20) and not found.uniform
    open_ended = winning_shares(noisy, settings_of(noise_multiplier=2.0, threshold=0.0))
    assert open_ended.shares.min() == 0.0 and open_ended.shares[0, 1] > 0, "negative bins never count"
    nothing = winning_shares(noisy, settings_of(noise_multiplier=100.0))
    assert nothing.uniform and np.allclose(nothing.shares, 1 / 6) and nothing.shares.sum() == pytest.approx(1)


def test_the_same_histograms_give_the_same_conditions_whoever_the_patients_are() -> None:
    """Everything after the noise is a function of the noise's answer: no other way leads back to a patient."""
    bank = bank_of()
    votes = settings_of(noise_multiplier=0.5, iterations=4)
    voted = vote(patients_near(bank, {(3, "stroma"): 9, (8, "gland"): 4}), votes, bank)
    again = replayed(voted, bank, Interpolation(bank), seed=5)
    assert again.digest == voted.digest and torch.equal(again.candidates, voted.candidates)
    assert replayed(voted, bank, Interpolation(bank), seed=6).digest != voted.digest
    # Another patient whose tiles count in no bin: the answers are the same, and so is every byte that follows.
    cohort = patients_near(bank, {(3, "stroma"): 9, (8, "gland"): 4})
    cohort.everyone["silent"] = PatientTiles(torch.randn(5, 1, 6), ("secret-label",) * 5)
    assert vote(cohort, votes, bank).digest == voted.digest
    counted = cohort.with_one("loud", PatientTiles(bank[20][None], ("tumour",)))
    assert vote(counted, votes, bank).digest != voted.digest


def test_a_fixed_key_gives_the_same_conditions_and_another_key_others() -> None:
    bank = bank_of()
    cohort = patients_near(bank, {(3, "stroma"): 9})
    one, again, other = (vote(cohort, settings_of(), bank, key) for key in (1, 1, 2))
    assert one.digest == again.digest != other.digest
    assert not np.array_equal(one.histograms[0], one.histograms[1]), "no iteration repeats another's noise"


def test_the_first_candidates_are_public_rows_and_later_ones_keep_their_number() -> None:
    bank, seen = bank_of(), []

    def ask(candidates: torch.Tensor, iteration: int) -> Array:
        seen.append(candidates)
        histogram = np.zeros((3, 16))
        histogram[0, 2], histogram[1, 5] = 60.0, 20.0
        return histogram

    votes = settings_of(iterations=3)
    search_conditions(bank, votes, ask, Interpolation(bank), seed=1)
    rows = {tuple(row.flatten().tolist()) for row in bank}
    assert all(tuple(row.flatten().tolist()) in rows for row in seen[0])
    assert len({tuple(row.flatten().tolist()) for row in seen[0]}) == 16, "no row twice"
    assert [tuple(c.shape) for c in seen] == [(16, 1, 6)] * 3
    winners = seen[0][[2, 5]]
    assert torch.equal(seen[1][:2], winners), "winners stay"
    near = torch.stack([torch.stack(near_rows(bank, winner)) for winner in winners])
    found = torch.isclose(seen[1][2:, None, None], near[None], atol=1e-5).all(dim=-1).all(dim=-1).any(dim=-1)
    assert found[:11, 0].all() and found[11:, 1].all(), "losers are gone, winners as by their votes"


def near_rows(bank: torch.Tensor, parent: torch.Tensor) -> list[torch.Tensor]:
    """The eight public embeddings of the largest cosine, the parent left out."""
    cosine = torch.nn.functional.cosine_similarity(bank[:, 0], parent, dim=-1)
    return [bank[int(i)] for i in torch.argsort(cosine, descending=True)[1:9]]


def test_a_winner_of_a_fair_share_is_never_lost() -> None:
    """One in sixteen of the votes is one of sixteen candidates, in every draw."""
    bank = bank_of(16)

    def ask(candidates: torch.Tensor, iteration: int) -> Array:
        histogram = np.zeros((1, 16))
        histogram[0, :2] = 15.0, 1.001
        return histogram

    votes = settings_of(labels=(), noise_multiplier=0.1, threshold=0.0, candidates=16)
    for seed in range(40):
        first, second = search_conditions(bank, votes, ask, Interpolation(bank), seed=seed).candidates
        assert torch.equal(second[:2], first[:2])


def test_a_variation_lies_between_its_parent_and_the_bank_and_steps_grow_smaller() -> None:
    bank = torch.tensor([[[0.0, 4.0]]])
    parents = torch.tensor([[[2.0, 0.0]], [[8.0, 0.0]]])
    vary = Interpolation(bank)
    angles = []
    for iteration in range(4):
        made = vary(parents, iteration, np.random.default_rng(0))
        lengths = made.flatten(1).norm(dim=1)
        step = 1.0 / 2**iteration
        assert lengths.tolist() == pytest.approx([2 + 2 * step, 8 - 4 * step], rel=1e-5)
        angles.append(float(torch.atan2(made[0, 0, 1], made[0, 0, 0])))
    assert angles == sorted(angles, reverse=True) and angles[-1] > 0
    assert vary(parents[:0], 0, np.random.default_rng(0)).shape == (0, 1, 2)


def test_too_few_public_embeddings_are_refused_before_anybody_is_asked() -> None:
    def never(candidates: torch.Tensor, iteration: int) -> Array:
        raise AssertionError("asked")

    with pytest.raises(RefusedError) as refused:
        search_conditions(bank_of(15), settings_of(), never, Interpolation(bank_of(15)), seed=0)
    assert refused.value.code == "too-few-candidates"


def test_the_seed_is_the_studys_own_and_public() -> None:
    assert public_seed(DIGEST) == public_seed(DIGEST) != public_seed("sha256:" + "1" * 64)


def label_shares(voted: VotedConditions) -> Array:
    shares: Array = voted.winners.shares.sum(axis=(0, 2))
    return shares


def test_many_patients_and_little_noise_show_the_cohorts_shares() -> None:
    bank = bank_of(16)
    cohort = patients_near(bank, {(1, "stroma"): 240, (7, "tumour"): 120, (12, "gland"): 40})
    for iterations in (1, 3):
        voted = vote(cohort, settings_of(noise_multiplier=1.5, threshold=3.0, iterations=iterations), bank)
        assert label_shares(voted) == pytest.approx([0.6, 0.3, 0.1], abs=0.03)
        best = voted.candidates[-1, voted.winners.shares[-1].argmax(axis=1)]
        wanted = bank[[1, 7, 12]]
        assert torch.nn.functional.cosine_similarity(best[:, 0], wanted[:, 0], dim=-1).min() > 0.97


def test_overwhelming_noise_shows_nothing_of_the_cohort() -> None:
    """With noise a thousand times the cohort's votes every candidate and label is equally likely."""
    bank = bank_of(16)
    cohort = patients_near(bank, {(1, "stroma"): 40})
    votes = settings_of(noise_multiplier=40_000.0, iterations=1, threshold=0.5)
    mean = np.mean([vote(cohort, votes, bank, key).winners.shares[0] for key in range(300)], axis=0)
    assert mean.shape == (3, 16)
    assert mean.sum(axis=1) == pytest.approx([1 / 3] * 3, abs=0.03)
    first = np.sort(np.random.default_rng(5).permutation(16)).tolist().index(1)
    assert mean[0, first] == pytest.approx(1 / 48, abs=0.01), (
        "the bin of all forty patients is like any other"
    )
    clear = np.mean(
        [vote(cohort, settings_of(iterations=1), bank, key).winners.shares[0, 0, first] for key in range(20)]
    )
    assert clear > 0.5, "and with little noise it is not"


def test_iterations_bring_candidates_nearer_to_the_patients() -> None:
    """Patients away from every public embedding: variations of winners come closer than the bank is."""
    bank = bank_of(60, seed=3)
    rng = np.random.default_rng(2)
    target = torch.from_numpy(rng.normal(size=(1, 6))).float()
    cohort = Cohort(
        {
            f"p{i}": PatientTiles(
                target[None] + 0.05 * torch.from_numpy(rng.normal(size=(3, 1, 6))).float(), LABELS
            )
            for i in range(200)
        }
    )
    found = []
    for iterations in (1, 5):
        votes = settings_of(iterations=iterations, candidates=60, threshold=4.0)
        nearest = []
        for seed in range(5):
            voted = vote(cohort, votes, bank, seed, seed=seed)
            best = voted.candidates[-1, int(voted.winners.shares[-1].sum(axis=0).argmax())]
            nearest.append(float(torch.nn.functional.cosine_similarity(best, target).item()))
        found.append(np.mean(nearest))
    assert found[1] > found[0] + 0.02


def test_the_digest_names_settings_and_every_number() -> None:
    bank = bank_of()
    voted = vote(Cohort(), settings_of(iterations=1), bank)
    other = VotedConditions(voted.candidates * 2, voted.histograms, voted.votes, voted.variation)
    shifted = VotedConditions(voted.candidates, voted.histograms + 1e-9, voted.votes, voted.variation)
    renamed = VotedConditions(voted.candidates, voted.histograms, voted.votes, "model")
    assert len({v.digest for v in (voted, other, shifted, renamed)}) == 4
    assert voted.labels == LABELS
    assert vote(Cohort(), settings_of(labels=()), bank).labels == (None,)


def test_the_winners_of_all_iterations_count_together() -> None:
    """Every question was paid for: what passed in any of them is drawn from, in proportion to its noisy votes."""
    votes = settings_of(noise_multiplier=1.0, threshold=2.0, iterations=2, labels=(), candidates=2)
    histograms = np.array([[[6.0, 1.9]], [[0.0, 3.0]]])
    voted = VotedConditions(torch.zeros(2, 2, 1, 6), histograms, votes, "interpolation")
    assert voted.winners.shares.tolist() == [[[6 / 9, 0.0]], [[0.0, 3 / 9]]]
    silent = VotedConditions(torch.zeros(2, 2, 1, 6), histograms * 0.1, votes, "interpolation")
    assert silent.winners.uniform and silent.winners.shares.tolist() == [[[0.25, 0.25]], [[0.25, 0.25]]]


def test_neighbours_found_in_blocks_are_those_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, parents = bank_of(30), bank_of(23, seed=4)
    whole = Interpolation(bank)(parents, 1, np.random.default_rng(0))
    monkeypatch.setattr("pixcell_core.private.condition_search._ROWS_AT_ONCE", 5)
    assert torch.allclose(Interpolation(bank)(parents, 1, np.random.default_rng(0)), whole, atol=1e-6)
    inside = Interpolation(bank)(bank, 0, np.random.default_rng(0))
    assert not torch.isclose(inside, bank, atol=1e-3).all(dim=-1).any(), "nobody is a neighbour of its own"
