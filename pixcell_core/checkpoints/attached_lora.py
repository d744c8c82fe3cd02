"""A LoRA adapter on a model: attached beside its layers, merged into their weights, taken off again.

The layers are peft's own; what is ours is the strictness, and the way to and from this platform's federated adapters
(FFA-LoRA), whose A is not stored but drawn from the study's seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from pixcell_core.checkpoints.lora import LoraAdapter
from pixcell_core.checkpoints.naming import a_few
from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.training.adapters import attach_lora as attach_drawn_lora
from pixcell_core.training.adapters import load_adapter_state

NAME = "default"


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Adapted layers with their names."""
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def check_fits(model: nn.Module, adapter: LoraAdapter) -> None:
    """Refuse an adapter whose layers or shapes are not the model's.

    Raises:
        BadInputError: names the layer, the shape met and the shape expected.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if strange := [layer for layer in adapter.layers if layer not in linear]:
        raise BadInputError(
            f"The adapter adapts {len(strange)} layers the model does not have: {a_few(strange)}.",
            hint="Adapter and model must belong together; an adapter of a text-to-image model does not fit.",
            code="adapter-mismatch",
        )
    for layer in adapter.layers:
        met = (adapter.up[layer].shape[0], adapter.down[layer].shape[1])
        expected = (linear[layer].out_features, linear[layer].in_features)
        if met != expected:
            raise BadInputError(
                f"The adapter of {layer} is for a weight of shape {met}, the model's is {expected}.",
                hint="Adapter and model must be of one size.",
                code="adapter-mismatch",
            )


def attach_lora(model: nn.Module, adapter: LoraAdapter, *, trainable: bool = False) -> None:
    """Put an adapter beside the model's layers, in place; the model's own weights stay as they are and are frozen.

    Args:
        model: a plain model.
        adapter: what to attach.
        trainable: let A and B be trained.

    Raises:
        BadInputError: the adapter does not fit.
        RefusedError: the model carries an adapter already.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if next(_adapted(model), None) is not None:
        raise RefusedError(
            "The model carries an adapter already.",
            hint="Fold it into the weights or take it off first.",
            code="adapter-present",
        )
    check_fits(model, adapter)
    ranks = adapter.ranks
    rank = Counter(ranks.values()).most_common(1)[0][0]
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=adapter.layers,
        rank_pattern={layer: r for layer, r in ranks.items() if r != rank},
    )
    inject_adapter_in_model(config, model, adapter_name=NAME)
    model.requires_grad_(False)
    for name, layer in _adapted(model):
        with torch.no_grad():
            layer.lora_A[NAME].weight.copy_(adapter.down[name])
            layer.lora_B[NAME].weight.copy_(adapter.up[name])
        layer.lora_A[NAME].weight.requires_grad_(trainable)
        layer.lora_B[NAME].weight.requires_grad_(trainable)
        layer.scaling[NAME] = adapter.scale[name]


def _required(model: nn.Module) -> list[tuple[str, Any]]:
    found = list(_adapted(model))
    if not found:
        raise RefusedError("The model carries no adapter.", hint="Attach one first.", code="adapter-missing")
    return found


def extract_lora(model: nn.Module) -> LoraAdapter:
    """The adapter a model carries, as detached copies; FFA-LoRA's drawn A is in it like any other.

    Raises:
        RefusedError: the model carries none.
    """
    layers = _required(model)
    return LoraAdapter(
        {name: layer.lora_A[NAME].weight.detach().clone() for name, layer in layers},
        {name: layer.lora_B[NAME].weight.detach().clone() for name, layer in layers},
        {name: float(layer.scaling[NAME]) for name, layer in layers},
    )


def merge_lora(model: nn.Module) -> None:
    """Add the adapter to the weights it stands beside: the same function, without the adapter's cost. Once only.

    Raises:
        RefusedError: the model carries no adapter.
    """
    for _, layer in _required(model):
        if not layer.merged:
            layer.merge()


def unmerge_lora(model: nn.Module) -> None:
    """Take a merged adapter out of the weights again (equal up to rounding).

    Raises:
        RefusedError: the model carries no adapter.
    """
    for _, layer in _required(model):
        if layer.merged:
            layer.unmerge()


def detach_lora(model: nn.Module, *, fold: bool = False) -> None:
    """Take the adapter's layers off, in place; with `fold` their product stays in the weights.

    Raises:
        RefusedError: the model carries no adapter.
    """
    layers = _required(model)
    (merge_lora if fold else unmerge_lora)(model)
    for name, layer in layers:
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def attach_as_ffa(model: nn.Module, adapter: LoraAdapter, *, seed: int) -> None:
    """Attach a peft-form adapter as this platform's FFA-LoRA: A drawn from the seed and frozen, B trainable.

    Args:
        model: a plain model.
        adapter: one rank and one scale for all layers.
        seed: the study's; the adapter's A must be the one it draws.

    Raises:
        BadInputError: the adapter does not fit the model, or its A is not the seed's.
        RefusedError: ranks or scales differ between layers, or the model carries an adapter already.
    """
    if next(_adapted(model), None) is not None:
        raise RefusedError(
            "The model carries an adapter already.", hint="Take it off first.", code="adapter-present"
        )
    check_fits(model, adapter)
    ranks, alphas = set(adapter.ranks.values()), {adapter.scale[k] * r for k, r in adapter.ranks.items()}
    if len(ranks) > 1 or len({round(a, 6) for a in alphas}) > 1 or round(min(alphas)) < 1:
        raise RefusedError(
            f"A federated adapter has one rank and one alpha; met ranks {sorted(ranks)}, alphas {sorted(alphas)}.",
            hint="Train the study's adapter with one rank for all layers.",
            code="adapter-mismatch",
        )
    rank = min(ranks)
    attach_drawn_lora(
        model, kind="ffa-lora", rank=rank, seed=seed, targets=adapter.layers, alpha=round(min(alphas))
    )
    drawn = extract_lora(model)
    for layer in adapter.layers:
        if not torch.equal(adapter.down[layer].float(), drawn.down[layer].float()):
            detach_lora(model)
            raise BadInputError(
                f"A of {layer} is not the matrix seed {seed} draws.",
                hint="Give the seed of the study that trained it; an adapter trained elsewhere has no seed.",
                code="adapter-mismatch",
            )
    state = {f"{layer}.lora_B.{NAME}.weight": matrix for layer, matrix in adapter.up.items()}
    load_adapter_state(model, state)
