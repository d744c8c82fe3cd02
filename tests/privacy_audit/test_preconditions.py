"""Preconditions: the two sides are disjoint, large enough, and drawn before training."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from privacy_audit.features import load_features
from privacy_audit.policy import load_policy
from privacy_audit.preconditions import disjoint, drawn_before, find_split, sizes, twin_clusters
from privacy_audit.result import Status
from privacy_audit.subject import Group, cohort_of
from privacy_audit.tiles import TileSource, open_tiles
from tests.privacy_audit.conftest import TextureEye, World

RULES = load_policy("rehearsal").preconditions
COPIES = load_policy("rehearsal").copies


def group(folder: Path, name: str = "training") -> Group:
    source = open_tiles(folder, name=name, needs_patients=True)
    features = load_features(source, TextureEye(), None)
    return Group(name, tuple(source.ids), tuple(source.patients), tuple(source.strata), features)


@pytest.fixture(scope="module")
def train(world: World) -> Group:
    return group(world.train)


@pytest.fixture(scope="module")
def holdout(world: World) -> Group:
    return group(world.holdout, "holdout")


def test_separate_sides_pass(train: Group, holdout: Group) -> None:
    assert disjoint(train, holdout, RULES).status is Status.PASS


def test_a_shared_patient_is_invalid(train: Group, holdout: Group) -> None:
    shared = replace(holdout, patients=(train.patients[0], *holdout.patients[1:]))
    found = disjoint(train, shared, RULES)
    assert found.status is Status.INVALID
    assert train.patients[0] not in found.model_dump_json()


def test_a_training_tile_in_the_holdout_is_found_even_when_mirrored(
    world: World, train: Group, tmp_path: Path
) -> None:
    shutil.copytree(world.holdout, tmp_path / "holdout")
    tile = np.array(Image.open(world.train / "tpatient-03" / "0.png"))
    Image.fromarray(tile[:, ::-1]).save(tmp_path / "holdout" / "hpatient-01" / "extra.png")
    assert disjoint(train, group(tmp_path / "holdout"), RULES).status is Status.INVALID


def test_a_compressed_training_tile_in_the_holdout_is_noticed(
    world: World, train: Group, tmp_path: Path
) -> None:
    shutil.copytree(world.holdout, tmp_path / "holdout")
    tile = Image.open(world.train / "tpatient-03" / "0.png")
    tile.save(tmp_path / "holdout" / "hpatient-01" / "extra.jpg", quality=85)
    assert disjoint(train, group(tmp_path / "holdout"), RULES).status is Status.REVIEW


def test_repeated_fields_count_as_one_cluster(train: Group) -> None:
    twice = replace(
        train,
        features=train.features.select([*range(len(train)), 0, 0, 5]),
    )
    assert twin_clusters(train, RULES.twin_correlation) == len(train)
    assert twin_clusters(twice, RULES.twin_correlation) == len(train)


@pytest.mark.parametrize(
    ("rule", "status"),
    [
        ({}, Status.REVIEW),  # 12 patients a side: between the two limits
        ({"review_patients_below": 12}, Status.PASS),
        ({"invalid_patients_below": 13}, Status.INVALID),
        ({"min_null_tiles": 1000}, Status.INVALID),
        ({"min_synthetic_tiles": 500}, Status.INVALID),
    ],
)
def test_small_samples_do_not_pass(
    train: Group, holdout: Group, rule: dict[str, int], status: Status
) -> None:
    assert sizes(train, holdout, train, RULES.model_copy(update=rule), COPIES).status is status


def test_a_large_release_needs_a_large_holdout(train: Group, holdout: Group) -> None:
    def judged(large: int) -> Status:
        rules = RULES.model_copy(update={"review_patients_below": 12})
        return sizes(
            train, holdout, train, rules, COPIES.model_copy(update={"large_release_tiles": large})
        ).status

    assert len(holdout) == len(train) == 108
    assert judged(108) is Status.PASS and judged(109) is Status.PASS
    fewer = few(holdout, 107)
    rules = RULES.model_copy(update={"review_patients_below": 12})
    found = sizes(train, fewer, train, rules, COPIES.model_copy(update={"large_release_tiles": 108}))
    assert found.status is Status.REVIEW and "large" in found.why


def few(group: Group, count: int) -> Group:
    kept = range(count)
    return replace(
        group,
        ids=group.ids[:count],
        patients=group.patients[:count],
        strata=group.strata[:count],
        features=group.features.select(list(kept)),
    )


def test_small_counts_of_patients_are_not_printed(train: Group, holdout: Group) -> None:
    found = sizes(train, holdout, train, RULES.model_copy(update={"min_count_shown": 20}), COPIES)
    assert found.value is None and found.details["train_patients"] == "fewer than 20"


def sources(world: World, folder: Path) -> tuple[TileSource, TileSource]:
    for side in ("train", "holdout"):
        shutil.copytree(getattr(world, side), folder / side)
    return (
        open_tiles(folder / "train", name="training", needs_patients=True),
        open_tiles(folder / "holdout", name="holdout", needs_patients=True),
    )


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({}, Status.PASS),
        ({"train": ["someone"]}, Status.INVALID),
        ({"train": [f"tpatient-{number:02d}" for number in range(13)]}, Status.REVIEW),  # one is not here
        ({"holdout": [f"hpatient-{number:02d}" for number in range(13)]}, Status.REVIEW),
        (
            {"drawn_at": "2026-01-05T08:00:00", "training_started_at": "2026-01-06T08:00:00+00:00"},
            Status.PASS,
        ),
        ({"holdout": None}, Status.REVIEW),
        ({"drawn_at": "yesterday"}, Status.REVIEW),
        ({"training_started_at": "2026-01-01T00:00:00+00:00"}, Status.REVIEW),
    ],
)
def test_the_split_file_must_agree(
    world: World, train: Group, holdout: Group, tmp_path: Path, change: dict[str, object], status: Status
) -> None:
    value = json.loads((world.train.parent / "split.json").read_text())
    (tmp_path / "split.json").write_text(json.dumps(value | change))
    assert drawn_before(find_split(*sources(world, tmp_path)), train, holdout, RULES).status is status


@pytest.mark.parametrize("text", [None, "[]", "{", ""])
def test_without_evidence_a_person_must_vouch(
    world: World, train: Group, holdout: Group, tmp_path: Path, text: str | None
) -> None:
    if text is not None:
        (tmp_path / "split.json").write_text(text)
    evidence = find_split(*sources(world, tmp_path))
    assert drawn_before(evidence, train, holdout, RULES).status is Status.REVIEW


def test_strata_that_stand_on_one_side_only_are_merged(train: Group, holdout: Group) -> None:
    labelled = replace(train, strata=("north",) * len(train))
    cohort = cohort_of(labelled, replace(holdout, strata=("south",) * len(holdout)))
    assert set(cohort.stratum.tolist()) == {-1}
    both = cohort_of(labelled, replace(holdout, strata=("north",) * len(holdout)))
    assert len(set(both.stratum.tolist())) == 1 and both.is_train.sum() == len(train.patient_names)
