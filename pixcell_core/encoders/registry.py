"""Tile encoders and latent autoencoders by name: `starter`, `uni2-h:/folder`, `sd3-vae:/folder` and others.

A specification is a name, or `name:path` where the weights are a person's own. Nothing is ever fetched: what is not
on this machine is named in an error, with the file to bring and who publishes it.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pixcell_core.encoders.autoencoder_folders import (
    load_autoencoder_kl,
    load_autoencoder_tiny,
    load_starter_autoencoder,
)
from pixcell_core.encoders.latent_autoencoder import LatentAutoencoder
from pixcell_core.encoders.packaged import load_second_eye_encoder, load_starter_encoder
from pixcell_core.encoders.protocols import ImageEncoder
from pixcell_core.encoders.tiled_encoder import TILE_SIZE
from pixcell_core.encoders.transformers_folder import load_transformers_folder
from pixcell_core.encoders.uni2 import load_uni2
from pixcell_core.errors import BadInputError
from pixcell_core.models.devices import choose_device


@dataclass(frozen=True)
class RegistryEntry:
    """One known model: what it is, what a person must bring, under which licence, and how it is loaded.

    `path` says whether a path must be ("needed"), may be ("optional") or cannot be ("none") given. `load` is called
    with that path first (None where it was left out; not at all with "none"); a tile encoder's also with the
    keywords `tile_size`, `device` and `dtype`.
    """

    name: str
    kind: str
    summary: str
    needs: str
    licence: str
    path: str
    load: Callable[..., Any]


TILE_ENCODERS: dict[str, RegistryEntry] = {}
AUTOENCODERS: dict[str, RegistryEntry] = {}


def register_encoder(entry: RegistryEntry) -> None:
    """Make a model known by its name; `kind` is "encoder" or "autoencoder", `path` "needed", "optional" or "none".

    Raises:
        BadInputError: the name is taken or has a colon in it, or kind or path is another word.
    """
    kinds = {"encoder": TILE_ENCODERS, "autoencoder": AUTOENCODERS}
    table = kinds.get(entry.kind)
    if table is None or entry.path not in {"needed", "optional", "none"}:
        raise BadInputError(
            f"The entry {entry.name!r} has kind {entry.kind!r} and path {entry.path!r}.",
            hint="Expected kind encoder or autoencoder, and path needed, optional or none.",
            code="registry-entry",
        )
    if entry.name in table or ":" in entry.name or not entry.name:
        raise BadInputError(
            f"The name {entry.name!r} is taken or cannot be used.",
            hint="Choose a name without a colon that is not in `pixcell model encoders`.",
            code="registry-entry",
        )
    table[entry.name] = entry


def load_tile_encoder(
    spec: str,
    *,
    device: str = "cpu",
    tile_size: int = TILE_SIZE,
    dtype: torch.dtype = torch.float32,
) -> ImageEncoder:
    """The tile encoder `spec` names, in evaluation mode, on `device` (auto, cpu or cuda).

    Raises:
        BadInputError: an unknown name, no path where one is needed, weights that are not there or not the right
            ones, or a device this machine has not.
    """
    entry, path = _find(spec, TILE_ENCODERS, AUTOENCODERS)
    chosen = choose_device(device)
    place = () if entry.path == "none" else (path,)
    encoder: ImageEncoder = entry.load(*place, tile_size=tile_size, device=chosen, dtype=dtype)
    return encoder


def load_latent_autoencoder(
    spec: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> LatentAutoencoder:
    """The autoencoder `spec` names, in evaluation mode, on `device` (auto, cpu or cuda).

    Raises:
        BadInputError: as for `load_tile_encoder`.
    """
    entry, path = _find(spec, AUTOENCODERS, TILE_ENCODERS)
    chosen = choose_device(device)
    autoencoder: LatentAutoencoder = entry.load(path)
    return autoencoder.to(chosen, dtype)


def parse_spec(spec: str) -> tuple[str, Path | None]:
    """Name and path of `name` or `name:path`."""
    name, colon, path = spec.partition(":")
    return name.strip(), Path(path).expanduser() if colon and path else None


def _find(
    spec: str, table: dict[str, RegistryEntry], other: dict[str, RegistryEntry]
) -> tuple[RegistryEntry, Path | None]:
    name, path = parse_spec(spec)
    entry = table.get(name)
    if entry is None:
        kind = "tile encoder" if table is TILE_ENCODERS else "autoencoder"
        wrong = f" {name} is of the other kind." if name in other else ""
        near = difflib.get_close_matches(name, table, n=1)
        raise BadInputError(
            f"There is no {kind} {name!r}; expected one of {', '.join(table)}.{wrong}",
            hint=f"Did you mean {near[0]}?" if near else "`pixcell model encoders` says what each is.",
            code="encoder-unknown",
        )
    if entry.path == "needed" and path is None:
        raise BadInputError(
            f"{name} needs your own copy of its weights: {entry.needs}",
            hint=f"Name it as {name}:/path/to/folder. Licence: {entry.licence}",
            code="weights-missing",
        )
    if entry.path == "none" and path is not None:
        raise BadInputError(
            f"{name} takes no path, met {str(path)!r}.", hint=f"Write {name} alone.", code="encoder-path"
        )
    if path is not None and not path.exists():
        raise BadInputError(
            f"There is nothing at {path}; {name} needs: {entry.needs}",
            hint="Check the path after the colon.",
            code="weights-missing",
        )
    # Local folders only; libraries read this when they are first asked for a model.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return entry, path


for _entry in (
    RegistryEntry(
        "starter",
        "encoder",
        "The starter's own tile encoder, 256 numbers per tile.",
        "nothing; or the folder of one trained by `pixcell model train-starter`.",
        "Apache-2.0, as this program.",
        "optional",
        load_starter_encoder,
    ),
    RegistryEntry(
        "second-eye",
        "encoder",
        "EfficientNet-Lite0 (ImageNet), 2,864 numbers per tile: for measuring, never for conditioning.",
        "nothing; its package is installed with this program.",
        "Apache-2.0.",
        "none",
        load_second_eye_encoder,
    ),
    RegistryEntry(
        "uni2-h",
        "encoder",
        "UNI2-h, the encoder of the published PixCell weights, 1,536 numbers per tile.",
        "pytorch_model.bin (or the same as safetensors) of MahmoodLab/UNI2-h, given out by its makers on request.",
        "CC BY-NC-ND 4.0: no commercial use, no redistribution of changed weights.",
        "needed",
        load_uni2,
    ),
    RegistryEntry(
        "dinov2",
        "encoder",
        "A DINOv2 or ViT folder of transformers, its class token.",
        "the folder of, for example, facebook/dinov2-base or owkin/phikon-v2: config.json, model.safetensors, "
        "preprocessor_config.json.",
        "that of the model you bring (dinov2-base: Apache-2.0; phikon-v2: its makers' non-commercial licence).",
        "needed",
        load_transformers_folder,
    ),
    RegistryEntry(
        "starter",
        "autoencoder",
        "The starter's own autoencoder: 16 channels, 8 px per latent pixel.",
        "nothing; or the folder of one trained by `pixcell model train-starter`.",
        "Apache-2.0, as this program.",
        "optional",
        load_starter_autoencoder,
    ),
    RegistryEntry(
        "sd3-vae",
        "autoencoder",
        "The autoencoder of Stable Diffusion 3 and 3.5, which published PixCell weights expect.",
        "the `vae` folder (config.json, diffusion_pytorch_model.safetensors) of "
        "stabilityai/stable-diffusion-3.5-large, or the pipeline folder around it.",
        "its makers' Stability AI community licence; given out after it is accepted.",
        "needed",
        lambda path: load_autoencoder_kl(path, published=True),
    ),
    RegistryEntry(
        "autoencoder-kl",
        "autoencoder",
        "Any AutoencoderKL folder, for a transformer trained with it.",
        "config.json and diffusion_pytorch_model.safetensors; with 16 channels, scale and shift in config.json.",
        "that of the model you bring.",
        "needed",
        load_autoencoder_kl,
    ),
    RegistryEntry(
        "autoencoder-tiny",
        "autoencoder",
        "AutoencoderTiny (TAESD3): fast and rough, in the same scaled latent space as sd3-vae.",
        "the folder of madebyollin/taesd3, or its safetensors file.",
        "MIT (taesd3).",
        "needed",
        load_autoencoder_tiny,
    ),
):
    register_encoder(_entry)
