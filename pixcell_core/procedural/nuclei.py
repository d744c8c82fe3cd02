"""Nuclei: a bank of textured shapes drawn once per patient, and stamping them into a field."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from pixcell_core.procedural.patient import PatientLook
from pixcell_core.procedural.texture import FloatPlane, generator

#: Orientations the bank holds, evenly over half a turn.
ANGLES = 16


class NucleusKind(IntEnum):
    """What sort of nucleus a stamp shows."""

    TUMOR = 0
    SPINDLE = 1
    COLUMNAR = 2
    LYMPHOCYTE = 3
    MITOSIS = 4


@dataclass(frozen=True)
class Stamp:
    """One nucleus: haematoxylin `density` (h, w) and `mask`, both cut to the shape's bounding box."""

    density: FloatPlane
    mask: npt.NDArray[np.bool_]
    area: int


@dataclass(frozen=True)
class Shape:
    """Distribution of one kind: semi-axes in um, wobble of the outline, and how chromatin is laid out.

    `density` is the mean haematoxylin optical density, `rough` the amplitude of clumps, `rim` the extra
    density of the membrane, `pale` how much clearer the middle is, `nucleoli` the chance of a nucleolus,
    `variants` the number of shapes per orientation.
    """

    major: float
    minor: float
    spread: float
    wobble: float
    density: float
    density_spread: float
    rough: float
    rim: float
    pale: float
    nucleoli: float
    variants: int


def _shapes(patient: PatientLook) -> dict[NucleusKind, Shape]:
    tumor = patient.tumor_nucleus_um / 2
    normal = patient.normal_nucleus_um / 2
    stretch = patient.eccentricity**0.5
    rough = patient.chromatin
    return {
        NucleusKind.TUMOR: Shape(
            tumor * stretch,
            tumor / stretch,
            patient.pleomorphism,
            0.09,
            1.15,
            0.2,
            0.30 * rough,
            0.42,
            0.35,
            patient.nucleoli,
            9,
        ),
        NucleusKind.SPINDLE: Shape(
            normal * 2.1, normal * 0.5, 0.22, 0.08, 1.35, 0.2, 0.22 * rough, 0.2, 0.1, 0.0, 5
        ),
        NucleusKind.COLUMNAR: Shape(
            normal * 1.35, normal * 0.85, 0.1, 0.04, 1.3, 0.13, 0.22 * rough, 0.3, 0.2, 0.12, 5
        ),
        NucleusKind.LYMPHOCYTE: Shape(
            normal * 0.9, normal * 0.84, 0.08, 0.03, 1.9, 0.13, 0.3, 0.15, 0.0, 0.0, 5
        ),
        NucleusKind.MITOSIS: Shape(tumor * 1.1, tumor * 0.5, 0.15, 0.28, 2.3, 0.1, 0.35, 0.0, 0.0, 0.0, 2),
    }


@dataclass(frozen=True)
class NucleusBank:
    """All stamps of a patient at one scale: `stamps[kind][orientation * variants + variant]`."""

    stamps: tuple[tuple[Stamp, ...], ...]
    reach: int

    def choose(
        self, rng: np.random.Generator, kind: NucleusKind, angle: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.int64]:
        """Pick a stamp of `kind` for each angle (radians): the nearest orientation, any variant."""
        variants = len(self.stamps[kind]) // ANGLES
        turn = np.round(angle / np.pi * ANGLES).astype(np.int64) % ANGLES
        return np.asarray(turn * variants + rng.integers(0, variants, len(angle)), np.int64)


@lru_cache(maxsize=8)
def nucleus_bank(patient: PatientLook, mpp: float) -> NucleusBank:
    """Draw (or recall) the bank of a patient at `mpp` micrometres per pixel."""
    rng = generator(0xBA4C, patient.seed)
    kinds = tuple(_draw(rng, shape, mpp) for _, shape in sorted(_shapes(patient).items()))
    reach = max(max(stamp.density.shape) for stamps in kinds for stamp in stamps) // 2 + 2
    return NucleusBank(kinds, reach)


