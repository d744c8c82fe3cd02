"""A tiny real transformer with an adapter, and cohorts of pretend patients, for private training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

torch.set_num_threads(1)


@dataclass
class Cohort:
    """Latents (n,4,8,8) and conditions (n,tokens,16) per patient; ragged when patients have differing n."""

    tiles: dict[str, tuple[Tensor, ...]]

    @property
    def patients(self) -> Sequence[str]:
        return sorted(self.tiles)

    def rows(self, patient: str, k: int, rng: torch.Generator) -> tuple[Tensor, ...]:
        tensors = self.tiles[patient]
        chosen = torch.randperm(tensors[0].shape[0], generator=rng)[:k]
        return tuple(t[chosen] for t in tensors)


def make_cohort(counts: Sequence[int], tokens: int = 1, seed: int = 0) -> Cohort:
    generator = torch.Generator().manual_seed(seed)
    tiles: dict[str, tuple[Tensor, ...]] = {}
    for index, count in enumerate(counts):
        tiles[f"p{index:03d}"] = (
            torch.randn(count, 4, 8, 8, generator=generator),
            torch.randn(count, tokens, 16, generator=generator),
            torch.randn(count, 4, 8, 8, generator=generator),
            torch.randint(0, 1000, (count,), generator=generator),
        )
    return Cohort(tiles)


def make_transformer(targets: Sequence[str], seed: int = 0) -> nn.Module:
    """A two-block PixArt transformer with FFA-LoRA: A frozen, B at zero and trainable."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import PixArtTransformer2DModel
        from peft import LoraConfig, inject_adapter_in_model

        torch.manual_seed(seed)
        model = PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            cross_attention_dim=16,
            sample_size=8,
            patch_size=2,
            caption_channels=16,
            use_additional_conditions=False,
            interpolation_scale=1,
        )
        model.requires_grad_(False)
        inject_adapter_in_model(LoraConfig(r=2, lora_alpha=2, target_modules=list(targets)), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    return model


def denoising_loss(model: nn.Module, rows: tuple[Tensor, ...]) -> Tensor:
    """Per-row epsilon loss; the noise comes with the rows, so that two engines see the same problem."""
    latents, condition, noise, timestep = rows
    keep = (1.0 - timestep.to(latents) / 1000.0).view(-1, 1, 1, 1)
    noisy = keep.sqrt() * latents + (1.0 - keep).sqrt() * noise
    predicted = model(noisy, encoder_hidden_states=condition, timestep=timestep).sample
    return (predicted - noise).pow(2).flatten(1).mean(1)


TARGETS = ("attn1.to_q", "attn1.to_v", "attn2.to_v", "attn2.to_out.0", "ff.net.2")


@pytest.fixture
def transformer() -> nn.Module:
    return make_transformer(TARGETS)


@pytest.fixture
def transformer_with() -> Callable[[Sequence[str]], nn.Module]:
    return make_transformer


@pytest.fixture
def cohort_of() -> Callable[..., Cohort]:
    return make_cohort


@pytest.fixture
def per_row_loss() -> Callable[[nn.Module, tuple[Tensor, ...]], Tensor]:
    return denoising_loss
