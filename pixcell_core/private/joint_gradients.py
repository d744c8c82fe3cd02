"""Unit gradients of several patients from one backward pass, where every trained weight is that of a linear layer.

The loop over patients is the definition. Where a patient has few rows its passes are small and waste the processor;
here the rows of several patients go through the model together, and each trained layer takes its gradient apart by row:
with a layer's input a (rows, T, in) and the gradient g (rows, T, out) of its output, row i adds g_i^T a_i to the
gradient of the patient it belongs to. Adapters are such layers, and their row gradients are small.

It is right only while the model never lets one row touch another. `rows_stay_apart` tries that on random numbers before
training; where it fails, or where other parameters are trained, the engine keeps to the loop.

Legend: T positions inside a row, such as tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pixcell_core.private.clipping import UnitGradient, global_norm

PerRowLoss = Callable[[nn.Module, tuple[Tensor, ...]], Tensor]

_SAME = 1e-4
"""Relative difference that rounding may make between two ways to compute one gradient."""


class JointGradients:
    """Takes gradients apart by patient while it is `watching` a model.

    Args:
        model: its forward passes are watched through hooks that are taken off again.
        trainable: weights of linear layers of the model, in the order wanted.
    """

    def __init__(self, model: nn.Module, trainable: Sequence[nn.Parameter]) -> None:
        self._layers = _layers_of(model, trainable)
        self._owner = torch.zeros(0, dtype=torch.long)
        self._sums: list[Tensor] = []
        self.attributed = True

    @staticmethod
    def fits(model: nn.Module, trainable: Sequence[nn.Parameter]) -> bool:
        """Whether every trained parameter is the weight of one linear layer."""
        held = {id(p) for p in trainable}
        linear = [m for m in model.modules() if isinstance(m, nn.Linear) and id(m.weight) in held]
        return len(linear) == len(held) and {id(m.weight) for m in linear} == held

    @contextmanager
    def watching(self, patients: int, device: torch.device) -> Iterator[None]:
        """Within the block, backward passes add to the gradients of `patients` patients, at zero when it begins."""
        self._sums = [
            torch.zeros((patients, *layer.weight.shape), dtype=torch.float32, device=device)
            for layer in self._layers
        ]
        self.attributed = True
        hooks = [
            layer.register_forward_hook(self._tap(total))
            for layer, total in zip(self._layers, self._sums, strict=True)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def rows_belong_to(self, owner: Tensor) -> None:
        """Say whose the rows of the next pass are: integers (rows,)."""
        self._owner = owner

    def units(self, losses: Sequence[float]) -> list[UnitGradient]:
        """The patients' gradients since `watching` began; their tensors are views, good until it begins again."""
        parts = [torch.linalg.vector_norm(t.flatten(1), dim=1, dtype=torch.float64) for t in self._sums]
        norms = torch.linalg.vector_norm(torch.stack(parts), dim=0).tolist()
        found = [
            UnitGradient([total[patient] for total in self._sums], loss, norms[patient])
            for patient, loss in enumerate(losses)
        ]
        self._sums = []
        return found

    def _tap(self, total: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not output.requires_grad:
                return None
            if len(output) != len(self._owner) or output.ndim < 2:
                self.attributed = False  # One output for several rows cannot be taken apart.
                return None
            return _Tap.apply(output, given[0].detach(), self._owner, total)

        return hook


class _Tap(torch.autograd.Function):
    """Passes a layer's output on; on the way back adds each row's weight gradient to its patient's.

    The input is a saved tensor like any other, so that gradient checkpointing frees and recomputes it.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, given: Tensor, owner: Tensor, total: Tensor) -> Tensor:
        ctx.save_for_backward(given, owner)
        ctx.total = total
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        given, owner = ctx.saved_tensors
        rows = len(owner)
        # float32 before the product: what is clipped and summed must not be rounded to bfloat16.
        left = gradient.reshape(rows, -1, gradient.shape[-1]).float().transpose(1, 2)
        right = given.reshape(rows, -1, given.shape[-1]).float()
        with torch.autocast(gradient.device.type, enabled=False):
            ctx.total.index_add_(0, owner, torch.bmm(left, right))
        return gradient, None, None, None


def rows_stay_apart(
    model: nn.Module, per_row_loss: PerRowLoss, trainable: Sequence[nn.Parameter], rows: tuple[Tensor, ...]
) -> bool:
    """Try on random rows whether gradients can be taken apart by patient.

    Two claims are tried: the patients' gradients add up to the one that automatic differentiation finds, and a
    patient's gradient stays what it is when all other rows are replaced.

    Args:
        model: with parameters away from zero, or a factor of an adapter hides the other.
        per_row_loss: draws from torch's own generator; the caller has forked it, and gets it back seeded.
        trainable: the trained parameters.
        rows: at least three random rows; never a patient's.
    """
    if not JointGradients.fits(model, trainable):
        return False
    joint = JointGradients(model, trainable)
    count, device = len(rows[0]), trainable[0].device
    owner = torch.ones(count, dtype=torch.long, device=device)
    owner[0] = owner[-1] = 0
    mine = owner.cpu().bool().logical_not()
    others = tuple(_replaced(tensor, mine) for tensor in rows)
    found = []
    for given in (rows, others):
        torch.manual_seed(0)
        for parameter in trainable:
            parameter.grad = None
        with joint.watching(2, device):
            joint.rows_belong_to(owner)
            losses = per_row_loss(model, given)
            if losses.shape != (count,) or not joint.attributed:
                return False
            losses.float().sum().backward()  # type: ignore[no-untyped-call]
        first, second = joint.units([0.0, 0.0])
        whole = [torch.zeros_like(p) if p.grad is None else p.grad.float() for p in trainable]
        halves = [a + b for a, b in zip(first.tensors, second.tensors, strict=True)]
        for parameter in trainable:
            parameter.grad = None
        if not _close(halves, whole):
            return False
        found.append([t.clone() for t in first.tensors])
    return global_norm(found[0]) > 0.0 and _close(found[0], found[1])


def _layers_of(model: nn.Module, trainable: Sequence[nn.Parameter]) -> list[nn.Linear]:
    by_weight = {id(m.weight): m for m in model.modules() if isinstance(m, nn.Linear)}
    return [by_weight[id(parameter)] for parameter in trainable]


def _replaced(tensor: Tensor, kept: Tensor) -> Tensor:
    """The tensor with other numbers in the rows that are not kept; integers may be indices and stay."""
    if not tensor.is_floating_point():
        return tensor
    shape = (-1,) + (1,) * (tensor.ndim - 1)
    return torch.where(kept.to(tensor.device).view(shape), tensor, tensor.flip(0) * 3.0 + 1.0)


def _close(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    differ = global_norm([a - b for a, b in zip(left, right, strict=True)])
    return differ <= _SAME * max(global_norm(left), global_norm(right))