def _draw(rng: np.random.Generator, shape: Shape, mpp: float) -> tuple[Stamp, ...]:
    """Draw every orientation and variant of one kind at once."""
    count = ANGLES * shape.variants

    def column(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        return values.astype(np.float32).reshape(count, 1, 1)

    scale = np.exp(np.clip(rng.normal(0, shape.spread, count), -2.2 * shape.spread, 1.8 * shape.spread))
    long, short = shape.major / mpp * scale, shape.minor / mpp * scale * np.exp(rng.normal(0, 0.09, count))
    half = int(np.ceil(float(np.max(np.maximum(long, short))) * 1.2)) + 2
    axis = np.arange(-half, half + 1, dtype=np.float32)
    turn = np.repeat(np.arange(ANGLES), shape.variants) * np.pi / ANGLES + rng.normal(
        0, np.pi / ANGLES / 3, count
    )
    major, minor, cosine, sine = column(long), column(short), column(np.cos(turn)), column(np.sin(turn))
    y = axis[None, :, None] - column(rng.uniform(-0.5, 0.5, count))
    x = axis[None, None, :] - column(rng.uniform(-0.5, 0.5, count))
    u, v = (cosine * x + sine * y) / major, (cosine * y - sine * x) / minor
    radius = np.maximum(np.sqrt(u * u + v * v), np.float32(1e-3))
    # cos(k theta + phase) for k = 2..5 by powers of a unit complex number: no trigonometry per pixel.
    unit = np.empty(u.shape, np.complex64)
    unit.real, unit.imag = u / radius, v / radius
    outline, power = np.ones_like(radius), unit
    for order in (2, 3, 4, 5):
        power = power * unit
        size, phase = rng.normal(0, shape.wobble / order**0.5, count), rng.uniform(0, 2 * np.pi, count)
        outline += column(size * np.cos(phase)) * power.real - column(size * np.sin(phase)) * power.imag
    distance = radius / np.clip(outline, 0.5, 1.4)
    edge = np.clip((1 - distance) * minor / np.float32(1.2) + np.float32(0.5), 0, 1)

    chromatin = _clumps(rng, count, 2 * half + 1, 0.9 / mpp)
    level = column(shape.density * np.exp(rng.normal(0, shape.density_spread, count)))
    body = 1 + np.float32(shape.rough) * chromatin
    body += np.float32(shape.rim) * np.clip(1 - np.abs(distance - np.float32(0.92)) * np.float32(5), 0, 1)
    body -= np.float32(shape.pale) * np.clip(1 - distance, 0, 1)
    if shape.nucleoli > 0:
        for share in (shape.nucleoli, shape.nucleoli / 3):
            shown = column(np.where(rng.random(count) < share, 0.8, 0.0))
            across, down = column(rng.uniform(-0.45, 0.45, count)), column(rng.uniform(-0.45, 0.45, count))
            gap = np.hypot((u - across) * major, (v - down) * minor)
            body += shown * np.clip(column(rng.uniform(0.7, 1.15, count) / mpp) - gap + np.float32(0.5), 0, 1)
    density = level * edge * np.clip(body, 0.25, 1.9)
    return tuple(_cut(density[i], edge[i] > 0.5) for i in range(count))


def _clumps(rng: np.random.Generator, count: int, side: int, length: float) -> npt.NDArray[np.float32]:
    """Chromatin clumps about `length` pixels across, (count, side, side), unit variance."""
    white = rng.standard_normal((count * side, side), dtype=np.float32)
    soft = cv2.GaussianBlur(white, (0, 0), max(length * 0.55, 0.5))
    fine = cv2.GaussianBlur(white, (0, 0), 0.5)
    mixed = soft / soft.std() + 0.5 * fine / fine.std()
    return np.asarray(mixed.reshape(count, side, side) / 1.25, np.float32)


def _cut(density: FloatPlane, mask: npt.NDArray[np.bool_]) -> Stamp:
    """Cut a stamp to the box around its mask plus one pixel, keeping the centre in the middle."""
    half = density.shape[0] // 2
    rows, columns = np.nonzero(density > 0.02)
    tall = int(max(abs(rows - half).max(initial=1), 1)) + 1
    wide = int(max(abs(columns - half).max(initial=1), 1)) + 1
    box = (slice(half - tall, half + tall + 1), slice(half - wide, half + wide + 1))
    inside = np.ascontiguousarray(mask[box])
    return Stamp(np.ascontiguousarray(density[box]), inside, int(inside.sum()))


@dataclass
class NucleusCanvas:
    """Where nuclei are stamped: `density` float32, `instances` int32, both padded by `pad` pixels."""

    density: FloatPlane
    instances: npt.NDArray[np.int32]
    pad: int
    count: int = 0

    @classmethod
    def blank(cls, height: int, width: int, pad: int) -> NucleusCanvas:
        """An empty canvas for a field of (height, width)."""
        shape = (height + 2 * pad, width + 2 * pad)
        return cls(np.zeros(shape, np.float32), np.zeros(shape, np.int32), pad)

    def stamp(
        self,
        stamps: tuple[Stamp, ...],
        which: npt.NDArray[np.int64],
        rows: npt.NDArray[np.int64],
        columns: npt.NDArray[np.int64],
        gains: npt.NDArray[np.float32],
        *,
        overlap: float,
    ) -> list[int]:
        """Stamp nuclei one by one; skip one when more than `overlap` of it would cover earlier ones.

        Returns the index of each nucleus that was kept; the k-th kept one gets the next instance number.
        """
        kept: list[int] = []
        density, instances, pad = self.density, self.instances, self.pad
        for i, (choice, row, column, gain) in enumerate(
            zip(which.tolist(), rows.tolist(), columns.tolist(), gains.tolist(), strict=True)
        ):
            one = stamps[choice]
            tall, wide = one.mask.shape
            top, left = row + pad - tall // 2, column + pad - wide // 2
            taken = instances[top : top + tall, left : left + wide]
            if np.count_nonzero(taken[one.mask]) > overlap * one.area:
                continue
            self.count += 1
            kept.append(i)
            view = density[top : top + tall, left : left + wide]
            np.maximum(view, one.density * np.float32(gain), out=view)
            taken[one.mask] = self.count
        return kept

    def field(self, plane: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The part of a padded plane that belongs to the field, contiguous."""
        return np.ascontiguousarray(
            plane[self.pad : plane.shape[0] - self.pad, self.pad : plane.shape[1] - self.pad]
        )
