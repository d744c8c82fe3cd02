"""Looks at a folder of models a person brought and says by which name each one loads."""

from __future__ import annotations

import json
from pathlib import Path

from pixcell_core.encoders.transformers_folder import MODEL_TYPES
from pixcell_core.encoders.uni2 import UNI2_FILES
from pixcell_core.errors import BadInputError


def recognise(weights: Path) -> list[tuple[str, str]]:
    """(kind, specification) of every known model in `weights` and its direct sub-folders, `vae/` included.

    Only configuration files are read: a model listed here may still turn out damaged when it is loaded.

    Raises:
        BadInputError: no such folder.
    """
    if not weights.is_dir():
        raise BadInputError(
            f"There is no folder {weights}.",
            hint="Give the folder your models lie in.",
            code="no-such-folder",
        )
    places = [weights, *sorted(p for p in weights.iterdir() if p.is_dir())]
    places += [p / "vae" for p in places if p.name != "vae" and (p / "vae" / "config.json").is_file()]
    found = [(kind, f"{name}:{place}") for place in places for kind, name in _names(place)]
    return list(dict.fromkeys(found))


def _names(folder: Path) -> list[tuple[str, str]]:
    config = _config(folder)
    kind = str(config.get("_class_name", ""))
    if kind == "AutoencoderKL":
        published = [config.get(k) for k in ("latent_channels", "scaling_factor", "shift_factor")]
        return [("autoencoder", "sd3-vae" if published == [16, 1.5305, 0.0609] else "autoencoder-kl")]
    if kind == "AutoencoderTiny":
        return [("autoencoder", "autoencoder-tiny")]
    if kind == "TileAutoencoder":
        return [("autoencoder", "starter")]
    if kind == "TileEncoder":
        return [("encoder", "starter")]
    if config.get("model_type") in MODEL_TYPES:
        return [("encoder", "dinov2")]
    # UNI2-h is given out with a configuration of its architecture only, or none.
    if not kind and "model_type" not in config and any((folder / name).is_file() for name in UNI2_FILES):
        return [("encoder", "uni2-h")]
    return []


def _config(folder: Path) -> dict[str, object]:
    try:
        found = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
