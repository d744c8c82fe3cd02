"""A small world of tissue-like tiles with patients, and one honest and one dishonest audit of it, run once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from privacy_audit import plants
from privacy_audit.policy import Policy, load_policy, parse_policy
from privacy_audit.report import AuditReport
from privacy_audit.run import AuditRequest, run_audit

SIDE, PATIENTS, TILES, RELEASED = 64, 12, 9, 40
Tile = npt.NDArray[np.uint8]


def tissue_tile(rng: np.random.Generator, stain: npt.NDArray[np.float64], side: int = SIDE) -> Tile:
    """Nuclei of random place and size on eosin, mixed by Beer and Lambert."""
    y, x = np.mgrid[0:side, 0:side]
    nuclei = np.zeros((side, side))
    for _ in range(int(rng.integers(18, 34))):
        cy, cx, radius = rng.uniform(-4, side + 4), rng.uniform(-4, side + 4), rng.uniform(2.0, 4.5)
        nuclei = np.maximum(nuclei, rng.uniform(0.6, 1.0) * (np.hypot(y - cy, x - cx) < radius))
    fibres = 0.3 + 0.1 * np.sin(x * rng.uniform(0.1, 0.4) + y * rng.uniform(0.1, 0.4))
    density = nuclei[..., None] * stain[0] + fibres[..., None] * stain[1]
    return np.clip(256 * 10 ** (-density) - 1 + rng.normal(0, 2, (side, side, 3)), 0, 255).astype(np.uint8)


def stain_of(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """One patient's stain: haematoxylin and eosin vectors with a little of their own."""
    base = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])
    return base * rng.uniform(0.8, 1.2, size=(2, 1))


class TextureEye:
    """A cheap eye for tests: means and spreads over a coarse grid."""

    name = "texture-grid"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        values = pixels.to(self.device).float()
        small = torch.nn.functional.adaptive_avg_pool2d(values, 8)
        return torch.cat([small.flatten(1), values.flatten(2).std(dim=2)], dim=1).to("cpu")


@dataclass(frozen=True)
class World:
    """Folders of one site: training, holdout, an honest release, and a dishonest one.

    `sources` maps each planted tile of the dishonest release to the training tile it was made from.
    """

    train: Path
    holdout: Path
    honest: Path
    dishonest: Path
    sources: dict[str, str]

    @property
    def planted(self) -> frozenset[str]:
        """Names of the planted tiles."""
        return frozenset(self.sources)


def small_policy(**changes: Any) -> Policy:
    """The shipped rehearsal policy, made quicker; dotted keys change single values."""
    value = load_policy("rehearsal").model_dump(mode="json")
    value["self_test"]["planted_per_kind"] = 8
    value["self_test"]["recoloured_tiles"] = 12
    value["self_test"]["max_recoloured_false_positive"] = 0.5
    value["self_test"]["gates"] = {
        kind: 0.6 if gate >= 0.6 else 0.2 for kind, gate in value["self_test"]["gates"].items()
    }
    value["patients"].update(permutations=999, power_simulations=10, min_power=0.1)
    for key, change in changes.items():
        section, name = key.split("__")
        value[section][name] = change
    return parse_policy(value)


@pytest.fixture(scope="session")
def tissue() -> torch.Tensor:
    rng = np.random.default_rng(11)
    tiles = np.stack([tissue_tile(rng, stain_of(rng), 96) for _ in range(4)])
    return torch.from_numpy(tiles).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(7)
    training: dict[str, Tile] = {}
    for side in ("train", "holdout"):
        for number in range(PATIENTS):
            folder = root / side / f"{side[0]}patient-{number:02d}"
            folder.mkdir(parents=True)
            stain = stain_of(rng)
            for index in range(TILES):
                tile = tissue_tile(rng, stain)
                Image.fromarray(tile).save(folder / f"{index}.png")
                if side == "train":
                    training[f"{folder.name}/{index}.png"] = tile
    for name in ("honest", "dishonest"):
        (root / name).mkdir()
        for number in range(RELEASED):
            Image.fromarray(tissue_tile(rng, stain_of(rng))).save(root / name / f"s{number:03d}.png")
    sources = {}
    for number, source in enumerate(rng.choice(sorted(training), 6, replace=False)):
        kind = ("exact", "d4", "jpeg50")[number % 3]
        maker = next(k for k in plants.KINDS if k.key == kind).make
        name = f"s{(number * 7 + 3) % RELEASED:03d}"
        (root / "dishonest" / f"{name}.png").unlink()
        suffix = "jpg" if kind == "jpeg50" else "png"
        copy = Image.fromarray(maker(training[str(source)], training[str(source)], rng))
        copy.save(root / "dishonest" / f"{name}.{suffix}", quality=60)
        sources[f"{name}.{suffix}"] = str(source)
    sides = {side: sorted(p.name for p in (root / side).iterdir()) for side in ("train", "holdout")}
    (root / "split.json").write_text(json.dumps({"drawn_at": "2026-01-05T08:00:00+00:00", **sides}))
    return World(root / "train", root / "holdout", root / "honest", root / "dishonest", sources)


def audit(
    world: World, synthetic: Path, out: Path, policy: Policy | None = None, seed: int = 3
) -> AuditReport:
    """Run an audit of the small world with the cheap eye."""
    request = AuditRequest(world.train, world.holdout, synthetic, out, policy or small_policy(), seed)
    return run_audit(request, TextureEye())


@dataclass(frozen=True)
class Audited:
    """A finished audit: where it lies and what it said."""

    out: Path
    report: AuditReport


@pytest.fixture(scope="session")
def honest(world: World, tmp_path_factory: pytest.TempPathFactory) -> Audited:
    out = tmp_path_factory.mktemp("honest")
    return Audited(out, audit(world, world.honest, out))


@pytest.fixture(scope="session")
def dishonest(world: World, tmp_path_factory: pytest.TempPathFactory) -> Audited:
    out = tmp_path_factory.mktemp("dishonest")
    return Audited(out, audit(world, world.dishonest, out))
