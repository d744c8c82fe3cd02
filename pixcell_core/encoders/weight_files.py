"""Reads files of tensors that a person brings: safetensors, or a pickle of plain tensors and nothing else.

A pickle is only ever read with `weights_only=True`; one that asks to run code is refused by the name of what it
asked for. Every failure says what was met and what was expected.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pixcell_core.errors import BadInputError

PICKLES = {".bin", ".pth", ".pt", ".ckpt"}


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a weights file by name, on the CPU, in the type the file has.

    A pickle may hold the tensors directly or under `state_dict`.

    Raises:
        BadInputError: no such file, a truncated or damaged one, a pickle with code in it, or values that are NaN.
    """
    if not path.is_file():
        raise BadInputError(
            f"There is no file {path}.", hint="Give the weights file itself.", code="weights-missing"
        )
    if path.suffix == ".safetensors":
        tensors = _read_safetensors(path)
    elif path.suffix in PICKLES:
        tensors = _read_pickle(path)
    else:
        raise BadInputError(
            f"{path.name} is no weights file this program reads (ending {path.suffix or 'none'!r}).",
            hint=f"Expected .safetensors or one of {', '.join(sorted(PICKLES))}.",
            code="weights-unknown",
        )
    for name, value in tensors.items():
        # fp8 has no isfinite of its own.
        if value.is_floating_point() and not bool(torch.isfinite(value.float()).all()):
            raise BadInputError(
                f"{path.name} holds NaN or infinite values in {name}.",
                hint="Expected finite weights only: bring the file again from where it was published.",
                code="weights-not-finite",
            )
    return tensors


def load_strictly(model: nn.Module, tensors: Mapping[str, torch.Tensor], source: str, what: str) -> None:
    """Put `tensors` into `model`, which must have exactly these names and shapes; float tensors become float32.

    The model may be on the meta device: it takes the tensors themselves and nothing is held twice.

    Raises:
        BadInputError: a tensor is missing, too many, or of another shape.
    """
    wanted = model.state_dict()
    for name in wanted.keys() & tensors.keys():
        if wanted[name].shape != tensors[name].shape:
            raise BadInputError(
                f"{source} is not {what}: {name} has shape {list(tensors[name].shape)}, "
                f"expected {list(wanted[name].shape)}.",
                hint=f"Give the weights of {what}; this file belongs to another model.",
                code="weights-foreign",
            )
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or extra:
        first = f"missing {missing[0]}" if missing else f"unknown {extra[0]}"
        raise BadInputError(
            f"{source} is not {what}: {len(missing)} tensors are missing and {len(extra)} are unknown ({first}); "
            f"met {len(tensors)} tensors, expected {len(wanted)}.",
            hint=f"Give the whole, unchanged weights of {what}.",
            code="weights-foreign",
        )
    ready = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
    model.load_state_dict(ready, strict=True, assign=True)


def check_weight_file(path: Path) -> None:
    """Refuse a damaged or unsafe weights file before a library opens it; the errors of `read_tensors`."""
    read_tensors(path)


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        met, needed = path.stat().st_size, _announced_size(path)
        expected = f"its header announces {needed:,}" if needed else "its header cannot be read"
        raise BadInputError(
            f"{path.name} cannot be read: it has {met:,} bytes, {expected}.",
            hint="The file is truncated or damaged: copy it again and compare its size with the original.",
            code="weights-damaged",
        ) from error


def _announced_size(path: Path) -> int | None:
    """Bytes a safetensors file should have by its own header (8 bytes of length, JSON, data)."""
    with path.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if not 0 < length < 100_000_000:
            return None
        try:
            header = json.loads(handle.read(length))
            ends = [int(v["data_offsets"][1]) for k, v in header.items() if k != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return None
    return 8 + length + max(ends, default=0)


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL\s+([\w.]+)", str(error))
        if asked is None:
            raise _damaged(path) from error
        raise BadInputError(
            f"{path.name} is a pickle that asks to use {asked.group(1)}; expected plain tensors only.",
            hint="It was not loaded and nothing in it was run. Bring a .safetensors file, or a pickle of the state "
            "dict alone.",
            code="weights-unsafe",
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise _damaged(path) from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(isinstance(v, torch.Tensor) for v in found.values()):
        met = type(found).__name__
        if isinstance(found, dict):
            met = f"a dict with {', '.join(sorted(str(k) for k in found)[:4])}"
        raise BadInputError(
            f"{path.name} holds {met}, expected tensors by name.",
            hint="Save the model's state dict alone.",
            code="weights-unknown",
        )
    return {str(k): v for k, v in found.items()}


def _damaged(path: Path) -> BadInputError:
    return BadInputError(
        f"{path.name} cannot be read: its {path.stat().st_size:,} bytes are no complete file of tensors.",
        hint="The file is truncated or damaged: copy it again and compare its size with the original.",
        code="weights-damaged",
    )
