"""One private optimiser step against the non-private step over the same tiles and noise draws, time and peak memory.

The non-private reference sees neither patients nor clipping: one Adam step on the mean loss over all tiles times noise
draws, in micro-batches of 8, 16 or 32 rows, whichever is fastest here (for memory 16, as many as a shared pass of
patients holds). The private step takes the engine that training takes: patients with few rows share passes, the rest go
one by one, everything is clipped, summed and noised. In some cases three other engines are timed beside it: the loop
alone, torch.func's vectorised map over single rows, and Opacus' hooks.

Peak memory is measured in a child process per way, above what it held before its first step.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from paired import compare, show
from torch import Tensor, nn

from pixcell_core.diffusion import training_loss
from pixcell_core.models import PixCellTransformer2DModel
from pixcell_core.private.engine import private_step
from pixcell_core.private.noise import SystemNoiseSource
from pixcell_core.private.parameters import PrivacyParameters
from pixcell_core.private.patient_gradients import PatientGradientEngine
from pixcell_core.starter.recipe.train_transformer import CONFIG
from pixcell_core.training.adapters import AdapterKind, attach_lora

BOUND = 1e-3
CASES: tuple[tuple[str, AdapterKind, Sequence[int], int], ...] = (
    ("24 patients of 1-4 tiles, 1 draw", "ffa-lora", (1, 2, 3, 4) * 6, 1),
    ("12 patients of 4 tiles, 1 draw", "ffa-lora", (4,) * 12, 1),
    ("6 patients of 4 tiles, 4 draws", "ffa-lora", (4,) * 6, 4),
    ("12 patients of 1-4 tiles, 4 draws, A and B trained", "lora", (1, 2, 3, 4) * 3, 4),
)
ALL_ENGINES = (0, 2)
"""Cases in which the other engines are timed too."""


@dataclass
class Patients:
    """Latents, conditions, time steps and noise per patient."""

    tiles: dict[str, tuple[Tensor, ...]]

    @property
    def patients(self) -> Sequence[str]:
        return list(self.tiles)

    def rows(self, patient: str, k: int, rng: torch.Generator) -> tuple[Tensor, ...]:
        return self.tiles[patient]


def pretend(counts: Sequence[int]) -> Patients:
    """Random tiles; `counts` of them per patient."""
    side, width = int(str(CONFIG["sample_size"])), int(str(CONFIG["caption_channels"]))
    shapes = ((16, side, side), (1, width))
    tiles: dict[str, tuple[Tensor, ...]] = {}
    for index, n in enumerate(counts):
        latents, condition = (torch.randn(n, *shape) for shape in shapes)
        tiles[f"p{index}"] = (latents, condition, torch.randint(0, 1000, (n,)), torch.randn(n, *shapes[0]))
    return Patients(tiles)


def loss(model: nn.Module, rows: tuple[Tensor, ...]) -> Tensor:
    """One loss per row; noise and times come with the rows, so that all ways see one problem."""
    latents, condition, timestep, noise = rows
    return training_loss(model, latents, condition, timestep=timestep, noise=noise)


def adapted(kind: AdapterKind) -> nn.Module:
    """The starter's transformer with an adapter away from its start."""
    torch.manual_seed(0)
    model = PixCellTransformer2DModel(**CONFIG)
    attach_lora(model, kind=kind, rank=4, seed=1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.train()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """What is trained."""
    return [p for p in model.parameters() if p.requires_grad]


def all_rows(source: Patients, draws: int) -> tuple[Tensor, ...]:
    """The rows of all patients, each repeated for its draws."""
    parts = zip(*source.tiles.values(), strict=True)
    return tuple(torch.cat(part).repeat_interleave(draws, 0) for part in parts)


def private(kind: AdapterKind, source: Patients, draws: int, joint: bool) -> Callable[[], object]:
    """One private step, noise included."""
    model = adapted(kind)
    settings = PrivacyParameters(1.0, BOUND, 1.0, 1, float(len(source.tiles)), 4, draws)
    engine = PatientGradientEngine(model, loss, settings, joint=joint)
    optimizer, noise = torch.optim.Adam(engine.trainable, lr=1e-6), SystemNoiseSource()
    rng = torch.Generator()
    return lambda: private_step(engine, source, source.patients, optimizer, noise, rng)


def plain(kind: AdapterKind, source: Patients, draws: int, batch: int) -> Callable[[], object]:
    """One non-private step in micro-batches."""
    model = adapted(kind)
    rows, optimizer = all_rows(source, draws), torch.optim.Adam(trainable(model), lr=1e-6)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        for start in range(0, len(rows[0]), batch):
            part = loss(model, tuple(t[start : start + batch] for t in rows))
            (part.sum() / len(rows[0])).backward()
        optimizer.step()

    return step


def by_vmap(kind: AdapterKind, source: Patients, draws: int, batch: int = 16) -> Callable[[], object]:
    """Row gradients by `torch.func.vmap` over `grad`, summed to nothing: its passes alone are timed."""
    model = adapted(kind)
    rows = all_rows(source, draws)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    rest = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad} | dict(
        model.named_buffers()
    )

    def one(parameters: dict[str, Tensor], *row: Tensor) -> Tensor:
        def call(*args: object, **kwargs: object) -> object:
            return torch.func.functional_call(model, parameters | rest, args, kwargs)

        return loss(call, tuple(t[None] for t in row))[0]  # type: ignore[arg-type]

    each = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0, 0, 0))
    given = {n: p.detach() for n, p in trained.items()}
    return lambda: [
        each(given, *(t[start : start + batch] for t in rows)) for start in range(0, len(rows[0]), batch)
    ]


