"""Large images from overlapping windows: every step averages the windows' predictions, so no seam can form.

The average of the windows' clean-image predictions (MultiDiffusion, Bar-Tal et al. 2023) equals the average of their
noise predictions, because both are tied by x = alpha x0 + sigma eps with one x; so only the noise is averaged and
any sampler can take the step.
Legend: B images, C latent channels, H W latent pixels of the whole image, R S rows and columns of condition tokens,
n tokens of one window, d their width. A cell is the square of latent pixels that one token describes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pixcell_core.diffusion.guidance import GuidedNoise
from pixcell_core.diffusion.inputs import check_grid
from pixcell_core.errors import BadInputError


@dataclass(frozen=True)
class Windowing:
    """How a large image is cut.

    Args:
        stride: latent pixels between windows; half a window when absent. A multiple of the patch, at most a window.
        batch_size: windows per call of the transformer (twice as many rows with guidance).
        on_windows: told after every call how many windows it evaluated.
    """

    stride: int | None = None
    batch_size: int = 8
    on_windows: Callable[[int], None] = lambda count: None


@dataclass(frozen=True)
class WindowAxis:
    """Windows along one axis of the latents.

    Args:
        length: latent pixels of the image.
        window: latent pixels of a window, at most `length`.
        stride: latent pixels between windows.
        tokens: condition tokens of one window along this axis.
    """

    length: int
    window: int
    stride: int
    tokens: int

    @property
    def starts(self) -> list[int]:
        """First latent pixel of each window; the last window ends with the image."""
        last = self.length - self.window
        return [*range(0, last, self.stride), last]

    @property
    def cell(self) -> float:
        """Latent pixels one token describes."""
        return self.window / self.tokens

    @property
    def cells(self) -> int:
        """Tokens the whole axis needs; the last may describe less than a cell."""
        return math.ceil(self.length / self.cell - 1e-9)

    def weights(self) -> torch.Tensor:
        """Weight of each window at each of its pixels, float64 (windows, window).

        A squared sine over the window, divided by the sum over all windows that cover a pixel: smooth, and the
        weights of every pixel add up to one.
        """
        ramp = torch.sin(math.pi * (torch.arange(self.window, dtype=torch.float64) + 0.5) / self.window) ** 2
        total = torch.zeros(self.length, dtype=torch.float64)
        for start in self.starts:
            total[start : start + self.window] += ramp
        return torch.stack([ramp / total[s : s + self.window] for s in self.starts])

    def mixture(self, start: int) -> torch.Tensor:
        """How the tokens of the window at `start` mix the axis' tokens, float64 (tokens, cells).

        A window that lies on the cells takes them as they are; between cells a token is the mean of the two it
        covers, by the share it covers of each.
        """
        mixed = torch.zeros(self.tokens, self.cells, dtype=torch.float64)
        for token in range(self.tokens):
            position = start / self.cell + token
            low = math.floor(position + 1e-9)
            share = max(position - low, 0.0)
            mixed[token, min(low, self.cells - 1)] += 1.0 - share
            mixed[token, min(low + 1, self.cells - 1)] += share
        return mixed


@dataclass(frozen=True)
class WindowPlan:
    """The windows of an image: every pair of a row window and a column window."""

    rows: WindowAxis
    columns: WindowAxis

    @classmethod
    def of(
        cls, size: tuple[int, int], *, sample_size: int, tokens: int, patch: int, stride: int | None = None
    ) -> WindowPlan:
        """Plan windows of the transformer's own size (or of the image's, where that is smaller).

        Args:
            size: (H, W) latent pixels.
            sample_size: side of the latents the transformer was trained on.
            tokens: condition tokens of one window, a square number.
            patch: the transformer's patch size.
            stride: latent pixels between windows; half a window when absent.

        Raises:
            BadInputError: a stride that is no multiple of the patch or leaves gaps.
        """
        step = stride if stride is not None else max(sample_size // 2 // patch, 1) * patch
        if step < patch or step % patch or step > sample_size:
            raise BadInputError(
                f"The window stride is {step} latent pixels, it must be a multiple of {patch} "
                f"from {patch} to {sample_size}.",
                hint="Half a window is the default; a whole window leaves no overlap.",
                code="window-stride",
            )
        side = math.isqrt(tokens)
        rows, columns = (WindowAxis(length, min(length, sample_size), step, side) for length in size)
        return cls(rows, columns)

    @property
    def places(self) -> list[tuple[int, int]]:
        """Index of the row window and of the column window, row by row."""
        return [(i, j) for i in range(len(self.rows.starts)) for j in range(len(self.columns.starts))]

    @property
    def grid_shape(self) -> tuple[int, int]:
        """(R, S): rows and columns of condition tokens the whole image needs."""
        return self.rows.cells, self.columns.cells

    @property
    def borders(self) -> tuple[list[int], list[int]]:
        """Latent rows and columns at which a window begins or ends inside the image."""
        found = []
        for axis in (self.rows, self.columns):
            ends = {s for s in axis.starts} | {s + axis.window for s in axis.starts}
            found.append(sorted(e for e in ends if 0 < e < axis.length))
        return found[0], found[1]

    def condition(self, grid: torch.Tensor, place: tuple[int, int]) -> torch.Tensor:
        """Tokens (B, n, d), row by row, that the window at `place` sees of the grid (B, R, S, d)."""
        down = self.rows.mixture(self.rows.starts[place[0]]).to(grid)
        across = self.columns.mixture(self.columns.starts[place[1]]).to(grid)
        return torch.einsum("ir,js,brsd->bijd", down, across, grid).flatten(1, 2)


class WindowedNoise:
    """Predicts the noise of a whole image as the weighted mean of its windows' predictions.

    Args:
        model: the transformer.
        condition: a grid (B, R, S, d), or tokens (B, n, d) that every window sees.
        null: (B, n, d).
        guidance_scale: w.
        plan: the windows.
        windowing: windows per call, and whom to tell.
    """

    def __init__(
        self,
        model: Any,
        condition: torch.Tensor,
        null: torch.Tensor,
        guidance_scale: float,
        *,
        plan: WindowPlan,
        windowing: Windowing,
    ) -> None:
        if condition.ndim == 4:
            check_grid((condition.shape[1], condition.shape[2]), plan.grid_shape)
        self._plan, self._windowing = plan, windowing
        self._jobs = [(image, place) for image in range(len(condition)) for place in plan.places]
        tokens = torch.cat([self._tokens(condition, image, place) for image, place in self._jobs])
        nulls = null[[image for image, _ in self._jobs]]
        # Prepared once for all windows and steps: each call takes its rows of it.
        self._predict = GuidedNoise(model, tokens, nulls, guidance_scale)
        self._weights = plan.rows.weights(), plan.columns.weights()

    def _tokens(self, condition: torch.Tensor, image: int, place: tuple[int, int]) -> torch.Tensor:
        own = condition[image : image + 1]
        return self._plan.condition(own, place) if own.ndim == 4 else own

    def _box(self, place: tuple[int, int]) -> tuple[slice, slice]:
        top, left = self._plan.rows.starts[place[0]], self._plan.columns.starts[place[1]]
        return slice(top, top + self._plan.rows.window), slice(left, left + self._plan.columns.window)

    def __call__(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Noise (B, C, H, W) of scaled latents (B, C, H, W) at one timestep."""
        total = torch.zeros_like(latents)
        down, across = (weight.to(latents) for weight in self._weights)
        size = max(self._windowing.batch_size, 1)
        for first in range(0, len(self._jobs), size):
            rows = slice(first, first + size)
            chunk = self._jobs[rows]
            boxes = [(image, *self._box(place)) for image, place in chunk]
            crops = torch.stack([latents[image, :, y, x] for image, y, x in boxes])
            predicted = self._predict(crops, timestep, rows)
            for (image, y, x), (_, place), noise in zip(boxes, chunk, predicted, strict=True):
                total[image, :, y, x] += noise * (down[place[0]][:, None] * across[place[1]][None, :])
            self._windowing.on_windows(len(chunk))
        return total
