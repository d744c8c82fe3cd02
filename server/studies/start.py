"""The adapter a study starts from: all zeros, with the names and shapes that the base model gives it.

FFA-LoRA trains B from zero, so the coordinator needs no torch to begin: the shapes stand in the header of the base
model's weight file. Sites compare them with their own model and refuse what does not fit.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pixcell_core.contracts.spool import Arrays
from pixcell_core.contracts.study import AdapterSettings
from pixcell_core.errors import BadInputError


def start_adapter(base: Path, adapter: AdapterSettings) -> Arrays:
    """Zero B matrices `<module>.lora_B.default.weight` of shape (out, rank) for every adapted linear layer.

    Raises `BadInputError` where the folder holds no weights or no module has one of the target names.
    """
    from safetensors import SafetensorError, safe_open

    files = sorted(base.glob("*.safetensors"))
    if not files:
        raise BadInputError(
            f"{base} holds no .safetensors file.",
            hint="Give the folder of a saved transformer.",
            code="no-weights",
        )
    start: Arrays = {}
    for path in files:
        try:
            with safe_open(path, framework="numpy") as handle:
                for key in handle.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                    module, _, leaf = key.rpartition(".")
                    shape = handle.get_slice(key).get_shape()
                    if leaf == "weight" and len(shape) == 2 and _is_target(module, adapter.targets):
                        start[f"{module}.lora_B.default.weight"] = np.zeros(
                            (shape[0], adapter.rank), dtype=np.float32
                        )
        except SafetensorError as error:
            raise BadInputError(
                f"{path.name} is not a readable safetensors file.",
                hint="Save the base again.",
                code="no-weights",
            ) from error
    if not start:
        raise BadInputError(
            f"No linear layer of {base.name} is called {', '.join(adapter.targets)}.",
            hint="Correct the adapter's targets.",
            code="no-adapter-target",
        )
    return start


def _is_target(module: str, targets: tuple[str, ...]) -> bool:
    return any(module == target or module.endswith(f".{target}") for target in targets)
