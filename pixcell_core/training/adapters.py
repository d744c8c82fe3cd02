"""Low-rank adapters for federated fine-tuning: FFA-LoRA (A frozen, B trained) and plain LoRA (A and B trained).

Both draw A from a seed that all sites share, and both start with B at zero, so that the adapted model begins as the
base. With A fixed the mean of the sites' updates is exact (the product B·A is linear in B), no product of two noises
appears, and half of the parameters carry noise (Sun et al. 2024, FFA-LoRA). Plain LoRA (Hu et al. 2021) can turn A
towards the data and pays for it with twice the noise and a mean of products that is not the product of the means.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from pixcell_core.errors import BadInputError, RefusedError

AdapterKind = Literal["ffa-lora", "lora"]

DEFAULT_TARGETS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_v", "attn2.to_out.0")
SILENT_WITH_ONE_TOKEN = ("attn2.to_q", "attn2.to_k")

_TRAINED: Mapping[AdapterKind, tuple[str, ...]] = {"ffa-lora": ("lora_B",), "lora": ("lora_A", "lora_B")}
_NAME = "default"


def start_state(
    layers: Mapping[str, tuple[int, int]], *, kind: AdapterKind, rank: int, seed: int
) -> dict[str, torch.Tensor]:
    """What an adapter trains, at its start: the same names, shapes and values as in a model it was attached to.

    Whoever has no model in memory begins a study with it; the shapes stand in the header of the base's weight file.

    Args:
        layers: for each adapted layer, by the name of its module, (outputs, inputs).
        kind: `ffa-lora` or `lora`.
        rank: rank r of the adapter.
        seed: seed of the A matrices.

    Returns:
        `<layer>.lora_B.default.weight` (outputs, r) of zeros; for `lora` also `<layer>.lora_A.default.weight`
        (r, inputs) as drawn from the seed. All float32.
    """
    start: dict[str, torch.Tensor] = {}
    for layer, (outputs, inputs) in layers.items():
        a_name = f"{layer}.lora_A.{_NAME}.weight"
        if "lora_A" in _trained_halves(kind):
            start[a_name] = _drawn_matrix(a_name, (rank, inputs), seed)
        start[f"{layer}.lora_B.{_NAME}.weight"] = torch.zeros(outputs, rank)
    return start


def attach_lora(
    model: nn.Module,
    *,
    kind: AdapterKind,
    rank: int,
    seed: int,
    targets: Sequence[str] = DEFAULT_TARGETS,
    alpha: int | None = None,
) -> None:
    """Inject LoRA layers in place; everything is frozen but what the kind trains. B starts at zero.

    Args:
        model: a transformer.
        kind: `ffa-lora` trains B alone, `lora` trains A and B.
        rank: rank r of the adapter.
        seed: seed of the A matrices, shared by all sites of a study.
        targets: endings of the module names to adapt.
        alpha: scaling numerator; `rank` when absent, so that the adapter's scale is 1.

    Raises:
        BadInputError: the kind or the rank means nothing.
        RefusedError: a target names no linear layer, or carries no signal with this model (one condition token).
    """
    from peft import LoraConfig, inject_adapter_in_model

    trained = _trained_halves(kind)
    if rank < 1:
        raise BadInputError(
            f"An adapter of rank {rank} has nothing to train.",
            hint="Give a rank of at least 1; 4 is a good start.",
            code="adapter-rank",
        )
    require_trainable_targets(model, targets)
    config = LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=list(targets), lora_dropout=0.0)
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(half in name for half in trained))
        if "lora_A" in name:
            with torch.no_grad():
                parameter.copy_(_drawn_matrix(name, (parameter.shape[0], parameter.shape[1]), seed))


def require_trainable_targets(model: nn.Module, targets: Sequence[str]) -> None:
    """Refuse targets that reach no linear layer of the model, or layers that cannot learn. Changes nothing.

    Raises:
        RefusedError: names the target and the reason.
    """
    modules = dict(model.named_modules())
    tokens = int(getattr(model, "config", {}).get("caption_num_tokens", 2))
    hit = {t: [m for m in modules if m == t or m.endswith(f".{t}")] for t in targets}
    absent = [t for t in targets if not hit[t]]
    if absent or not targets:
        raise RefusedError(
            f"The model has no layer called {', '.join(absent) or '(no target was given)'}.",
            hint="Correct the study's adapter targets; they are endings of the model's own module names.",
            code="unknown-adapter-target",
        )
    other = [m for t in targets for m in hit[t] if not isinstance(modules[m], nn.Linear)]
    if other:
        raise RefusedError(
            f"{other[0]} is a {type(modules[other[0]]).__name__}, no linear layer; low-rank matrices fit linear layers.",
            hint="Name the linear layers inside it, such as attn1.to_v.",
            code="adapter-target-not-linear",
        )
    require_no_silent_layers([m for t in targets for m in hit[t]], tokens)


def require_no_silent_layers(layers: Iterable[str], tokens: int) -> None:
    """Refuse layers that cannot learn with `tokens` condition tokens; needs their names alone.

    Judged by the layers reached, not by how a target is spelled: `to_q` alone reaches both attentions.

    Raises:
        RefusedError: with one token, a query or key projection of the cross-attention.
    """
    silent = sorted({".".join(m.rsplit(".", 2)[-2:]) for m in layers if m.endswith(SILENT_WITH_ONE_TOKEN)})
    if tokens == 1 and silent:
        raise RefusedError(
            f"{', '.join(silent)} cannot learn: with one condition token the attention weight is always 1, "
            "so these layers have zero gradient and would carry privacy noise alone.",
            hint="Leave them out of the study's adapter targets.",
            code="silent-adapter-target",
        )


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """What the adapter trains, detached, float32: every B, and every A where A is trained too."""
    return {name: p.detach().float().clone() for name, p in _trained_parameters(model).items()}


def load_adapter_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Write what `adapter_state` returns into an adapted model.

    Raises:
        RefusedError: a name or a shape differs, so that the state is of another model, rank or kind; nothing is written.
    """
    own = _trained_parameters(model)
    if own.keys() != state.keys():
        odd = sorted(own.keys() ^ state.keys())
        kinds = " One trains A, the other does not." if any("lora_A" in name for name in odd) else ""
        raise RefusedError(
            f"The adapter does not fit this model: {len(odd)} names differ, e.g. {odd[:3]}.{kinds}",
            hint="Adapter and model must come from the same study.",
            code="adapter-mismatch",
        )
    for name, parameter in own.items():
        if parameter.shape != state[name].shape:
            raise RefusedError(
                f"The adapter tensor {name} has shape {tuple(state[name].shape)}, not {tuple(parameter.shape)}.",
                hint="Adapter and model must come from the same study.",
                code="adapter-mismatch",
            )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])


def _trained_halves(kind: AdapterKind) -> tuple[str, ...]:
    if kind not in _TRAINED:
        raise BadInputError(
            f"There is no adapter of the kind {kind!r}.",
            hint=f"Choose one of {', '.join(_TRAINED)}.",
            code="adapter-kind",
        )
    return _TRAINED[kind]


def _trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every B, also of a model that was frozen after training; A where it is open to training."""
    named = model.named_parameters()
    return {name: p for name, p in named if "lora_B" in name or ("lora_A" in name and p.requires_grad)}


def _drawn_matrix(name: str, shape: tuple[int, int], seed: int) -> torch.Tensor:
    """A of one layer: rows Gaussian with variance 1/in_features, from a seed of its own per layer name."""
    own = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1
    generator = torch.Generator().manual_seed(own)
    return torch.randn(shape, generator=generator) / shape[1] ** 0.5
