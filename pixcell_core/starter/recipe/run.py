"""The whole recipe in one call: corpus, three trainings, fp16 weights, measurements, cards."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.modeling_utils import ModelMixin

from pixcell_core.models import PixCellTransformer2DModel, TileAutoencoder, TileEncoder
from pixcell_core.starter.recipe.cards import write_cards
from pixcell_core.starter.recipe.corpus import RealTile, draw_procedural, read_real
from pixcell_core.starter.recipe.measure import reconstruction_quality, spot_tiles, taesd3, tissue_probes
from pixcell_core.starter.recipe.train_autoencoder import train_autoencoder
from pixcell_core.starter.recipe.train_encoder import train_encoder
from pixcell_core.starter.recipe.train_transformer import LatentCrops, encode_crops, train_transformer
from pixcell_core.starter.weights import load_autoencoder, load_encoder, load_second_eye, save_folder


@dataclass(frozen=True)
class StarterRecipe:
    """Where the data lie, where the weights go, how long each training runs."""

    data: Path
    out: Path
    work: Path
    autoencoder_steps: int
    encoder_steps: int
    transformer_steps: int
    crops: int
    drawn: int
    minutes: float | None
    threads: int
    compiled: bool = False


def drawn_fields(recipe: StarterRecipe) -> list[RealTile]:
    """The procedural half of the corpus: drawn once, kept in the work folder."""
    kept = recipe.work / "procedural.npy"
    if not kept.exists():
        recipe.work.mkdir(parents=True, exist_ok=True)
        np.save(kept, np.stack([t.pixels for t in draw_procedural(recipe.drawn, 512, seed=1000)]))
    fields = np.load(kept, mmap_mode="r")
    return [RealTile("procedural", f"procedural/{i}", "", 0.5, np.asarray(p)) for i, p in enumerate(fields)]


def save_half(model: ModelMixin, folder: Path) -> None:
    """Save a model folder with fp16 weights, replacing what was there."""
    save_folder(model.half(), folder)
    model.float()


@torch.inference_mode()
def latent_scaling(autoencoder: TileAutoencoder, crops: LatentCrops) -> tuple[float, float]:
    """Shift and scale that give the drawn latents zero mean and unit variance over all channels."""
    mean, std = crops.mean[:4096].float(), crops.std[:4096].float()
    shift = float(mean.mean())
    variance = float((mean - shift).pow(2).mean() + std.pow(2).mean())
    return round(shift, 4), round(variance**-0.5, 4)


def latent_crops(
    recipe: StarterRecipe,
    tiles: list[RealTile],
    autoencoder: TileAutoencoder,
    encoder: TileEncoder,
    size: int,
) -> LatentCrops:
    """Encoded crops of `size` px, kept in the work folder."""
    kept = recipe.work / f"crops-{size}.pt"
    if not kept.exists():
        count = recipe.crops if size == 128 else recipe.crops // 32
        encode_crops(tiles, autoencoder, encoder, count=count, size=size, seed=size).save(kept)
    return LatentCrops.load(kept)


def train_starter_models(recipe: StarterRecipe) -> dict[str, Any]:
    """Run (or resume) the recipe; returns the measurements that the cards state."""
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    real = read_real(recipe.data)
    train = [t for t in real if not t.held_out] + drawn_fields(recipe)
    held_out = [t for t in real if t.held_out]
    if not (recipe.out / "autoencoder" / "config.json").exists():
        save_half(
            train_autoencoder(train, held_out, recipe.work, steps=recipe.autoencoder_steps),
            recipe.out / "autoencoder",
        )
    if not (recipe.out / "encoder" / "config.json").exists():
        save_half(train_encoder(train, recipe.work, steps=recipe.encoder_steps), recipe.out / "encoder")
    autoencoder, encoder = load_autoencoder(recipe.out), load_encoder(recipe.out)
    crops = latent_crops(recipe, train, autoencoder, encoder, 128)
    large = latent_crops(recipe, train, autoencoder, encoder, 256)
    shift, scale = latent_scaling(autoencoder, crops)
    autoencoder.register_to_config(shift_factor=shift, scaling_factor=scale)
    save_half(autoencoder, recipe.out / "autoencoder")
    transformer = train_transformer(
        crops,
        recipe.work,
        scaling=(shift, scale),
        steps=recipe.transformer_steps,
        large=large,
        minutes=recipe.minutes,
        compiled=recipe.compiled,
    )
    save_half(transformer, recipe.out / "transformer")
    return measure_starter(recipe, real, transformer)


def measure_starter(
    recipe: StarterRecipe, real: list[RealTile], transformer: PixCellTransformer2DModel
) -> dict[str, Any]:
    """Measure the written weights on held-out real tiles and write the model cards."""
    autoencoder, encoder = load_autoencoder(recipe.out), load_encoder(recipe.out)
    held_out = [t for t in real if t.held_out]
    figures: dict[str, Any] = {"parameters": {}, "bytes": {}}
    for name, model in (("autoencoder", autoencoder), ("encoder", encoder), ("transformer", transformer)):
        figures["parameters"][name] = sum(p.numel() for p in model.parameters())
        figures["bytes"][name] = sum(f.stat().st_size for f in (recipe.out / name).glob("*.safetensors"))
    if held_out:
        figures["psnr_db"] = {"starter": reconstruction_quality(autoencoder, held_out)}
        weights = recipe.data / "weights" / "taesd3_f8e4m3.safetensors"
        if weights.exists():
            figures["psnr_db"]["TAESD3"] = reconstruction_quality(taesd3(weights), held_out)
        figures["probes"] = tissue_probes(encoder, load_second_eye(), [*real, *spot_tiles(recipe.data)])
    (recipe.out / "figures.json").write_text(json.dumps(figures, indent=1, sort_keys=True))
    write_cards(recipe.out, figures)
    return figures
