"""Loads and writes the original checkpoints: released `.ckpt`, training's `epoch_E_step_S.pth`.

Such a file is a pickle. It is only ever opened with `weights_only=True`, which builds tensors and plain values and
refuses everything that could run; a file with more in it is an error that names what was met.
The file says nothing of its configuration, so that is read off the shapes and off the latent table.
"""

from __future__ import annotations

import math
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pixcell_core.checkpoints.folders import build_empty, fill
from pixcell_core.checkpoints.foreign import LATENT_TABLE, from_original, is_original, to_original
from pixcell_core.checkpoints.foreign import without_wrapper as plain_names
from pixcell_core.checkpoints.tensor_files import read_header, read_tensors
from pixcell_core.errors import BadInputError
from pixcell_core.models.positions import sincos_table

if TYPE_CHECKING:
    from pixcell_core.models import PixCellTransformer2DModel

HEAD_DIM = 72
#: Latent pixels per side by number of condition tokens: the published stages.
STAGE_OF_TOKENS = {1: 32, 4: 64, 16: 128}
#: Largest difference between a stored latent table and the one its scale gives; half precision rounds by 5e-4.
TABLE_TOLERANCE = 2e-3
WEIGHTS, AVERAGE = "state_dict", "state_dict_ema"
_TRAINING_NAME = re.compile(r"^epoch_(\d+)_step_(\d+)\.pth$")


@dataclass(frozen=True)
class OriginalFile:
    """An opened original checkpoint.

    `states` holds its state dicts by name (`state_dict`, `state_dict_ema`); `others` names what else is in the file;
    `epoch` and `step` are those of a training checkpoint's name.
    """

    states: Mapping[str, dict[str, torch.Tensor]]
    others: tuple[str, ...] = ()
    epoch: int | None = None
    step: int | None = None

    def choose(self, ema: bool | None = None) -> dict[str, torch.Tensor]:
        """One state dict: the average when `ema` is true, or is absent and there is one; else the plain weights.

        An average over parameters alone is completed with the buffers of the plain weights.

        Raises:
            BadInputError: the wanted one is not in the file.
        """
        wanted = AVERAGE if ema or (ema is None and AVERAGE in self.states) else WEIGHTS
        if wanted not in self.states:
            raise BadInputError(
                f"The checkpoint holds {', '.join(self.states)}, not {wanted}.",
                hint="Released checkpoints hold the average as state_dict: leave the choice out.",
                code="checkpoint-missing-keys",
            )
        chosen = plain_names(self.states[wanted])
        if wanted == AVERAGE and WEIGHTS in self.states:
            buffers = (LATENT_TABLE, "y_embedder.y_embedding", "y_pos_embed")
            kept = plain_names(self.states[WEIGHTS])
            chosen |= {name: kept[name] for name in buffers if name in kept and name not in chosen}
        return chosen


def _refused(path: Path, error: Exception) -> BadInputError:
    met = re.search(r"GLOBAL ([\w.]+)|but got <class '([\w.]+)'>", str(error))
    if isinstance(error, pickle.UnpicklingError) and met:
        return BadInputError(
            f"{path.name} is a pickle with code in it: it asks for {met[1] or met[2]}, and only tensors and plain "
            "values are read.",
            hint="Do not open it otherwise unless you trust its author. Ask for a safetensors file, or for a "
            "checkpoint with the state dicts alone.",
            code="pickle-with-code",
        )
    return BadInputError(
        f"{path.name} is no checkpoint that can be read, or it was cut off.",
        hint="Copy or download the file again, and compare its size with the published one.",
        code="weights-damaged",
    )


def _numbers() -> list[Any]:
    """What counters and random states of a training are pickled as: numpy's numbers and arrays, which run nothing.

    numpy 2 moved its module; files written before still call it by the old name.
    """
    import numpy as np

    multiarray: Any = np._core.multiarray  # type: ignore[attr-defined]
    builders = [
        (getattr(multiarray, name), f"numpy.{core}.multiarray.{name}")
        for name in ("scalar", "_reconstruct")
        for core in ("core", "_core")
    ]
    kinds = [type(np.dtype(kind)) for kind in ("bool", "i4", "i8", "u4", "u8", "f4", "f8")]
    return [*builders, np.ndarray, np.dtype, *kinds]


