"""How far patients' gradients agree at the start of training: the consensus that `pixcell private plan` assumes.

rho^2 is the mean cosine between the unit gradients of two patients. Patients, tiles and loss are the utility bench's.
"""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path

import torch
from utility.loss import PatientLoss
from utility.sites import PUBLIC_SITES, patients_of

from pixcell_core.starter import load_transformer
from pixcell_core.training.adapters import attach_lora


def consensus(cache: Path, patients: int, tiles: int, draws: int, rank: int) -> float:
    """rho over the patients of one drawn site, at B = 0."""
    site = patients_of(PUBLIC_SITES[0], 0, patients, cache)
    model = load_transformer()
    attach_lora(model, kind="ffa-lora", rank=rank, seed=0)
    loss = PatientLoss(group=tiles * draws, stratified=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(0)
    directions = []
    for number in range(patients):
        rows = (site.latents[number, :tiles], site.embeddings[number, :tiles])
        batch = tuple(t.repeat_interleave(draws, dim=0) for t in rows)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss(model, batch).mean(), trained)])
        directions.append(gradient / gradient.norm())
    cosines = [float(a @ b) for a, b in itertools.combinations(directions, 2)]
    return math.sqrt(max(0.0, sum(cosines) / len(cosines)))


def main() -> None:
    """Print rho for several sizes of a unit gradient."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--cache", type=Path, required=True, help="Folder of encoded patients; filled when empty."
    )
    parser.add_argument("--patients", type=int, default=20)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for tiles, draws in ((1, 1), (4, 1), (4, 8), (8, 16)):
        rho = consensus(asked.cache, asked.patients, tiles, draws, rank=4)
        print(
            f"{tiles} tiles x {draws} noise draws: consensus rho {rho:.2f} over {asked.patients} patients",
            flush=True,
        )


if __name__ == "__main__":
    main()
