"""Plain LoRA beside FFA: A and B trained from one public start, states of one kind never mixed with the other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pixcell_core.diffusion import training_loss
from pixcell_core.errors import BadInputError, PixcellError, RefusedError
from pixcell_core.models import PixCellTransformer2DModel
from pixcell_core.private import signal
from pixcell_core.private.signal import parameters_without_signal
from pixcell_core.training.adapters import (
    DEFAULT_TARGETS,
    AdapterKind,
    adapter_state,
    attach_lora,
    load_adapter_state,
    start_state,
)
from tests.pixcell_core.training.process_runs import transformer

RANK = 3
KINDS: tuple[AdapterKind, ...] = ("ffa-lora", "lora")


def adapted(kind: AdapterKind, seed: int = 5, rank: int = RANK) -> PixCellTransformer2DModel:
    model = transformer()
    attach_lora(model, kind=kind, rank=rank, seed=seed)
    return model


def layers_of(model: nn.Module, targets: tuple[str, ...] = DEFAULT_TARGETS) -> dict[str, tuple[int, int]]:
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {n: (m.out_features, m.in_features) for n, m in linear.items() if n.endswith(targets)}


def denoising(model: nn.Module, rows: tuple[torch.Tensor, ...]) -> torch.Tensor:
    latents, condition, noise = rows
    timestep = torch.full((len(latents),), 300)
    return training_loss(model, latents, condition, timestep=timestep, noise=noise)


def some_rows(count: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(4)
    shapes = ((count, 16, 8, 8), (count, 1, 12), (count, 16, 8, 8))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


@pytest.mark.parametrize("kind", KINDS)
def test_the_start_without_a_model_is_the_models_own(kind: AdapterKind) -> None:
    model = adapted(kind)
    start = start_state(layers_of(transformer()), kind=kind, rank=RANK, seed=5)
    own = adapter_state(model)
    assert start.keys() == own.keys()
    assert all(torch.equal(start[name], own[name]) and start[name].dtype == torch.float32 for name in own)
    load_adapter_state(model, start)
    other = start_state(layers_of(transformer()), kind=kind, rank=RANK, seed=6)
    differ = {name for name in own if not torch.equal(other[name], own[name])}
    assert differ == {name for name in own if "lora_A" in name}, "the seed is A's alone"


def test_plain_lora_trains_a_and_b_and_begins_as_the_base() -> None:
    model, frozen = adapted("lora"), adapted("ffa-lora")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == adapter_state(model).keys()
    assert len(trained) == 2 * len(adapter_state(frozen)) == 2 * 2 * len(DEFAULT_TARGETS)
    a_of = {n: p for n, p in frozen.named_parameters() if "lora_A" in n}
    assert all(torch.equal(p, a_of[n]) for n, p in model.named_parameters() if "lora_A" in n), (
        "one seed, one A"
    )
    rows = some_rows()
    with torch.no_grad():
        assert torch.equal(denoising(model, rows), denoising(transformer(), rows))


def test_two_steps_of_plain_lora_move_both_halves_and_nothing_else() -> None:
    model = adapted("lora")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # A has no gradient while B is zero
        optimizer.zero_grad()
        denoising(model, some_rows()).sum().backward()
        optimizer.step()
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == adapter_state(model).keys()


def test_the_probe_does_not_call_a_silent_though_b_starts_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("lora")
    denoising(model, some_rows()).sum().backward()
    assert all(not p.grad.any() for n, p in model.named_parameters() if "lora_A" in n and p.grad is not None)
    model.zero_grad()
    assert parameters_without_signal(model, denoising, some_rows()) == []
    monkeypatch.setattr(signal, "_PROBE_SCALE", 0.0)
    assert parameters_without_signal(model, denoising, some_rows()), "mutant: a probe at the start is blind"


@pytest.mark.parametrize(("given", "wanted"), [("lora", "ffa-lora"), ("ffa-lora", "lora")])
def test_a_state_of_the_other_kind_is_refused_and_nothing_is_written(
    given: AdapterKind, wanted: AdapterKind
) -> None:
    state = {k: torch.ones_like(v) for k, v in adapter_state(adapted(given)).items()}
    model = adapted(wanted)
    before = adapter_state(model)
    with pytest.raises(RefusedError, match="trains A") as refused:
        load_adapter_state(model, state)
    assert refused.value.code == "adapter-mismatch"
    assert all(torch.equal(v, before[k]) for k, v in adapter_state(model).items())


def test_a_frozen_models_state_still_carries_b() -> None:
    """Sampling freezes the model; the adapter it holds must not look empty then."""
    model = adapted("ffa-lora").requires_grad_(False)
    assert adapter_state(model).keys() == adapter_state(adapted("ffa-lora")).keys()


def test_the_mean_of_plain_lora_updates_is_not_the_mean_of_their_functions() -> None:
    """Why FFA is the default: with both halves trained the mean of the states carries products that nobody trained."""
    models = [adapted("lora") for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    states = [
        {k: torch.randn(v.shape, generator=generator) * 0.3 for k, v in sorted(adapter_state(m).items())}
        for m in models
    ]
    together = adapted("lora")
    for model, state in zip(models, states, strict=True):
        load_adapter_state(model, state)
    load_adapter_state(together, {k: (states[0][k] + states[1][k]) / 2 for k in states[0]})
    name = next(n for n, m in together.named_modules() if hasattr(m, "lora_B"))
    x = torch.randn(7, 16, generator=generator)
    outputs = [dict(m.named_modules())[name](x) for m in models]
    merged = dict(together.named_modules())[name](x)
    assert not torch.allclose(merged, torch.stack(outputs).mean(0), atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"kind": "dora"}, "adapter-kind"),
        ({"rank": 0}, "adapter-rank"),
        ({"targets": ("attn1",)}, "adapter-target-not-linear"),
        ({"targets": ("norm1", "attn1.to_v")}, "adapter-target-not-linear"),
        ({"targets": ()}, "unknown-adapter-target"),
        ({"targets": ("attn2.to_k",)}, "silent-adapter-target"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_trained_is_refused_before_a_change(
    kind: AdapterKind, settings: dict[str, object], code: str
) -> None:
    model = transformer()
    with pytest.raises(PixcellError) as refused:
        attach_lora(model, **{"kind": kind, "rank": 2, "seed": 0, **settings})  # type: ignore[arg-type]
    assert refused.value.code == code and refused.value.hint
    assert all(p.requires_grad for p in model.parameters()) and not any(
        "lora" in n for n, _ in model.named_modules()
    )


def test_an_unknown_kind_has_no_start() -> None:
    with pytest.raises(BadInputError, match="dora"):
        start_state({"layer": (2, 3)}, kind="dora", rank=1, seed=0)  # type: ignore[arg-type]
