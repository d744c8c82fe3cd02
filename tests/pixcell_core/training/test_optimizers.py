"""CAME against its paper's formula in float64, the published settings, and the learning rate of every step."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from pixcell_core.errors import BadInputError
from pixcell_core.training.optimizers import CAME_BETAS, CAME_EPS, learning_rate_at, make_optimizer
from pixcell_core.training.settings import TrainingSettings

SETTINGS = TrainingSettings(steps=100, optimizer="came", learning_rate=2e-5, weight_decay=0.0)


class PlainCame:
    """Luo et al. 2023, algorithm 2, written out: sums and outer products, matrices of rank one formed in full.

    Vectors keep the whole second moment; a convolution is a stack of matrices.
    """

    def __init__(
        self, betas: tuple[float, float, float], eps: tuple[float, float], confidence: bool = True
    ) -> None:
        self.betas, self.eps, self.confidence = betas, eps, confidence
        self.m: torch.Tensor | None = None

    @staticmethod
    def _outer(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        return row[..., :, None] * column[..., None, :] / row.sum(-1)[..., None, None]

    def update(self, gradient: torch.Tensor) -> torch.Tensor:
        (b1, b2, b3), (e1, e2) = self.betas, self.eps
        square = gradient**2 + e1
        matrix = gradient.ndim >= 2
        if self.m is None:
            self.m = torch.zeros_like(gradient)
            self.r, self.c = (
                torch.zeros_like(square.sum(-1)),
                torch.zeros_like(square.sum(-2 if matrix else -1)),
            )
            self.R, self.C, self.v = self.r.clone(), self.c.clone(), torch.zeros_like(gradient)
        if matrix:
            self.r = b2 * self.r + (1 - b2) * square.sum(-1)
            self.c = b2 * self.c + (1 - b2) * square.sum(-2)
            u = gradient / self._outer(self.r, self.c).sqrt()
        else:
            self.v = b2 * self.v + (1 - b2) * square
            u = gradient / self.v.sqrt()
        u = u / max(1.0, u.pow(2).mean().sqrt().item())
        self.m = b1 * self.m + (1 - b1) * u
        if not matrix or not self.confidence:
            return self.m
        instability = (u - self.m) ** 2 + e2
        self.R = b3 * self.R + (1 - b3) * instability.sum(-1)
        self.C = b3 * self.C + (1 - b3) * instability.sum(-2)
        return self.m / self._outer(self.R, self.C).sqrt()


def gap(
    plain_options: dict[str, object], shape: tuple[int, ...], decay: float = 0.0, steps: int = 12
) -> float:
    """Largest relative difference of the way travelled, ours in float64 too."""
    generator = torch.Generator().manual_seed(len(shape))
    start = torch.randn(shape, generator=generator, dtype=torch.float64)
    ours, theirs = nn.Parameter(start.clone()), start.clone()
    settings = replace(SETTINGS, weight_decay=decay)
    optimizer = make_optimizer([ours], settings)
    options: dict[str, object] = {"betas": (0.9, 0.999, 0.9999), "eps": (1e-30, 1e-16), **plain_options}
    plain = PlainCame(**options)  # type: ignore[arg-type]
    for _ in range(steps):
        gradient = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.1
        ours.grad = gradient.clone()
        optimizer.step()
        theirs = theirs - settings.learning_rate * decay * theirs
        theirs = theirs - settings.learning_rate * plain.update(gradient)
    return ((ours.detach() - theirs).norm() / (theirs - start).norm()).item()


@pytest.mark.parametrize("shape", [(7,), (5, 8), (1, 6), (6, 3, 2, 2)])
@pytest.mark.parametrize("decay", [0.0, 0.03])
def test_came_is_the_papers(shape: tuple[int, ...], decay: float) -> None:
    # The package forms the decay from the shrunken weights' own value, as AdamW does.
    assert gap({}, shape, decay) < 1e-9


@pytest.mark.parametrize(
    "wrong",
    [
        {"betas": (0.9, 0.999, 0.999)},
        {"betas": (0.9, 0.99, 0.9999)},
        {"betas": (0.95, 0.999, 0.9999)},
        {"confidence": False},
        {"eps": (1e-2, 1e-16)},
        {"eps": (1e-30, 1e-1)},
    ],
)
def test_mutants_of_came_fail(wrong: dict[str, object]) -> None:
    assert gap(wrong, (5, 8)) > 1e-6


def test_came_gets_the_published_numbers_and_keeps_less_state_than_adamw() -> None:
    weight = nn.Parameter(torch.randn(64, 64))
    sizes = {}
    for name in ("came", "adamw"):
        optimizer = make_optimizer([weight], replace(SETTINGS, optimizer=name))
        weight.grad = torch.randn(64, 64)
        optimizer.step()
        state = optimizer.state[weight]
        sizes[name] = sum(v.numel() for v in state.values() if isinstance(v, torch.Tensor))
        group = optimizer.param_groups[0]
        if name == "came":
            assert (group["betas"], group["eps"], group["lr"]) == (CAME_BETAS, CAME_EPS, 2e-5)
            assert (CAME_BETAS, CAME_EPS) == ((0.9, 0.999, 0.9999), (1e-30, 1e-16))
    assert sizes["came"] < 0.55 * sizes["adamw"]


def test_the_learning_rate_warms_up_linearly_and_stays() -> None:
    settings = replace(SETTINGS, warmup_steps=10, learning_rate=1.0)
    assert [learning_rate_at(s, settings) for s in range(10)] == [
        pytest.approx((s + 1) / 10) for s in range(10)
    ]
    assert {learning_rate_at(s, settings) for s in range(10, 200)} == {1.0}
    assert learning_rate_at(0, replace(settings, warmup_steps=0)) == 1.0


def test_the_cosine_falls_from_the_warm_up_to_zero() -> None:
    settings = replace(SETTINGS, warmup_steps=10, learning_rate=1.0, schedule="cosine")
    assert learning_rate_at(9, settings) == learning_rate_at(10, settings) == 1.0
    for step in (30, 55, 99):
        assert learning_rate_at(step, settings) == pytest.approx(
            0.5 * (1 + math.cos(math.pi * (step - 10) / 90))
        )
    assert learning_rate_at(100, settings) == pytest.approx(0.0) == learning_rate_at(500, settings)


def test_the_published_settings() -> None:
    for resolution, steps, batch in ((256, 120_000, 128), (512, 60_000, 64), (1024, 80_000, 12)):
        found = TrainingSettings.published(resolution)
        assert (found.steps, found.batch_size, found.optimizer, found.weight_decay) == (
            steps,
            batch,
            "came",
            0.0,
        )
        assert (found.learning_rate, found.warmup_steps, found.max_grad_norm) == (2e-5, 1000, 0.01)
        assert (found.ema_decay, found.condition_drop, found.schedule) == (0.9999, 0.1, "constant")
        assert (found.shift_factor, found.scaling_factor, found.gradient_checkpointing) == (
            0.0609,
            1.5305,
            True,
        )
    assert TrainingSettings.published(256, "adamw", batch_size=2).weight_decay == 0.03
    assert TrainingSettings.published(256, "adamw", batch_size=2).batch_size == 2
    with pytest.raises(BadInputError) as refused:
        TrainingSettings.published(384)
    assert "384" in refused.value.message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("accumulate", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("condition_drop", 1.5),
        ("ema_decay", -0.1),
        ("max_grad_norm", 0.0),
        ("optimizer", "sgd"),
        ("schedule", "linear"),
        ("precision", "fp8"),
        ("warmup_steps", -1),
    ],
)
def test_a_setting_outside_its_range_is_named_with_its_value(name: str, value: object) -> None:
    with pytest.raises(BadInputError) as refused:
        replace(SETTINGS, **{name: value})  # type: ignore[arg-type]
    assert refused.value.code == "bad-training-setting"
    assert name in refused.value.message and repr(value) in refused.value.message
