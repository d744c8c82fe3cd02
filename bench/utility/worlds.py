"""The sites of a run: who trains, chosen by its seed, and who is held out, always the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from utility.real_sites import real_sites
from utility.setting import Setting
from utility.sites import HELD_OUT, PRIVATE_SITES, PUBLIC_SITES, SitePatients, patients_of

POOLS = {"private": 200, "public": 140}
"""Patients of a site that a run of up to so many chooses from, by its seed."""


HELD_OUT_EACH = 20


@dataclass(frozen=True)
class World:
    """Three sites' training patients, and 20 held-out patients of each."""

    training: tuple[SitePatients, ...]
    held_out: SitePatients


def world_of(setting: Setting, seed: int, cache: Path, data: Path | None = None) -> World:
    """Choose the patients of a run; a third of them at each site. `data` holds the real tiles, where they are asked for."""
    if setting.world == "real":
        if data is None:
            raise ValueError("the real tiles need their folder")
        training_sites, kept = real_sites(data)
        return World(tuple(training_sites), kept)
    sites = PRIVATE_SITES if setting.world == "private" else PUBLIC_SITES
    each = setting.patients // len(sites)
    pool = max(each, min(POOLS[setting.world], 2 * each))
    rng = torch.Generator().manual_seed(1000 + seed)
    training = tuple(
        patients_of(site, 0, pool, cache).chosen(torch.randperm(pool, generator=rng)[:each].tolist())
        for site in sites
    )
    held = [patients_of(site, HELD_OUT, HELD_OUT + HELD_OUT_EACH, cache) for site in sites]
    return World(training, SitePatients.joined(held))
