"""The moving average against its closed form; what it must leave alone."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pixcell_core.training.ema import Ema


class Scalar(nn.Module):
    """One parameter, one frozen parameter, one buffer."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value]))
        self.frozen = nn.Parameter(torch.tensor([7.0]), requires_grad=False)
        self.register_buffer("seen", torch.tensor([1.0]))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-10, 10), min_size=2, max_size=30),
    st.floats(0.0, 0.9999),
)
def test_closed_form(values: list[float], decay: float) -> None:
    """shadow_n = sum_i (1 - d_i) prod_{j>i} d_j x_i + prod_j d_j x_0, with d_n = min(d, (1 + n) / (10 + n))."""
    model = Scalar(values[0])
    ema = Ema(model, decay)
    for value in values[1:]:
        with torch.no_grad():
            model.weight.fill_(value)
        ema.update(model)
    decays = [min(decay, (1 + n) / (10 + n)) for n in range(1, len(values))]
    weights = [1.0]
    for d in decays:
        weights = [w * d for w in weights] + [1 - d]
    assert sum(weights) == pytest.approx(1.0)
    expected = sum(w * v for w, v in zip(weights, values, strict=True))
    assert ema.shadow["weight"].item() == pytest.approx(expected, abs=1e-4)


def test_only_trained_parameters_are_averaged_buffers_and_frozen_ones_never() -> None:
    model = Scalar(0.0)
    ema = Ema(model, 0.5)
    assert set(ema.shadow) == {"weight"}
    with torch.no_grad():
        model.weight.fill_(4.0)
        model.frozen.fill_(8.0)
        model.seen.fill_(9.0)
    ema.update(model)
    ema.copy_to(model)
    assert model.weight.item() == pytest.approx(4 * (1 - 2 / 11))
    assert (model.frozen.item(), model.seen.item()) == (8.0, 9.0)


def test_swapped_into_restores_also_after_an_error() -> None:
    model = Scalar(1.0)
    ema = Ema(model, 0.5)
    with torch.no_grad():
        model.weight.fill_(3.0)
    with ema.swapped_into(model):
        assert model.weight.item() == 1.0
        assert model.weight.requires_grad
    assert model.weight.item() == 3.0
    with pytest.raises(RuntimeError, match="boom"), ema.swapped_into(model):
        raise RuntimeError("boom")
    assert model.weight.item() == 3.0
    assert ema.shadow["weight"].item() == 1.0


def test_a_swap_that_fails_half_way_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    ema = Ema(model, 0.5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ema.shadow["0.weight"] += 1
    ema.shadow["1.weight"] = torch.zeros(3, 5)
    with pytest.raises(RuntimeError), ema.swapped_into(model):
        pass
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_state_survives_a_file_and_goes_on_alike() -> None:
    one, other = Scalar(1.0), Scalar(1.0)
    first, second = Ema(one, 0.9), Ema(other, 0.9)
    with torch.no_grad():
        one.weight.fill_(2.0)
    first.update(one)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    first.update(one)
    second.update(one)
    assert second.updates == first.updates == 2
    assert torch.equal(first.shadow["weight"], second.shadow["weight"])


def test_half_precision_parameters_are_averaged_in_single_precision() -> None:
    model = Scalar(1.0).half()
    ema = Ema(model, 0.999)
    assert ema.shadow["weight"].dtype == torch.float32
    ema.update(model)
    ema.copy_to(model)
    assert model.weight.dtype == torch.float16