def by_opacus(kind: AdapterKind, source: Patients, draws: int, batch: int = 16) -> Callable[[], object]:
    """Row gradients by Opacus' hooks: its passes alone are timed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.grad_sample import GradSampleModule

        model = GradSampleModule(adapted(kind), loss_reduction="sum")
    rows = all_rows(source, draws)

    def step() -> None:
        for start in range(0, len(rows[0]), batch):
            loss(model, tuple(t[start : start + batch] for t in rows)).sum().backward()
            for parameter in trainable(model):
                parameter.grad_sample = parameter.grad = None  # type: ignore[attr-defined]

    return step


def _status(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))


def peak(build: Callable[[], Callable[[], object]]) -> float:
    """MiB that two steps needed at most, above what the process held before; measured in a child process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        step = build()
        before = _status("VmRSS")
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")
        step(), step()
        os.write(writer, str(_status("VmHWM") - before).encode())
        os._exit(0)
    os.waitpid(child, 0)
    return int(os.read(reader, 64)) / 1024.0


def main() -> None:
    """Print memory and time of each case."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    # Memory first: a child of a process that has trained finds freed memory in its heap and seems to need none.
    for name, kind, counts, draws in CASES:
        source = pretend(counts)
        needed = peak(lambda: private(kind, source, draws, True))  # noqa: B023 - called at once
        wanted = peak(lambda: plain(kind, source, draws, 16))  # noqa: B023 - called at once
        print(
            f"{name}: {needed / wanted:.2f} x the peak memory of the non-private step in micro-batches of 16 "
            f"({needed:.0f} MiB against {wanted:.0f} MiB)"
        )
    for number, (name, kind, counts, draws) in enumerate(CASES):
        source = pretend(counts)
        tried = {b: compare(plain(kind, source, draws, b), lambda: None, 3).ours for b in (8, 16, 32)}
        batch = min(tried, key=lambda size: tried[size])
        reference = plain(kind, source, draws, batch)
        ours = compare(private(kind, source, draws, True), reference)
        print(f"{name}: {sum(counts) * draws} rows")
        show("  private step", f"the non-private step in micro-batches of {batch}", ours)
        if number not in ALL_ENGINES:
            continue
        for other, step in (
            ("the loop alone", private(kind, source, draws, False)),
            ("vectorised map", by_vmap(kind, source, draws)),
            ("Opacus' hooks", by_opacus(kind, source, draws)),
        ):
            show(f"  {other}", "the same reference", compare(step, reference, 3))


if __name__ == "__main__":
    main()
