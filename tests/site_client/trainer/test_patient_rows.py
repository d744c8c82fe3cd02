"""Rows of one patient: K draws of every tile, time steps spread over the schedule within that patient alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pixcell_core.training.feature_store import FeatureStore
from site_client.trainer import patient_rows
from site_client.trainer.patient_rows import TIMESTEPS, LatentScaling, PatientRows, stratified_timesteps
from tests.site_client.trainer.site_fixture import make_features


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    make_features(tmp_path / "features", "east", patients=3, tiles=3)
    return FeatureStore.open(tmp_path / "features")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("count", [1, 2, 7, 32, 1000])
def test_every_stratum_gives_one_time_step(count: int) -> None:
    found = stratified_timesteps(count, rng()).double()
    edges = torch.linspace(0, TIMESTEPS, count + 1)
    for low, high, t in zip(edges[:-1], edges[1:], sorted(found.tolist()), strict=True):
        assert low.floor() <= t <= high, "one in each equal part of the schedule"


def test_each_single_time_step_is_uniform() -> None:
    first = torch.stack([stratified_timesteps(4, rng(seed))[0] for seed in range(8000)]).double()
    assert abs(first.mean() - 499.5) < 4 * 289 / 8000**0.5
    counts = torch.histc(first, bins=10, min=0, max=TIMESTEPS)
    assert ((counts - 800).abs() < 5 * 800**0.5).all()


def test_the_mean_over_strata_varies_less_than_over_independent_steps() -> None:
    spread = torch.stack([stratified_timesteps(8, rng(s)).double().mean() for s in range(400)]).std()
    independent = torch.stack(
        [torch.randint(0, TIMESTEPS, (8,), generator=rng(s)).double().mean() for s in range(400)]
    ).std()
    assert spread < independent / 4


def test_draws_stand_in_rows_of_their_own(store: FeatureStore) -> None:
    source = PatientRows(store, LatentScaling(0.5, 2.0), noise_draws=4)
    patient = source.patients[0]
    latents, embeddings, timesteps = source.rows(patient, 2 * 4, rng())
    assert latents.shape == (8, 16, 8, 8) and embeddings.shape == (8, 1, 8) and timesteps.shape == (8,)
    assert torch.equal(embeddings[0], embeddings[3]) and not torch.equal(embeddings[0], embeddings[4])
    assert not torch.equal(latents[0], latents[1]), "each draw samples the latent anew"
    assert len({int(t) // (TIMESTEPS // 8) for t in timesteps}) == 8
    # A patient with fewer tiles than k gives fewer rows, never a tile twice.
    fewer, _, _ = source.rows(patient, 10 * 4, rng())
    assert len(fewer) == 3 * 4


def test_scaling_is_applied_to_the_drawn_latent(store: FeatureStore) -> None:
    plain, scaled = (
        PatientRows(store, scaling).rows(store.patients[0], 3, rng())[0]
        for scaling in (LatentScaling(0.0, 1.0), LatentScaling(0.5, 2.0))
    )
    torch.testing.assert_close(scaled, (plain - 0.5) * 2.0)


def test_rows_of_a_patient_do_not_depend_on_who_else_is_there(tmp_path: Path) -> None:
    sources = []
    for patients in (2, 5):
        torch.manual_seed(0)
        folder = tmp_path / str(patients)
        make_features(folder, "east", patients=patients)
        sources.append(PatientRows(FeatureStore.open(folder), LatentScaling(0.0, 1.0), noise_draws=2))
    for patient in sources[0].patients:
        rows = [source.rows(patient, 4, rng(3)) for source in sources]
        assert all(torch.equal(a, b) for a, b in zip(*rows, strict=True))


def test_independent_steps_would_fail_the_strata(monkeypatch: pytest.MonkeyPatch) -> None:
    def independent(count: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randint(0, TIMESTEPS, (count,), generator=generator)

    monkeypatch.setattr(patient_rows, "stratified_timesteps", independent)
    found = patient_rows.stratified_timesteps(32, rng())
    assert len({int(t) * 32 // TIMESTEPS for t in found}) < 32
