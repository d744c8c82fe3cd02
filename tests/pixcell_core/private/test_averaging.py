"""Averages over steps: the closed form, the two ends of the decay, and nothing private in them."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from torch import nn

from pixcell_core.errors import BadInputError
from pixcell_core.private.averaging import AdapterAverage


def averaged(values: np.ndarray, decay: float) -> np.ndarray:
    parameter = nn.Parameter(torch.full((values.shape[1],), 77.0))
    average = AdapterAverage([parameter], decay)
    for row in values:
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(row))
        average.update()
    average.write()
    return parameter.detach().numpy()


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 0.999, 1.0])
def test_equals_the_closed_form_and_forgets_the_start(decay: float) -> None:
    values = np.random.default_rng(0).normal(size=(23, 5)).astype(np.float32)
    weights = np.array([decay ** (22 - i) for i in range(23)])
    expected = (weights[:, None] * values.astype(np.float64)).sum(0) / weights.sum()
    assert averaged(values, decay) == pytest.approx(expected, abs=1e-6)
    wrong = expected * (1.0 - decay**23) + 77.0 * decay**23
    if decay >= 0.9:
        assert not np.allclose(averaged(values, decay), wrong, atol=1e-6), "mutant: the start is averaged in"


def test_the_ends_are_the_last_step_and_the_mean() -> None:
    values = np.random.default_rng(1).normal(size=(9, 4)).astype(np.float32)
    assert np.array_equal(averaged(values, 0.0), values[-1])
    assert averaged(values, 1.0) == pytest.approx(values.mean(0), abs=1e-6)


def test_noise_of_independent_steps_averages_out() -> None:
    """Around a fixed point an average of n noises has 1/n of their variance."""
    values = np.random.default_rng(2).normal(size=(100, 2000)).astype(np.float32)
    assert averaged(values, 1.0).var() == pytest.approx(0.01, rel=0.15)
    assert averaged(values, 0.9).var() == pytest.approx((1 - 0.9) / (1 + 0.9), rel=0.15)


def test_before_the_first_step_nothing_is_written() -> None:
    parameter = nn.Parameter(torch.ones(3))
    AdapterAverage([parameter], 0.5).write()
    assert torch.equal(parameter.detach(), torch.ones(3))


def test_it_sees_parameters_and_nothing_else() -> None:
    assert set(inspect.signature(AdapterAverage.__init__).parameters) == {"self", "parameters", "decay"}
    assert set(inspect.signature(AdapterAverage.update).parameters) == {"self"}


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_a_decay_without_meaning_is_refused(decay: float) -> None:
    with pytest.raises(BadInputError, match="decay"):
        AdapterAverage([], decay)
