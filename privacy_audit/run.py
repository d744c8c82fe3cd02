"""Runs an audit: reads tiles, gathers evidence, judges it, writes the report. The only room with files and clocks."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from pixcell_core.contracts import digest
from pixcell_core.contracts.bands import band
from pixcell_core.contracts.release import tiles_root
from pixcell_core.errors import PixcellError
from pixcell_core.models.devices import choose_device
from privacy_audit import base_twins, battery
from privacy_audit.battery import Prepared
from privacy_audit.blinding import Blinding
from privacy_audit.copies import exact_matches
from privacy_audit.deciding import Decided
from privacy_audit.distances import distances_by_eye, distances_by_shape
from privacy_audit.duplicates import Duplicates, duplicates_result, find_duplicates
from privacy_audit.evidence import Evidence
from privacy_audit.evidence_parts import DisclosureEvidence
from privacy_audit.eye import Eye, SecondEye
from privacy_audit.features import TileFeatures, join, load_features
from privacy_audit.filtering import filtered_release
from privacy_audit.gallery import write_site_page
from privacy_audit.identity import PLANTED, identity_curve, identity_distances, identity_rows
from privacy_audit.judge import judge
from privacy_audit.neighbours import Standardiser
from privacy_audit.patients import View
from privacy_audit.policy import Policy
from privacy_audit.preconditions import (
    SplitEvidence,
    disjoint,
    drawn_before,
    find_split,
    require_time_after,
    sizes,
)
from privacy_audit.render import render_page
from privacy_audit.report import (
    CACHE_FOLDER,
    EVIDENCE,
    NEIGHBOURS,
    PAGE,
    REPORT,
    SITE_FOLDER,
    SITE_PAGE,
    TIMINGS,
    AuditReport,
    PolicyStatement,
    Reference,
    Released,
    ReleasedFile,
    Subjects,
    stated,
    summarise,
    timestamp,
    tool,
)
from privacy_audit.request import AuditRequest as AuditRequest
from privacy_audit.request import first_audit, refuse_identifying_names, refuse_same_folder, seed_of
from privacy_audit.result import TestResult
from privacy_audit.review_queue import KEY, QUEUE
from privacy_audit.screen import CopyScreen, ScreenScores
from privacy_audit.self_test import TEXTURE_FLOOR, plant, recoloured_holdout
from privacy_audit.spectrum import ShapeSpectra
from privacy_audit.subject import Cohort, Group, cohort_of
from privacy_audit.tiles import TileSource, open_tiles, read_patients, require_one_size


@dataclass
class _Clock:
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.seconds[name] = round(time.process_time() - start, 2)


def run_audit(request: AuditRequest, eye: Eye | None = None) -> AuditReport:
    """Audit a release and write `report.json`, `report.html` and the site's own pages into `request.out`.

    A verdict of FAIL or INVALID is a result, not an error.

    Raises:
        BadInputError: a folder or file cannot be used.
    """
    device = choose_device(request.device)
    now = request.now or datetime.now(UTC)
    table = read_patients(request.patients) if request.patients else None
    sources = (
        open_tiles(request.train, name="training", needs_patients=True, patients=table),
        open_tiles(request.holdout, name="holdout", needs_patients=True, patients=table),
        open_tiles(request.synthetic, name="synthetic", needs_patients=False),
    )
    refuse_same_folder(request)
    refuse_identifying_names(*sources)
    require_one_size(*sources)
    first = first_audit(request)
    split = find_split(sources[0], sources[1])
    require_time_after(now, split, first[0].created_at if first else None)
    prepared = battery.prepare(request.extras, sources)
    eye = eye or SecondEye(request.policy.copies.eye_pixels, device)
    out = _prepare(request.out)
    clock = _Clock()
    with clock.stage("looking"):
        train, holdout, synthetic = (_group(source, eye, out / CACHE_FOLDER) for source in sources)
        twins = _group(prepared.twins, eye, out / CACHE_FOLDER) if prepared.twins else None
    blinding = Blinding.make(out, request.filtered_from)
    subjects = _subjects(sources[2], train, holdout, synthetic, request.policy, blinding)
    seed = request.seed
    if seed is None:
        seed = seed_of(subjects.synthetic.root, request.policy.digest)
    filtering: tuple[TestResult, ...] = ()
    if first is not None:
        files = [file.sha256 for file in subjects.synthetic.files]
        filtering = (
            filtered_release(*first, files, (subjects.train.root, subjects.holdout.root), request.policy),
        )
    groups = (train, holdout, synthetic)
    evidence, scores, null = _gather(
        sources, groups, twins, eye, request.policy, seed, clock, blinding, split, prepared
    )
    used = tool(eye.name)
    evidence = replace(
        evidence,
        preconditions=evidence.preconditions + filtering,
        stated=stated(subjects.train, subjects.holdout, used),
    )
    with clock.stage("judging"):
        judged = judge(evidence, request.policy, seed)
    packed = evidence.to_bytes()
    report = AuditReport(
        verdict=judged.verdict,
        summary=summarise(judged.verdict, judged.tests, len(judged.flagged), len(synthetic)),
        created_at=timestamp(now),
        tool=used,
        policy=PolicyStatement(
            name=request.policy.name,
            words=request.policy.words,
            digest=request.policy.digest,
            settings=request.policy.model_dump(mode="json"),
        ),
        seed=seed,
        subjects=subjects,
        tests=judged.tests,
        flagged=judged.flagged,
        proven_kinds=judged.proven_kinds,
        not_tested=judged.not_tested,
        evidence_digest=digest(packed),
    )
    _write(out / EVIDENCE, packed)
    _write(out / NEIGHBOURS, json.dumps(_neighbours(report, train, blinding), indent=1).encode())
    _write(out / TIMINGS, json.dumps(clock.seconds, indent=1).encode())
    write_site_page(out, report, sources[0], sources[2], scores, evidence)
    marks = evidence.part(DisclosureEvidence)
    battery.write_review_queue(out, sources, groups, (scores, null), marks, request.policy, blinding, seed)
    write_report(out, report)
    return report


def write_report(out: Path, report: AuditReport) -> None:
    """Write the shareable page and, last, the JSON: a report that exists is complete."""
    _write(out / PAGE, render_page(report).encode())
    _write(out / REPORT, (json.dumps(report.model_dump(mode="json"), indent=1) + "\n").encode())


def write_decided(out: Path, decided: Decided) -> None:
    """Write an audit anew after a reviewer's decisions: evidence first, the JSON last."""
    _write(out / EVIDENCE, decided.evidence)
    _write(out / SITE_PAGE, decided.site_page.encode())
    write_report(out, decided.report)


