"""An outsider audits another lab's release from plain folders; and whatever is wrong with them is said, never passed."""

from __future__ import annotations

import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
import yaml
from click.testing import Result
from PIL import Image
from safetensors.numpy import save_file
from typer.testing import CliRunner

from pixcell_core.errors import BadInputError
from pixcell_core.models import PixCellTransformer2DModel
from privacy_audit import commands
from privacy_audit.battery import Extras
from privacy_audit.patients import TAIL_GIVEN
from privacy_audit.report import AuditReport
from privacy_audit.result import Status
from privacy_audit.run import AuditRequest, run_audit
from privacy_audit.tiles import TileError, decode_tile, open_tiles, read_patients
from privacy_audit.verify import verify_audit
from tests.privacy_audit.conftest import Audited, TextureEye, World, small_policy

BEFORE = datetime(2026, 1, 4, tzinfo=UTC)  # a day before the split of the small world


def flat(folder: Path, out: Path, names: dict[str, str], side: str) -> None:
    """All tiles of a side in one folder, as another lab has them; `names` gets the patient of each."""
    out.mkdir()
    for number, tile in enumerate(sorted(folder.rglob("*.png"))):
        shutil.copy(tile, out / f"{number:04d}.png")
        names[f"{side}/{number:04d}.png"] = tile.parent.name


