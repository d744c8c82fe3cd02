"""Command line of the bench: `python bench/utility --help`."""

from __future__ import annotations

import argparse
import fcntl
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Run as a folder, its modules are found beside it, as the other benches find theirs.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import nn

from pixcell_core.starter import load_transformer
from utility.federation import train
from utility.measures import HeldOutLoss, held_out_loss
from utility.plan import Run, full_plan, quick_plan, real_plan
from utility.record import Record
from utility.sites import HELD_OUT, PRIVATE_SITES, PUBLIC_SITES, SitePatients, patients_of
from utility.surrogates import SurrogateTest
from utility.table import render
from utility.worlds import world_of

ASKED = 40
"""Patients of each site whose tiles condition the surrogates."""


def main() -> None:
    """Run what is missing of a plan, then print the table."""
    parser = argparse.ArgumentParser(
        prog="bench/utility",
        description="What patient-level privacy costs in usefulness. Draws immunostained sites that the shipped base "
        "model has not seen, trains federated adapters at several epsilon (per patient, delta 1e-5, for the "
        "released adapter alone), and measures them on held-out patients. Runs that stand in the record are "
        "not repeated, and several processes may share one record.",
    )
    parser.add_argument(
        "--quick", action="store_true", help="two tiny runs that walk the code (about a minute)"
    )
    parser.add_argument(
        "--record", type=Path, default=Path("utility.jsonl"), help="results, one JSON line per run"
    )
    parser.add_argument(
        "--cache", type=Path, default=Path("utility-cache"), help="folder of drawn, encoded patients"
    )
    parser.add_argument("--sheets", type=Path, help="folder for sheets of surrogates")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no run after so many minutes")
    parser.add_argument(
        "--real", type=Path, help="folder with the real tiles: run those instead of the drawn sites"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--table", action="store_true", help="print the table of the record and stop")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    record = Record(args.record)
    if not args.table:
        _work(args, record)
    print(render(record.rows()))


def _work(args: argparse.Namespace, record: Record) -> None:
    end = time.monotonic() + 60 * args.minutes
    measurer = Measurer(args.cache, args.sheets, args.real, count=32 if args.quick else 240)
    plan = quick_plan() if args.quick else real_plan() if args.real else full_plan()
    for number, run in enumerate(plan, start=1):
        if time.monotonic() > end:
            print("time is up; the rest is left for another call", flush=True)
            return
        claim = _claim(args.cache, run)
        if claim is None or record.has(run.setting, run.seed):
            continue
        began = time.monotonic()
        figures = measurer.perform(run)
        record.add(run.setting, run.seed, {"group": run.group, **figures})
        claim.close()
        print(
            f"{number}/{len(plan)} {run.group}: epsilon {run.setting.epsilon}, seed {run.seed}, "
            f"gain {figures['gain_percent']:.2f} %, {time.monotonic() - began:.0f} s",
            flush=True,
        )


def _claim(cache: Path, run: Run) -> Any:
    """A lock on a run, so that two processes never do the same; None where another one is at it."""
    import hashlib

    cache.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(f"{run.setting.key()}{run.seed}".encode()).hexdigest()[:16]
    handle = (cache / f"claim-{name}").open("w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        return None
    return handle


class Measurer:
    """What all runs of a process share: the base, its own loss and, where needed, the judge of surrogates."""

    def __init__(self, cache: Path, sheets: Path | None, data: Path | None, count: int) -> None:
        self.base = load_transformer()
        self._cache, self._sheets, self._data, self._count = cache, sheets, data, count
        self._before: dict[str, HeldOutLoss] = {}
        self._test: SurrogateTest | None = None

    def perform(self, run: Run) -> dict[str, Any]:
        """Train and measure one run."""
        setting = run.setting
        world = world_of(setting, run.seed, self._cache, self._data)
        if setting.world not in self._before:
            self._before[setting.world] = held_out_loss(self.base, world.held_out)
        before = self._before[setting.world]
        began = time.process_time()
        trained = train(self.base, world.training, setting, run.seed)
        seconds = time.process_time() - began
        after = held_out_loss(trained.model, world.held_out)
        figures: dict[str, Any] = {
            "base": asdict(before),
            "error": asdict(after),
            "gain_percent": 100 * (1 - after.error / before.error),
            "weighted_gain_percent": 100 * (1 - after.weighted / before.weighted),
            "trained_parameters": trained.trained_parameters,
            "noise_multiplier": setting.noise_multiplier() if setting.private else 0.0,
            "cpu_seconds": round(seconds, 1),
        }
        if trained.traces:
            figures["clipped_fraction"] = float(np.mean([t.clipped_fraction for t in trained.traces]))
            figures["mean_gradient_norm"] = float(np.mean([t.mean_gradient_norm for t in trained.traces]))
        if run.look:
            self._look(run, trained.model, world.held_out, figures)
        return figures

    def _look(self, run: Run, model: nn.Module, held_out: SitePatients, figures: dict[str, Any]) -> None:
        if self._test is None:
            public = [patients_of(site, HELD_OUT, HELD_OUT + 20, self._cache) for site in PUBLIC_SITES]
            asked = [
                patients_of(site, 0, ASKED if self._count > 100 else 20, self._cache)
                for site in PRIVATE_SITES
            ]
            self._conditions = SitePatients.joined(asked)
            self._test = SurrogateTest(
                SitePatients.joined(public), held_out, self._conditions, count=self._count
            )
        worth, pixels = self._test.worth(model)
        figures["surrogates"] = asdict(worth)
        if run.seed == 0 and run.group == "ordinary training":
            figures["surrogates_base"] = asdict(self._test.worth(self.base)[0])
            figures["real_tiles"] = asdict(self._test.real_data(self._conditions, self._count))
        if self._sheets is not None:
            name = f"{run.group}-{run.setting.patients}-{run.setting.optimizer}-{run.setting.epsilon:g}-{run.seed}.png"
            _sheet(pixels, self._sheets / name.replace(" ", "-"))


def _sheet(pixels: np.ndarray, path: Path) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    side = pixels.shape[1]
    chosen = pixels[np.linspace(0, len(pixels) - 1, 32).astype(int)].reshape(4, 8, side, side, 3)
    Image.fromarray(chosen.transpose(0, 2, 1, 3, 4).reshape(4 * side, 8 * side, 3)).save(path)


if __name__ == "__main__":
    main()