def _gather(
    sources: tuple[TileSource, TileSource, TileSource],
    groups: tuple[Group, Group, Group],
    twins: Group | None,
    eye: Eye,
    policy: Policy,
    seed: int,
    clock: _Clock,
    blinding: Blinding,
    split: SplitEvidence | None,
    prepared: Prepared,
) -> tuple[Evidence, ScreenScores, ScreenScores]:
    train, holdout, synthetic = groups
    rng = np.random.default_rng([seed, 0])
    preconditions = (
        disjoint(train, holdout, policy.preconditions),
        sizes(train, holdout, synthetic, policy.preconditions, policy.copies),
        drawn_before(split, train, holdout, policy.preconditions),
    )
    shapes = ShapeSpectra.fit(train.features.thumbs, holdout.features.thumbs, device=eye.device)
    with clock.stage("duplicates"):
        duplicates = find_duplicates(train, shapes, policy.copies.min_overlap)
    with clock.stage("planting"):
        planted = plant(
            sources[0], train, sources[1], eye, policy.self_test.planted_per_kind, rng, duplicates
        )
        recoloured, rows = recoloured_holdout(
            sources[1], sources[0], eye, policy.self_test.recoloured_tiles, rng
        )
    standardise = Standardiser.fit(train.features.embeddings, holdout.features.embeddings)
    with clock.stage("screening"):
        screen = CopyScreen(train.features, standardise, shapes, policy.copies)
        tiles = [synthetic.features, planted.features, recoloured, holdout.features]
        scored = _blind(screen, [*tiles, twins.features] if twins else tiles, rng)
        del screen  # of a hundred thousand tiles it holds two gigabytes
    released, controls, colours, null = scored[:4]
    cohort = cohort_of(train, holdout, seed)
    with clock.stage("distances"):
        asked = (synthetic.features, planted.features)
        by_eye = distances_by_eye(asked, train, holdout, cohort, standardise, shapes.device)
        by_shape = distances_by_shape(asked, train, holdout, cohort, shapes)
        distances = [by_eye[0], by_shape[0], by_eye[1], by_shape[1]]
    with clock.stage("battery"):
        parts = battery.gather(prepared, sources, groups, cohort, standardise, (released, null), policy, seed)
        if twins is not None:
            parts["base_twins"] = base_twins.gather(scored[4], twins.features, blinding)
    with clock.stage("identity"):
        family = battery.family_size(parts, cohort, policy)
        identity = _identity(
            train, holdout, cohort, standardise, shapes, duplicates, distances, policy, seed, family
        )
    exact = exact_matches(synthetic, train)
    known = set(train.features.canonical)
    evidence = Evidence(
        released_ids=synthetic.ids,
        released_scores=released.score,
        released_nearest=tuple(
            blinding.name(train.features.digests[exact.get(row, int(match))])
            for row, match in enumerate(released.match)
        ),
        released_exact=np.array([row in exact for row in range(len(synthetic))], dtype=bool),
        released_distances=distances[0],
        released_shape_distances=distances[1],
        null_scores=null.score,
        null_owner=cohort.of_holdout,
        planted_scores=controls.score,
        planted_kind=planted.kind,
        planted_same=np.array([mark in known for mark in planted.features.canonical], dtype=bool),
        planted_right=duplicates.same(controls.match, planted.source),
        planted_distances=distances[2],
        planted_shape_distances=distances[3],
        planted_patient=cohort.of_train[planted.source],
        recoloured_scores=colours.score,
        recoloured_owner=cohort.of_holdout[rows],
        is_train=cohort.is_train,
        stratum=cohort.stratum,
        unrecognisable=float((train.features.texture <= TEXTURE_FLOOR).float().mean()),
        preconditions=(
            *preconditions,
            duplicates_result(duplicates, policy.self_test.planted_per_kind),
            identity,
        ),
        parts=parts,
    )
    return evidence, released, null


