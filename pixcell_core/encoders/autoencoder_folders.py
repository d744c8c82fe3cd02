"""Latent autoencoders from local folders: diffusers' AutoencoderKL and AutoencoderTiny, and the starter's.

Scale and shift come from the folder's own `config.json`. A 16-channel AutoencoderKL without a shift is refused:
the library's default would be none, and SD3's is 0.0609.

AutoencoderTiny (TAESD3 and its kin) was trained to give latents that are scaled already: SD3's
(z - 0.0609) * 1.5305. Its own factors are therefore 1 and 0, and its latents and SD3's can take each other's place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pixcell_core.checkpoints.folders import build_empty, declared_class, fill, load_model_folder
from pixcell_core.encoders.latent_autoencoder import LatentAutoencoder
from pixcell_core.encoders.weight_files import check_finite, read_tensors
from pixcell_core.errors import BadInputError

SD3_SCALING_FACTOR = 1.5305
SD3_SHIFT_FACTOR = 0.0609


def load_autoencoder_kl(
    path: Path,
    *,
    scaling_factor: float | None = None,
    shift_factor: float | None = None,
    published: bool = False,
) -> LatentAutoencoder:
    """An `AutoencoderKL` folder, or the pipeline folder whose `vae/` it is.

    Args:
        path: the folder.
        scaling_factor: used instead of the configuration's.
        shift_factor: used instead of the configuration's.
        published: refuse anything but SD3's 16 channels, 1.5305 and 0.0609, which published PixCell weights expect.

    Raises:
        BadInputError: no such model there, a damaged or unsafe file, a 16-channel model without a shift, or (with
            `published`) other factors than SD3's.
    """
    from diffusers import AutoencoderKL

    folder, config = _folder(path, "AutoencoderKL")
    channels = int(config.get("latent_channels", 4))
    scale = config.get("scaling_factor") if scaling_factor is None else scaling_factor
    shift = config.get("shift_factor") if shift_factor is None else shift_factor
    if channels == 16 and (scale is None or shift is None):
        absent = "scaling_factor" if scale is None else "shift_factor"
        raise BadInputError(
            f"{folder / 'config.json'} declares 16 latent channels and has no {absent} "
            f"(met {config.get(absent)!r}, expected a number).",
            hint=f"Give it: SD3's are {SD3_SCALING_FACTOR} (scale) and {SD3_SHIFT_FACTOR} (shift).",
            code="autoencoder-shift-missing",
        )
    # A model of 4 channels (Stable Diffusion 1, 2, XL) has no shift, and the library's scale when none is written.
    numbers = (
        _finite("scaling_factor", 0.18215 if scale is None else scale),
        _finite("shift_factor", shift or 0.0),
    )
    if published and (channels, *numbers) != (16, SD3_SCALING_FACTOR, SD3_SHIFT_FACTOR):
        raise BadInputError(
            f"{folder} has {channels} latent channels, scale {numbers[0]:g} and shift {numbers[1]:g}; published "
            f"PixCell weights expect 16, {SD3_SCALING_FACTOR} and {SD3_SHIFT_FACTOR}.",
            hint="Bring the `vae` folder of Stable Diffusion 3 or 3.5. Another autoencoder, for a transformer trained "
            "with it, is named autoencoder-kl:FOLDER.",
            code="autoencoder-foreign",
        )
    model = _from_folder(AutoencoderKL, folder)
    model.register_to_config(scaling_factor=numbers[0], shift_factor=numbers[1])
    downscale = 2 ** (len(model.config["block_out_channels"]) - 1)
    name = "sd3-vae" if published else "autoencoder-kl"
    return LatentAutoencoder(name, model, latent_channels=channels, downscale=downscale)


def load_autoencoder_tiny(path: Path) -> LatentAutoencoder:
    """An `AutoencoderTiny` folder, or its safetensors file alone (8-bit floats are widened).

    Raises:
        BadInputError: no such model there, or a damaged or unsafe file.
    """
    from diffusers import AutoencoderTiny

    model: Any
    if path.is_file():
        tensors = read_tensors(path)
        first = tensors.get("decoder.layers.0.weight")
        channels = int(first.shape[1]) if first is not None and first.ndim == 4 else 16
        config = {"latent_channels": channels}
        kind: Any = AutoencoderTiny
        model = build_empty(kind, config, path.name)
        fill(model, {k: v.float() for k, v in tensors.items()}, config, path.name)
    else:
        folder, _ = _folder(path, "AutoencoderTiny")
        model = _from_folder(AutoencoderTiny, folder)
    blocks = len(model.config["encoder_block_out_channels"])
    return LatentAutoencoder(
        "autoencoder-tiny",
        model,
        latent_channels=int(model.config["latent_channels"]),
        downscale=2 ** (blocks - 1),
    )


def load_starter_autoencoder(folder: Path | None = None) -> LatentAutoencoder:
    """The starter's autoencoder: the shipped one, or one of the same class from a folder."""
    from pixcell_core.models import TileAutoencoder
    from pixcell_core.starter import load_autoencoder
    from pixcell_core.starter.weights import load_folder

    model = load_autoencoder() if folder is None else load_folder(TileAutoencoder, folder)
    return LatentAutoencoder("starter", model, latent_channels=int(model.config["latent_channels"]))


def _finite(name: str, value: Any) -> float:
    number = float(value) if isinstance(value, (int, float)) else float("nan")
    if not abs(number) < 1e6 or (name == "scaling_factor" and number <= 0):
        raise BadInputError(
            f"The autoencoder's {name} is {value!r}, expected a finite number{' above 0' if 'scal' in name else ''}.",
            hint="Put the published number into config.json, or give it explicitly.",
            code="autoencoder-factor",
        )
    return number


def _folder(path: Path, expected: str) -> tuple[Path, dict[str, Any]]:
    """The folder with `config.json` and its content, whether `path` is it or the pipeline folder above it."""
    folder = path if (path / "config.json").is_file() else path / "vae"
    if not (folder / "config.json").is_file():
        raise BadInputError(
            f"{path} holds no autoencoder: neither config.json nor vae/config.json is there.",
            hint="Bring the `vae` folder of Stable Diffusion 3 or 3.5 (stabilityai/stable-diffusion-3.5-large, under "
            "its makers' licence), or of TAESD3 (madebyollin/taesd3) for autoencoder-tiny.",
            code="weights-missing",
        )
    hint = "`pixcell model encoders` lists the autoencoders this program knows and how each is named."
    return folder, declared_class(folder, expected, hint=hint)[1]


def _from_folder(kind: Any, folder: Path) -> Any:
    """A diffusers model from its folder as float32; a missing, extra, misshapen or NaN tensor is an error."""
    model = load_model_folder(kind, folder, dtype=torch.float32)
    check_finite(model.state_dict().items(), str(folder))
    return model
