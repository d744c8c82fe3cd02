"""Reads one file of tensors that a person brings: safetensors, or a pickle of plain tensors and nothing else.

A pickle is only ever read with `weights_only=True`; one that asks to run code is refused by the name of what it
asked for. Every failure says what was met and what was expected.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from pixcell_core.checkpoints import tensor_files
from pixcell_core.checkpoints.original import read_pickle
from pixcell_core.errors import BadInputError

PICKLES = (".bin", ".ckpt", ".pt", ".pth")


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a weights file by name, on the CPU, in the type the file has, mapped rather than copied.

    A pickle may hold the tensors directly or under `state_dict`.

    Raises:
        BadInputError: no such file, a truncated or damaged one, a pickle with code in it, or values that are NaN.
    """
    if path.suffix == ".safetensors":
        tensors = tensor_files.read_tensors(tensor_files.read_header(path)[0])
    elif path.suffix in PICKLES:
        tensors = _tensors_of(read_pickle(path), path)
    else:
        raise BadInputError(
            f"{path.name} is no weights file this program reads (ending {path.suffix or 'none'!r}).",
            hint=f"Expected .safetensors or one of {', '.join(PICKLES)}.",
            code="weights-unknown",
        )
    check_finite(tensors.items(), path.name)
    return tensors


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], source: str) -> None:
    """Refuse weights with NaN or infinity in them: every result would be NaN too, or wrong without a word.

    Raises:
        BadInputError: naming the first such tensor.
    """
    for name, value in tensors:
        # 8-bit floats have no isfinite of their own.
        if value.is_floating_point() and not bool(torch.isfinite(value.float()).all()):
            raise BadInputError(
                f"{source} holds NaN or infinite values in {name}, expected finite weights.",
                hint="Bring the file again from where it was published.",
                code="weights-not-finite",
            )


def _tensors_of(found: Any, path: Path) -> dict[str, torch.Tensor]:
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if isinstance(found, dict) and found and all(isinstance(v, torch.Tensor) for v in found.values()):
        return {str(k): v for k, v in found.items()}
    met = type(found).__name__
    if isinstance(found, dict):
        met = f"a dict with {', '.join(sorted(map(str, found))[:4]) or 'nothing'}"
    raise BadInputError(
        f"{path.name} holds {met}, expected tensors by name.",
        hint="Save the model's state dict alone.",
        code="weights-unknown",
    )
