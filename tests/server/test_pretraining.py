"""Central pretraining on public tiles: bad images named, resumable, and a result whose digest the study can name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from pixcell_core.contracts.artifacts import base_digest
from pixcell_core.errors import BadInputError
from pixcell_core.models import PixCellTransformer2DModel
from pixcell_core.starter.weights import load_folder, save_folder, weights_digest
from server.pretraining import commands
from server.pretraining.public_tiles import draw_public_tiles, read_public_tiles
from server.pretraining.session import PretrainingRequest, pretrain
from tests.server.pretraining_inputs import picture, write_inputs


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def silent(count: int) -> None:
    """Nobody watches."""


@pytest.fixture
def request_(tmp_path: Path) -> PretrainingRequest:
    """Six public tiles and a tiny base as wide as the starter's encoder."""
    write_inputs(tmp_path)
    return PretrainingRequest(
        base=tmp_path / "base",
        tiles=tmp_path / "tiles",
        out=tmp_path / "out",
        tile_size=32,
        steps=25,
        batch_size=2,
        learning_rate=1e-3,
        seed=4,
        threads=1,
    )


def code(action: Any) -> str | None:
    with pytest.raises(BadInputError) as refused:
        action()
    return refused.value.code


def test_the_result_folder_loads_and_its_digest_is_the_one_named(request_: PretrainingRequest) -> None:
    counted: list[int] = []
    result = pretrain(request_, counted.append)
    folder = Path(result.base)
    assert sum(counted) == result.steps == 25 and result.public_tiles == 6
    assert (
        result.base_digest == weights_digest(folder) == base_digest(folder) != weights_digest(request_.base)
    )
    model = load_folder(PixCellTransformer2DModel, folder)
    assert dict(model.config)["caption_channels"] == 256
    lines = [json.loads(line) for line in (request_.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 26))
    assert not list(request_.out.glob("*.partial"))


def test_no_path_of_a_machine_is_written_and_equal_runs_have_equal_digests(
    request_: PretrainingRequest, tmp_path: Path
) -> None:
    """The library notes where a model was loaded from; the digest must not depend on it."""
    quick = replace(request_, steps=2)
    one = pretrain(quick, silent)
    (tmp_path / "moved").mkdir()
    base = request_.base.rename(tmp_path / "moved" / "elsewhere")
    other = pretrain(replace(quick, base=base, out=tmp_path / "second"), silent)
    assert one.base_digest == other.base_digest
    for result in (one, other):
        text = (Path(result.base) / "config.json").read_text()
        assert str(tmp_path) not in text and "_name_or_path" not in text


class Killed(BaseException):
    """What a test does to a run."""


def test_a_killed_run_resumes_to_the_same_model(request_: PretrainingRequest, tmp_path: Path) -> None:
    whole = pretrain(replace(request_, out=tmp_path / "whole"), silent)
    done = [0]

    def kill(count: int) -> None:
        done[0] += count
        if done[0] == 22:
            raise Killed

    with pytest.raises(Killed):
        pretrain(request_, kill)
    with (request_.out / "metrics.jsonl").open("a") as log:
        log.write('{"step": 23, "lo')  # what a kill leaves of a line
    counted: list[int] = []
    parts = pretrain(request_, counted.append)
    assert sum(counted) == 5, "from the checkpoint at step 20"
    assert parts == whole.model_copy(update={"base": parts.base}), "digest, losses and steps are equal"
    again = pretrain(request_, silent)
    assert again == parts


def test_a_folder_of_another_pretraining_is_refused(request_: PretrainingRequest, tmp_path: Path) -> None:
    """Without this the old checkpoint would be handed out as the pretraining of the new base or tiles."""
    quick = replace(request_, steps=2)
    first = pretrain(quick, silent)
    other = load_folder(PixCellTransformer2DModel, request_.base)
    with torch.no_grad():
        other.scale_shift_table.add_(1.0)
    save_folder(other, tmp_path / "base2")
    picture(tmp_path / "tiles2" / "a.png", seed=77)
    for changes in (
        {"base": tmp_path / "base2"},
        {"tiles": tmp_path / "tiles2"},
        {"seed": 5},
        {"learning_rate": 1e-2},
        {"batch_size": 3},
        {"tile_size": 16},
    ):
        changed = replace(quick, **changes)
        assert code(lambda changed=changed: pretrain(changed, silent)) == "pretraining-differs", changes
    assert weights_digest(Path(first.base)) == first.base_digest
    assert pretrain(replace(quick, steps=3), silent).steps == 3, "more steps of the same go on"


