"""Folders that cannot be drafted: each refused with one clear error, and nothing half-made left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image, PngImagePlugin

from pixcell_core.errors import BadInputError, PixcellError, RefusedError
from site_client.approvals.site_folder import SiteIdentity

if TYPE_CHECKING:
    from tests.site_client.release.conftest import Room


def bad_record(source: Path) -> None:
    (source / "generation.json").write_text("{}")


def no_record(source: Path) -> None:
    (source / "generation.json").unlink()


def no_tiles(source: Path) -> None:
    for path in source.glob("*.png"):
        path.unlink()


def broken_tile(source: Path) -> None:
    path = source / "surrogate-000002.png"
    path.write_bytes(path.read_bytes()[:200])


def empty_tile(source: Path) -> None:
    (source / "surrogate-000002.png").write_bytes(b"")


def other_size(source: Path) -> None:
    Image.new("RGB", (40, 48)).save(source / "surrogate-000002.png")


def linked_tile(source: Path) -> None:
    path = source / "surrogate-000002.png"
    path.unlink()
    path.symlink_to(source / "surrogate-000001.png")


def bad_table(source: Path) -> None:
    (source / "tiles.csv").write_text("file,colour\nsurrogate-000001.png,red\n")


@pytest.mark.parametrize(
    "change",
    [bad_record, no_record, no_tiles, broken_tile, empty_tile, other_size, linked_tile, bad_table],
)
def test_folders_that_cannot_be_drafted(room: Room, change: Callable[[Path], None]) -> None:
    change(room.source)
    with pytest.raises(BadInputError) as error:
        room.draft()
    assert error.value.hint
    assert not any(room.workspace.releases.glob("*")), "no half-made draft stays"
    assert not any(room.workspace.releases.glob(".*"))


def test_a_picture_marked_for_the_site_is_not_drafted(room: Room) -> None:
    mark = PngImagePlugin.PngInfo()
    mark.add_text("Comment", "SITE ONLY – do not export")
    Image.new("RGB", (48, 48)).save(room.source / "gallery.png", pnginfo=mark)
    with pytest.raises(RefusedError) as error:
        room.draft()
    assert error.value.code == "site-only"


def test_the_name_of_the_site(room: Room) -> None:
    from site_client.release.draft import seal_draft

    with pytest.raises(BadInputError, match="no name"):
        seal_draft(room.workspace, room.source, now=room.now)
    identity = SiteIdentity(site="south", hub="127.0.0.1:9092")
    (room.workspace.site_dir / "site.json").write_bytes(identity.to_bytes())
    assert seal_draft(room.workspace, room.source, now=room.now).manifest().site == "south"
    with pytest.raises(BadInputError, match="enrolled as south"):
        room.draft()


def test_a_full_disk_leaves_no_draft(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(PixcellError, match="No space left"):
        room.draft()
    assert not any(room.workspace.releases.iterdir())


def test_an_interrupted_draft_leaves_nothing(room: Room) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        room.draft(on_tile=stop)
    assert not any(room.workspace.releases.iterdir())
    assert room.draft().manifest().tile_count == 6


def leave_out(source: Path) -> None:
    """What a site does to whose audit flagged two tiles."""
    for number in (2, 5):
        (source / f"surrogate-{number:06d}.png").unlink()


def twice(source: Path) -> None:
    (source / "more").mkdir()
    (source / "more" / "surrogate-000001.png").write_bytes((source / "surrogate-000001.png").read_bytes())


def other_pixels(source: Path) -> None:
    Image.new("RGB", (48, 48)).save(source / "surrogate-000003.png")


def swapped_names(source: Path) -> None:
    first, second = source / "surrogate-000001.png", source / "surrogate-000002.png"
    one = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(one)


def old_record(source: Path) -> None:
    edit(source, lambda record: record.pop("pixel_digests"))


def pixels_of_some(source: Path) -> None:
    edit(source, lambda record: record["pixel_digests"].popitem())


def edit(source: Path, change: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads((source / "generation.json").read_text())
    change(record)
    (source / "generation.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (leave_out, "tiles-missing", "2 of the 6 tiles"),
        (twice, "tile-not-in-record", "here twice"),
        (other_pixels, "source-tile-changed", "1 tiles"),
        (swapped_names, "source-tile-changed", "2 tiles"),
        (old_record, "pixels-not-recorded", "earlier version"),
        (pixels_of_some, "source-tile-changed", "1 tiles"),
    ],
)
@pytest.mark.parametrize("tile_format", ["png", "jpg"])
def test_other_tiles_than_the_record_names_are_no_draft(
    room: Room, change: Callable[[Path], None], code: str, said: str, tile_format: str
) -> None:
    assert room.draft(tile_format=tile_format).manifest().tile_count == 6
    change(room.source)
    with pytest.raises(RefusedError, match=said) as error:
        room.draft(tile_format=tile_format)
    assert error.value.code == code and error.value.hint
    assert len(room.workspace.all_releases()) == 1
