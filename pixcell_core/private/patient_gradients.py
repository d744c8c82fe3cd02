"""Unit gradients of patients: one per patient, clipped and summed, and the sum released with noise.

A patient's unit gradient is that of the mean loss over its k tiles times K noise draws. The plain way is a loop, one
patient per backward pass: it needs no hooks, so that any module, gradient checkpointing and autocast keep working.
`JointGradients` gives the same gradients from shared passes where a model allows it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from pixcell_core.errors import BadInputError
from pixcell_core.private.clipping import GradientSum, UnitGradient, global_norm
from pixcell_core.private.joint_gradients import JointGradients, PerRowLoss
from pixcell_core.private.noise import NoiseSource, gaussian_like
from pixcell_core.private.parameters import PrivacyParameters
from pixcell_core.private.signal import unchanged_buffers

Precision = Literal["float32", "bfloat16"]

NUMBERS_PER_PASS = 1 << 16
"""Numbers of the rows' first tensor that share a pass unless the caller bounds the rows: 16 tiles of 16 x 16 x 16 latents.
Past this a processor gains little, and memory grows."""

ROWS_PER_PASS = (16, 64)
"""Fewest and most rows of a shared pass. A patient who fills half of one goes alone: taking gradients apart then costs
more than the fuller pass saves."""

_OPENS_A_GROUP = 16
"""Of 256 values of the first byte of the hash of a patient's name, those that open a new group."""


class PatientBatchSource(Protocol):
    """Gives the rows of one patient. They may depend on that patient alone."""

    @property
    def patients(self) -> Sequence[str]:
        """The patients of the cohort, each once."""
        ...

    def rows(self, patient: str, k: int, rng: torch.Generator) -> tuple[Tensor, ...]:
        """Return at most `k` chosen tiles, rows first, such as latents (k,C,h,w) and conditions (k,n,d)."""
        ...


