"""Tissue classes are told apart by what a pathologist would look at, across patients and sites."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from pixcell_core.procedural import Field, TissueClass, patient_look, render_field, separate, site_look
from pixcell_core.procedural.nuclei import NucleusKind, nucleus_bank


def density_per_mm2(field: Field) -> float:
    count = len(np.unique(field.nuclei[field.nuclei > 0]))
    return count / (field.nuclei.size * (field.mpp / 1000) ** 2)


def texture(field: Field) -> np.ndarray:
    """Level and spread at three lengths of each dye, and the shares of nuclear, dark and empty pixels."""
    planes = separate(field.rgb, field.site)
    values: list[float] = []
    for plane in planes:
        soft, softer = cv2.GaussianBlur(plane, (0, 0), 2), cv2.GaussianBlur(plane, (0, 0), 6)
        values += [plane.mean(), (plane - soft).std(), (soft - softer).std(), softer.std()]
    haematoxylin, eosin = planes
    values += [(haematoxylin > 0.6).mean(), (haematoxylin > 1.3).mean(), (haematoxylin + eosin < 0.15).mean()]
    return np.asarray(values)


def nearest_centroid(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    mean, spread = train.mean(axis=0), train.std(axis=0) + 1e-6
    centroids = np.stack([((train - mean) / spread)[labels == c].mean(axis=0) for c in np.unique(labels)])
    gaps = np.linalg.norm(((test - mean) / spread)[:, None] - centroids[None], axis=2)
    return np.unique(labels)[gaps.argmin(axis=1)]


def test_nuclear_density_is_ordered(by_class: dict[TissueClass, list[Field]]) -> None:
    mean = {
        tissue: np.mean([density_per_mm2(field) for field in fields]) for tissue, fields in by_class.items()
    }
    assert mean[TissueClass.lymphoid] > 1.3 * mean[TissueClass.tumor]
    assert mean[TissueClass.tumor] > 1.4 * mean[TissueClass.stroma]
    # Counts of a real section at 20x: some thousand nuclei per square millimetre, not hundreds or a million.
    assert all(1_000 < value < 30_000 for value in mean.values())


def test_kinds_of_nuclei_follow_the_class(by_class: dict[TissueClass, list[Field]]) -> None:
    expected = {
        TissueClass.tumor: NucleusKind.TUMOR,
        TissueClass.gland: NucleusKind.COLUMNAR,
        TissueClass.lymphoid: NucleusKind.LYMPHOCYTE,
    }
    for tissue, kind in expected.items():
        elsewhere = np.mean(
            [
                np.mean(field.nucleus_kinds[1:] == kind)
                for other, fields in by_class.items()
                if other is not tissue
                for field in fields
            ]
        )
        here = np.mean([np.mean(field.nucleus_kinds[1:] == kind) for field in by_class[tissue]])
        assert here > 1.8 * elsewhere


def test_a_plain_classifier_separates_the_classes_of_unseen_patients() -> None:
    """Trained on patients of three sites, tried on patients never seen; a shuffled label must fail."""
    features, labels, patients = [], [], []
    for code, tissue in enumerate(TissueClass):
        for n in range(20):
            site = n % 3
            field = render_field(
                224,
                224,
                site=site_look(site),
                patient=patient_look(site, n),
                tissue=tissue,
                seed=n,
                coverage=1.0,
            )
            features.append(texture(field))
            labels.append(code)
            patients.append(n)
    x, y, who = np.stack(features), np.asarray(labels), np.asarray(patients)
    held = who >= 10
    right = nearest_centroid(x[~held], y[~held], x[held]) == y[held]
    assert right.mean() > 0.7
    shuffled = np.random.default_rng(0).permutation(y[~held])
    assert (nearest_centroid(x[~held], shuffled, x[held]) == y[held]).mean() < 0.6


def test_a_patients_nuclei_are_their_own() -> None:
    """Slides of one patient share nuclear size; patients differ."""
    sizes = []
    for patient in range(6):
        bank = nucleus_bank(patient_look(0, patient), 0.5)
        sizes.append(np.mean([stamp.area for stamp in bank.stamps[NucleusKind.TUMOR]]))
    assert np.std(sizes) / np.mean(sizes) > 0.08


def test_stamps_are_crisp_and_textured() -> None:
    bank = nucleus_bank(patient_look(0, 1), 0.5)
    for kind in NucleusKind:
        for stamp in bank.stamps[kind][::7]:
            assert stamp.area == stamp.mask.sum() > 10
            inside = stamp.density[stamp.mask]
            assert inside.std() / inside.mean() > 0.08
            # The edge falls from dense to nothing within about two pixels.
            ring = cv2.dilate(stamp.mask.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
            assert stamp.density[~ring].max(initial=0.0) < 0.35 * inside.mean()


def test_two_patients_at_two_sites_are_not_one() -> None:
    assert patient_look(0, 7) != patient_look(1, 7)
    assert patient_look(0, 7) == patient_look(0, 7)
    assert patient_look(0, -7) != patient_look(0, 7)
    assert site_look(5) == site_look(5) != site_look(6)


def test_colours_lie_among_those_of_real_slides(shared_data: Path) -> None:
    """Mean optical density per channel, tile by tile, against seven classes of real colorectal tissue."""

    def density(rgb: np.ndarray) -> np.ndarray:
        return np.asarray(-np.log(np.maximum(rgb, 1) / 245.0).mean(axis=(0, 1)))

    folders = [
        shared_data / "tiles" / "crc_val_he_7k" / name for name in ("TUM", "STR", "NORM", "LYM", "MUS")
    ]
    paths = [
        path for folder in folders for path in sorted(folder.iterdir()) if path.suffix in {".jpg", ".png"}
    ]
    real = np.stack([density(cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)) for path in paths])
    drawn = np.stack(
        [
            density(
                render_field(
                    224,
                    224,
                    site=site_look(n),
                    patient=patient_look(n, 0),
                    tissue=list(TissueClass)[n % 4],
                    seed=n,
                    coverage=1.0,
                ).rgb
            )
            for n in range(16)
        ]
    )
    low, high = np.percentile(real, [1, 99], axis=0)
    margin = 0.25 * (high - low)
    assert ((drawn > low - margin) & (drawn < high + margin)).all(axis=1).mean() > 0.8
    # The order of the channels is what makes it pink: green is absorbed most, red and blue less.
    assert (drawn.argmax(axis=1) == 1).all() and (real.argmax(axis=1) == 1).mean() > 0.9
