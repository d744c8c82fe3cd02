"""The batches of a training run: which tiles, which noise, in an order that a resumed run repeats exactly.

Every tile of a step gets a seed of its own, and all its draws (latent, drop of the condition, timestep, noise) come
from a generator of that seed. What a tile is given therefore does not depend on the number of processes or on how a
batch is cut into parts, and the state to keep is small: the place in the epoch and one generator.
Legend: B batch, C latent channels, h w latent pixels, n condition tokens, d embedding width.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from pixcell_core.errors import BadInputError
from pixcell_core.training.parallel import Processes
from pixcell_core.training.sampler import EpochSampler, shard_of
from pixcell_core.training.settings import TrainingSettings
from pixcell_core.training.tile_sources import TileSource

TIMESTEPS = 1000


@dataclass(frozen=True)
class Batch:
    """What one forward pass trains on: scaled `latents` and `noise` (B, C, h, w), `condition` (B, n, d),
    `timestep` (B,) integers, `dropped` (B,) whether the condition gives way to the null condition."""

    latents: torch.Tensor
    condition: torch.Tensor
    timestep: torch.Tensor
    noise: torch.Tensor
    dropped: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; copies to a GPU do not block."""
        if device.type == "cpu":
            return self

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.pin_memory().to(device, non_blocking=True)

        return Batch(*(moved(getattr(self, name)) for name in self.__dataclass_fields__))


class BatchStream:
    """Gives this process's batches of every optimiser step; with `ahead`, the next ones are made meanwhile."""

    def __init__(
        self, tiles: TileSource, settings: TrainingSettings, processes: Processes, *, ahead: bool = False
    ) -> None:
        self._tiles, self._settings, self._processes = tiles, settings, processes
        self._order = EpochSampler(len(tiles), settings.seed)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self._pool = ThreadPoolExecutor(1) if ahead else None
        self._next: Future[list[Batch]] | None = None
        self._kept = self._now()

    @property
    def step_size(self) -> int:
        """Tiles of one optimiser step over all processes."""
        return self._settings.batch_size * self._settings.accumulate * self._processes.world

    @property
    def epoch(self) -> int:
        """Epochs finished by the batches given out so far."""
        return int(self._kept["position"]) // len(self._tiles)

    def _now(self) -> dict[str, Any]:
        return {"position": self._order.position, "random": self.generator.get_state()}

    def state_dict(self) -> dict[str, Any]:
        """Place in the epoch and state of the generator after the batches given out so far."""
        return dict(self._kept)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batches of `state`."""
        if self._next is not None:
            self._next.result()
            self._next = None
        self._order.position = int(state["position"])
        self.generator.set_state(state["random"])
        self._kept = self._now()

    def _plan(self) -> tuple[list[int], list[int]]:
        rows = self._order.take(self.step_size)
        seeds = torch.randint(0, 2**32, (len(rows),), generator=self.generator).tolist()
        return rows, seeds

    def _make(self, plan: tuple[list[int], list[int]]) -> list[Batch]:
        rows, seeds = plan
        parts = self._settings.accumulate
        place = {"rank": self._processes.rank, "world": self._processes.world, "parts": parts}
        return [
            self._batch(shard_of(rows, part=k, **place), shard_of(seeds, part=k, **place))
            for k in range(parts)
        ]

    def _batch(self, rows: list[int], seeds: list[int]) -> Batch:
        settings = self._settings
        latents, conditions, times, noises, dropped = [], [], [], [], []
        for row, seed in zip(rows, seeds, strict=True):
            found, own = self._tiles.features(row), torch.Generator().manual_seed(seed)
            mean, std, embedding = found.mean.float(), found.std.float(), found.embedding.float()
            drawn = mean + std * torch.randn(mean.shape, generator=own)
            latents.append((drawn - settings.shift_factor) * settings.scaling_factor)
            dropped.append(bool(torch.rand((), generator=own) < settings.condition_drop))
            times.append(int(torch.randint(0, TIMESTEPS, (), generator=own)))
            noises.append(torch.randn(mean.shape, generator=own))
            if not (torch.isfinite(embedding).all() and torch.isfinite(latents[-1]).all()):
                raise BadInputError(
                    f"Tile {row} holds a value that is infinite or not a number.",
                    hint="Extract its features again, or take it out.",
                    code="features-not-finite",
                )
            conditions.append(embedding)
        return Batch(
            torch.stack(latents),
            torch.stack(conditions),
            torch.tensor(times),
            torch.stack(noises),
            torch.tensor(dropped),
        )

    def take(self) -> list[Batch]:
        """This process's batches of the next step, one per accumulated part, on the CPU."""
        if self._next is None:
            batches = self._make(self._plan())
        else:
            batches = self._next.result()
            self._next = None
        self._kept = self._now()
        if self._pool is not None:
            self._next = self._pool.submit(self._make, self._plan())
        return batches

    def close(self) -> None:
        """Stop making batches ahead."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
