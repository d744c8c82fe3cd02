"""A filtered release: a chance flag is withheld once, the rest is audited again, and everything else is no filtering."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixcell_core.contracts import digest
from pixcell_core.errors import BadInputError
from privacy_audit.copies import NEAR
from privacy_audit.filtering import filtered_release
from privacy_audit.policy import Policy
from privacy_audit.report import FILTERED, REPORT, AuditReport
from privacy_audit.result import Status
from privacy_audit.run import AuditRequest, run_audit
from privacy_audit.verify import verify_audit
from tests.privacy_audit.conftest import TextureEye, World, small_policy


def lenient() -> Policy:
    """One flag among some forty tiles is chance; a dozen patients a side have no power to speak of."""
    return small_policy(
        preconditions__review_patients_below=8,
        copies__max_flagged_share=0.1,
        patients__min_power=0.01,
        patients__power_copy_share=0.6,
        patients__power_min_copies=24,
        patients__power_simulations=40,
        linkability__max_risk=0.9,
        linkability__fail_risk=0.95,
    )


@dataclass(frozen=True)
class Doubtful:
    """A release with one tile that is half a training tile, and its first audit."""

    tiles: Path
    out: Path
    report: AuditReport
    flagged: str

    def check(self, **changes: object) -> tuple[Status, str]:
        """Status and reason of the filtering test, with one thing changed."""
        files = self.report.subjects.synthetic.files
        subjects = self.report.subjects
        given: dict[str, object] = {
            "first": self.report,
            "files": [file.sha256 for file in files if file.name != self.flagged],
            "roots": (subjects.train.root, subjects.holdout.root),
            "policy": lenient(),
            **changes,
        }
        test = filtered_release(first_bytes=b"{}", **given)  # type: ignore[arg-type]
        return test.status, test.why


@pytest.fixture(scope="module")
def doubtful(world: World, tmp_path_factory: pytest.TempPathFactory) -> Doubtful:
    root = tmp_path_factory.mktemp("doubtful")
    shutil.copytree(world.honest, root / "tiles")
    source = np.asarray(Image.open(next(world.train.glob("*/0.png"))), dtype=float)
    other = np.asarray(Image.open(root / "tiles" / "s005.png"), dtype=float)
    Image.fromarray((0.52 * source + 0.48 * other).astype(np.uint8)).save(root / "tiles" / "s005.png")
    report = run(world, root / "tiles", root / "first")
    assert report.verdict is Status.REVIEW, [(t.name, t.status) for t in report.tests]
    (flag,) = report.flagged
    return Doubtful(root / "tiles", root / "first", report, flag.synthetic)


def run(world: World, tiles: Path, out: Path, first: Path | None = None) -> AuditReport:
    """An audit of the small world, told of a first one where there was one."""
    request = AuditRequest(world.train, world.holdout, tiles, out, lenient(), 3, first)
    return run_audit(request, TextureEye())


def test_the_rest_is_audited_again_and_says_that_it_is_filtered(
    doubtful: Doubtful, world: World, tmp_path: Path
) -> None:
    shutil.copytree(doubtful.tiles, tmp_path / "rest")
    (tmp_path / "rest" / doubtful.flagged).unlink()
    report = run(world, tmp_path / "rest", tmp_path / "second", doubtful.out)
    test = report.test(FILTERED)
    assert test is not None
    assert test.status is Status.PASS
    assert (test.details["withheld"], test.details["of"]) == (1, 40)
    assert test.details["first_report"] == digest((doubtful.out / REPORT).read_bytes())
    assert report.verdict is Status.PASS
    near = report.test(NEAR)
    assert near is not None and not report.flagged and near.status is Status.PASS
    assert "Filtered: 1 of 40 tiles were withheld before" in report.summary
    assert "Filtered: 1 of 40 tiles" in (tmp_path / "second" / "report.html").read_text()
    verified = verify_audit(tmp_path / "second", tmp_path / "rest")
    assert verified.verified and verified.complete, str(verified)


def test_the_same_tiles_are_no_filtered_release(doubtful: Doubtful, world: World, tmp_path: Path) -> None:
    report = run(world, doubtful.tiles, tmp_path / "second", doubtful.out)
    assert report.verdict is Status.INVALID
    test = report.test(FILTERED)
    assert test is not None
    assert "without the flagged ones" in test.why


def test_a_first_audit_in_the_output_folder_is_not_overwritten(doubtful: Doubtful, world: World) -> None:
    before = (doubtful.out / REPORT).read_bytes()
    with pytest.raises(BadInputError, match="same folder"):
        run(world, doubtful.tiles, doubtful.out, doubtful.out)
    assert (doubtful.out / REPORT).read_bytes() == before


def test_what_is_no_filtering_of_chance_flags_is_invalid(doubtful: Doubtful) -> None:
    first = doubtful.report
    assert doubtful.check()[0] is Status.PASS
    files = [file.sha256 for file in first.subjects.synthetic.files if file.name != doubtful.flagged]
    failed = first.model_copy(update={"verdict": Status.FAIL})
    worse = tuple(
        test.model_copy(update={"status": Status.REVIEW}) if test.name.startswith("patient tail") else test
        for test in first.tests
    )
    filtered = filtered_release(
        first, b"{}", files, (first.subjects.train.root, first.subjects.holdout.root), lenient()
    )
    twice = first.model_copy(update={"tests": (*first.tests, filtered)})
    cases: list[tuple[dict[str, object], str]] = [
        ({"first": failed}, "FAIL"),
        ({"first": first.model_copy(update={"tests": worse})}, "nothing else"),
        ({"first": twice}, "filtered once"),
        ({"first": first.model_copy(update={"flagged": ()})}, "nothing to withhold"),
        ({"files": files[1:]}, "not the first audit's tiles"),
        ({"files": [*files, files[0]]}, "not the first audit's tiles"),
        ({"roots": (first.subjects.train.root, first.subjects.train.root)}, "other training or holdout"),
        ({"policy": small_policy()}, "another policy"),
    ]
    for change, words in cases:
        status, why = doubtful.check(**change)
        assert status is Status.INVALID, change
        assert words in why, why
