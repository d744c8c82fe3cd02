"""Order and draws: epochs without replacement, draws that depend on the tile's seed alone, one state to keep."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pixcell_core.errors import BadInputError
from pixcell_core.training.batches import Batch, BatchStream
from pixcell_core.training.parallel import Processes
from pixcell_core.training.sampler import EpochSampler
from pixcell_core.training.settings import TrainingSettings
from pixcell_core.training.tile_sources import EncodedTiles

SETTINGS = TrainingSettings(steps=10, batch_size=3, seed=5, condition_drop=0.1)


def tiles(count: int = 7, tokens: int = 4) -> EncodedTiles:
    """Tile i is the number i everywhere, without deviation."""
    number = torch.arange(count, dtype=torch.float32)
    mean = number.view(-1, 1, 1, 1).expand(-1, 16, 4, 4)
    return EncodedTiles(mean, torch.zeros_like(mean), number.view(-1, 1, 1).expand(-1, tokens, 5))


def same(one: list[Batch], other: list[Batch]) -> bool:
    names = list(Batch.__dataclass_fields__)
    return len(one) == len(other) and all(
        torch.equal(getattr(a, n), getattr(b, n)) for a, b in zip(one, other, strict=True) for n in names
    )


@pytest.mark.parametrize("batch", [1, 3, 7, 16])
def test_every_epoch_is_another_permutation_without_replacement(batch: int) -> None:
    sampler, rows = EpochSampler(7, seed=3), []
    while len(rows) < 70:
        rows += sampler.take(batch)
    epochs = [rows[i : i + 7] for i in range(0, 70, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 5
    assert sampler.epoch == len(rows) // 7


def test_a_restored_position_goes_on_in_the_same_order() -> None:
    one, other = EpochSampler(7, seed=3), EpochSampler(7, seed=3)
    rows = one.take(40)
    other.position = 11
    assert other.take(29) == rows[11:]
    assert EpochSampler(7, seed=4).take(40) != rows
    with pytest.raises(ValueError):
        EpochSampler(0, seed=0)


def test_batches_do_not_depend_on_processes_or_parts() -> None:
    """Two processes with two parts of 3 see, together, exactly the batch of 12 of a single process."""
    whole = BatchStream(tiles(), replace(SETTINGS, batch_size=12), Processes())
    shared = [BatchStream(tiles(), replace(SETTINGS, accumulate=2), Processes(r, 2)) for r in (0, 1)]
    for _ in range(4):
        (one,) = whole.take()
        parts = [stream.take() for stream in shared]
        order = [parts[r][k] for k in (0, 1) for r in (0, 1)]
        for name in Batch.__dataclass_fields__:
            assert torch.equal(getattr(one, name), torch.cat([getattr(p, name) for p in order])), name


def test_batches_made_ahead_are_the_same_and_so_is_the_state_to_keep() -> None:
    plain, ahead = (BatchStream(tiles(), SETTINGS, Processes(), ahead=a) for a in (False, True))
    states = []
    for _ in range(6):
        assert same(plain.take(), ahead.take())
        one, other = plain.state_dict(), ahead.state_dict()
        assert one["position"] == other["position"] and torch.equal(one["random"], other["random"])
        states.append(one)
    assert plain.epoch == ahead.epoch == 18 // 7
    late = [plain.take() for _ in range(2)]
    for stream in (ahead, plain, BatchStream(tiles(), SETTINGS, Processes())):
        stream.load_state_dict(states[-1])
        assert all(same(stream.take(), wanted) for wanted in late)
    ahead.close()


def test_noise_timesteps_and_drops_are_what_they_should_be() -> None:
    stream = BatchStream(tiles(), replace(SETTINGS, batch_size=4000), Processes())
    (batch,) = stream.take()
    assert abs(batch.noise.mean().item()) < 0.01 and abs(batch.noise.std().item() - 1) < 0.01
    assert batch.timestep.min() >= 0 and batch.timestep.max() <= 999
    assert batch.timestep.float().mean().item() == pytest.approx(499.5, abs=15)
    assert batch.dropped.float().mean().item() == pytest.approx(0.1, abs=0.02)
    flat = batch.noise.flatten(1)
    assert abs((flat[:-1] * flat[1:]).mean().item()) < 0.01, "tiles share no noise"
    assert torch.equal(batch.latents[:, 0, 0, 0], batch.condition[:, 0, 0]), (
        "tile and condition belong together"
    )


def test_latents_are_drawn_and_scaled_each_time_anew() -> None:
    data = tiles(1)
    data = replace(data, mean=data.mean + 3, std=data.std + 0.5)
    settings = replace(SETTINGS, batch_size=200, shift_factor=1.0, scaling_factor=2.0)
    (batch,) = BatchStream(data, settings, Processes()).take()
    assert batch.latents.mean().item() == pytest.approx((3 - 1) * 2, abs=0.02)
    assert batch.latents.std().item() == pytest.approx(0.5 * 2, abs=0.02)
    assert not torch.equal(batch.latents[0], batch.latents[1])


@pytest.mark.parametrize("what", ["embedding", "mean", "std"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_is_named_with_its_tile(what: str, value: float) -> None:
    data = tiles(3)
    spoilt = getattr(data, what).clone()
    spoilt[1] = value
    with pytest.raises(BadInputError) as refused:
        BatchStream(replace(data, **{what: spoilt}), SETTINGS, Processes()).take()
    assert refused.value.code == "features-not-finite" and "Tile 1 " in refused.value.message
