"""Features: equal to a slow reading of the slides, split kept apart, and safe to kill at any patient."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import torch

from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.training.feature_store import FeatureStore, FeatureStoreWriter
from site_client.catalogue import Catalogue
from site_client.catalogue.intake import add_slides, tile_slides
from site_client.catalogue.slide_list import SlideEntry
from site_client.features.extraction import Models, Selection, extract
from site_client.slides.quality import TileQuality
from site_client.slides.tiling import Tile, TilingPlan

PLAN = TilingPlan(128, 0.5)


def run(site: Path, models: Models, selection: Selection | None = None) -> Any:
    with Catalogue(site) as catalogue:
        return extract(catalogue, PLAN, selection or Selection(4), models, batch_size=3)


def test_the_stores_hold_exactly_the_chosen_tiles(site: Path, models: Models) -> None:
    done = run(site, models)
    with Catalogue(site) as catalogue:
        slides = {s.public_name: s for s in catalogue.slides()}
        parts = {part: catalogue.patients(part) for part in ("train", "holdout")}
    assert done.encoded == 24 and [p.patients for p in done.parts] == [3, 3]
    for part in ("train", "holdout"):
        store = FeatureStore.open(site / "features" / part)
        assert store.patients == parts[part]
        for patient in store.patients:
            rows = [r for r in store.index.to_pylist() if r["patient"] == patient]
            pixels = store.pixels(patient)
            assert pixels.shape == (4, 3, 128, 128) and pixels.dtype == torch.uint8
            for row, tile in zip(sorted(rows, key=lambda r: r["row"]), pixels, strict=True):
                slide = slides[row["slide"]]
                assert slide.patient == patient and row["label"] == slide.label
                with openslide.OpenSlide(str(slide.path)) as raw:
                    slow = np.asarray(raw.read_region((row["x"], row["y"]), 0, (128, 128)).convert("RGB"))
                assert np.array_equal(tile.permute(1, 2, 0).numpy(), slow)
            embedding = models.encoder.encode(pixels).half()
            assert torch.equal(store.embeddings(patient), embedding)


def test_only_the_train_store_has_latents(site: Path, models: Models) -> None:
    run(site, models)
    train, holdout = (FeatureStore.open(site / "features" / p) for p in ("train", "holdout"))
    latents = train.latents(train.patients[0])
    assert latents.shape == (4, 32, 16, 16) and latents.dtype == torch.float16
    assert (latents[:, 16:] == 0.25).all()
    grey = train.pixels(train.patients[0]).float().div(127.5).sub(1).mean(1, keepdim=True)
    assert torch.allclose(latents[:, :1].float(), torch.nn.functional.avg_pool2d(grey, 8), atol=1e-3)
    with pytest.raises(BadInputError):
        holdout.latents(holdout.patients[0])
    assert set(train.patients).isdisjoint(holdout.patients)


def test_without_a_split_nothing_is_extracted(prepared_site: Path, tmp_path: Path, models: Models) -> None:
    slides = sorted((prepared_site / "slides").glob("*.tiff"))[:2]
    with Catalogue(tmp_path, create=True) as catalogue:
        add_slides(catalogue, [SlideEntry(p, p.stem, None, 2) for p in slides], None)
        tile_slides(catalogue, PLAN)
        with pytest.raises(RefusedError) as caught:
            extract(catalogue, PLAN, Selection(4), models)
    assert caught.value.code == "split-missing" and "data split" in caught.value.hint
    assert not (tmp_path / "features").exists()


class Killed(BaseException):
    """Stands for the end of the process: nothing in the code may catch it."""


def test_interrupted_extraction_continues_where_it_was(
    site: Path, models: Models, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    shutil.copy(site / "catalogue.db", whole)
    run(whole, models)
    added: list[str] = []
    original = FeatureStoreWriter.add

    def dying(self: FeatureStoreWriter, patient: str, *args: Any, **kwargs: Any) -> None:
        if len(added) == 2:
            raise Killed
        original(self, patient, *args, **kwargs)
        added.append(patient)

    monkeypatch.setattr(FeatureStoreWriter, "add", dying)
    with pytest.raises(Killed):
        run(site, models)
    with pytest.raises(BadInputError):
        FeatureStore.open(site / "features" / "train")  # unfinished is not taken for finished
    monkeypatch.setattr(FeatureStoreWriter, "add", original)
    again = run(site, models)
    assert again.encoded == 16  # two of six patients were kept
    for part in ("train", "holdout"):
        left, right = (FeatureStore.open(s / "features" / part) for s in (site, whole))
        assert left.index.equals(right.index)
        assert all(torch.equal(left.pixels(p), right.pixels(p)) for p in left.patients)
    assert run(site, models).encoded == 0


def test_a_slide_added_later_renews_its_patient_only(site: Path, models: Models, prepared_site: Path) -> None:
    run(site, models, Selection(0))
    with Catalogue(site) as catalogue:
        patient = catalogue.patients("train")[0]
        used = {s.path.name for s in catalogue.slides()}
        from site_client.slides.synthesise import SynthesisRecipe, write_slide

        extra = site / "extra"
        extra.mkdir()
        recipe = SynthesisRecipe(9, 99, 11, size=512)
        write_slide(recipe, 8, extra)
        new = extra / recipe.slide_name(8)
        assert new.name not in used
        add_slides(catalogue, [SlideEntry(new, patient, None, 2)], None)
        added = tile_slides(catalogue, PLAN).made
    before = len(FeatureStore.open(site / "features" / "train").tiles(patient))
    done = run(site, models, Selection(0))
    after = len(FeatureStore.open(site / "features" / "train").tiles(patient))
    assert after == before + added and done.encoded == after


def test_other_settings_never_mix_into_a_store(site: Path, models: Models) -> None:
    run(site, models)
    with pytest.raises(BadInputError) as caught:
        run(site, models, Selection(5))
    assert caught.value.code == "feature-settings-differ"


def test_selection_drops_ink_and_blur_and_is_stable() -> None:
    def tile(name: str, focus: float = 100.0, ink: float = 0.0) -> Tile:
        return Tile(name, 0, 0, 0, 0.5, TileQuality(0.9, focus, ink))

    class Slide:
        id = 1

    tiles: list[Any] = [(Slide, tile(f"t{n}")) for n in range(30)]
    bad: list[Any] = [(Slide, tile("blurred", focus=1.0)), (Slide, tile("inked", ink=0.5))]
    chosen = Selection(8).choose(tiles + bad)
    names = {t.tile for _, t in chosen}
    assert len(names) == 8 and not names & {"blurred", "inked"}
    assert {t.tile for _, t in Selection(8).choose(bad + tiles[::-1])} == names
    assert len(Selection(0).choose(tiles + bad)) == 30


def test_a_part_without_usable_tiles_is_said(site: Path, models: Models) -> None:
    with pytest.raises(RefusedError) as caught:
        run(site, models, Selection(4, min_focus=1e9))
    assert caught.value.code == "no-usable-tiles"


def test_no_patient_name_in_what_the_terminal_shows(
    site: Path, models: Models, capfd: pytest.CaptureFixture[str]
) -> None:
    run(site, models)
    shown = "".join(capfd.readouterr())
    assert "tiles/s" in shown and "P0001" not in shown
