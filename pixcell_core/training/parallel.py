"""Several processes that train one model on slices of one batch (torchrun starts them; one process needs nothing).

Gradients are averaged by torch's DistributedDataParallel; only the leading process writes files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pixcell_core.errors import PixcellError


@dataclass(frozen=True)
class Processes:
    """This process among those that train together."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def leads(self) -> bool:
        """Whether this process writes the files and speaks to the person."""
        return self.rank == 0

    def wrap(self, model: nn.Module, *, may_leave_unused: bool) -> nn.Module:
        """The model as the forward pass calls it: gradients are averaged over the processes.

        Args:
            model: on this process's device already.
            may_leave_unused: some parameters may take no part in a step (with one condition token, the queries and
                keys of the cross-attention).
        """
        if self.world == 1:
            return model
        from torch.nn.parallel import DistributedDataParallel

        devices = [self.device] if self.device.type == "cuda" else None
        # The buffers are fixed tables, equal everywhere: sending them with every step would buy nothing.
        return DistributedDataParallel(
            model, device_ids=devices, forward_sync_buffers=False, find_unused_parameters=may_leave_unused
        )

    def without_averaging(self, model: nn.Module, *, when: bool) -> AbstractContextManager[Any]:
        """Within it, gradients add up in this process alone: every accumulated part but the last needs no traffic."""
        if self.world == 1 or not when:
            return nullcontext()
        quiet: AbstractContextManager[Any] = model.no_sync()  # type: ignore[operator]
        return quiet

    def mean(self, values: list[float]) -> list[float]:
        """The mean of each value over the processes."""
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self._speaking())
        dist.all_reduce(total)
        return [float(v) / self.world for v in total]

    def leader_says(self, question: Callable[[], bool]) -> bool:
        """The leading process's answer, in every process; the others are not asked."""
        return self.mean([float(self.leads and question())])[0] > 0

    def check_same(self, step: int) -> None:
        """Refuse to go on where the processes resumed from different steps.

        Raises:
            PixcellError: they do; usually --out is not one shared folder.
        """
        if self.world == 1:
            return
        steps = [torch.zeros(1, dtype=torch.long, device=self._speaking()) for _ in range(self.world)]
        dist.all_gather(steps, torch.tensor([step], dtype=torch.long, device=self._speaking()))
        found = [int(s) for s in steps]
        if len(set(found)) > 1:
            raise PixcellError(
                f"The processes would resume from different steps: {found}.",
                hint="Give all machines the same shared --out folder.",
                code="processes-disagree",
            )

    def _speaking(self) -> torch.device:
        """Where tensors must lie for the processes to exchange them."""
        return self.device if self.device.type == "cuda" else torch.device("cpu")


@contextmanager
def joined_processes(device: torch.device, meeting: Path | None = None) -> Iterator[Processes]:
    """Join the processes that torchrun started, and part from them at the end; alone where it started none.

    Args:
        device: where this process computes.
        meeting: a file by which processes of one machine find each other, not there yet when the first comes. Without
            it they meet at torchrun's address, a port on which anybody who reaches the machine is listened to.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Processes(device=device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if meeting is None:
        dist.init_process_group(backend)
    else:
        rank = int(os.environ["RANK"])
        dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=world)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()
