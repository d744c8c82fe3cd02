"""The split: exact, uniform, independent of order, drawn once, and kept by the database itself."""

from __future__ import annotations

import random
import sqlite3
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixcell_core.errors import BadInputError, RefusedError
from site_client.catalogue import Catalogue
from site_client.catalogue.schema import TRIGGERS
from site_client.catalogue.split import HOLDOUT, TRAIN, SplitSeed, draw
from site_client.slides.reader import SlideFacts

FACTS = SlideFacts("generic-tiff", 0.5, False, 1024, 1024, 3, (0, 0, 1024, 1024))


def fill(site: Path, patients: int, start: int = 0) -> None:
    with Catalogue(site, create=True) as catalogue:
        for n in range(start, start + patients):
            catalogue.add_slide(site / f"s{n}.tiff", f"P{n:03d}", None, f"{n:064x}", FACTS, 0.2)


@given(
    count=st.integers(2, 60),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 10**6),
)
def test_sizes_are_exact_and_order_does_not_matter(count: int, fraction: float, seed: int) -> None:
    people = [f"P{n}" for n in range(count)]
    parts = draw(people, fraction, SplitSeed.given(seed))
    shuffled = people[:]
    random.Random(seed).shuffle(shuffled)
    assert draw(shuffled, fraction, SplitSeed.given(seed)) == parts
    held = sum(part == HOLDOUT for part in parts.values())
    assert held == min(max(round(fraction * count), 1), count - 1)
    assert set(parts) == set(people) and set(parts.values()) == {TRAIN, HOLDOUT}


def test_every_subset_is_equally_likely() -> None:
    """Chi-square over all 10 holdouts of 2 among 5 patients; 99.9 % quantile of 9 degrees of freedom."""
    people = [f"P{n}" for n in range(5)]
    draws = 4000
    counts: Counter[tuple[str, ...]] = Counter()
    for seed in range(draws):
        parts = draw(people, 0.4, SplitSeed.given(seed))
        counts[tuple(p for p in people if parts[p] == HOLDOUT)] += 1
    expected = draws / 10
    statistic = sum((counts[c] - expected) ** 2 / expected for c in combinations(people, 2))
    assert statistic < 27.88


def test_the_systems_seed_is_long_and_never_repeats() -> None:
    seeds = {SplitSeed.from_operating_system().text for _ in range(50)}
    assert len(seeds) == 50 and all(len(s) == 64 for s in seeds)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, 2.0])
def test_fractions_that_empty_a_part_are_refused(fraction: float) -> None:
    with pytest.raises(BadInputError):
        draw(["a", "b"], fraction, SplitSeed.given(0))


def test_it_is_drawn_once_and_survives_reopening(tmp_path: Path) -> None:
    fill(tmp_path, 10)
    with Catalogue(tmp_path) as catalogue:
        first = catalogue.draw_split(0.5, SplitSeed.from_operating_system())
        assert (first.train, first.holdout, first.seed_source) == (5, 5, "operating-system")
    with Catalogue(tmp_path) as catalogue:
        assert catalogue.split() == first
        before = catalogue.patients(TRAIN)
        with pytest.raises(RefusedError) as caught:
            catalogue.draw_split(0.5, SplitSeed.given(1))
        assert caught.value.code == "split-drawn" and caught.value.exit_code == 1
        assert catalogue.patients(TRAIN) == before
        assert set(before).isdisjoint(catalogue.patients(HOLDOUT))


def test_one_patient_is_too_few(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    with Catalogue(tmp_path) as catalogue, pytest.raises(BadInputError) as caught:
        catalogue.draw_split(0.5, SplitSeed.given(1))
    assert caught.value.code == "too-few-patients"
    with Catalogue(tmp_path) as catalogue:
        assert catalogue.split() is None


def test_latecomers_belong_to_neither_part(tmp_path: Path) -> None:
    fill(tmp_path, 6)
    with Catalogue(tmp_path) as catalogue:
        catalogue.draw_split(0.5, SplitSeed.given(1))
    fill(tmp_path, 2, start=6)
    with Catalogue(tmp_path) as catalogue:
        assert len(catalogue.patients()) == 8
        assert len(catalogue.patients(TRAIN)) == len(catalogue.patients(HOLDOUT)) == 3


TAMPERING = (
    "UPDATE patient SET part='train' WHERE part='holdout'",
    "UPDATE patient SET part=NULL",
    "UPDATE split SET seed='x'",
    "DELETE FROM split",
    "DELETE FROM patient WHERE part='holdout'",
    "INSERT INTO patient (name, part) VALUES ('new', 'holdout')",
    "INSERT INTO split (seed, seed_source, holdout_fraction, train, holdout, drawn_at) VALUES ('x','given',.5,1,1,'')",
)


def drawn(site: Path) -> Path:
    fill(site, 6)
    with Catalogue(site) as catalogue:
        catalogue.draw_split(0.5, SplitSeed.given(1))
        return catalogue.path


@pytest.mark.parametrize("statement", TAMPERING)
def test_the_database_refuses_to_change_the_split(tmp_path: Path, statement: str) -> None:
    with sqlite3.connect(drawn(tmp_path)) as raw, pytest.raises(sqlite3.IntegrityError):
        raw.execute(statement)


@pytest.mark.parametrize("statement", TAMPERING)
def test_without_the_triggers_it_would_not(tmp_path: Path, statement: str) -> None:
    """The mutant of the test above: the refusal comes from the triggers, nothing else."""
    with sqlite3.connect(drawn(tmp_path)) as raw:
        for trigger in TRIGGERS:
            raw.execute(f"DROP TRIGGER {trigger.split()[5]}")
        assert raw.execute(statement).rowcount > 0


def test_a_latecomer_cannot_be_slipped_into_a_part(tmp_path: Path) -> None:
    path = drawn(tmp_path)
    fill(tmp_path, 1, start=6)
    with sqlite3.connect(path) as raw, pytest.raises(sqlite3.IntegrityError):
        raw.execute("UPDATE patient SET part='holdout' WHERE name='P006'")
