"""Rates of the patient test in hierarchical Gaussian worlds: exact under a perfect generator, sharp under a leak."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from privacy_audit.neighbours import patient_minima


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """The bench that is published; the test runs fewer and smaller of its worlds."""
    path = Path(__file__).parents[2] / "bench" / "bench_patient_test.py"
    spec = importlib.util.spec_from_file_location("bench_patient_test", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_a_perfect_generator_is_rejected_in_one_of_twenty(bench: ModuleType) -> None:
    world = bench.World(patients=20, holdout=20, released=120)
    assert 0.03 <= bench.rejection(world, 700, 3, draws=99) <= 0.07


def test_a_perfect_generator_is_rejected_no_more_with_unequal_sides(bench: ModuleType) -> None:
    world = bench.World(patients=24, holdout=8, released=120)
    assert bench.rejection(world, 400, 4, draws=99) <= 0.08


def test_one_per_cent_of_copies_is_seen_in_four_of_five_releases(bench: ModuleType) -> None:
    world = bench.World(copies=0.01)  # six copies among 600 tiles, 60 + 60 patients
    assert bench.rejection(world, 25, 5) >= 0.8


def test_a_test_that_counts_tiles_would_condemn_the_perfect_generator(bench: ModuleType) -> None:
    """The mutant: the share of tiles nearer to training, with tiles taken as independent."""
    from scipy.stats import binomtest

    rng, rejected = np.random.default_rng(6), 0
    for _ in range(60):
        distances, cohort = bench.World(patients=20, holdout=20, released=200).draw(rng)
        nearer = distances[:, cohort.is_train].min(axis=1) < distances[:, ~cohort.is_train].min(axis=1)
        rejected += binomtest(int(nearer.sum()), len(nearer)).pvalue <= 0.05
    assert rejected / 60 > 0.15


def test_distances_of_a_copy_are_those_to_its_patient(bench: ModuleType) -> None:
    distances, cohort = bench.World(patients=6, holdout=6, released=40, copies=1.0).draw(
        np.random.default_rng(0)
    )
    assert cohort.is_train[distances.argmin(axis=1)].all()
    one = patient_minima(torch.zeros(1, 2), torch.ones(3, 2), torch.tensor([0, 1, 1]), 2)
    assert torch.allclose(one, torch.full((1, 2), 2.0**0.5))