@pytest.fixture(scope="module")
def lab(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Flat folders, a table of patients, and embeddings of another encoder that know the training patients."""
    root = tmp_path_factory.mktemp("lab")
    names: dict[str, str] = {}
    flat(world.train, root / "train", names, "train")
    flat(world.holdout, root / "holdout", names, "holdout")
    shutil.copytree(world.honest, root / "release")
    (root / "patients.csv").write_text("file,patient\n" + "".join(f"{a},{b}\n" for a, b in names.items()))
    shutil.copy(world.train.parent / "split.json", root / "split.json")
    rng = np.random.default_rng(0)
    np.savez(root / "embeddings.npz", **vectors(root, rng))
    return root


def vectors(root: Path, rng: np.random.Generator, width: int = 8, leak: float = 0.0) -> dict[str, Any]:
    """One vector per tile; with a leak, released tiles lie on training tiles."""
    found = {
        f"{side}/{path.name}": rng.normal(size=width).astype(np.float32)
        for side, folder in (("train", "train"), ("holdout", "holdout"), ("synthetic", "release"))
        for path in sorted((root / folder).glob("*.png"))
    }
    train = [vector for name, vector in found.items() if name.startswith("train/")]
    for name in [name for name in found if name.startswith("synthetic/")]:
        if rng.random() < leak:
            found[name] = train[int(rng.integers(len(train)))] + rng.normal(0, 0.01, width).astype(np.float32)
    return found


def run(lab: Path, out: Path, **extras: Any) -> AuditReport:
    request = AuditRequest(
        lab / "train", lab / "holdout", lab / "release", out, small_policy(), 3,
        extras=Extras(**extras), patients=lab / "patients.csv",
    )  # fmt: skip
    return run_audit(request, TextureEye())


def test_plain_folders_a_table_and_a_file_of_embeddings_are_enough(
    lab: Path, honest: Audited, tmp_path: Path
) -> None:
    report = run(lab, tmp_path / "out", embeddings=lab / "embeddings.npz")
    assert report.verdict is honest.report.verdict is Status.REVIEW
    given = report.test(TAIL_GIVEN)
    # These vectors are noise: that they find nothing is no reason to pass, and no other eye's power stands in for theirs.
    assert given is not None and given.status is Status.PASS and not given.gating
    assert "was not measured" in given.why and "catch" not in given.why and given.details["power"] is None
    assert report.subjects.train.patients == honest.report.subjects.train.patients
    verified = verify_audit(tmp_path / "out", lab / "release")
    assert verified.verified and verified.complete


def test_embeddings_that_know_the_training_patients_betray_a_leak(lab: Path, tmp_path: Path) -> None:
    save_file(vectors(lab, np.random.default_rng(1), leak=0.9), tmp_path / "e.safetensors")
    report = run(lab, tmp_path / "out", embeddings=tmp_path / "e.safetensors")
    given = report.test(TAIL_GIVEN)
    assert (
        given is not None and given.status is Status.FAIL and given.gating and report.verdict is Status.FAIL
    )


def spoil_width(found: dict[str, Any]) -> None:
    found["holdout/0003.png"] = found["holdout/0003.png"][:-1]


def spoil_nan(found: dict[str, Any]) -> None:
    found["synthetic/s001.png"] = np.full(8, np.nan, dtype=np.float32)


def spoil_missing(found: dict[str, Any]) -> None:
    del found["train/0000.png"]


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (spoil_width, "embeddings-width"),
        (spoil_nan, "embeddings-not-finite"),
        (spoil_missing, "embeddings-missing"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(
    lab: Path, tmp_path: Path, spoil: Callable[[dict[str, Any]], None], code: str
) -> None:
    found = vectors(lab, np.random.default_rng(2))
    spoil(found)
    np.savez(tmp_path / "e.npz", **found)
    with pytest.raises(BadInputError) as caught:
        run(lab, tmp_path / "out", embeddings=tmp_path / "e.npz")
    assert caught.value.code == code
    assert not (tmp_path / "out" / "report.json").exists()


def test_pickled_or_broken_embeddings_are_refused(lab: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "pickled.npz", **{"train/0000.png": np.array([{"a": 1}], dtype=object)})
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 broken")
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 40)
    for name in ("pickled.npz", "broken.npz", "broken.safetensors", "absent.npz"):
        with pytest.raises(BadInputError):
            run(lab, tmp_path / "out", embeddings=tmp_path / name)


def test_tables_of_patients_are_read_strictly(lab: Path, tmp_path: Path) -> None:
    table = tmp_path / "p.csv"
    for text in (
        "file,patient\n",
        "file\n0.png\n",
        "file,patient\n0.png,\n",
        "file,patient\n0.png,a\n0.png,b\n",
    ):
        table.write_text(text)
        with pytest.raises(TileError):
            read_patients(table)
    table.write_text("file,patient\n0000.png,someone\n")
    with pytest.raises(TileError, match="no patient"):
        open_tiles(lab / "train", name="training", needs_patients=True, patients=read_patients(table))


# --- what is wrong with the tiles themselves -------------------------------------------------------------------------


def png_16(path: Path) -> None:
    """A 16-bit RGB PNG, which the reader would quietly halve."""
    rows = b"".join(b"\x00" + bytes(64 * 6) for _ in range(64))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 64, 64, 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def animated(path: Path) -> None:
    frames = [Image.new("RGB", (64, 64), (200, 100 + step, 180)) for step in range(3)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def transparent(path: Path) -> None:
    pixels = np.full((64, 64, 4), 200, dtype=np.uint8)
    Image.fromarray(pixels).save(path)


BAD_TILES: dict[str, Callable[[Path], None]] = {
    "cmyk.jpg": lambda path: Image.new("CMYK", (64, 64)).save(path),
    "cmyk.tif": lambda path: Image.new("CMYK", (64, 64)).save(path),
    "deep.png": lambda path: Image.fromarray(np.full((64, 64), 40_000, dtype=np.uint16)).save(path),
    "deep.tif": lambda path: Image.fromarray(np.full((64, 64), 40_000, dtype=np.uint16)).save(path),
    "float.tif": lambda path: Image.fromarray(np.ones((64, 64), dtype=np.float32)).save(path),
    "deep-rgb.png": png_16,
    "animated.png": animated,
    "pages.tif": animated,
    "transparent.png": transparent,
    "cut.png": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 30),
    "gif.png": lambda path: Image.new("RGB", (64, 64)).save(path, format="GIF"),
}


@pytest.mark.parametrize("name", BAD_TILES)
def test_pictures_that_are_no_plain_tiles_are_refused_by_name(tmp_path: Path, name: str) -> None:
    BAD_TILES[name](tmp_path / name)
    with pytest.raises(TileError, match=name):
        decode_tile(tmp_path / name)


def test_plain_tiles_of_every_usual_kind_are_read(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for name, picture in {
        "rgb.png": Image.fromarray(pixels),
        "rgb.tif": Image.fromarray(pixels),
        "grey.png": Image.fromarray(pixels[..., 0]),
        "opaque.png": Image.fromarray(np.dstack([pixels, np.full((64, 64), 255, np.uint8)])),
    }.items():
        picture.save(tmp_path / name)
        assert decode_tile(tmp_path / name).shape == (64, 64, 3)
    assert np.array_equal(decode_tile(tmp_path / "rgb.tif"), pixels)


def copied(world: World, root: Path) -> World:
    """The small world's folders, to be spoilt."""
    for name in ("train", "holdout", "honest"):
        shutil.copytree(getattr(world, name), root / name)
    shutil.copy(world.train.parent / "split.json", root / "split.json")
    return World(root / "train", root / "holdout", root / "honest", root / "dishonest", {})


def one_patient(world: World) -> None:
    for folder in sorted(world.holdout.iterdir())[1:]:
        shutil.rmtree(folder)


def one_patient_in_training(world: World) -> None:
    for folder in sorted(world.train.iterdir())[1:]:
        shutil.rmtree(folder)


def shared_by_name(world: World) -> None:
    (world.holdout / "hpatient-00").rename(world.holdout / "tpatient-00")


def shared_by_content(world: World) -> None:
    tile = Image.open(world.train / "tpatient-00" / "0.png")
    tile.transpose(Image.Transpose.ROTATE_90).save(world.holdout / "hpatient-00" / "0.png")


def few_tiles(world: World) -> None:
    for tile in sorted(world.honest.glob("*.png"))[5:]:
        tile.unlink()


@pytest.mark.parametrize(
    "spoil", [one_patient, one_patient_in_training, shared_by_name, shared_by_content, few_tiles]
)
def test_a_comparison_that_cannot_hold_is_invalid(
    world: World, tmp_path: Path, spoil: Callable[[World], None]
) -> None:
    spoilt = copied(world, tmp_path)
    spoil(spoilt)
    request = AuditRequest(spoilt.train, spoilt.holdout, spoilt.honest, tmp_path / "out", small_policy(), 3)
    report = run_audit(request, TextureEye())
    assert report.verdict is Status.INVALID
    assert json.loads((tmp_path / "out" / "report.json").read_text())["verdict"] == "INVALID"


def empty(world: World) -> None:
    shutil.rmtree(world.honest)
    world.honest.mkdir()


def mixed(world: World) -> None:
    Image.new("RGB", (96, 96)).save(world.honest / "s000.png")


def other_size_of_holdout(world: World) -> None:
    for tile in world.holdout.rglob("*.png"):
        Image.open(tile).resize((96, 96)).save(tile)


def corrupt(world: World) -> None:
    (world.train / "tpatient-03" / "4.png").write_bytes(b"no picture")


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (empty, "no-tiles"),
        (mixed, "mixed-tile-sizes"),
        (other_size_of_holdout, "mixed-tile-sizes"),
        (corrupt, "tile-unreadable"),
    ],
)
def test_folders_that_cannot_be_read_are_a_named_error(
    world: World, tmp_path: Path, spoil: Callable[[World], None], code: str
) -> None:
    spoilt = copied(world, tmp_path)
    spoil(spoilt)
    request = AuditRequest(spoilt.train, spoilt.holdout, spoilt.honest, tmp_path / "out", small_policy(), 3)
    with pytest.raises(BadInputError) as caught:
        run_audit(request, TextureEye())
    assert caught.value.code == code
    assert not (tmp_path / "out" / "report.json").exists()