def read_pickle(path: Path) -> Any:
    """The content of a torch file, memory-mapped where its format allows; tensors and plain values only.

    Raises:
        BadInputError: no such file, a damaged one, or a pickle with code in it.
    """
    if not path.is_file():
        raise BadInputError(
            f"There is no file {path}.", hint="Check the path of the checkpoint.", code="weights-missing"
        )
    try:
        with torch.serialization.safe_globals(_numbers()), warnings.catch_warnings():
            # The reader's doubts about a damaged file end in the error below; on a terminal they only frighten.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        # A reader of foreign bytes stumbles over them in any way: index, key, assertion, attribute errors alike.
        raise _refused(path, error) from error


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in value.items())
    )


def open_original(path: Path) -> OriginalFile:
    """Open a checkpoint file and find the state dicts in it.

    Raises:
        BadInputError: as `read_pickle`, or no state dict inside.
    """
    if path.suffix == ".safetensors":
        return OriginalFile({WEIGHTS: read_tensors(read_header(path)[0])})
    content = read_pickle(path)
    named = _TRAINING_NAME.match(path.name)
    epoch, step = (int(named[1]), int(named[2])) if named else (None, None)
    if _is_state(content):
        return OriginalFile({WEIGHTS: content}, (), epoch, step)
    if isinstance(content, dict):
        states = {k: content[k] for k in (WEIGHTS, AVERAGE) if _is_state(content.get(k))}
        if states:
            others = tuple(sorted(str(k) for k in content if k not in states))
            return OriginalFile(states, others, epoch, step)
    met = (
        f"a dictionary with {', '.join(sorted(map(str, content))[:5])}"
        if isinstance(content, dict)
        else type(content).__name__
    )
    raise BadInputError(
        f"{path.name} holds {met}; expected tensors under {WEIGHTS} or {AVERAGE}.",
        hint="Give an original PixCell checkpoint (pixcell_256.ckpt, epoch_E_step_S.pth).",
        code="checkpoint-missing-keys",
    )


def _scale_of(table: torch.Tensor, side: int, width: int) -> float:
    """The interpolation scale a stored latent table (1, tokens, d) was laid with.

    The slowest sine of the last column is sin(f (side - 1) / scale) with f of order 1e-4, which no scale in use wraps.
    """
    slowest = width // 4 - 1
    frequency = 1.0 / 10000.0 ** (slowest / (width / 4))
    angle = math.asin(max(-1.0, min(1.0, float(table[0, side - 1, slowest]))))
    if angle <= 0:
        raise _unfitting_table()
    estimate = frequency * (side - 1) / angle
    for scale in (2.0 ** round(math.log2(estimate)), float(f"{estimate:.3g}")):
        laid = sincos_table(width, side, side, base=side, scale=scale)
        if torch.allclose(table[0].float(), laid, atol=TABLE_TOLERANCE, rtol=0):
            return scale
    raise _unfitting_table()


def _unfitting_table() -> BadInputError:
    return BadInputError(
        "The latent table pos_embed of the checkpoint is not one PixCell lays at any scale.",
        hint="Give the stage's own interpolation scale and sample size, or take the checkpoint again.",
        code="checkpoint-wrong-shape",
    )


