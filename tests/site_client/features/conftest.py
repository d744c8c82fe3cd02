"""A small site of procedural slides, and tiny deterministic stand-ins for the two models."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from site_client.catalogue import Catalogue
from site_client.catalogue.intake import add_slides, tile_slides
from site_client.catalogue.slide_list import read_slide_list
from site_client.catalogue.split import SplitSeed
from site_client.features.extraction import Models
from site_client.slides.synthesise import SynthesisRecipe, synthesise
from site_client.slides.tiling import TilingPlan

PLAN = TilingPlan(128, 0.5)


class ColourEncoder:
    """Mean and spread of each channel: six numbers, one token."""

    embedding_dim = 6

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        flat = pixels.float().flatten(2)
        return torch.cat([flat.mean(2), flat.std(2)], dim=1)[:, None]


class PoolAutoencoder:
    """Eight by eight means of grey as all 16 channels; a constant spread."""

    def encode(self, images: torch.Tensor) -> SimpleNamespace:
        mean = F.avg_pool2d(images.mean(1, keepdim=True), 8).repeat(1, 16, 1, 1)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=torch.full_like(mean, 0.25)))


@pytest.fixture
def models() -> Models:
    return Models(ColourEncoder(), PoolAutoencoder())


@pytest.fixture(scope="session")
def prepared_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six patients of 512 px, entered, split and cut."""
    site = tmp_path_factory.mktemp("site")
    synthesise(SynthesisRecipe(6, 11, 11, size=512), site / "slides", workers=1)
    with Catalogue(site, create=True) as catalogue:
        add_slides(catalogue, read_slide_list(site / "slides" / "slides.csv", site / "slides"), None)
        catalogue.draw_split(0.5, SplitSeed.given(1))
        tile_slides(catalogue, PLAN)
    return site


@pytest.fixture
def site(prepared_site: Path, tmp_path: Path) -> Path:
    """A copy to write features into; the slides stay where the catalogue knows them."""
    copy = tmp_path / "site"
    copy.mkdir()
    shutil.copy(prepared_site / "catalogue.db", copy)
    return copy
