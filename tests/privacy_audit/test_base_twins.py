"""Base-model twins: a second null that can only add suspicion, named in the report, and refused when it is another's."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from privacy_audit import commands
from privacy_audit.base_twins import TWIN_NULL, nulls_of, open_twins, read_origins
from privacy_audit.battery import Extras, prepare
from privacy_audit.conditioning import ConditionsError
from privacy_audit.copies import NEAR, least_null
from privacy_audit.evidence import Evidence
from privacy_audit.evidence_parts import BaseTwinEvidence
from privacy_audit.judge import judge
from privacy_audit.policy import parse_policy
from privacy_audit.report import EVIDENCE
from privacy_audit.result import Status
from privacy_audit.run import AuditRequest, run_audit
from privacy_audit.tiles import TileError, open_tiles
from privacy_audit.verify import verify_audit
from tests.privacy_audit.conftest import (
    RELEASED,
    SIDE,
    Audited,
    TextureEye,
    World,
    small_policy,
    stain_of,
    tissue_tile,
)


def draw(folder: Path, names: list[str], side: int = SIDE, seed: int = 5) -> Path:
    """Tiles of nobody under the given names, as a base model would draw them."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for name in names:
        Image.fromarray(tissue_tile(rng, stain_of(rng), side)).save(folder / name)
    return folder


def names_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def audited(world: World, tmp_path_factory: pytest.TempPathFactory) -> Audited:
    """The honest release with its twins."""
    out = tmp_path_factory.mktemp("twins")
    twins = draw(out / "twins", names_of(world.honest))
    request = AuditRequest(
        world.train,
        world.holdout,
        world.honest,
        out / "audit",
        small_policy(copies__flag_p=0.03),
        3,
        extras=Extras(base_twins=twins),
    )
    return Audited(out / "audit", run_audit(request, TextureEye()))


def test_twins_are_screened_named_and_kept_as_evidence(audited: Audited) -> None:
    evidence = Evidence.load(audited.out / EVIDENCE)
    twins = evidence.part(BaseTwinEvidence)
    assert twins is not None and len(twins.scores) == RELEASED and twins.root.startswith("sha256:")
    # Tiles of one kind score alike, whichever folder they came from: the screen saw them in one queue.
    assert np.median(twins.scores) == pytest.approx(np.median(evidence.released_scores), abs=0.1)
    near = audited.report.test(NEAR)
    assert near is not None and "holdout tiles and" in near.null and TWIN_NULL in near.null
    assert near.details[TWIN_NULL] == RELEASED
    assert near.details[f"{TWIN_NULL}: flag_threshold"] == pytest.approx(twins.scores.max())
    assert near.histogram is not None and [bars.name for bars in near.histogram.seconds] == [TWIN_NULL]
    page = (audited.out / "report.html").read_text()
    assert f"dotted brown outline: {TWIN_NULL}" in page and page.count('stroke-dasharray="2 2"') == 1
    checked = verify_audit(audited.out)
    assert checked.verified and checked.complete


def test_too_few_twins_flag_nothing_and_the_report_says_so(audited: Audited) -> None:
    evidence = Evidence.load(audited.out / EVIDENCE)
    policy = small_policy(copies__flag_p=0.01)
    few = judge(evidence, policy, 3)
    none = judge(
        replace(evidence, parts={k: v for k, v in evidence.parts.items() if k != "base_twins"}), policy, 3
    )
    assert few.flagged == none.flagged and few.verdict is none.verdict
    near = next(test for test in few.tests if test.name == NEAR)
    assert f"The {RELEASED} {TWIN_NULL} are too few" in near.why and "99 are needed" in near.why
    assert (near.p, near.details[f"{TWIN_NULL}: flag_threshold"]) == (
        next(test for test in none.tests if test.name == NEAR).p,
        None,
    )


def test_the_fewest_twins_that_have_a_threshold() -> None:
    for flag_p in (0.001, 0.01, 0.03, 0.5):
        least = least_null(flag_p)
        assert 1.0 / (least + 1) <= flag_p + 1e-12 and 1.0 / least > flag_p


def test_a_tile_that_stands_out_from_the_twins_alone_is_flagged(honest: Audited) -> None:
    """A tile under the holdout's maximum is no copy by the holdout; the base, drawing the same, came nowhere near."""
    evidence = Evidence.load(honest.out / EVIDENCE)
    policy = parse_policy(honest.report.policy.settings)
    scores = evidence.released_scores.copy()
    scores[0] = evidence.null_scores.max() - 1e-6
    below = replace(evidence, released_scores=scores)
    twins = np.full(150, float(np.sort(scores)[-2]))
    with_twins = replace(below, parts={**below.parts, "base_twins": BaseTwinEvidence(twins, "sha256:0")})
    before, after = judge(below, policy, 3), judge(with_twins, policy, 3)
    assert not before.flagged
    assert [flag.synthetic for flag in after.flagged] == [evidence.released_ids[0]]
    near = next(test for test in after.tests if test.name == NEAR)
    assert near.status is Status.REVIEW and "1 stand out, 1 of them not against the holdout" in near.why
    assert (nulls_of(with_twins).p_values(scores) <= nulls_of(below).p_values(scores)).all()
    # The proof of sensitivity must not rest on an optional folder.
    assert after.proven_kinds == before.proven_kinds


