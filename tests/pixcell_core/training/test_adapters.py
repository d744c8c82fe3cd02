"""FFA-LoRA: A frozen and shared, B zero at the start, the mean of sites exact, silent targets refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pixcell_core.errors import RefusedError
from pixcell_core.models import PixCellTransformer2DModel
from pixcell_core.training.adapters import (
    DEFAULT_TARGETS,
    adapter_state,
    attach_lora,
    load_adapter_state,
)
from tests.pixcell_core.training.process_runs import transformer

RANK = 3


def adapted(seed: int = 5, rank: int = RANK, alpha: float | None = None) -> PixCellTransformer2DModel:
    model = transformer()
    attach_lora(model, kind="ffa-lora", rank=rank, seed=seed, alpha=alpha)
    return model


def frozen(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: p.detach().clone() for k, p in model.named_parameters() if "lora_A" in k}


def run(model: PixCellTransformer2DModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    latents = torch.randn(3, 16, 8, 8, generator=generator)
    condition = torch.randn(3, 1, 12, generator=generator)
    with torch.no_grad():
        return model(latents, condition, torch.tensor([0, 400, 999]), return_dict=False)[0]


def random_state(model: nn.Module, seed: int, scale: float = 0.3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        k: torch.randn(v.shape, generator=generator) * scale for k, v in sorted(adapter_state(model).items())
    }


def test_only_b_is_trained_and_every_target_is_reached() -> None:
    model = adapted()
    trained = {k for k, p in model.named_parameters() if p.requires_grad}
    assert trained == adapter_state(model).keys()
    assert len(trained) == 2 * len(DEFAULT_TARGETS)
    for target in DEFAULT_TARGETS:
        assert sum(f".{target}.lora_B" in name for name in trained) == 2, target


def test_a_is_equal_for_equal_seeds_and_differs_by_seed_and_layer() -> None:
    one, again, other = frozen(adapted(5)), frozen(adapted(5)), frozen(adapted(6))
    assert one.keys() == again.keys() == other.keys()
    for name, matrix in one.items():
        assert torch.equal(matrix, again[name])
        assert not torch.allclose(matrix, other[name])
    matrices = list(one.values())
    for i, left in enumerate(matrices):
        assert not any(torch.equal(left, right) for right in matrices[i + 1 :]), "two layers share an A"


def test_a_does_not_depend_on_the_global_generator_nor_on_other_targets() -> None:
    one = frozen(adapted(5))
    model = transformer()
    torch.manual_seed(12345)
    attach_lora(model, kind="ffa-lora", rank=RANK, seed=5, targets=("attn1.to_v",))
    few = frozen(model)
    assert few and all(torch.equal(matrix, one[name]) for name, matrix in few.items())


def test_rows_of_a_have_variance_one_over_inputs() -> None:
    model = nn.ModuleDict({"wide": nn.Linear(400, 10)})
    attach_lora(model, kind="ffa-lora", rank=64, seed=2, targets=("wide",))
    (matrix,) = frozen(model).values()
    assert matrix.shape == (64, 400)
    assert matrix.var().item() * 400 == pytest.approx(1.0, abs=0.05)
    assert matrix.mean().item() == pytest.approx(0.0, abs=0.002)


def test_b_starts_at_zero_so_the_adapted_model_is_the_base() -> None:
    model = adapted()
    assert all(not value.any() for value in adapter_state(model).values())
    assert torch.equal(run(model), run(transformer()))
    load_adapter_state(model, random_state(model, 1))
    assert not torch.allclose(run(model), run(transformer())), "mutant: an adapter that does nothing"


def test_a_step_moves_b_alone() -> None:
    model = adapted()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=1.0)
    output = model(torch.randn(2, 16, 8, 8), torch.randn(2, 1, 12), torch.tensor([1, 2]), return_dict=False)[
        0
    ]
    output.pow(2).mean().backward()
    optimizer.step()
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == adapter_state(model).keys(), "every B learns, nothing else moves"


def test_the_mean_of_sites_is_exactly_the_mean_of_their_updates() -> None:
    """With A shared, W + B A is linear in B: averaging B averages the layers' functions (plain LoRA does not)."""
    models = [adapted() for _ in range(3)]
    states = [random_state(model, seed) for seed, model in enumerate(models)]
    mean = {k: torch.stack([s[k] for s in states]).mean(0) for k in states[0]}
    together = adapted()
    load_adapter_state(together, mean)
    for model, state in zip(models, states, strict=True):
        load_adapter_state(model, state)
    x = torch.randn(7, 16)
    checked = 0
    for name, layer in together.named_modules():
        if not hasattr(layer, "lora_B"):
            continue
        outputs = [dict(model.named_modules())[name](x) for model in models]
        assert torch.allclose(layer(x), torch.stack(outputs).mean(0), atol=1e-5)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert torch.allclose(layer(x), layer.base_layer(x) + x @ a.T @ b.T, atol=1e-5), "scale 1"
        checked += 1
    assert checked == 2 * len(DEFAULT_TARGETS)