def test_unequal_sizes_do_not_make_an_innocent_release_fail(world: World, tmp_path: Path) -> None:
    spoilt = copied(world, tmp_path)
    for folder in sorted(spoilt.holdout.iterdir())[6:]:
        shutil.rmtree(folder)
    policy = small_policy(preconditions__min_null_tiles=50, self_test__max_null_false_positive=0.5)
    request = AuditRequest(spoilt.train, spoilt.holdout, spoilt.honest, tmp_path / "out", policy, 3)
    report = run_audit(request, TextureEye())
    patients = [test for test in report.tests if test.section == "attribution" and test.gating]
    assert patients and all(test.status is not Status.FAIL for test in patients)


def test_a_clock_in_the_past_is_a_named_error(world: World, tmp_path: Path) -> None:
    request = AuditRequest(
        world.train, world.holdout, world.honest, tmp_path / "out", small_policy(), 3, now=BEFORE
    )
    with pytest.raises(BadInputError) as caught:
        run_audit(request, TextureEye())
    assert caught.value.code == "clock-behind"


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Iterator[typer.Typer]:
    monkeypatch.setattr("privacy_audit.run.SecondEye", lambda side, device: TextureEye(device))
    root = typer.Typer()
    root.callback()(lambda: None)
    commands.register(root)
    yield root
    os.environ.pop("PIXCELL_EXIT", None)


