"""Loads the shipped weights; each is a folder with `config.json`, fp16 safetensors and a model card."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pixcell_core.errors import BadInputError

if TYPE_CHECKING:
    from diffusers.models.modeling_utils import ModelMixin

    from pixcell_core.models import EfficientNetLite, PixCellTransformer2DModel, TileAutoencoder, TileEncoder

STARTER = Path(__file__).resolve().parent / "weights"


ModelT = TypeVar("ModelT", bound="ModelMixin")


def _folder(kind: str, root: Path | None) -> Path:
    folder = (root or STARTER) / kind
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise BadInputError(
            f"The {kind} is not in {folder.parent.name}.",
            hint="Install the whole package, or give a folder made by `pixcell model train-starter`.",
            code="weights-missing",
        )
    return folder


def load_folder(kind: type[ModelT], folder: Path) -> ModelT:
    """A model folder as float32, in evaluation mode and frozen.

    Raises:
        BadInputError: no model in the folder, a damaged one, or one of another kind.
    """
    from safetensors import SafetensorError

    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise BadInputError(
            f"{folder} holds no model (config.json beside a .safetensors file).",
            hint="Give the folder of a saved model.",
            code="weights-missing",
        )
    try:
        found: Any = kind.from_pretrained(str(folder), low_cpu_mem_usage=False, output_loading_info=True)
        model, report = found
        if report["missing_keys"]:
            # The library would leave these at their random start and say so in a log only.
            raise ValueError(f"{len(report['missing_keys'])} tensors are missing")
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise BadInputError(
            f"{folder} holds no {kind.__name__} that can be read.",
            hint="Copy or train the model again; config.json and weights must belong together.",
            code="weights-damaged",
        ) from error
    ready: ModelT = model.float().eval()
    ready.requires_grad_(False)
    return ready


def save_folder(model: ModelMixin, folder: Path) -> None:
    """Write a model folder beside its place and put it there.

    The library notes where a model was loaded from; that path says something about a machine, and would give equal
    models unequal digests, so it is left out.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(str(partial))
    config = json.loads((partial / "config.json").read_text())
    config.pop("_name_or_path", None)
    (partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


def load_autoencoder(root: Path | None = None) -> TileAutoencoder:
    """The f8, 16-channel autoencoder, float32, in evaluation mode."""
    from pixcell_core.models import TileAutoencoder

    return load_folder(TileAutoencoder, _folder("autoencoder", root))


def load_encoder(root: Path | None = None) -> TileEncoder:
    """The tile encoder whose embeddings condition the transformer, float32, in evaluation mode."""
    from pixcell_core.models import TileEncoder

    return load_folder(TileEncoder, _folder("encoder", root))


def load_transformer(root: Path | None = None) -> PixCellTransformer2DModel:
    """The small PixCell transformer, float32, in evaluation mode."""
    from pixcell_core.models import PixCellTransformer2DModel

    return load_folder(PixCellTransformer2DModel, _folder("transformer", root))


def load_second_eye() -> EfficientNetLite:
    """EfficientNet-Lite0 (ImageNet), the audit's own eye: never the generator's encoder."""
    from pixcell_core.models import EfficientNetLite

    return EfficientNetLite.from_package()


def weights_digest(folder: Path) -> str:
    """sha256 over the names and bytes of a model folder's configuration and weights."""
    total = hashlib.sha256()
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        total.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return f"sha256:{total.hexdigest()}"


def starter_digest(kind: str = "transformer") -> str:
    """Digest of one of the shipped models."""
    return weights_digest(_folder(kind, None))
