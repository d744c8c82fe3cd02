"""The pipeline: guidance, reproducibility, and its call shape."""

from __future__ import annotations

import pytest
import torch

from pixcell_core.diffusion import PixCellPipeline, default_scheduler
from pixcell_core.models import PixCellTransformer2DModel, TileAutoencoder


@pytest.fixture(scope="module")
def pipeline() -> PixCellPipeline:
    torch.manual_seed(0)
    model = PixCellTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=24,
    ).eval()
    autoencoder = TileAutoencoder(width=8, deep_width=8, encoder_blocks=(1, 1), decoder_blocks=(1, 1)).eval()
    return PixCellPipeline(autoencoder, model, default_scheduler())


def _draw(pipeline: PixCellPipeline, condition: torch.Tensor, **options: object) -> torch.Tensor:
    settings = {"num_inference_steps": 3, "output_type": "latent", **options}
    return pipeline(uni_embeds=condition, **settings).images  # type: ignore[arg-type, return-value]


def _generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(s) for s in seeds]


def test_a_tile_does_not_depend_on_its_batch(pipeline: PixCellPipeline) -> None:
    condition = torch.randn(3, 1, 24)
    together = _draw(pipeline, condition, generator=_generators(1, 2, 3))
    alone = _draw(pipeline, condition[1:2], generator=_generators(2))
    assert torch.allclose(together[1:2], alone, atol=1e-4)


def test_guidance_of_one_makes_one_call_per_step_and_equals_the_condition(pipeline: PixCellPipeline) -> None:
    calls: list[int] = []
    handle = pipeline.transformer.register_forward_hook(lambda m, a, k: calls.append(1))
    condition = torch.randn(2, 1, 24)
    plain = _draw(pipeline, condition, guidance_scale=1.0, generator=_generators(5, 6))
    near = _draw(pipeline, condition, guidance_scale=1.0 + 1e-7, generator=_generators(5, 6))
    handle.remove()
    assert len(calls) == 6
    assert torch.allclose(plain, near, atol=1e-4)


def test_guidance_moves_every_latent_channel(pipeline: PixCellPipeline) -> None:
    condition = torch.randn(1, 1, 24)
    weak = _draw(pipeline, condition, guidance_scale=1.0, generator=_generators(7))
    strong = _draw(pipeline, condition, guidance_scale=4.0, generator=_generators(7))
    assert ((weak - strong).abs().amax(dim=(0, 2, 3)) > 1e-5).all()


def test_guidance_towards_the_null_itself_changes_nothing(pipeline: PixCellPipeline) -> None:
    null = pipeline.get_unconditional_embedding(1)
    one = _draw(pipeline, null, guidance_scale=1.0, generator=_generators(7))
    five = _draw(pipeline, null, guidance_scale=5.0, generator=_generators(7))
    assert torch.allclose(one, five, atol=1e-3)


def test_published_call_shape(pipeline: PixCellPipeline) -> None:
    images = pipeline(
        uni_embeds=torch.randn(2, 1, 24),
        negative_uni_embeds=pipeline.get_unconditional_embedding(2),
        guidance_scale=1.5,
        num_images_per_prompt=2,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
    ).images
    assert len(images) == 4
    assert images[0].size == (64, 64)


def test_other_sizes_and_wrong_number_of_generators(pipeline: PixCellPipeline) -> None:
    wide = _draw(pipeline, torch.randn(1, 1, 24), latent_size=(8, 16), generator=_generators(1))
    assert wide.shape == (1, 16, 8, 16)
    with pytest.raises(ValueError, match="one generator per image"):
        _draw(pipeline, torch.randn(2, 1, 24), generator=_generators(1))