def _identity(
    train: Group,
    holdout: Group,
    cohort: Cohort,
    standardise: Standardiser,
    shapes: ShapeSpectra,
    duplicates: Duplicates,
    distances: list[npt.NDArray[np.float64]],
    policy: Policy,
    seed: int,
    family: int,
) -> TestResult:
    """Plant unused tissue of training patients in both views and draw the detection curve."""
    rng = np.random.default_rng([seed, 3])
    rows = identity_rows(cohort.of_train, PLANTED, rng)
    sides = (train.features, holdout.features)
    planted = [
        identity_distances(rows, view(), cohort, duplicates)
        for view in (
            lambda: standardise(*(side.embeddings for side in sides)),
            lambda: torch.cat([shapes(side.thumbs) for side in sides]),
        )
    ]
    seen = [View(*pair) for pair in zip(distances[:2], planted, strict=True)]
    return identity_curve(seen, cohort.of_train[rows], cohort, policy.patients, rng, family)


def _blind(screen: CopyScreen, groups: list[TileFeatures], rng: np.random.Generator) -> list[ScreenScores]:
    """Score all groups in one shuffled queue: the screen cannot know which tile was planted."""
    everyone = join(groups)
    order = rng.permutation(len(everyone))
    shuffled = screen.score(everyone.select(order), "searching for near copies")
    back = np.argsort(order)
    bounds = np.cumsum([0] + [len(group) for group in groups])
    return [shuffled[back[low:high]] for low, high in pairwise(bounds)]


def _group(source: TileSource, eye: Eye, cache: Path) -> Group:
    features = load_features(source, eye, cache)
    return Group(source.name, tuple(source.ids), tuple(source.patients), tuple(source.strata), features)


def _subjects(
    source: TileSource, train: Group, holdout: Group, synthetic: Group, policy: Policy, blinding: Blinding
) -> Subjects:
    files = source.file_digests()
    minimum = policy.preconditions.min_count_shown

    def reference(group: Group) -> Reference:
        return Reference(
            tiles=band(len(group)),
            patients=band(len(group.patient_names), minimum),
            root=blinding.root(group.features.digests),
        )

    return Subjects(
        synthetic=Released(
            tiles=len(synthetic),
            root=tiles_root(files),
            sorted_sha256=tuple(sorted(files)),
            files=tuple(
                ReleasedFile(name=name, sha256=file, pixel_sha256=pixels)
                for name, file, pixels in zip(synthetic.ids, files, synthetic.features.digests, strict=True)
            ),
        ),
        train=reference(train),
        holdout=reference(holdout),
    )


def _neighbours(report: AuditReport, train: Group, blinding: Blinding) -> dict[str, object]:
    """For the site alone: which training tile stands behind each blinded name of the flagged list."""
    names = dict(zip(map(blinding.name, train.features.digests), train.ids, strict=True))
    return {
        "mark": "SITE ONLY - do not export",
        "flagged": [{**flag.model_dump(), "training_tile": names[flag.nearest]} for flag in report.flagged],
    }


def _prepare(out: Path) -> Path:
    try:
        (out / SITE_FOLDER).mkdir(parents=True, exist_ok=True)
        (out / CACHE_FOLDER).mkdir(exist_ok=True)
        # An old report must not stand beside new evidence if this run is interrupted.
        for stale in (REPORT, PAGE, EVIDENCE, NEIGHBOURS, TIMINGS, QUEUE, KEY):
            (out / stale).unlink(missing_ok=True)
        free = shutil.disk_usage(out).free
    except OSError as error:
        raise PixcellError(
            f"Cannot write into {out}: {error.strerror or error}.",
            hint="Choose another --out or mend its permissions.",
            code="out-unwritable",
        ) from error
    if free < 64 * 1024 * 1024:
        raise PixcellError(
            f"The disk of {out} is full.", hint="Free some space and run again.", code="disk-full"
        )
    return out


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise PixcellError(
            f"Cannot write {path.name}: {error.strerror or error}.",
            hint="Free space on the disk and run the audit again; features are kept in its cache.",
            code="write-failed",
        ) from error
