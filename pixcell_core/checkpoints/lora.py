"""LoRA files in every published form, as one value: peft folders, diffusers' files, whole adapted state dicts.

An adapted layer computes W x + scale · B A x with A (r, in) and B (out, r). Files say `alpha`; scale is alpha / r, or
alpha / √r where the configuration asks for rank-stabilised scaling. A file that names no alpha means alpha = r.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pixcell_core.checkpoints.folders import read_json
from pixcell_core.checkpoints.foreign import LoraTensors, lora_tensors, peft_names
from pixcell_core.checkpoints.original import open_original
from pixcell_core.checkpoints.tensor_files import read_header, read_tensors
from pixcell_core.errors import BadInputError

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
#: Where diffusers keeps the adapter's configuration inside its safetensors file.
DIFFUSERS_METADATA = "lora_adapter_metadata"
#: Settings of peft that change what a layer computes, with the only value this platform computes.
PLAIN_SETTINGS: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "target_parameters": (None, []),
    "layer_replication": (None,),
}


@dataclass(frozen=True)
class LoraAdapter:
    """An adapter apart from its model: by layer name A (r, in), B (out, r) and the scale of their product."""

    down: dict[str, torch.Tensor]
    up: dict[str, torch.Tensor]
    scale: dict[str, float]

    def __post_init__(self) -> None:
        if not self.down:
            raise BadInputError(
                "No LoRA matrices were found (…lora_A.weight, …lora_B.weight).",
                hint="`pixcell model info` says what kind of file it is.",
                code="adapter-missing",
            )
        for layer, matrix in self.down.items():
            other = self.up[layer]
            if matrix.ndim != 2 or other.ndim != 2 or matrix.shape[0] != other.shape[1]:
                raise BadInputError(
                    f"{layer}: A has shape {tuple(matrix.shape)} and B {tuple(other.shape)}; "
                    "expected (r, in) and (out, r).",
                    hint="The file is damaged or of another kind of adapter.",
                    code="adapter-wrong-shape",
                )

    @property
    def layers(self) -> list[str]:
        """Adapted layers, sorted."""
        return sorted(self.down)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each layer."""
        return {layer: int(matrix.shape[0]) for layer, matrix in self.down.items()}

    @property
    def parameters(self) -> int:
        """Numbers in all A and B."""
        return sum(t.numel() for t in (*self.down.values(), *self.up.values()))

    def delta(self, layer: str) -> torch.Tensor:
        """What the adapter adds to a layer's weight, (out, in), float32."""
        return self.scale[layer] * (self.up[layer].float() @ self.down[layer].float())


def _plain(config: Mapping[str, Any], origin: str) -> None:
    """Refuse adapter configurations that mean more than W + scale · B A."""
    for key, allowed in PLAIN_SETTINGS.items():
        if key in config and config[key] not in allowed:
            raise BadInputError(
                f"{origin} sets {key} to {config[key]!r}, expected {allowed[0]!r}.",
                hint="Only plain LoRA is read; merge such an adapter with the library that made it.",
                code="adapter-unsupported",
            )


def _pattern(patterns: Any, layer: str) -> Any:
    """The value of the first pattern that is the layer's name or an ending of it, as peft matches them."""
    for key, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", layer):
            return value
    return None


def _scales(
    found: LoraTensors, config: Mapping[str, Any], alpha: float | None, origin: str
) -> dict[str, float]:
    scales: dict[str, float] = {}
    for layer, matrix in found.down.items():
        rank = int(matrix.shape[0])
        said = (alpha, found.alpha.get(layer), _pattern(config.get("alpha_pattern"), layer))
        value = next((v for v in (*said, config.get("lora_alpha")) if v is not None), rank)
        try:
            scales[layer] = float(value) / (math.sqrt(rank) if config.get("use_rslora") else rank)
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise BadInputError(
                f"{origin}: {layer} has alpha {value!r} and rank {rank}; expected numbers, the rank at least 1.",
                hint="Correct adapter_config.json, or give alpha yourself.",
                code="bad-configuration",
            ) from error
    return scales


def _diffusers_configuration(metadata: Mapping[str, str], origin: str) -> dict[str, Any]:
    if DIFFUSERS_METADATA not in metadata:
        return {}
    try:
        found: dict[str, Any] = json.loads(metadata[DIFFUSERS_METADATA])
        return {key.removeprefix("transformer."): value for key, value in found.items()}
    except (ValueError, AttributeError) as error:
        raise BadInputError(
            f"{origin} carries adapter metadata that is no JSON object.",
            hint="Save the adapter again.",
            code="weights-damaged",
        ) from error


