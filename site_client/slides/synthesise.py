"""Writes a hospital's worth of procedural slides: real tiled TIFF files, one patient each, and slides.csv."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path

from pixcell_core.cli.progress import progress
from pixcell_core.errors import BadInputError
from site_client.slides.parallel import default_workers
from site_client.slides.storage import atomic_path, exclusive, storage_errors, sweep_partials

RECIPE_FILE = "synthesis.json"
LIST_FILE = "slides.csv"
MIN_SIZE, MAX_SIZE = 256, 16_384


@dataclass(frozen=True)
class SynthesisRecipe:
    """All that decides the pixels of a procedural cohort. `site_seed` fixes dyes and scanner."""

    patients: int
    seed: int
    site_seed: int
    size: int = 1024
    mpp: float = 0.5

    def __post_init__(self) -> None:
        if self.patients < 1:
            raise BadInputError(
                "A cohort needs at least one patient.", hint="Give --patients 1 or more.", code="bad-patients"
            )
        if not MIN_SIZE <= self.size <= MAX_SIZE:
            raise BadInputError(
                f"Slides of {self.size} pixels cannot be written.",
                hint=f"Give --size between {MIN_SIZE} and {MAX_SIZE}.",
                code="bad-size",
            )
        if min(self.seed, self.site_seed) < 0:
            raise BadInputError("Seeds are not negative.", hint="Give --seed 0 or more.", code="bad-seed")

    def slide_name(self, patient: int) -> str:
        """File name of a patient's slide."""
        return f"slide-{patient + 1:04d}.tiff"

    def label(self, patient: int) -> str:
        """The tissue class that dominates a slide; classes take turns, so all are equally common."""
        from pixcell_core.procedural import TissueClass

        classes = list(TissueClass)
        return str(classes[(patient + self.seed) % len(classes)].value)


@dataclass(frozen=True)
class SynthesisOutcome:
    """What was written."""

    folder: Path
    slides: int
    written: int
    seconds: float


def write_slide(recipe: SynthesisRecipe, patient: int, folder: Path) -> None:
    """Render and write one patient's slide, whole or not at all.

    Raises:
        StorageFullError: the disk is full; nothing of this slide stays.
    """
    from pixcell_core.procedural import TissueClass, patient_look, render_field, site_look
    from site_client.slides.pyramid import write_pyramid

    field = render_field(
        recipe.size,
        recipe.size,
        mpp=recipe.mpp,
        site=site_look(recipe.site_seed),
        patient=patient_look(recipe.seed, patient),
        tissue=TissueClass(recipe.label(patient)),
        seed=recipe.seed * 1_000_003 + patient,
    )
    with (
        storage_errors("writing a slide", folder),
        atomic_path(folder / recipe.slide_name(patient)) as partial,
    ):
        write_pyramid(partial, field.rgb, recipe.mpp)


def synthesise(recipe: SynthesisRecipe, folder: Path, workers: int | None = None) -> SynthesisOutcome:
    """Write every slide that is not there yet, then slides.csv; safe to kill and to run again.

    slides.csv is written last: a folder with it is complete.

    Raises:
        BadInputError: code `recipe-differs` when the folder holds a cohort of another recipe.
        StorageFullError: the disk is full.
    """
    start = time.monotonic()
    what = "writing procedural slides"
    with storage_errors(what, folder), exclusive(folder, what):
        _claim(recipe, folder)
        sweep_partials(folder)
        missing = [p for p in range(recipe.patients) if not (folder / recipe.slide_name(p)).is_file()]
        with progress("writing slides", total=len(missing), unit="slides") as bar:
            for _ in _write_all(recipe, missing, folder, workers or default_workers()):
                bar.advance()
        _write_list(recipe, folder)
    return SynthesisOutcome(folder, recipe.patients, len(missing), time.monotonic() - start)


def _claim(recipe: SynthesisRecipe, folder: Path) -> None:
    """Remember the recipe beside the slides, so that a later run cannot mix two cohorts in one folder."""
    note = folder / RECIPE_FILE
    wanted = asdict(recipe)
    if note.is_file():
        found = json.loads(note.read_text())
        if {**found, "patients": 0} != {**wanted, "patients": 0} or found["patients"] > wanted["patients"]:
            raise BadInputError(
                f"{folder} already holds procedural slides of another recipe ({found}).",
                hint="Use the same --seed, --site-seed and --size (and no fewer patients), or "
                "another folder.",
                code="recipe-differs",
            )
    elif any(folder.glob("*.tif*")):
        raise BadInputError(
            f"{folder} already holds slides that this command did not write.",
            hint="Give --out with an empty folder; procedural slides never mix with a hospital's own.",
            code="folder-not-empty",
        )
    with atomic_path(note) as partial:
        partial.write_text(json.dumps(wanted))


def _write_list(recipe: SynthesisRecipe, folder: Path) -> None:
    with (
        atomic_path(folder / LIST_FILE) as partial,
        partial.open("w", newline="", encoding="utf-8") as handle,
    ):
        rows = csv.writer(handle)
        rows.writerow(("file", "patient", "label"))
        for patient in range(recipe.patients):
            rows.writerow((recipe.slide_name(patient), f"P{patient + 1:04d}", recipe.label(patient)))


def _become_worker() -> None:
    """Leave Ctrl-C to the parent, never outlive it, and use one core."""
    import cv2

    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _write_all(recipe: SynthesisRecipe, patients: list[int], folder: Path, workers: int) -> Iterator[None]:
    if len(patients) < 4 or workers == 1:
        for patient in patients:
            write_slide(recipe, patient, folder)
            yield
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_become_worker)
    try:
        waiting: set[Future[None]] = {
            pool.submit(write_slide, recipe, patient, folder) for patient in patients
        }
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
                yield
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
