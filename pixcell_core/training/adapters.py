"""Low-rank adapters for federated fine-tuning: FFA-LoRA, whose A is frozen from a shared seed and whose B is trained.

With A fixed the mean of the sites' updates is exact (the product B·A is linear in B), no product of two noises
appears, and half of the parameters carry noise (Sun et al. 2024, FFA-LoRA).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from pixcell_core.errors import RefusedError

DEFAULT_TARGETS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_v", "attn2.to_out.0")
SILENT_WITH_ONE_TOKEN = ("attn2.to_q", "attn2.to_k")


def _frozen_matrix(name: str, shape: tuple[int, int], seed: int) -> torch.Tensor:
    """A of one layer: rows Gaussian with variance 1/in_features, from a seed of its own per layer name."""
    own = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1
    generator = torch.Generator().manual_seed(own)
    return torch.randn(shape, generator=generator) / shape[1] ** 0.5


def attach_ffa_lora(
    model: nn.Module,
    *,
    rank: int,
    seed: int,
    targets: Sequence[str] = DEFAULT_TARGETS,
    alpha: int | None = None,
) -> None:
    """Inject LoRA layers in place; everything is frozen but the B matrices, which start at zero.

    Args:
        model: a transformer.
        rank: rank r of the adapter.
        seed: seed of the frozen A matrices, shared by all sites of a study.
        targets: endings of the module names to adapt.
        alpha: scaling numerator; `rank` when absent, so that the adapter's scale is 1.

    Raises:
        RefusedError: a target names no layer, or carries no signal with this model (one condition token).
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = [name for name, _ in model.named_modules()]
    tokens = int(getattr(model, "config", {}).get("caption_num_tokens", 2))
    hit = {t: [m for m in names if m == t or m.endswith(f".{t}")] for t in targets}
    absent = [t for t in targets if not hit[t]]
    if absent:
        raise RefusedError(
            f"The model has no layer called {', '.join(absent)}.",
            hint="Correct the study's adapter targets; they are endings of the model's own module names.",
            code="unknown-adapter-target",
        )
    # Judged by the layers reached, not by how the target is spelled: `to_q` alone reaches both attentions.
    silent = [t for t in targets if any(m.endswith(SILENT_WITH_ONE_TOKEN) for m in hit[t])]
    if tokens == 1 and silent:
        raise RefusedError(
            f"{', '.join(silent)} cannot learn: with one condition token the attention weight is always 1, "
            "so these layers have zero gradient and would carry privacy noise alone.",
            hint="Leave them out of the study's adapter targets.",
            code="silent-adapter-target",
        )
    config = LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=list(targets), lora_dropout=0.0)
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
        if "lora_A" in name:
            with torch.no_grad():
                parameter.copy_(_frozen_matrix(name, (parameter.shape[0], parameter.shape[1]), seed))


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trained half of the adapter: every B, detached, float32."""
    return {k: p.detach().float().clone() for k, p in model.named_parameters() if "lora_B" in k}


def load_adapter_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Write B matrices into an adapted model; names and shapes must match exactly, or nothing is written."""
    own = {k: p for k, p in model.named_parameters() if "lora_B" in k}
    if own.keys() != state.keys():
        odd = sorted(own.keys() ^ state.keys())[:3]
        raise RefusedError(
            f"The adapter does not fit this model: {len(own.keys() ^ state.keys())} names differ, e.g. {odd}.",
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
