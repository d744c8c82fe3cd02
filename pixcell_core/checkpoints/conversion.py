"""Converts a transformer between its published forms; nothing that exists is written over."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pixcell_core.checkpoints.folders import load_transformer_folder
from pixcell_core.checkpoints.original import HEAD_DIM, load_original, save_original
from pixcell_core.errors import BadInputError, PixcellError
from pixcell_core.starter.weights import save_folder

if TYPE_CHECKING:
    import torch

    from pixcell_core.models import PixCellTransformer2DModel

PICKLED = (".ckpt", ".pth", ".pt")
Form = Literal["diffusers", "original"]


@dataclass(frozen=True)
class OriginalReading:
    """How an original checkpoint is read: which weights, and what its tensors may not tell."""

    ema: bool | None = None
    head_dim: int = HEAD_DIM
    sample_size: int | None = None
    interpolation_scale: float | None = None


def load_transformer_from(
    source: Path, *, dtype: torch.dtype | None = None, reading: OriginalReading | None = None
) -> PixCellTransformer2DModel:
    """A transformer from a Diffusers folder, a pipeline folder or an original checkpoint.

    Raises:
        BadInputError: nothing there, or nothing a transformer can be made of.
    """
    if not source.exists():
        raise BadInputError(f"There is no {source}.", hint="Check the path.", code="weights-missing")
    if source.is_dir():
        if reading is not None and reading.ema is not None:
            raise BadInputError(
                "A Diffusers folder holds one set of weights; there is no average to choose.",
                hint="Leave --ema and --no-ema out.",
                code="bad-input",
            )
        return load_transformer_folder(source, dtype=dtype)
    how = reading or OriginalReading()
    return load_original(
        source,
        ema=how.ema,
        dtype=dtype,
        head_dim=how.head_dim,
        sample_size=how.sample_size,
        interpolation_scale=how.interpolation_scale,
    )


def convert_checkpoint(
    source: Path,
    out: Path,
    form: Form,
    *,
    dtype: torch.dtype | None = None,
    reading: OriginalReading | None = None,
) -> PixCellTransformer2DModel:
    """Write `source` to `out` in another form and return the model written.

    Args:
        source: as `load_transformer_from`.
        out: a new folder for `diffusers`, a new file ending in .ckpt, .pth or .pt for `original`.
        form: the form to write.
        dtype: type of the weights; the source's own when absent.
        reading: how an original source is read.

    Raises:
        BadInputError: `out` exists or has the wrong ending, or the source cannot be used.
        PixcellError: the disk did not take the file.
    """
    if out.exists():
        raise BadInputError(
            f"{out} exists already.", hint="Give a new name, or remove it first.", code="output-exists"
        )
    if form == "original" and out.suffix not in PICKLED:
        raise BadInputError(
            f"An original checkpoint is one file; {out.name} ends in {out.suffix or 'nothing'}, "
            f"expected one of {', '.join(PICKLED)}.",
            hint="Name the output for example pixcell_256.ckpt.",
            code="bad-input",
        )
    model = load_transformer_from(source, dtype=dtype, reading=reading)
    try:
        if form == "original":
            save_original(model, out)
        else:
            save_folder(model, out)
    except (OSError, RuntimeError) as error:
        partial = out.with_name(out.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        if partial.is_file():
            partial.unlink()
        raise PixcellError(
            f"{out} could not be written: {error}",
            hint="Check the free space and the rights of the folder.",
            code="write-failed",
        ) from error
    return model
