"""Trainings in processes of their own, for `test_processes`: started once, it forks one child per run.

Usage: process_runs.py FOLDER. Writes `<name>.pt` (the model's end and the steps it took) for each run into FOLDER.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path

import torch

from pixcell_core.models import PixCellTransformer2DModel
from pixcell_core.training.journal import Journal
from pixcell_core.training.parallel import joined_processes
from pixcell_core.training.settings import TrainingSettings
from pixcell_core.training.tile_sources import EncodedTiles
from pixcell_core.training.trainer import Trainer

ADAMW = TrainingSettings(
    steps=7, batch_size=2, learning_rate=1e-2, checkpoint_every=3, warmup_steps=2, seed=3
)
CAME = replace(ADAMW, optimizer="came", accumulate=2, learning_rate=1e-3)
PAIR = replace(ADAMW, batch_size=2, steps=6, learning_rate=1e-3)


def transformer(tokens: int = 1, dropout: float = 0.0) -> PixCellTransformer2DModel:
    torch.manual_seed(1)
    return PixCellTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=12,
        caption_num_tokens=tokens,
        dropout=dropout,
    )


def tiles(count: int = 5, tokens: int = 1) -> EncodedTiles:
    generator = torch.Generator().manual_seed(2)
    return EncodedTiles(
        torch.randn(count, 16, 8, 8, generator=generator),
        torch.full((count, 16, 8, 8), 0.05),
        torch.randn(count, tokens, 12, generator=generator),
    )


def train(folder: Path, name: str, settings: TrainingSettings, *, tokens: int = 1, kill_at: int = 0) -> None:
    """Train with a checkpoint in `folder/name`; with `kill_at`, die there without a chance to tidy up."""
    torch.set_num_threads(1)
    torch.manual_seed(os.getpid())
    model, steps = transformer(tokens), []

    def on_step(step: int, loss: float) -> None:
        steps.append(step)
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    with joined_processes(torch.device("cpu")) as processes:
        journal = Journal(folder / name / "metrics.jsonl")
        trainer = Trainer(model, tiles(tokens=tokens), settings, processes=processes, journal=journal)
        trainer.run(folder / name / "c.pt", on_step)
        if not processes.leads:
            assert trainer.journal is None
        torch.save({"model": model.state_dict(), "steps": steps}, folder / f"{name}-{processes.rank}.pt")


def fork(*runs: tuple[dict[str, str], tuple[object, ...], dict[str, object]]) -> list[int]:
    """Run each training in a child of its own, at the same time; return how they ended (negative: the signal)."""
    children = []
    for environment, arguments, options in runs:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ.update(environment)
                train(*arguments, **options)  # type: ignore[arg-type]
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def pair(*arguments: object, **options: object) -> list[int]:
    """The same training on two processes that meet on loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return fork(*(({**meet, "RANK": str(r), "LOCAL_RANK": str(r)}, arguments, options) for r in (0, 1)))


def main(folder: Path) -> None:
    """All runs; each line says what ended how."""
    for name, settings, kill_at in (("adamw", ADAMW, 4), ("came", CAME, 5)):
        print(name, "killed", *fork(({}, (folder, name, settings), {"kill_at": kill_at})))
        print(name, "resumed", *fork(({}, (folder, name, settings), {})))
    for tokens in (1, 4):
        print("pair", tokens, *pair(folder, f"pair{tokens}", PAIR, tokens=tokens))
    print("parts", *pair(folder, "parts", replace(PAIR, batch_size=1, accumulate=2)))
    print("half", *pair(folder, "again", replace(PAIR, steps=3)))
    print("rest", *pair(folder, "again", PAIR))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