def adapter_from_state(
    state: Mapping[str, torch.Tensor],
    *,
    config: Mapping[str, Any] | None = None,
    alpha: float | None = None,
    origin: str = "the state dict",
) -> LoraAdapter:
    """The adapter inside a state dict, in whatever names; base weights of a whole adapted model are left behind.

    Args:
        state: names to tensors.
        config: peft's adapter configuration, where there is one.
        alpha: overrides what the file says.
        origin: how errors call the state dict.

    Raises:
        BadInputError: no adapter, half of one, several, one that is not plain LoRA, or stray tensors beside it.
    """
    _plain(config or {}, origin)
    found = lora_tensors(state)
    whole = any(".base_layer." in name for name in state)
    if found.rest and found.down and not whole:
        raise BadInputError(
            f"{origin} holds {len(found.rest)} tensors that are no LoRA matrices, e.g. {min(found.rest)}.",
            hint="Only plain LoRA is read: adapters of linear layers, without biases or magnitudes.",
            code="adapter-unsupported",
        )
    return LoraAdapter(found.down, found.up, _scales(found, config or {}, alpha, origin))


def _lora_file(path: Path, alpha: float | None, config: Mapping[str, Any] | None) -> LoraAdapter:
    if path.suffix != ".safetensors":
        return adapter_from_state(open_original(path).choose(), config=config, alpha=alpha, origin=path.name)
    entries, metadata = read_header(path)
    if config is None:
        config = _diffusers_configuration(metadata, path.name)
    # Base weights of a whole adapted model are gigabytes: their pages are mapped, never touched.
    return adapter_from_state(read_tensors(entries), config=config, alpha=alpha, origin=path.name)


def load_lora(path: Path, *, alpha: float | None = None) -> LoraAdapter:
    """An adapter from a peft folder, a folder or file of diffusers, or a whole adapted state dict.

    Args:
        path: a folder with adapter_config.json or pytorch_lora_weights.safetensors, or a .safetensors, .pth file.
        alpha: numerator of the scale; what the file says, or else the rank, when absent.

    Raises:
        BadInputError: nothing there, a damaged file, a pickle with code, or an adapter that is not plain LoRA.
    """
    if path.is_file():
        beside = path.with_name(PEFT_CONFIG)
        peft = path.name == PEFT_WEIGHTS and beside.is_file()
        return _lora_file(path, alpha, read_json(beside) if peft else None)
    if (path / PEFT_CONFIG).is_file():
        if not (path / PEFT_WEIGHTS).is_file():
            raise BadInputError(
                f"{path} has {PEFT_CONFIG} but no {PEFT_WEIGHTS}.",
                hint="Save the adapter as safetensors (the default of peft).",
                code="weights-missing",
            )
        return _lora_file(path / PEFT_WEIGHTS, alpha, read_json(path / PEFT_CONFIG))
    if (path / DIFFUSERS_WEIGHTS).is_file():
        return _lora_file(path / DIFFUSERS_WEIGHTS, alpha, None)
    raise BadInputError(
        f"{path} holds no adapter.",
        hint=f"Expected {PEFT_CONFIG} with {PEFT_WEIGHTS}, {DIFFUSERS_WEIGHTS}, or the path of one file.",
        code="weights-missing",
    )


def save_peft(adapter: LoraAdapter, folder: Path) -> None:
    """Write an adapter in peft's form; the folder is made beside its place and put there.

    Layers of another rank or scale than most are written as peft's patterns.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    ranks = adapter.ranks
    alphas = {layer: adapter.scale[layer] * ranks[layer] for layer in ranks}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = LoraConfig(
        r=int(rank),
        # peft calls alpha an integer and computes with any number.
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=adapter.layers,
        rank_pattern={layer: r for layer, r in ranks.items() if r != rank},
        alpha_pattern={layer: a for layer, a in alphas.items() if a != alpha},
        inference_mode=True,
    )
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config.save_pretrained(str(partial))
    # peft writes the layers as a set; sorted, equal adapters are equal files.
    written = json.loads((partial / PEFT_CONFIG).read_text())
    written["target_modules"] = adapter.layers
    (partial / PEFT_CONFIG).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
    tensors = {
        name: t.detach().contiguous().clone() for name, t in peft_names(adapter.down, adapter.up).items()
    }
    save_file(tensors, partial / PEFT_WEIGHTS, metadata={"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)
