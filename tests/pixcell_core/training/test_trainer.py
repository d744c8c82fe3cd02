"""The trainer: an interrupted run ends bit-equal to one that was not, and it learns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pixcell_core.diffusion import training_loss
from pixcell_core.errors import BadInputError
from pixcell_core.models import PixCellTransformer2DModel
from pixcell_core.training.trainer import EncodedTiles, Trainer, TrainingSettings

SETTINGS = TrainingSettings(
    steps=8, batch_size=4, learning_rate=1e-2, checkpoint_every=3, warmup_steps=4, seed=3
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def transformer(width: int = 16) -> PixCellTransformer2DModel:
    torch.manual_seed(1)
    return PixCellTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=width // 2,
        num_layers=2,
        cross_attention_dim=width,
        sample_size=8,
        caption_channels=12,
    )


def tiles(count: int = 4) -> EncodedTiles:
    generator = torch.Generator().manual_seed(2)
    return EncodedTiles(
        torch.randn(count, 16, 8, 8, generator=generator),
        torch.full((count, 16, 8, 8), 0.05),
        torch.randn(count, 1, 12, generator=generator),
    )


def equal(one: PixCellTransformer2DModel, other: PixCellTransformer2DModel) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


class Killed(BaseException):
    """What a test does to a run."""


@pytest.mark.parametrize("killed_at", [1, 3, 5, 7])
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(tmp_path: Path, killed_at: int) -> None:
    whole, parts = transformer(), transformer()
    losses: dict[int, float] = {}
    Trainer(whole, tiles(), SETTINGS).run(None, lambda step, loss: losses.__setitem__(step, loss))

    def kill(step: int, loss: float) -> None:
        assert loss == losses[step]
        if step == killed_at:
            raise Killed

    with pytest.raises(Killed):
        Trainer(parts, tiles(), SETTINGS).run(tmp_path / "c.pt", kill)
    torch.manual_seed(killed_at)  # the global generator decides nothing
    fresh, again = transformer(), {}
    trainer = Trainer(fresh, tiles(), SETTINGS)
    trainer.run(tmp_path / "c.pt", lambda step, loss: again.__setitem__(step, loss))
    assert trainer.step == 8
    assert min(again) == 3 * (max(killed_at - 1, 0) // 3) + 1, "it went on from the last checkpoint"
    assert all(losses[step] == loss for step, loss in again.items())
    assert equal(whole, fresh)
    third = transformer()
    Trainer(third, tiles(), SETTINGS).run(tmp_path / "c.pt", kill)
    assert equal(whole, third), "a finished run resumed again takes no step and ends the same"


def test_mutant_a_run_with_another_seed_or_a_lost_random_state_differs(tmp_path: Path) -> None:
    whole, other = transformer(), transformer()
    Trainer(whole, tiles(), SETTINGS).run(None)
    Trainer(other, tiles(), replace(SETTINGS, seed=4)).run(None)
    assert not equal(whole, other)
    parts = transformer()
    first = Trainer(parts, tiles(), replace(SETTINGS, steps=3))
    first.run(tmp_path / "c.pt")
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    state["random"] = torch.Generator().manual_seed(SETTINGS.seed).get_state()
    torch.save(state, tmp_path / "c.pt")
    fresh = transformer()
    Trainer(fresh, tiles(), SETTINGS).run(tmp_path / "c.pt")
    assert not equal(whole, fresh), "the comparison would not notice a lost random state"


def test_it_learns_four_tiles_by_heart() -> None:
    """Measured on fixed noise before and after, with conditions; the same tiles under wrong conditions gain less."""
    # Wide enough for a patch of noise (2 x 2 x 16 numbers) to pass through; each tile of one colour.
    data, model = tiles(), transformer(width=64)
    data = replace(data, mean=data.mean[:, :, :1, :1].expand(-1, -1, 8, 8).contiguous())

    def loss(condition: torch.Tensor) -> float:
        generator = torch.Generator().manual_seed(99)
        total = 0.0
        model.eval()
        with torch.no_grad():
            for _ in range(8):
                timestep = torch.randint(0, 1000, (4,), generator=generator)
                noise = torch.randn(data.mean.shape, generator=generator)
                total += (
                    training_loss(model, data.mean, condition, timestep=timestep, noise=noise).mean().item()
                )
        return total / 8

    before = loss(data.embedding)
    settings = TrainingSettings(
        steps=150, batch_size=16, learning_rate=5e-3, ema_decay=0.95, condition_drop=0.1, warmup_steps=10
    )
    Trainer(model, data, settings).run(None)
    after = loss(data.embedding)
    wrong = loss(data.embedding.roll(1, 0))
    assert after < before / 2, (before, after)
    assert wrong > after * 1.05, (wrong, after)


def test_the_checkpoint_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "c.pt"
    trainer = Trainer(transformer(), tiles(), SETTINGS)
    trainer.train_step()
    trainer.save(path)
    kept = path.read_bytes()
    assert [p.name for p in path.parent.iterdir()] == ["c.pt"]

    def dies_half_way(state: object, place: Path) -> None:
        Path(place).write_bytes(b"half a checkpoint")
        raise Killed

    monkeypatch.setattr(torch, "save", dies_half_way)
    trainer.train_step()
    with pytest.raises(Killed):
        trainer.save(path)
    assert path.read_bytes() == kept
    monkeypatch.undo()
    again = Trainer(transformer(), tiles(), SETTINGS)
    assert again.resume(path) and again.step == 1
    assert not again.resume(tmp_path / "nowhere.pt")


def test_a_checkpoint_that_cannot_be_read_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "c.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(BadInputError) as refused:
        Trainer(transformer(), tiles(), SETTINGS).resume(tmp_path / "c.pt")
    assert refused.value.code == "checkpoint-unreadable"
    Trainer(transformer(), tiles(), SETTINGS).save(tmp_path / "c.pt")
    other = PixCellTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, cross_attention_dim=16, caption_channels=12
    )
    with pytest.raises(BadInputError) as refused:
        Trainer(other, tiles(), SETTINGS).resume(tmp_path / "c.pt")
    assert refused.value.code == "checkpoint-unreadable"


def test_the_model_ends_as_its_average_and_the_null_condition_is_never_trained() -> None:
    model = transformer()
    null = model.caption_projection.uncond_embedding.clone()
    trainer = Trainer(model, tiles(), SETTINGS)
    trainer.run(None)
    assert torch.equal(model.caption_projection.uncond_embedding, null)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, trainer.ema.shadow[name])
    assert not model.training


def test_latents_are_drawn_scaled_with_the_encoders_own_deviation() -> None:
    data = EncodedTiles(
        torch.full((1, 16, 64, 64), 3.0), torch.full((1, 16, 64, 64), 0.5), torch.zeros(1, 1, 4)
    )
    generator = torch.Generator().manual_seed(0)
    drawn = data.draw(torch.tensor([0, 0]), shift_factor=1.0, scaling_factor=2.0, generator=generator)
    assert drawn.mean().item() == pytest.approx((3.0 - 1.0) * 2.0, abs=0.02)
    assert drawn.std().item() == pytest.approx(0.5 * 2.0, abs=0.02)
    assert not torch.equal(drawn[0], drawn[1])


def test_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(BadInputError) as refused:
        Trainer(transformer(), tiles(0), SETTINGS)
    assert refused.value.code == "no-tiles"
    with pytest.raises(ValueError, match="one latent"):
        EncodedTiles(torch.zeros(2, 16, 8, 8), torch.zeros(1, 16, 8, 8), torch.zeros(2, 1, 12))
