"""Patients' votes: against a plain numpy account, one patient's reach, and mutants that reach further."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pixcell_core.errors import BadInputError
from pixcell_core.private.noise import UnsafeFixedKeySource
from pixcell_core.private.votes import (
    VOTE_UNIT_BITS,
    NoisyVotes,
    PatientTiles,
    exact_votes,
    patient_vote,
)

LABELS = ("stroma", "tumour", "gland")
UNKNOWN = ("secret-label", None, *LABELS)
Array = npt.NDArray[np.float64]
Votes = Callable[["Cohort", torch.Tensor, Sequence[str]], Array]


@dataclass
class Cohort:
    """Patients in memory."""

    everyone: dict[str, PatientTiles] = field(default_factory=dict)

    @property
    def patients(self) -> list[str]:
        return list(self.everyone)

    def tiles(self, patient: str) -> PatientTiles:
        return self.everyone[patient]

    def with_one(self, name: str, tiles: PatientTiles) -> Cohort:
        return Cohort(self.everyone | {name: tiles})


def tiles_of(rng: np.random.Generator, most: int = 12, spread: float = 3.0) -> PatientTiles:
    """Any number of tiles of any labels; some patients all of one kind, some mixed."""
    count = int(rng.integers(0, most + 1))
    centre = rng.normal(size=(1, 2, 3)) * rng.choice([0.0, spread])
    vectors = torch.from_numpy(rng.normal(size=(count, 2, 3)) + centre).float()
    few = UNKNOWN[: int(rng.integers(1, len(UNKNOWN) + 1))][::-1]
    return PatientTiles(vectors, tuple(few[int(i)] for i in rng.integers(len(few), size=count)))


def cohort_of(seed: int, patients: int) -> tuple[Cohort, torch.Tensor]:
    rng = np.random.default_rng(seed)
    candidates = torch.from_numpy(rng.normal(size=(7, 2, 3))).float()
    return Cohort({f"p{i}": tiles_of(rng) for i in range(patients)}), candidates


def plain_votes(cohort: Cohort, candidates: torch.Tensor, labels: Sequence[str]) -> Array:
    """The same by numpy in float64, tile by tile, as one would write it on a board."""
    directions = candidates.flatten(1).numpy().astype(np.float64)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    total = np.zeros((max(1, len(labels)), len(candidates)))
    for tiles in cohort.everyone.values():
        counts = np.zeros_like(total)
        for vector, label in zip(tiles.embeddings.flatten(1).numpy(), tiles.labels, strict=True):
            if labels and label not in labels:
                continue
            row = list(labels).index(str(label)) if labels else 0
            counts[
                row, int(np.argmax(directions @ (vector / np.linalg.norm(vector)).astype(np.float64)))
            ] += 1
        if counts.any():
            total += counts / np.linalg.norm(counts)
    return total


@pytest.mark.parametrize("labels", [LABELS, LABELS[:1], ()])
def test_votes_are_the_numpy_account(labels: tuple[str, ...]) -> None:
    for seed in range(20):
        cohort, candidates = cohort_of(seed, 6)
        found, plain = exact_votes(cohort, candidates, labels), plain_votes(cohort, candidates, labels)
        assert found.shape == (max(1, len(labels)), 7)
        assert np.abs(found - plain).max() < 6 * 2.0**-VOTE_UNIT_BITS


@dataclass(frozen=True)
class Reach:
    """How far one patient moves a histogram, and whether the others change how far."""

    largest: float
    by_others: float


def reach(votes: Votes, trials: int = 60) -> Reach:
    """Add a random patient to two random cohorts, and take the patient away again."""
    largest, by_others = 0.0, 0.0
    for seed in range(trials):
        rng = np.random.default_rng(1000 + seed)
        one, candidates = cohort_of(seed, int(rng.integers(0, 6)))
        other, _ = cohort_of(seed + 500, int(rng.integers(1, 9)))
        new = tiles_of(rng, most=40)
        labels = LABELS if seed % 3 else ()
        moved = [
            votes(group.with_one("new", new), candidates, labels) - votes(group, candidates, labels)
            for group in (one, other)
        ]
        largest = max(largest, *(float(np.linalg.norm(m)) for m in moved))
        by_others = max(by_others, float(np.abs(moved[0] - moved[1]).max()))
    return Reach(largest, by_others)


def test_one_patient_moves_the_histogram_by_one_unit_at_most_and_nobody_elses_votes() -> None:
    found = reach(exact_votes)
    assert 0.99 < found.largest <= 1.0, "the unit is used, and never passed"
    assert found.by_others == 0.0, "not by a last bit"


def by_counts(norm: Callable[[Array], Array]) -> Votes:
    """A mutant: counts divided by another norm than the L2 norm of the whole vote."""

    def votes(cohort: Cohort, candidates: torch.Tensor, labels: Sequence[str]) -> Array:
        total = np.zeros((max(1, len(labels)), len(candidates)))
        for tiles in cohort.everyone.values():
            each = [
                plain_votes(
                    Cohort({"t": PatientTiles(tiles.embeddings[i : i + 1], tiles.labels[i : i + 1])}),
                    candidates,
                    labels,
                )
                for i in range(len(tiles.labels))
            ]
            counts = np.sum(each, axis=0) if each else np.zeros_like(total)
            if counts.any():
                total += counts / norm(counts)
        return total

    return votes


MUTANTS: dict[str, Votes] = {
    "a vote per tile": by_counts(lambda counts: np.ones(1)),
    "the largest bin as the unit": by_counts(lambda counts: np.max(counts, keepdims=True)),
    "a unit for each label": by_counts(
        lambda counts: np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)
    ),
    "the root of the number of tiles": by_counts(lambda counts: np.sqrt(counts.sum(keepdims=True))),
    "shares of the number of patients": lambda cohort, candidates, labels: (
        exact_votes(cohort, candidates, labels) / max(1, len(cohort.patients))
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_check_of_sensitivity_catches(name: str) -> None:
    found = reach(MUTANTS[name], trials=40)
    assert found.largest > 1.2 or found.by_others > 0.05, found


def test_a_unit_of_l1_is_within_the_bound_but_wastes_it() -> None:
    """The check of sensitivity is no test of equality: a smaller vote passes it, and another test tells them apart."""
    wasteful = by_counts(lambda counts: counts.sum(keepdims=True))
    assert reach(wasteful, trials=20).largest <= 1.0 + 1e-12
    cohort, candidates = cohort_of(3, 6)
    assert np.abs(wasteful(cohort, candidates, LABELS) - plain_votes(cohort, candidates, LABELS)).max() > 0.1


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), max_size=60), st.integers(1, 10**6))
def test_the_square_of_a_vote_is_at_most_one_in_whole_numbers(
    hits: list[tuple[int, int]], copies: int
) -> None:
    """Exactly, and not up to rounding, for any counts; copies of a slide change nothing."""
    candidates = torch.eye(7)[:, None]
    vectors = torch.stack([candidates[c] for c, _ in hits]) if hits else torch.empty(0, 1, 7)
    tiles = PatientTiles(vectors, tuple(UNKNOWN[label] for _, label in hits))
    vote = patient_vote(tiles, candidates, LABELS)
    square = sum(int(v) ** 2 for v in vote.ravel())
    assert square <= 2 ** (2 * VOTE_UNIT_BITS) and (vote >= 0).all()
    counted = any(label in LABELS for label in tiles.labels)
    assert (square > 0.999 * 2 ** (2 * VOTE_UNIT_BITS)) == counted
    twice = PatientTiles(tiles.embeddings.repeat(2, 1, 1) * copies, tiles.labels * 2)
    assert np.array_equal(patient_vote(twice, candidates, LABELS), vote)


def test_a_label_that_is_not_public_votes_in_no_bin() -> None:
    candidates = torch.eye(3)[:, None]
    own = PatientTiles(candidates[:2], ("secret-label", "stroma"))
    vote = patient_vote(own, candidates, LABELS)
    assert vote.tolist() == [[0, 2**VOTE_UNIT_BITS, 0], [0, 0, 0], [0, 0, 0]]
    for label in ("secret-label", None, "Stroma", ""):
        assert not patient_vote(PatientTiles(candidates, (label,) * 3), candidates, LABELS).any()
    assert patient_vote(PatientTiles(candidates[:1], ("secret-label",)), candidates, ()).sum() == 2**30, (
        "where no label is asked for, every tile counts"
    )


def test_an_embedding_without_direction_votes_in_no_bin() -> None:
    """One NaN in one tile would otherwise make the whole histogram NaN: a loud sign of one patient."""
    candidates = torch.eye(3)[:, None]
    for bad in (float("nan"), float("inf"), -float("inf"), 0.0):
        broken = torch.full((1, 1, 3), bad)
        assert not patient_vote(PatientTiles(broken, ("stroma",)), candidates, LABELS).any()
        mixed = PatientTiles(torch.cat([broken, candidates[2:]]), ("stroma", "stroma"))
        assert patient_vote(mixed, candidates, LABELS)[0].tolist() == [0, 0, 2**VOTE_UNIT_BITS]


def test_equal_candidates_and_half_precision() -> None:
    candidates = torch.tensor([[[2.0, 0.0]], [[1.0, 0.0]], [[0.0, 5.0]]])
    tile = PatientTiles(torch.tensor([[[9.0, 0.1]]]).half(), (None,))
    assert patient_vote(tile, candidates, ())[0].tolist() == [2**VOTE_UNIT_BITS, 0, 0], (
        "cosine, and the first"
    )


def test_patients_and_shapes() -> None:
    candidates = torch.eye(3)[:, None]
    nobody = PatientTiles(torch.empty(0, 1, 3), ())
    assert not exact_votes(Cohort(), candidates, LABELS).any()
    assert not exact_votes(Cohort({"a": nobody}), candidates, LABELS).any()
    with pytest.raises(BadInputError, match="candidates") as refused:
        patient_vote(PatientTiles(torch.ones(1, 1, 4), ("stroma",)), candidates, LABELS)
    assert refused.value.code == "features-do-not-fit"

    class Twice(Cohort):
        @property
        def patients(self) -> list[str]:
            return ["a", "a"]

    with pytest.raises(ValueError, match="one vote"):
        exact_votes(Twice({"a": nobody}), candidates, LABELS)


class Watched(UnsafeFixedKeySource):
    """Says when noise is drawn."""

    def __init__(self, heard: list[str]) -> None:
        super().__init__()
        self.heard = heard

    def gaussian(self, count: int) -> Array:
        self.heard.append(f"noise {count}")
        return super().gaussian(count)


def watched_votes(
    heard: list[str], cohort: Cohort, sigma: float = 2.0, refuse: bool = False
) -> tuple[NoisyVotes, Watched]:
    def reserve(step: int) -> None:
        heard.append(f"charge {step}")
        if refuse:
            raise RuntimeError("no room")

    def opened() -> Cohort:
        heard.append("patients")
        return cohort

    source = Watched(heard)
    return NoisyVotes(opened, LABELS, noise_multiplier=sigma, source=source, reserve=reserve), source


def test_the_charge_comes_first_then_the_patients_then_all_of_the_noise() -> None:
    heard: list[str] = []
    cohort, candidates = cohort_of(1, 4)
    ask, _ = watched_votes(heard, cohort)
    ask(candidates, 0)
    ask(candidates, 1)
    assert heard == ["charge 0", "patients", "noise 21", "charge 1", "patients", "noise 21"]
    heard.clear()
    refused, _ = watched_votes(heard, cohort, refuse=True)
    with pytest.raises(RuntimeError):
        refused(candidates, 0)
    assert heard == ["charge 0"], "no patient was looked at and no noise drawn"
    heard.clear()
    empty, _ = watched_votes(heard, Cohort())
    assert empty(candidates, 0).std() > 0.5 and heard[-1] == "noise 21", "nobody there is not to be seen"


def test_the_noise_is_the_sources_times_sigma_drawn_anew_in_every_iteration() -> None:
    cohort, candidates = cohort_of(2, 5)
    exact = exact_votes(cohort, candidates, LABELS)
    ask, _ = watched_votes([], cohort, sigma=3.5)
    noisy = [ask(candidates, i) for i in range(2)]
    known = UnsafeFixedKeySource()
    for histogram in noisy:
        assert np.array_equal(histogram, exact + 3.5 * known.gaussian(21).reshape(3, 7))
    assert not np.allclose(noisy[0], noisy[1])


def separation(votes: Votes, sigma: float, drawn_sigma: float, asks: int = 1500) -> float:
    """How many sigmas apart the answers with and without one patient lie, along that patient's own vote."""
    cohort, candidates = cohort_of(4, 3)
    rng = np.random.default_rng(8)
    new = PatientTiles(torch.from_numpy(rng.normal(size=(30, 2, 3))).float(), ("stroma",) * 30)
    vote = votes(Cohort({"new": new}), candidates, LABELS)
    direction = vote / np.linalg.norm(vote)
    source = UnsafeFixedKeySource()
    scores = []
    for group in (cohort.with_one("new", new), cohort):
        exact = votes(group, candidates, LABELS)
        noise = source.gaussian(asks * exact.size).reshape(asks, *exact.shape) * drawn_sigma
        scores.append(((exact + noise) * direction).sum(axis=(1, 2)))
    gap = scores[0].mean() - scores[1].mean()
    return float(gap / np.concatenate([s - s.mean() for s in scores]).std() * sigma)


def test_an_attacker_who_knows_the_vote_sees_one_unit_and_planted_faults_show() -> None:
    """The best attack on a Gaussian mechanism sees unit / sigma; measured here as units, within sampling error."""
    assert separation(exact_votes, 2.0, 2.0) == pytest.approx(1.0, abs=0.2)
    assert separation(exact_votes, 2.0, 1.0) > 1.7, "half the noise"
    assert separation(MUTANTS["a vote per tile"], 2.0, 2.0) > 5.0


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan"), float("inf")])
def test_noise_that_hides_nothing_is_refused(sigma: float) -> None:
    with pytest.raises(BadInputError, match="hides no patient"):
        watched_votes([], Cohort(), sigma=sigma)
