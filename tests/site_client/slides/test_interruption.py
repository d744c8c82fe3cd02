"""Ctrl-C at every stage, in real processes: exit 1, one line, and the same command run again completes the work."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import openslide
import pytest

from site_client.slides.synthesise import SynthesisRecipe, write_slide
from tests.site_client.slides.process import envelope, interrupt_when, run

N = 16


def count(site: Path, table: str) -> int:
    """Rows of a table while another process writes it; 0 before it exists."""
    if not (site / "catalogue.db").exists():
        return 0
    try:
        with sqlite3.connect(f"file:{site / 'catalogue.db'}?mode=ro", uri=True) as raw:
            return int(raw.execute(f"SELECT count(*) FROM {table}").fetchone()[0])
    except sqlite3.OperationalError:
        return 0


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site whose every stage was interrupted once and completed by a second run."""
    site = tmp_path_factory.mktemp("site")
    slides = site / "slides"
    write = ("data", "synthesise", "--site-dir", site, "--patients", N, "--size", 640, "--seed", 5)
    stopped = interrupt_when(lambda: len(list(slides.glob("*.tiff"))) >= 2, *write)
    assert stopped.returncode == 1 and "error [interrupted]" in stopped.stderr, stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert not (slides / "slides.csv").exists() and not list(slides.glob(".*.partial"))
    kept = {p: p.stat().st_mtime_ns for p in slides.glob("*.tiff")}
    assert 2 <= len(kept) < N
    done = run(*write, "--format", "json")
    assert envelope(done)["data"]["written"] == N - len(kept)
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())

    add = ("data", "add", "--site-dir", site, "--slides", slides)
    stopped = interrupt_when(lambda: count(site, "slide") >= 2, *add)
    assert stopped.returncode == 1 and "Traceback" not in stopped.stderr
    entered = count(site, "slide")
    done = run(*add, "--format", "json")
    assert envelope(done)["data"] == {
        "added": N - entered,
        "known": entered,
        "patients": N,
        "late_patients": 0,
    }
    assert run("data", "split", "--site-dir", site, "--seed", 1).returncode == 0

    tile = ("data", "tile", "--site-dir", site)
    stopped = interrupt_when(lambda: count(site, "tiling") >= 2, *tile)
    assert stopped.returncode == 1 and "Traceback" not in stopped.stderr
    assert 2 <= count(site, "tiling") < N
    assert run(*tile).returncode == 0
    return site


def test_all_stages_completed_after_interruption(site: Path) -> None:
    assert count(site, "slide") == count(site, "tiling") == N
    for slide in (site / "slides").glob("*.tiff"):
        with openslide.OpenSlide(str(slide)) as whole:
            whole.read_region((0, 0), 0, whole.dimensions).load()
    with sqlite3.connect(site / "catalogue.db") as raw:
        mismatched = raw.execute(
            "SELECT count(*) FROM tiling WHERE tiles != (SELECT count(*) FROM tile WHERE tiling_id = tiling.id)"
        ).fetchone()[0]
    assert mismatched == 0


def test_the_result_equals_an_uninterrupted_run(site: Path, tmp_path: Path) -> None:
    recipe = SynthesisRecipe(N, 5, 5, 640)
    for patient in (0, 1, N // 2, N - 1):
        write_slide(recipe, patient, tmp_path)
        name = recipe.slide_name(patient)
        assert (site / "slides" / name).read_bytes() == (tmp_path / name).read_bytes()
