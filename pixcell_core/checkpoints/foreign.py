"""The one adapter between foreign tensor names and ours: the original checkpoints, and every spelling of LoRA files.

Our own names are those of the published Diffusers folders. Everything here takes a mapping of names to tensors and
returns a new one; nothing is copied that a view can show, so a memory-mapped file stays mapped.
Legend: d transformer width, n condition tokens, c channels of one condition token.

Fused layers of the original form are stacked by rows: `attn.qkv` is q, k, v of width d each, `cross_attn.kv_linear` is
k, v. Its `pos_embed` (1, tokens, d) is the fixed table over latent patches, which we always lay anew.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from pixcell_core.checkpoints.naming import a_few
from pixcell_core.errors import BadInputError
from pixcell_core.models.positions import sincos_table

State = dict[str, torch.Tensor]

LATENT_TABLE = "pos_embed"
_LAYERS = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "final_layer.linear": "proj_out",
}
_TENSORS = {
    "y_embedder.y_embedding": "caption_projection.uncond_embedding",
    "final_layer.scale_shift_table": "scale_shift_table",
}
_OPTIONAL = {"y_pos_embed": "y_pos_embed.y_pos_embed"}
_BLOCK_LAYERS = {
    "attn.proj": "attn1.to_out.0",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.proj": "attn2.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
#: A fused layer of the original form, and the layers its rows are, from the top.
_FUSED = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
}
_ENDS = ("weight", "bias")
_LORA = re.compile(
    r"^(?P<layer>.+?)\.(?P<half>lora_A|lora_B|lora\.down|lora\.up)(?:\.(?P<adapter>[^.]+))?\.weight$"
)
_HALVES = {"lora_A": "lora_A", "lora_B": "lora_B", "lora.down": "lora_A", "lora.up": "lora_B"}
_LORA_PREFIXES = ("base_model.model.transformer.", "base_model.model.", "transformer.")


def _depth(names: Iterable[str], prefix: str) -> int:
    """One more than the highest block number among the names."""
    found = [int(m[1]) for name in names if (m := re.match(rf"{prefix}\.(\d+)\.", name))]
    return max(found, default=-1) + 1


def _renames(depth: int) -> dict[str, str]:
    """Original name to ours for every tensor that is only called differently."""
    layers = dict(_LAYERS)
    tensors = {**_TENSORS}
    for n in range(depth):
        layers |= {f"blocks.{n}.{a}": f"transformer_blocks.{n}.{b}" for a, b in _BLOCK_LAYERS.items()}
        tensors[f"blocks.{n}.scale_shift_table"] = f"transformer_blocks.{n}.scale_shift_table"
    return {f"{a}.{e}": f"{b}.{e}" for a, b in layers.items() for e in _ENDS} | tensors


def _fused(depth: int) -> dict[str, tuple[str, ...]]:
    """Original name of every fused tensor to the names of its parts, from the top row."""
    return {
        f"blocks.{n}.{fused}.{e}": tuple(f"transformer_blocks.{n}.{part}.{e}" for part in parts)
        for n in range(depth)
        for fused, parts in _FUSED.items()
        for e in _ENDS
    }


def _check_names(met: Iterable[str], required: Iterable[str], optional: Iterable[str], form: str) -> None:
    """Refuse a mapping with names missing or left over."""
    met, required = set(met), set(required)
    if missing := required - met:
        raise BadInputError(
            f"{len(missing)} tensors of a checkpoint in the {form} form are missing: {a_few(missing)}.",
            hint="The file is incomplete or of another network; take it again from where it was published.",
            code="checkpoint-missing-keys",
        )
    if extra := met - required - set(optional):
        raise BadInputError(
            f"{len(extra)} tensors do not belong to a PixCell checkpoint in the {form} form: {a_few(extra)}.",
            hint="The file is of another network (a ControlNet, a text-to-image model) or of a newer version.",
            code="checkpoint-extra-keys",
        )


def is_original(names: Iterable[str]) -> bool:
    """Whether these tensor names are those of the original form."""
    return any("x_embedder.proj." in name for name in names)


def without_wrapper(state: Mapping[str, torch.Tensor]) -> State:
    """Drop what data-parallel training (`module.`) and compilation (`_orig_mod.`) put before every name."""
    for prefix in ("module.", "_orig_mod."):
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return dict(state)


def from_original(state: Mapping[str, torch.Tensor]) -> State:
    """Original names to ours: fused rows split (as views), the latent table dropped.

    Raises:
        BadInputError: names missing or left over, or fused rows that do not divide.
    """
    state = without_wrapper(state)
    depth = max(_depth(state, "blocks"), 1)
    renames, fused = _renames(depth), _fused(depth)
    _check_names(state, [*renames, *fused], [LATENT_TABLE, *_OPTIONAL], "original")
    ours = {name: state[old] for old, name in (renames | _OPTIONAL).items() if old in state}
    for old, parts in fused.items():
        rows = state[old].shape[0]
        if rows % len(parts):
            raise BadInputError(
                f"{old} has {rows} rows, which is no multiple of {len(parts)}.",
                hint="The file is damaged or of another network.",
                code="checkpoint-wrong-shape",
            )
        ours |= dict(zip(parts, state[old].chunk(len(parts)), strict=True))
    return ours


def to_original(
    state: Mapping[str, torch.Tensor], *, sample_size: int, patch_size: int, interpolation_scale: float
) -> State:
    """Our names to the original ones: rows joined, the latent table (1, tokens, d) laid anew.

    Args:
        state: a whole state dict in our names.
        sample_size: latent pixels per side of the stage.
        patch_size: latent pixels per token side.
        interpolation_scale: the stage's scale of the latent table.

    Raises:
        BadInputError: names missing or left over.
    """
    depth = max(_depth(state, "transformer_blocks"), 1)
    renames, fused = _renames(depth), _fused(depth)
    required = [*renames.values(), *(part for parts in fused.values() for part in parts)]
    _check_names(state, required, _OPTIONAL.values(), "Diffusers")
    theirs = {old: state[name] for old, name in (renames | _OPTIONAL).items() if name in state}
    theirs |= {old: torch.cat([state[part] for part in parts]) for old, parts in fused.items()}
    patches = state["pos_embed.proj.weight"]
    base = sample_size // patch_size
    table = sincos_table(patches.shape[0], base, base, base=base, scale=interpolation_scale)
    theirs[LATENT_TABLE] = table[None].to(patches.dtype)
    return theirs


@dataclass(frozen=True)
class LoraTensors:
    """A state dict taken apart: LoRA halves by layer, `.alpha` scalars by layer, and everything else in our names."""

    down: State
    up: State
    alpha: dict[str, float]
    rest: State


def lora_tensors(state: Mapping[str, torch.Tensor]) -> LoraTensors:
    """Take LoRA matrices out of a state dict, whatever they are called.

    Understood are the names of peft (`base_model.model.<layer>.lora_A.weight`), of diffusers
    (`transformer.<layer>.lora_A.weight`, the older `<layer>.lora.down.weight`, `<layer>.alpha`) and of a whole adapted
    model (`<layer>.lora_A.default.weight` beside `<layer>.base_layer.weight`, which becomes `<layer>.weight`).

    Raises:
        BadInputError: two adapters in one file, one half of a layer without the other, or two names for one tensor.
    """
    halves: dict[str, State] = {"lora_A": {}, "lora_B": {}}
    alpha: dict[str, float] = {}
    rest: State = {}
    adapters: set[str] = set()
    for raw, tensor in without_wrapper(state).items():
        name = next((raw.removeprefix(p) for p in _LORA_PREFIXES if raw.startswith(p)), raw)
        if match := _LORA.match(name):
            place, key = halves[_HALVES[match["half"]]], match["layer"]
            adapters |= {match["adapter"]} if match["adapter"] else set()
        elif name.endswith(".alpha"):
            alpha[name.removesuffix(".alpha")] = float(tensor)
            continue
        else:
            place, key = rest, name.replace(".base_layer.", ".")
        if key in place:
            raise BadInputError(
                f"Two tensors of the file are both {key} (one of them called {raw}).",
                hint="Save the adapter again from the model it belongs to.",
                code="adapter-ambiguous",
            )
        place[key] = tensor
    if len(adapters) > 1:
        raise BadInputError(
            f"The file holds {len(adapters)} adapters: {a_few(adapters)}; one was expected.",
            hint="Save each adapter to a file of its own.",
            code="adapter-ambiguous",
        )
    if half := halves["lora_A"].keys() ^ halves["lora_B"].keys():
        raise BadInputError(
            f"{len(half)} layers have one half of the adapter only: {a_few(half)}.",
            hint="A and B belong together; the file is incomplete.",
            code="adapter-incomplete",
        )
    return LoraTensors(halves["lora_A"], halves["lora_B"], alpha, rest)


def peft_names(down: Mapping[str, torch.Tensor], up: Mapping[str, torch.Tensor]) -> State:
    """LoRA halves by layer to the names of peft's `adapter_model.safetensors`."""
    pairs = {f"base_model.model.{layer}.lora_A.weight": matrix for layer, matrix in down.items()}
    return pairs | {f"base_model.model.{layer}.lora_B.weight": matrix for layer, matrix in up.items()}
