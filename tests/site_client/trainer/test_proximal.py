"""FedProx at a site: the pull is a step of public things, after the noise, and costs nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from pixcell_core.contracts.spool import Arrays, flatten
from pixcell_core.contracts.study import AggregationSettings, Study
from pixcell_core.private.clipping import GradientSum
from pixcell_core.private.noise import UnsafeFixedKeySource
from pixcell_core.private.patient_gradients import PatientGradientEngine
from pixcell_core.private.study_charges import planned_events
from pixcell_core.training.feature_store import FeatureStore
from site_client.trainer import rounds
from site_client.trainer.patient_rows import latent_scaling
from site_client.trainer.rounds import RoundTrainer
from tests.site_client.trainer.site_fixture import TinySite, make_study, start_of

RATE, MU, STEPS = 0.1, 3.0, 4


@dataclass
class Watched:
    """What one round did: clipped sums before the noise, what was released, charges, and the update."""

    sums: list[np.ndarray[Any, Any]] = field(default_factory=list)
    released: list[np.ndarray[Any, Any]] = field(default_factory=list)
    charged: list[int] = field(default_factory=list)
    update: Arrays = field(default_factory=dict)


def flat(tensors: list[torch.Tensor]) -> np.ndarray[Any, Any]:
    """End to end, float64."""
    return torch.cat([t.detach().double().reshape(-1) for t in tensors]).numpy()


@pytest.fixture
def train(tiny_site: TinySite, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Trains one round with known noise and watches it."""
    monkeypatch.setattr(rounds, "SystemNoiseSource", lambda: UnsafeFixedKeySource())
    monkeypatch.setattr(
        "pixcell_core.private.engine._system_seeded", lambda: torch.Generator().manual_seed(1)
    )
    clipped, release = PatientGradientEngine.clipped_sum, PatientGradientEngine.release

    def run(mu: float, **changes: Any) -> Watched:
        seen = Watched()

        def watch_sum(self: PatientGradientEngine, *args: Any) -> GradientSum:
            total = clipped(self, *args)
            seen.sums.append(flat(total.tensors))
            return total

        def watch_release(self: PatientGradientEngine, *args: Any) -> list[torch.Tensor]:
            found = release(self, *args)
            seen.released.append(flat(found))
            return found

        monkeypatch.setattr(PatientGradientEngine, "clipped_sum", watch_sum)
        monkeypatch.setattr(PatientGradientEngine, "release", watch_release)
        study = study_of(tiny_site, mu, **changes)
        store = FeatureStore.open(tiny_site.folder.train_features)
        trainer = RoundTrainer(tiny_site.base, store, latent_scaling(store.meta))
        torch.manual_seed(3)
        seen.update = trainer.train(study, start_of(tiny_site.base, study), seen.charged.append)
        return seen

    return run


def study_of(site: TinySite, mu: float, **changes: Any) -> Study:
    """A study with a pull of `mu`."""
    aggregation = AggregationSettings(proximal_mu=mu)
    settings = {"learning_rate": RATE, "steps_per_round": STEPS, "aggregation": aggregation}
    return make_study(site.base, **(settings | changes))


def by_hand(released: list[np.ndarray[Any, Any]], mu: float) -> np.ndarray[Any, Any]:
    """w - w_start after SGD with the pull: d' = d - rate (g + mu d), from d = 0."""
    moved = np.zeros_like(released[0])
    for gradient in released:
        moved = moved - RATE * (gradient + mu * moved)
    return moved


def test_the_update_is_a_function_of_released_sums_and_public_settings(train: Any) -> None:
    with_pull, without = train(MU), train(0.0)
    for seen, mu in ((with_pull, MU), (without, 0.0)):
        assert len(seen.released) == STEPS
        np.testing.assert_allclose(flatten(seen.update), by_hand(seen.released, mu), rtol=1e-4, atol=1e-7)
    # The other coefficient does not explain it: the comparison can fail.
    for seen, mu in ((with_pull, 0.0), (without, MU)):
        assert np.abs(flatten(seen.update) - by_hand(seen.released, mu)).max() > 1e-3
    assert np.linalg.norm(flatten(with_pull.update)) < np.linalg.norm(flatten(without.update))


def test_the_pull_changes_no_charge_and_no_sensitivity(train: Any, tiny_site: TinySite) -> None:
    with_pull, without = train(MU), train(0.0)
    assert with_pull.charged == without.charged == list(range(STEPS))
    assert planned_events(study_of(tiny_site, MU)) == planned_events(study_of(tiny_site, 0.0))
    # At the same weights the clipped sum, the only thing that patients touch, is the same bit for bit.
    assert with_pull.sums[0].tobytes() == without.sums[0].tobytes()
    # Far from the start, where a pull inside the gradients would be longest, the sum of 5 patients stays within 5 C.
    bound = study_of(tiny_site, MU).max_grad_norm
    far = train(9.0, noise_multiplier=1e4)
    assert max(np.linalg.norm(total) for total in far.sums) <= 5 * bound * (1 + 1e-6)


def test_a_pull_inside_the_loss_would_be_seen(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: the pull is part of every patient's loss and is clipped with it, as FedProx is written elsewhere."""
    real, starts = RoundTrainer._loss, []

    def pulled(self: RoundTrainer, model: torch.nn.Module, rows: tuple[torch.Tensor, ...]) -> torch.Tensor:
        weights = [p for p in model.parameters() if p.requires_grad]
        if not starts:
            starts.extend(p.detach().clone() for p in weights)
        away = sum(((w - s) ** 2).sum() for w, s in zip(weights, starts, strict=True))
        return real(self, model, rows) + MU / 2 * away

    monkeypatch.setattr(RoundTrainer, "_loss", pulled)
    monkeypatch.setattr(rounds, "add_proximal_pull", lambda optimizer, mu: optimizer)
    seen = train(MU)
    assert np.abs(flatten(seen.update) - by_hand(seen.released, MU)).max() > 1e-3


def test_no_pull_leaves_the_optimiser_alone() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    plain = torch.optim.SGD([parameter], lr=0.1)
    assert rounds.add_proximal_pull(plain, 0.0) is plain and not plain._optimizer_step_pre_hooks
