"""DINOv2-style encoders from a local transformers folder: the class token of the last hidden state.

Pathology encoders published in this form (Phikon-v2 among them) load the same way. Nothing is fetched and no code
of the folder is run: only the architectures named here are built.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pixcell_core.checkpoints.folders import read_json
from pixcell_core.encoders.preprocessing import Preprocessing
from pixcell_core.encoders.tile_networks import ClassTokenNetwork, NormalisedNetwork
from pixcell_core.encoders.tiled_encoder import TILE_SIZE, TiledEncoder
from pixcell_core.encoders.weight_files import read_tensors
from pixcell_core.errors import BadInputError

# Each puts its class token first and ends with the last norm.
MODEL_TYPES = ("dinov2", "dinov2_with_registers", "vit")


def load_transformers_folder(
    folder: Path,
    *,
    tile_size: int = TILE_SIZE,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TiledEncoder:
    """An encoder from `config.json`, weights and, where there is one, `preprocessor_config.json`.

    Raises:
        BadInputError: no such folder, another architecture, damaged or unsafe weights, or weights that do not fit
            the configuration.
    """
    from transformers import AutoModel
    from transformers.utils import logging

    model_type = _model_type(folder)
    for file in model_files(folder):
        # Judged before the library opens it: damaged, unsafe or NaN.
        read_tensors(file)
    options: dict[str, Any] = {"add_pooling_layer": False} if model_type == "vit" else {}
    quiet = logging.get_verbosity()
    logging.set_verbosity_error()
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        found: Any = AutoModel.from_pretrained(
            str(folder),
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            dtype=torch.float32,
            **options,
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise _unfit(folder, model_type, f"{type(error).__name__} while loading") from error
    finally:
        logging.set_verbosity(quiet)
        if bars:
            logging.enable_progress_bar()
    model, report = found
    missing = sorted(report["missing_keys"])
    if missing or report.get("mismatched_keys"):
        raise _unfit(folder, model_type, f"{len(missing)} tensors are missing ({', '.join(missing[:2])})")
    # A ViT's table of positions has one size; DINOv2's is interpolated.
    side = int(model.config.image_size) if model_type == "vit" else 224
    preprocessing = Preprocessing.from_folder(folder, Preprocessing(resize=side, crop=side))
    if model_type == "vit" and preprocessing.crop != side:
        raise BadInputError(
            f"{folder} prepares images of {preprocessing.crop} px, its network expects {side} px.",
            hint="preprocessor_config.json and config.json must belong together.",
            code="preprocessing-unknown",
        )
    return TiledEncoder(
        "dinov2",
        NormalisedNetwork(ClassTokenNetwork(model), preprocessing),
        int(model.config.hidden_size),
        tile_size=tile_size,
        device=device,
        dtype=dtype,
    )


def model_files(folder: Path) -> list[Path]:
    """The weight files of a transformers folder: safetensors where there are any, else pickles.

    Raises:
        BadInputError: the folder has none.
    """
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise BadInputError(
            f"{folder} holds no weights; expected model.safetensors or pytorch_model.bin beside config.json.",
            hint="Bring the whole folder of a DINOv2-style model, for example facebook/dinov2-base.",
            code="weights-missing",
        )
    return files


def _model_type(folder: Path) -> str:
    config = read_json(folder / "config.json")
    met = str(config.get("model_type") or config.get("_class_name") or config.get("architecture"))
    if met not in MODEL_TYPES:
        raise BadInputError(
            f"{folder} holds a model of type {met!r}, expected one of {', '.join(MODEL_TYPES)}.",
            hint="Give the folder of a DINOv2-style image encoder; `pixcell model encoders` lists what is known.",
            code="weights-of-another-model",
        )
    return met


def _unfit(folder: Path, model_type: str, why: str) -> BadInputError:
    return BadInputError(
        f"{folder} does not load as {model_type}: {why}.",
        hint="config.json and weights must belong together; copy the folder again.",
        code="weights-foreign",
    )