def call(cli: typer.Typer, *arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["audit", *map(str, arguments)])


def everything(lab: Path, tmp_path: Path) -> list[str | Path]:
    policy = tmp_path / "policy.yaml"
    policy.write_text(yaml.safe_dump(small_policy().model_dump(mode="json")))
    return [
        "run", "--train", lab / "train", "--holdout", lab / "holdout", "--synthetic", lab / "release",
        "--out", tmp_path / "out", "--patients", lab / "patients.csv", "--policy", policy, "--seed", "1",
        "--format", "json",
    ]  # fmt: skip


def test_the_command_takes_conditions_canaries_and_embeddings(
    cli: typer.Typer, lab: Path, tmp_path: Path
) -> None:
    released = sorted(path.name for path in (lab / "release").glob("*.png"))
    pairs = "".join(f"{name},{number:04d}.png\n" for number, name in enumerate(released))
    (tmp_path / "conditions.csv").write_text("surrogate,tile\n" + pairs)
    report = {
        "canaries": 50,
        "epsilon_lower_bound": 0.4,
        "epsilon_claimed": 4.0,
        "delta": 1e-5,
        "unit": "patient",
    }
    (tmp_path / "canaries.json").write_text(json.dumps(report))
    result = call(
        cli, *everything(lab, tmp_path), "--conditions", tmp_path / "conditions.csv",
        "--canary-report", tmp_path / "canaries.json", "--embeddings", lab / "embeddings.npz",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    tests = {test["name"]: test for test in json.loads(result.stdout)["data"]["tests"]}
    assert tests["conditioning pairs"]["tested"] and tests["conditioning pairs"]["status"] == "PASS"
    assert tests["differential privacy: ledger and canaries"]["tested"]
    assert TAIL_GIVEN in tests
    assert not tests["membership by weights"]["tested"]


def test_the_command_attacks_the_weights_with_the_encoders_that_are_named(
    cli: typer.Typer, lab: Path, tmp_path: Path
) -> None:
    for seed, name in enumerate(("base", "generator")):
        torch.manual_seed(seed)
        PixCellTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=1,
            cross_attention_dim=32, sample_size=8, patch_size=2, caption_channels=8,
        ).save_pretrained(tmp_path / name)  # fmt: skip
    weights = ["--generator", tmp_path / "generator", "--base", tmp_path / "base"]
    result = call(cli, *everything(lab, tmp_path), *weights)
    assert result.exit_code == 4  # the starter's encoders are not this toy generator's
    assert json.loads(result.stdout)["code"] in ("encoder-of-another-model", "tile-size")
    lonely = call(cli, *everything(lab, tmp_path), "--generator", tmp_path / "generator")
    assert lonely.exit_code == 4 and json.loads(lonely.stdout)["code"] == "weights-incomplete"


def test_every_option_that_cannot_be_read_exits_4(cli: typer.Typer, lab: Path, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("no,columns\n1,2\n")
    for option in ("--conditions", "--canary-report", "--ledger-export", "--embeddings", "--patients"):
        result = call(cli, *everything(lab, tmp_path), option, tmp_path / "x.csv")
        assert result.exit_code == 4, (option, result.output)
        body = json.loads(result.stdout)
        assert body["status"] == "error" and body["hint"] and "Traceback" not in result.output
