"""What is refused before anything is charged: weights that cannot learn, and layers that keep patient statistics.

A parameter without signal takes its full share of the noise and gives nothing back, and it lengthens the
vector that all others are clipped with. The known case: with a single condition token (PixCell-256 has one)
the cross-attention softmax runs over one key and is constant, so the query and key projections of `attn2`
have exactly zero gradient.

The probe never looks at a patient's values: it keeps the shapes of a batch and fills them with random
numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pixcell_core.errors import RefusedError

NO_SIGNAL = 1e-7
"""A gradient (root mean square) this much smaller than the largest is rounding, not signal."""

_PROBE_SCALE = 0.02
_PROBE_SEED = 20240611
_MAX_NAMED = 6


def parameters_without_signal(
    model: nn.Module,
    per_row_loss: Callable[[nn.Module, tuple[Tensor, ...]], Tensor],
    rows_like: tuple[Tensor, ...],
) -> list[str]:
    """Return the names of trainable parameters whose gradient is zero on random rows.

    Args:
        model: left as it was found. During the probe its trainable parameters are shifted by small random
            numbers, since an adapter begins at zero and would hide the factors behind it.
        per_row_loss: `(model, rows) -> (rows,)` losses.
        rows_like: gives shapes and kinds; floating-point tensors become random normal, others zero.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    with probing(model, rows_like) as rows, sdpa_kernel(SDPBackend.MATH):
        per_row_loss(model, rows).float().sum().backward()  # type: ignore[no-untyped-call]
        sizes = {
            name: 0.0 if p.grad is None else float(p.grad.double().pow(2).mean().sqrt()) for name, p in named
        }
    largest = max(sizes.values(), default=0.0)
    return [name for name, size in sizes.items() if size <= NO_SIGNAL * largest]


def require_signal(
    model: nn.Module,
    per_row_loss: Callable[[nn.Module, tuple[Tensor, ...]], Tensor],
    rows_like: tuple[Tensor, ...],
) -> None:
    """Raise `RefusedError` when a trainable parameter has no gradient; see `parameters_without_signal`."""
    silent = parameters_without_signal(model, per_row_loss, rows_like)
    if not silent:
        return
    named = ", ".join(silent[:_MAX_NAMED]) + (
        f" and {len(silent) - _MAX_NAMED} more" if len(silent) > _MAX_NAMED else ""
    )
    reason = ""
    if any(".attn2.to_q." in name or ".attn2.to_k." in name for name in silent):
        reason = (
            " With one condition token the softmax of attn2 runs over a single key, "
            "so attn2.to_q and attn2.to_k do nothing."
        )
    raise RefusedError(
        f"{len(silent)} trainable parameters have zero gradient on any data and would carry noise alone: "
        f"{named}.{reason}",
        hint="Leave them out of the adapter's targets; nothing was drawn and nothing was charged.",
        code="no-signal",
    )


@contextmanager
def probing(model: nn.Module, rows_like: tuple[Tensor, ...], count: int = 1) -> Iterator[tuple[Tensor, ...]]:
    """Within the block the trainable parameters are away from zero and torch's generators seeded; all is put back.

    Yields random rows of the shapes and kinds of `rows_like`, at least `count` of them; no value of a patient.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    devices = sorted({p.device.index or 0 for p in trainable if p.device.type == "cuda"})
    with unchanged_buffers(model), torch.random.fork_rng(devices=devices), _shifted(trainable):
        torch.manual_seed(_PROBE_SEED)
        yield _random_rows(rows_like, count)
    for parameter in trainable:
        parameter.grad = None


@contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Raise `RefusedError` when a buffer was written to, and put it back.

    Running statistics of patients would leave the site with the model and without noise.
    """
    kept = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    yield
    changed = []
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            before = kept.get(name)
            if before is None or not _same(before, buffer):
                changed.append(name)
                if before is not None:
                    buffer.copy_(before)
    if changed:
        raise RefusedError(
            f"The model writes to {changed[0]} while it looks at patients; such statistics carry no noise.",
            hint="Put normalisation layers in evaluation mode, or use layers without running statistics.",
            code="running-statistics",
        )


def _same(before: Tensor, after: Tensor) -> bool:
    if before.shape != after.shape:
        return False
    differs = before != after
    if before.is_floating_point():
        differs &= ~(before.isnan() & after.isnan())
    return not bool(differs.any())


def _random_rows(rows_like: tuple[Tensor, ...], count: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(_PROBE_SEED)
    rows = []
    for tensor in rows_like:
        shape = (max(count, tensor.shape[0]), *tensor.shape[1:])
        if tensor.is_floating_point():
            filled = torch.randn(shape, generator=generator).to(tensor.dtype)
        else:
            filled = torch.zeros(shape, dtype=tensor.dtype)
        rows.append(filled.to(tensor.device))
    return tuple(rows)


@contextmanager
def _shifted(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Shift parameters by small random numbers, and put them back bit for bit."""
    generator = torch.Generator().manual_seed(_PROBE_SEED)
    kept = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            for p in parameters:
                p.add_((torch.randn(p.shape, generator=generator) * _PROBE_SCALE).to(p))
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, kept, strict=True):
                p.copy_(value)