def refusal(folder: Path, released: Path, drawn: dict[str, str] | None = None) -> str:
    with pytest.raises(TileError) as refused:
        open_twins(folder, open_tiles(released, name="synthetic", needs_patients=False), drawn or {})
    assert refused.value.hint and refused.value.exit_code == 4
    return refused.value.code


def test_wrong_folders_are_refused(world: World, tmp_path: Path) -> None:
    names = names_of(world.honest)
    assert refusal(tmp_path / "nowhere", world.honest) == "no-folder"
    assert refusal(draw(tmp_path / "large", names, side=80), world.honest) == "mixed-tile-sizes"
    strangers = [f"t{name}" for name in names]
    assert refusal(draw(tmp_path / "foreign", strangers), world.honest) == "twins-of-another-release"
    mixed = [*names[:10], "stranger.png"]
    assert refusal(draw(tmp_path / "mixed", mixed), world.honest) == "twins-of-another-release"
    shutil.copytree(world.honest, tmp_path / "same")
    assert refusal(tmp_path / "same", world.honest) == "twins-are-the-release"


def test_fewer_twins_and_twins_of_withheld_tiles_are_taken(world: World, tmp_path: Path) -> None:
    released = open_tiles(world.honest, name="synthetic", needs_patients=False)
    names = names_of(world.honest)
    fewer = open_twins(draw(tmp_path / "fewer", names[:7]), released, {})
    assert list(fewer.ids) == names[:7] and fewer.read(0, 99).shape == (7, 3, SIDE, SIDE)
    more = open_twins(draw(tmp_path / "more", [*names, "withheld.png"]), released, {})
    assert list(more.ids) == names and len(more.file_digests()) == RELEASED


def test_origins_translate_the_names_of_a_release(world: World, tmp_path: Path) -> None:
    released = open_tiles(world.honest, name="synthetic", needs_patients=False)
    origins = {name: f"surrogate-{number:06d}.png" for number, name in enumerate(released.ids)}
    path = tmp_path / "origins.json"
    path.write_text(json.dumps(origins))
    drawn = read_origins(path, released.ids)
    twins = draw(tmp_path / "twins", sorted(origins.values()))
    assert list(open_twins(twins, released, drawn).ids) == sorted(origins.values())
    assert refusal(twins, world.honest) == "twins-of-another-release"
    for wrong in ("[]", '{"a": 1}', json.dumps({"s000.png": "x.png"})):
        path.write_text(wrong)
        with pytest.raises(TileError) as refused:
            read_origins(path, released.ids)
        assert refused.value.code == "bad-origins"


def test_the_command_takes_twins_and_refuses_a_folder_twice(world: World, tmp_path: Path) -> None:
    root = typer.Typer()
    root.callback()(lambda: None)
    commands.register(root)
    arguments = ["audit", "run", "--train", str(world.train), "--holdout", str(world.holdout), "--synthetic"]
    arguments += [
        str(world.honest),
        "--out",
        str(tmp_path / "out"),
        "--policy",
        "rehearsal",
        "--format",
        "json",
    ]
    same = CliRunner().invoke(root, [*arguments, "--base-twins", str(world.honest)])
    assert same.exit_code == 4 and json.loads(same.stdout)["code"] == "same-folder"
    missing = CliRunner().invoke(root, [*arguments, "--base-twins", str(tmp_path / "none")])
    assert missing.exit_code == 4 and json.loads(missing.stdout)["code"] == "no-folder"


def test_origins_translate_the_names_of_a_sites_own_conditions_too(world: World, tmp_path: Path) -> None:
    sources = tuple(
        open_tiles(folder, name=name, needs_patients=name != "synthetic")
        for folder, name in (
            (world.train, "training"),
            (world.holdout, "holdout"),
            (world.honest, "synthetic"),
        )
    )
    train, holdout, synthetic = sources
    origins = {name: f"surrogate-{number:06d}.png" for number, name in enumerate(synthetic.ids)}
    behind = {drawn: {"policy": "own", "sources": [train.ids[3]]} for drawn in origins.values()}
    (tmp_path / "origins.json").write_text(json.dumps(origins))
    (tmp_path / "conditions.json").write_text(json.dumps(behind))
    extras = Extras(conditions=tmp_path / "conditions.json", origins=tmp_path / "origins.json")
    prepared = prepare(extras, (train, holdout, synthetic))
    assert prepared.conditions is not None
    assert prepared.conditions.rows == {row: (3,) for row in range(RELEASED)}
    with pytest.raises(ConditionsError):
        prepare(Extras(conditions=tmp_path / "conditions.json"), (train, holdout, synthetic))