def infer_configuration(
    state: Mapping[str, torch.Tensor],
    *,
    head_dim: int = HEAD_DIM,
    sample_size: int | None = None,
    interpolation_scale: float | None = None,
) -> dict[str, Any]:
    """The configuration of an original state dict, in the words of the Diffusers form.

    Args:
        state: original names.
        head_dim: width of one attention head; no tensor tells it.
        sample_size: latent pixels per side; read off `pos_embed`, or off the number of tokens, when absent.
        interpolation_scale: of the latent table; read off `pos_embed`, or sample_size / 64, when absent.

    Raises:
        BadInputError: the shapes contradict each other or do not settle the configuration.
    """
    try:
        width, in_channels, patch, _ = state["x_embedder.proj.weight"].shape
        tokens, caption_channels = state["y_embedder.y_embedding"].shape
        rows = int(state["final_layer.linear.weight"].shape[0])
    except (KeyError, ValueError) as error:
        raise BadInputError(
            f"The checkpoint's input, null embedding or output layer is missing or of another shape ({error}).",
            hint="Give an original PixCell checkpoint.",
            code="checkpoint-missing-keys",
        ) from error
    if head_dim < 1 or width % head_dim:
        raise BadInputError(
            f"The width {width} is no multiple of the head dimension {head_dim}.",
            hint="Give the network's own head dimension (published PixCell: 72).",
            code="bad-configuration",
        )
    if interpolation_scale is not None and not 0 < interpolation_scale < math.inf:
        raise BadInputError(
            f"The interpolation scale is {interpolation_scale}, expected a number above 0.",
            hint="Published stages use 0.5 (256 px), 1 (512 px) and 2 (1024 px).",
            code="bad-configuration",
        )
    table = state.get(LATENT_TABLE)
    if sample_size is None:
        if table is not None:
            sample_size = math.isqrt(int(table.shape[1])) * patch
        elif int(tokens) in STAGE_OF_TOKENS:
            sample_size = STAGE_OF_TOKENS[int(tokens)]
        else:
            raise BadInputError(
                f"Neither a latent table nor {tokens} condition tokens settle the latent's size.",
                hint="Give the sample size: latent pixels per side, an eighth of the image's.",
                code="bad-configuration",
            )
    if sample_size < patch or sample_size % patch:
        raise BadInputError(
            f"The sample size is {sample_size}, expected a multiple of the patch size {patch}.",
            hint="Published stages use 32 (256 px), 64 (512 px) and 128 (1024 px).",
            code="bad-configuration",
        )
    side = sample_size // patch
    if table is not None and tuple(table.shape) != (1, side * side, width):
        raise BadInputError(
            f"pos_embed has shape {tuple(table.shape)}, expected {(1, side * side, width)} at sample size {sample_size}.",
            hint="Give the stage the checkpoint was trained at, or leave the sample size out.",
            code="checkpoint-wrong-shape",
        )
    if interpolation_scale is None:
        interpolation_scale = sample_size / 64 if table is None else _scale_of(table, side, int(width))
    return {
        "activation_fn": "gelu-approximate",
        "attention_head_dim": head_dim,
        "caption_channels": int(caption_channels),
        "caption_num_tokens": int(tokens),
        "cross_attention_dim": int(width),
        "in_channels": int(in_channels),
        "interpolation_scale": interpolation_scale,
        "num_attention_heads": int(width) // head_dim,
        "num_layers": len([name for name in state if re.fullmatch(r"blocks\.\d+\.scale_shift_table", name)]),
        "out_channels": rows // int(patch) ** 2,
        "patch_size": int(patch),
        "sample_size": sample_size,
    }


def load_original(
    path: Path,
    *,
    ema: bool | None = None,
    dtype: torch.dtype | None = None,
    head_dim: int = HEAD_DIM,
    sample_size: int | None = None,
    interpolation_scale: float | None = None,
) -> PixCellTransformer2DModel:
    """An original checkpoint as a transformer, in evaluation mode.

    Args:
        path: `.ckpt`, `.pth`, or the same tensors as `.safetensors`.
        ema: the averaged weights, the plain ones, or (absent) the average where there is one.
        dtype: type of the weights; the file's own when absent.
        head_dim, sample_size, interpolation_scale: as `infer_configuration`.

    Raises:
        BadInputError: as `open_original`, `infer_configuration` and `from_original`, or shapes that do not fit.
    """
    from pixcell_core.models import PixCellTransformer2DModel

    state = open_original(path).choose(ema)
    if not is_original(state):
        raise BadInputError(
            f"The tensors of {path.name} are not those of an original checkpoint (x_embedder, blocks, ...).",
            hint="`pixcell model info` says what kind of file it is.",
            code="checkpoint-missing-keys",
        )
    tensors = from_original(state)
    config = infer_configuration(
        state, head_dim=head_dim, sample_size=sample_size, interpolation_scale=interpolation_scale
    )
    if dtype is not None:
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    return fill(build_empty(PixCellTransformer2DModel, config, path.name), tensors, config, path.name)


def save_original(model: PixCellTransformer2DModel, path: Path) -> None:
    """Write a transformer as an original checkpoint, `{"state_dict": ...}`, beside its place and rename it there."""
    config = model.config
    scale = config["interpolation_scale"]
    state = to_original(
        model.state_dict(),
        sample_size=int(config["sample_size"]),
        patch_size=int(config["patch_size"]),
        interpolation_scale=max(int(config["sample_size"]) // 64, 1) if scale is None else float(scale),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as stream:
        torch.save({WEIGHTS: state}, stream)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