class PatientGradientEngine:
    """Computes, clips, sums and noises patient gradients of a model's trainable parameters.

    Args:
        model: parameters with `requires_grad` are trained; the rest is left alone.
        per_row_loss: one loss per row. Must not mix rows of different calls.
        parameters: the public settings.
        rows_per_backward: split rows into passes of at most this many, to bound memory.
        precision: of forward and backward; unit gradients, norms, clipping and noise never have less than float32.
        joint: take several patients through the model together and their gradients apart, see `JointGradients`. The
            caller has made sure with `rows_stay_apart` that this changes nothing but the time.
    """

    def __init__(
        self,
        model: nn.Module,
        per_row_loss: PerRowLoss,
        parameters: PrivacyParameters,
        *,
        rows_per_backward: int | None = None,
        precision: Precision = "float32",
        joint: bool = False,
    ) -> None:
        self.model = model
        self.per_row_loss = per_row_loss
        self.parameters = parameters
        self.rows_per_backward = rows_per_backward
        self.precision = precision
        self.trainable: list[nn.Parameter] = [p for p in model.parameters() if p.requires_grad]
        if not self.trainable:
            raise BadInputError(
                "The model has no trainable parameter.",
                hint="Attach an adapter, or set requires_grad on the parameters to train.",
                code="nothing-to-train",
            )
        if any(p.dtype not in (torch.float32, torch.float64) for p in self.trainable):
            raise BadInputError(
                "A trainable parameter is kept in half precision; gradients would be rounded before they are clipped.",
                hint="Keep what is trained in float32; ask for precision bfloat16, which covers forward and backward.",
                code="trainable-precision",
            )
        self._joint: JointGradients | None = None
        self.share_passes(joint)

    def share_passes(self, joint: bool) -> None:
        """Let the patients of a group share passes from now on, or not; the model must have passed `rows_stay_apart`."""
        self._joint = JointGradients(self.model, self.trainable) if joint else None

    @property
    def trainable_count(self) -> int:
        """How many numbers are trained, and noised."""
        return sum(p.numel() for p in self.trainable)

    def unit_gradient(self, rows: tuple[Tensor, ...]) -> UnitGradient:
        """Return the gradient of the mean loss over a patient's rows times `noise_draws`.

        Args:
            rows: tensors with the same number of rows first; each row is repeated for every noise draw.
        """
        repeated = self._repeated(rows)
        count = repeated[0].shape[0]
        self._forget_gradients()
        loss = 0.0
        for piece in _pieces(repeated, self.rows_per_backward):
            part = self._losses(piece).sum() / count
            part.backward()  # type: ignore[no-untyped-call]
            loss += float(part.detach())
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.trainable]
        tensors = [g.detach().to(torch.float32) for g in gradients]
        self._forget_gradients()
        return UnitGradient(tensors, loss, global_norm(tensors))

    def joint_unit_gradients(self, group: Sequence[tuple[Tensor, ...]]) -> list[UnitGradient]:
        """Return what `unit_gradient` returns for each patient of a group, from passes that they share."""
        if self._joint is None or len(group) == 1:
            return [self.unit_gradient(rows) for rows in group]
        each = [self._repeated(rows) for rows in group]
        counts = torch.tensor([rows[0].shape[0] for rows in each])
        together = tuple(torch.cat(parts) for parts in zip(*each, strict=True))
        device = self.trainable[0].device
        owner = torch.arange(len(each)).repeat_interleave(counts).to(device)
        share = (1.0 / counts).repeat_interleave(counts).to(device)
        losses = torch.zeros(len(each), device=device)
        self._forget_gradients()
        with self._joint.watching(len(each), device):
            for piece in _pieces((*together, owner, share), self._rows_per_pass(together)):
                self._joint.rows_belong_to(piece[-2])
                parts = self._losses(piece[:-2]) * piece[-1]
                parts.sum().backward()  # type: ignore[no-untyped-call]
                losses.index_add_(0, piece[-2], parts.detach().float())
        self._forget_gradients()
        if not self._joint.attributed:
            raise RuntimeError("a layer answered several rows with one output; its gradient has no owner")
        return self._joint.units(losses.tolist())

    def _repeated(self, rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(tensor.repeat_interleave(self.parameters.noise_draws, dim=0) for tensor in rows)

    def _losses(self, piece: tuple[Tensor, ...]) -> Tensor:
        """One float32 loss per row; the backward pass runs outside autocast, in the precisions of the forward."""
        with _autocast(self.precision, self.trainable[0].device):
            losses = self.per_row_loss(self.model, piece)
        if losses.shape != (piece[0].shape[0],):
            raise BadInputError(
                f"The loss has shape {tuple(losses.shape)}; one value per row is needed: "
                f"({piece[0].shape[0]},).",
                hint="Return unreduced losses: mean over pixels and channels, never over rows.",
                code="loss-shape",
            )
        return losses.to(torch.promote_types(losses.dtype, torch.float32))

    def _forget_gradients(self) -> None:
        for parameter in self.trainable:
            parameter.grad = None

    def _rows_per_pass(self, rows: tuple[Tensor, ...]) -> int:
        """How many rows like these share a pass."""
        if self.rows_per_backward is not None:
            return max(1, self.rows_per_backward)
        fewest, most = ROWS_PER_PASS
        return max(fewest, min(most, NUMBERS_PER_PASS // max(1, rows[0][0].numel())))

    def empty_sum(self) -> GradientSum:
        """Return a sum with no patient in it."""
        return GradientSum([torch.zeros_like(p, dtype=torch.float64) for p in self.trainable])

    def clipped_sum(
        self, source: PatientBatchSource, patients: Sequence[str], rng: torch.Generator
    ) -> GradientSum:
        """Return the sum of the clipped unit gradients of `patients`. Private: it carries no noise yet."""
        total = self.empty_sum()
        with unchanged_buffers(self.model):
            for group in self._groups(source, patients, rng, total):
                for unit in self.joint_unit_gradients(group):
                    total.add(unit, self.parameters.max_grad_norm)
        return total

    def _groups(
        self, source: PatientBatchSource, patients: Sequence[str], rng: torch.Generator, total: GradientSum
    ) -> Iterator[list[tuple[Tensor, ...]]]:
        """Yield the rows of patients that go through the model together: one by one, or as many as fill a pass.

        Where a group begins is decided by a patient's own name and by the patients since the last such name, so
        that one patient more or less regroups its neighbours alone.
        """
        group: list[tuple[Tensor, ...]] = []
        filled = 0
        for patient in patients:
            rows = source.rows(patient, self.parameters.tiles_per_patient, rng)
            if not rows or rows[0].shape[0] == 0:
                total.discarded += 1
                continue
            if any(t.shape[0] != rows[0].shape[0] for t in rows) or (
                rows[0].shape[0] > self.parameters.tiles_per_patient
            ):
                raise BadInputError(
                    "A patient's tensors have differing or too many rows.",
                    hint="A batch source returns at most k rows, the same number in every tensor.",
                    code="row-count",
                )
            size = rows[0].shape[0] * self.parameters.noise_draws
            full = self._rows_per_pass(rows)
            if self._joint is None or 2 * size >= full:
                yield [rows]
                continue
            if group and (
                filled + size > full
                or hashlib.sha256(patient.encode()).digest()[0] < _OPENS_A_GROUP
                or [t.shape[1:] for t in rows] != [t.shape[1:] for t in group[0]]
            ):
                yield group
                group, filled = [], 0
            group.append(rows)
            filled += size
        if group:
            yield group

    def release(self, total: GradientSum, noise_source: NoiseSource) -> list[Tensor]:
        """Add the step's noise, divide by the public constant, round once. The result may be looked at."""
        deviation = self.parameters.noise_standard_deviation
        released = []
        for parameter, summed in zip(self.trainable, total.tensors, strict=True):
            noisy = summed + gaussian_like(noise_source, summed, deviation)
            released.append((noisy / self.parameters.expected_patients).to(parameter.dtype))
        return released


def _pieces(rows: tuple[Tensor, ...], size: int | None) -> Iterator[tuple[Tensor, ...]]:
    count = rows[0].shape[0]
    step = count if size is None else max(1, size)
    for start in range(0, count, step):
        yield tuple(tensor[start : start + step] for tensor in rows)


def _autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()
