"""What the membership attacks need, from tiles and folders: models, latents and condition tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from pixcell_core.cli.progress import progress
from pixcell_core.errors import BadInputError
from privacy_audit.membership import Inputs
from privacy_audit.strata import sampled_rows
from privacy_audit.subject import Cohort
from privacy_audit.tiles import TileSource

if TYPE_CHECKING:
    from pixcell_core.models import PixCellTransformer2DModel

_BATCH = 16


@dataclass(frozen=True)
class WeightsRequest:
    """Folders of the generator and of its public base, the adapter if the generator is base and adapter, the encoders."""

    generator: Path
    base: Path
    adapter: Path | None = None
    encoder: str = "starter"
    autoencoder: str = "starter"
    device: str = "auto"


def load_models(
    request: WeightsRequest,
) -> tuple[PixCellTransformer2DModel, PixCellTransformer2DModel]:
    """Base and generator in evaluation mode.

    Raises:
        BadInputError: files missing or of another model, or two equal folders without an adapter.
    """
    from pixcell_core.checkpoints.attached_lora import attach_lora
    from pixcell_core.checkpoints.folders import load_transformer_folder
    from pixcell_core.checkpoints.lora import load_lora
    from pixcell_core.models.devices import choose_device

    if request.adapter is None and request.generator.resolve() == request.base.resolve():
        raise BadInputError(
            "--generator and --base are the same folder, so there is nothing that could remember anybody.",
            hint="Give the fine-tuned weights as --generator, or the base twice with --adapter.",
            code="generator-is-base",
        )
    device = choose_device(request.device)
    base = load_transformer_folder(request.base, dtype=torch.float32)
    generator = load_transformer_folder(request.generator, dtype=torch.float32)
    if request.adapter is not None:
        attach_lora(generator, load_lora(request.adapter))
    for key in ("in_channels", "sample_size", "caption_channels", "caption_num_tokens"):
        if base.config[key] != generator.config[key]:
            raise BadInputError(
                f"Base and generator differ in {key}: {base.config[key]} and {generator.config[key]}.",
                hint="Give the base that this generator was fine-tuned from.",
                code="base-of-another-model",
            )
    for model in (base, generator):
        nn.Module.to(model, device=device)
    return base.eval(), generator.eval()


def encode(
    request: WeightsRequest, train: TileSource, holdout: TileSource, cohort: Cohort, per_patient: int
) -> Inputs:
    """Latents and tokens of at most `per_patient` tiles of each patient, both sides by the same code.

    Raises:
        BadInputError: the encoders cannot take these tiles.
    """
    from pixcell_core.encoders.registry import load_latent_autoencoder, load_tile_encoder

    autoencoder = load_latent_autoencoder(request.autoencoder, device=request.device)
    side = train.read(0, 1).shape[-1]
    encoder = load_tile_encoder(request.encoder, device=request.device, tile_size=side)
    latents, tokens, owners = [], [], []
    sides = ((train, cohort.of_train), (holdout, cohort.of_holdout))
    chosen = [sampled_rows(owner, per_patient) for _, owner in sides]
    with progress("encoding tiles for the attacks", total=sum(map(len, chosen)), unit="tiles") as bar:
        for (source, owner), rows in zip(sides, chosen, strict=True):
            for start in range(0, len(rows), _BATCH):
                block = rows[start : start + _BATCH]
                pixels = torch.cat([source.read(int(row), int(row) + 1) for row in block])
                latents.append(autoencoder.to_latents(pixels).cpu())
                tokens.append(encoder.encode(pixels))
                owners.append(owner[block])
                bar.advance(len(block))
    return Inputs(torch.cat(latents), torch.cat(tokens), np.concatenate(owners))


def check_fit(model: PixCellTransformer2DModel, inputs: Inputs) -> None:
    """Refuse latents or tokens that this model cannot read.

    Raises:
        BadInputError: with what was met and expected.
    """
    wanted = (int(model.config["caption_num_tokens"]), int(model.config["caption_channels"]))
    met = (int(inputs.tokens.shape[1]), int(inputs.tokens.shape[2]))
    channels, needed = int(inputs.latents.shape[1]), int(model.config["in_channels"])
    if met != wanted or channels != needed:
        raise BadInputError(
            f"The encoders give {met[0]} tokens of width {met[1]} and {channels} latent channels; the generator takes "
            f"{wanted[0]} of width {wanted[1]} and {needed}.",
            hint="Name the generator's own encoders with --encoder and --autoencoder, and audit tiles of its size.",
            code="encoder-of-another-model",
        )
