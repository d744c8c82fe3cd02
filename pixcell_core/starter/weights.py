"""Loads the shipped weights; each is a folder with `config.json`, fp16 safetensors and a model card."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from pixcell_core.errors import BadInputError

if TYPE_CHECKING:
    from pixcell_core.models import EfficientNetLite, PixCellTransformer2DModel, TileAutoencoder, TileEncoder

STARTER = Path(__file__).resolve().parent / "weights"


def _folder(kind: str, root: Path | None) -> Path:
    folder = (root or STARTER) / kind
    if not (folder / "config.json").is_file():
        raise BadInputError(
            f"The {kind} is not in {folder.parent.name}.",
            hint="Install the whole package, or give a folder made by `pixcell model train-starter`.",
            code="weights-missing",
        )
    return folder


def load_autoencoder(root: Path | None = None) -> TileAutoencoder:
    """The f8, 16-channel autoencoder, float32, in evaluation mode."""
    from pixcell_core.models import TileAutoencoder

    model = TileAutoencoder.from_pretrained(str(_folder("autoencoder", root)), low_cpu_mem_usage=False)
    return model.float().eval().requires_grad_(False)


def load_encoder(root: Path | None = None) -> TileEncoder:
    """The tile encoder whose embeddings condition the transformer, float32, in evaluation mode."""
    from pixcell_core.models import TileEncoder

    model = TileEncoder.from_pretrained(str(_folder("encoder", root)), low_cpu_mem_usage=False)
    return model.float().eval().requires_grad_(False)


def load_transformer(root: Path | None = None) -> PixCellTransformer2DModel:
    """The small PixCell transformer, float32, in evaluation mode."""
    from pixcell_core.models import PixCellTransformer2DModel

    model = PixCellTransformer2DModel.from_pretrained(
        str(_folder("transformer", root)), low_cpu_mem_usage=False
    )
    return model.float().eval().requires_grad_(False)


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