def test_unreadable_images_are_named(tmp_path: Path) -> None:
    good = picture(tmp_path / "good.png")
    data = good.read_bytes()
    assert read_public_tiles(tmp_path, 32).shape == (1, 3, 32, 32)
    bad = tmp_path / "bad.png"
    for content in (b"", b"no image", data[: len(data) // 2], data[:60]):
        bad.write_bytes(content)
        with pytest.raises(BadInputError, match=r"bad\.png") as refused:
            read_public_tiles(tmp_path, 32)
        assert refused.value.code == "unreadable-tile"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_garbled_images_are_read_or_refused_but_never_a_bug(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for suffix in ("png", "jpg", "tif"):
        data = picture(tmp_path / "good" / f"x.{suffix}").read_bytes()
        place = tmp_path / suffix / f"x.{suffix}"
        place.parent.mkdir()
        refused = 0
        for _ in range(120):
            torn = bytearray(data)
            for at in rng.integers(0, min(len(torn), 400), 3):
                torn[at] = rng.integers(256)
            place.write_bytes(torn)
            try:
                read_public_tiles(place.parent, 16)
            except BadInputError:
                refused += 1
        assert refused > 5, suffix


def test_small_images_missing_folders_and_odd_sizes_are_refused(
    request_: PretrainingRequest, tmp_path: Path
) -> None:
    picture(tmp_path / "small" / "s.png", (31, 40))
    with pytest.raises(BadInputError, match="31×40 px, smaller than a tile of 32 px"):
        read_public_tiles(tmp_path / "small", 32)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    for folder in ("empty", "nowhere"):
        assert code(lambda folder=folder: read_public_tiles(tmp_path / folder, 32)) == "no-public-tiles"
    for size in (0, 8, 40, -16):
        odd = replace(request_, tile_size=size)
        assert code(lambda odd=odd: pretrain(odd, silent)) == "tile-size-impossible"
    missing = replace(request_, base=tmp_path / "nowhere")
    assert code(lambda: pretrain(missing, silent)) == "weights-missing"
    assert not request_.out.exists(), "a refused run leaves nothing"


def test_centre_crops_whatever_the_mode_of_the_image(tmp_path: Path) -> None:
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[8:40, 16:48] = 200
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).convert("L").save(tmp_path / "b.tif")
    Image.fromarray(pixels).convert("RGBA").save(tmp_path / "deep.png")
    tiles = read_public_tiles(tmp_path, 32)
    assert tiles.shape == (3, 3, 32, 32) and tiles.dtype == torch.uint8
    assert (tiles == 200).all()


def test_drawn_tiles_are_kept_and_repeatable(tmp_path: Path) -> None:
    counted: list[int] = []
    draw_public_tiles(tmp_path / "a", 5, 32, 1, counted.append)
    assert sum(counted) == 5 and len(list((tmp_path / "a").iterdir())) == 5
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").iterdir()}
    draw_public_tiles(tmp_path / "a", 5, 32, 1, silent)
    assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / "a").iterdir()}
    draw_public_tiles(tmp_path / "b", 5, 32, 1, silent)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_the_command_asks_for_one_source_of_public_tiles(
    request_: PretrainingRequest, tmp_path: Path
) -> None:
    root = typer.Typer()
    root.callback()(lambda: None)
    commands.register(root)

    def call(*more: object) -> Any:
        given = [
            "pretrain",
            "--out",
            tmp_path / "o",
            "--base",
            request_.base,
            "--tile-size",
            32,
            "--steps",
            1,
        ]
        arguments = [*given, "--batch-size", 2, "--threads", 1, "--format", "json", *more]
        return CliRunner().invoke(root, [str(a) for a in arguments])

    for wrong in ((), ("--draw", 2, "--tiles", request_.tiles)):
        assert call(*wrong).exit_code == 4
    done = call("--tiles", request_.tiles)
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)["data"]
    assert data["base_digest"] == weights_digest(tmp_path / "o" / "transformer") and data["steps"] == 1