def test_mutant_other_seeds_break_the_mean() -> None:
    """The claim above fails, as it must, where two sites freeze different A."""
    one, other, together = adapted(5), adapted(6), adapted(5)
    states = [random_state(one, 0), random_state(other, 1)]
    load_adapter_state(one, states[0])
    load_adapter_state(other, states[1])
    load_adapter_state(together, {k: (states[0][k] + states[1][k]) / 2 for k in states[0]})
    name = next(n for n, m in together.named_modules() if hasattr(m, "lora_B"))
    x = torch.randn(7, 16)
    outputs = [dict(model.named_modules())[name](x) for model in (one, other)]
    assert not torch.allclose(
        dict(together.named_modules())[name](x), torch.stack(outputs).mean(0), atol=1e-3
    )


def test_alpha_scales_the_update() -> None:
    plain, doubled = adapted(), adapted(alpha=2 * RANK)
    state = random_state(plain, 3)
    load_adapter_state(plain, state)
    load_adapter_state(doubled, {k: v / 2 for k, v in state.items()})
    assert torch.allclose(run(plain), run(doubled), atol=1e-5)


def test_state_is_a_copy_that_survives_training() -> None:
    model = adapted()
    kept = adapter_state(model)
    load_adapter_state(model, random_state(model, 4))
    assert all(not v.any() and v.dtype == torch.float32 and not v.requires_grad for v in kept.values())
    again = adapted()
    load_adapter_state(again, adapter_state(model))
    assert torch.equal(run(again), run(model))


def test_a_wrong_name_or_shape_is_refused_and_nothing_is_written() -> None:
    model = adapted()
    good = random_state(model, 1)
    first, last = next(iter(good)), list(good)[-1]
    odd = [
        {k: v for k, v in good.items() if k != last},
        {**good, "transformer_blocks.9.attn1.to_q.lora_B.default.weight": good[first]},
        {**good, last: good[last][:, :1]},
        {**good, last: good[last].T},
        adapter_state(adapted(rank=RANK + 1)),
        {},
    ]
    for state in odd:
        with pytest.raises(RefusedError) as refused:
            load_adapter_state(model, state)
        assert refused.value.code == "adapter-mismatch"
        assert all(not v.any() for v in adapter_state(model).values()), "half an adapter was written"


@pytest.mark.parametrize(
    "targets",
    [("attn2.to_q",), ("attn1.to_v", "attn2.to_k"), ("to_q",), ("transformer_blocks.1.attn2.to_k",)],
)
def test_silent_targets_are_refused_however_they_are_spelled(targets: tuple[str, ...]) -> None:
    """With one condition token the softmax over it is 1: to_q and to_k of attn2 get no gradient."""
    model = transformer()
    with pytest.raises(RefusedError) as refused:
        attach_lora(model, kind="ffa-lora", rank=2, seed=0, targets=targets)
    assert refused.value.code == "silent-adapter-target"
    assert not frozen(model) and all(p.requires_grad for p in model.parameters()), "refused before a change"


def test_the_refused_targets_are_silent_indeed_and_alive_with_more_tokens() -> None:
    for tokens, silent in ((1, True), (4, False)):
        model = transformer(tokens)
        condition = torch.randn(2, tokens, 12)
        output = model(torch.randn(2, 16, 8, 8), condition, torch.tensor([5, 6]), return_dict=False)[0]
        output.pow(2).sum().backward()
        alive = model.transformer_blocks[0].attn1.to_q.weight.grad.abs().max().item()
        for name, parameter in model.named_parameters():
            if name.endswith(("attn2.to_q.weight", "attn2.to_k.weight")):
                # With one token the model need not even compute them: no gradient at all is silence too.
                found = 0.0 if parameter.grad is None else parameter.grad.abs().max().item()
                assert (found < 1e-5 * alive) == silent, (tokens, name)
    attach_lora(transformer(4), kind="ffa-lora", rank=2, seed=0, targets=("attn2.to_q",))


def test_a_target_that_names_no_layer_is_refused() -> None:
    with pytest.raises(RefusedError) as refused:
        attach_lora(transformer(), kind="ffa-lora", rank=2, seed=0, targets=("attn1.to_q", "attn7.to_q"))
    assert refused.value.code == "unknown-adapter-target" and "attn7" in refused.value.message
