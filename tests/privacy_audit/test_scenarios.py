"""Whole audits: an honest release, one with planted tiles, and the ways in which an audit may hold no opinion."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixcell_core.errors import BadInputError
from privacy_audit.report import AuditReport
from privacy_audit.result import Status
from privacy_audit.run import write_report
from privacy_audit.verify import load_report, verify_audit
from site_client.release.evidence import refuse_site_only
from site_client.release.source_tiles import SiteOnlyError
from tests.privacy_audit.conftest import Audited, World, audit, small_policy, stain_of, tissue_tile


def named(report: AuditReport) -> set[str]:
    """Released tiles that are copies for certain; a small null may add a chance flag that a person looks at."""
    return {flag.synthetic for flag in report.flagged if flag.kind != "near copy"}


def test_a_dishonest_release_fails_and_exactly_the_planted_tiles_are_named(
    dishonest: Audited, world: World
) -> None:
    assert dishonest.report.verdict is Status.FAIL
    assert named(dishonest.report) == world.planted
    kinds = [flag.kind for flag in dishonest.report.flagged]
    assert kinds.count("exact copy") == 4  # as it is, and turned or mirrored
    assert kinds.count("confirmed near copy") == 2  # compressed


def test_the_flagged_list_points_to_the_right_training_tiles(dishonest: Audited, world: World) -> None:
    pairs = json.loads((dishonest.out / "site" / "neighbours.json").read_text())["flagged"]
    assert all(pair["training_tile"].startswith("tpatient-") for pair in pairs)
    certain = [pair for pair in pairs if pair["kind"] != "near copy"]
    assert {pair["synthetic"]: pair["training_tile"] for pair in certain} == world.sources


def test_an_honest_release_does_not_fail(honest: Audited) -> None:
    assert honest.report.verdict in (Status.PASS, Status.REVIEW)
    assert not any(flag.kind != "near copy" for flag in honest.report.flagged)
    assert all(test.status is not Status.INVALID for test in honest.report.tests)


def test_every_run_proves_what_it_can_see(honest: Audited) -> None:
    assert len(honest.report.proven_kinds) == 13
    planted = honest.report.test("self-test: planted copies")
    assert planted is not None
    assert all(d.planted == 8 and d.lower <= d.sensitivity for d in planted.detections)


def test_a_run_repeats_with_its_seed(honest: Audited, world: World, tmp_path: Path) -> None:
    shutil.copytree(honest.out / "site", tmp_path / "again" / "site")
    again = audit(world, world.honest, tmp_path / "again")
    assert again.tests == honest.report.tests
    assert again.evidence_digest == honest.report.evidence_digest


def test_an_audit_that_cannot_see_is_invalid_even_when_it_found_a_leak(world: World, tmp_path: Path) -> None:
    policy = small_policy(self_test__gates={"exact": 0.9})  # 8 of 8 proves .688 at most
    report = audit(world, world.dishonest, tmp_path, policy)
    assert report.verdict is Status.INVALID
    assert named(report) == world.planted


def test_nothing_that_may_be_shared_names_a_patient(dishonest: Audited) -> None:
    for name in ("report.json", "report.html"):
        text = (dishonest.out / name).read_text()
        assert "patient-" not in text
        assert (
            "data:image" not in text
            and "<img" not in text
            and "<script" not in text
            and "http:" not in text.replace("http://www.w3.org/2000/svg", "")
        )
    site = (dishonest.out / "site" / "report.html").read_text()
    assert "SITE ONLY" in site and "data:image/png" in site


def test_site_images_carry_the_mark_that_the_gate_refuses(dishonest: Audited) -> None:
    text = (dishonest.out / "site" / "report.html").read_text()
    uris = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", text)
    assert len(uris) >= 24
    info = Image.open(io.BytesIO(base64.b64decode(uris[0]))).info
    assert any("site only" in str(value).lower() for value in info.values())


def test_the_gate_refuses_the_sites_page_and_takes_the_shareable_one(dishonest: Audited) -> None:
    site = (dishonest.out / "site" / "report.html").read_bytes()
    refuse_site_only("report.html", (dishonest.out / "report.html").read_bytes())
    for page in (site, re.sub(rb"(?i)site only", b"anything", site)):  # the pictures alone are enough
        with pytest.raises(SiteOnlyError, match="own eyes"):
            refuse_site_only("report.html", page)


def test_names_that_identify_are_refused_before_anything_is_read(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "release"
    folder.mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(tissue_tile(rng, stain_of(rng))).save(folder / "tpatient-03_7.png")
    with pytest.raises(BadInputError, match="patient identifier"):
        audit(world, folder, tmp_path / "o")


def test_verification_recomputes_the_verdict(dishonest: Audited, world: World) -> None:
    found = verify_audit(dishonest.out, world.dishonest)
    assert found.verified and found.complete and found.exit_code == 0


@pytest.mark.parametrize(
    "what", ["verdict", "score", "page", "policy", "evidence", "tile", "summary", "patients", "tool", "name"]
)
def test_verification_sees_every_kind_of_tampering(
    dishonest: Audited, world: World, tmp_path: Path, what: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(dishonest.out, out, ignore=shutil.ignore_patterns("cache"))
    synthetic = world.dishonest
    path = out / "report.json"
    body = json.loads(path.read_text())
    if what == "verdict":
        body["verdict"] = "PASS"
    elif what == "score":
        body["flagged"] = body["flagged"][1:]
    elif what == "summary":
        body["summary"] = "These tiles may be put before the signer."
    elif what == "patients":
        body["subjects"]["train"]["patients"] = "1000 to 1999"
    elif what == "tool":
        body["tool"]["eye"] = "another"
    elif what == "name":
        body["policy"]["words"] = "stricter than it was"
    elif what == "policy":
        body["policy"]["settings"]["copies"]["flag_p"] = 0.001
    elif what == "page":
        (out / "report.html").write_text((out / "report.html").read_text().replace("FAIL", "PASS"))
    elif what == "evidence":
        (out / "site" / "evidence.npz").write_bytes((out / "site" / "evidence.npz").read_bytes() + b"0")
    else:
        synthetic = tmp_path / "tiles"
        shutil.copytree(world.dishonest, synthetic)
        next(synthetic.glob("*.png")).write_bytes(next(world.honest.glob("*.png")).read_bytes())
    path.write_text(json.dumps(body))
    if what in ("summary", "patients", "tool", "name"):  # with a page that agrees
        write_report(out, load_report(out))
    found = verify_audit(out, synthetic)
    assert not found.verified and found.exit_code == 1


def test_a_shared_report_alone_is_verified_in_part(dishonest: Audited, tmp_path: Path) -> None:
    for name in ("report.json", "report.html"):
        shutil.copy(dishonest.out / name, tmp_path / name)
    found = verify_audit(tmp_path)
    assert found.verified and not found.complete
