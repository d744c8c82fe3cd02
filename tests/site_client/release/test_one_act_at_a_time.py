"""An export, a refusal and a withdrawal that race: real processes, of which one at a time is in the release room."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.trust.keys import SigningKey
from site_client.release.export import export_release
from site_client.release.refuse import refuse_release
from site_client.release.withdraw import withdraw_release
from site_client.release.workspace import REFUSAL, ReleaseWorkspace
from tests.site_client.release.conftest import NOW

if TYPE_CHECKING:
    from tests.site_client.release.conftest import Room

_SPAWN = multiprocessing.get_context("spawn")
_PATIENCE = 60.0
SECONDS_TO_OVERTAKE = 1.5
"""How long the second process has for an overtaking that must not happen."""


def wait_for(there: Callable[[], bool]) -> None:
    end = time.monotonic() + _PATIENCE
    while not there():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def slow_export(site: Path, out: Path, signals: Path) -> None:
    """An export that stops at its first tile until it is told to go on."""

    def stop() -> None:
        if not (signals / "inside").exists():
            (signals / "inside").touch()
            wait_for((signals / "go").exists)

    export_release(ReleaseWorkspace(site), out, now=NOW, on_tile=stop)


def refuse(site: Path, key: Path, signals: Path) -> None:
    (signals / "second").touch()
    try:
        refuse_release(ReleaseWorkspace(site), SigningKey.load(key), "Ink.", now=NOW)
    except RefusedError as error:
        (signals / "code").write_text(error.code)


def withdraw(site: Path, key: Path, signals: Path) -> None:
    (signals / "second").touch()
    withdraw_release(ReleaseWorkspace(site), "Ink.", now=NOW)


def race(room: Room, place: Path, act: Callable[[Path, Path, Path], None]) -> Path:
    """Start an export, then `act` in the middle of it; returns the folder of the signals when both have ended."""
    signals, key, site = place / "signals", place / "auditor.key", room.workspace.site_dir
    signals.mkdir()
    room.auditor.save(key)
    before = room.kinds()
    first = _SPAWN.Process(target=slow_export, args=(site, place / "b.zip", signals))
    second = _SPAWN.Process(target=act, args=(site, key, signals))
    first.start()
    wait_for((signals / "inside").exists)
    second.start()
    wait_for((signals / "second").exists)
    second.join(SECONDS_TO_OVERTAKE)
    assert second.is_alive() and room.kinds() == before, "the second act went in while the first was at work"
    (signals / "go").touch()
    for process in (first, second):
        process.join(_PATIENCE)
        assert process.exitcode == 0
    return signals


def test_a_refusal_does_not_slip_into_an_export(room: Room, tmp_path: Path) -> None:
    release = room.signed()
    signals = race(room, tmp_path, refuse)
    assert (tmp_path / "b.zip").is_file()
    assert (signals / "code").read_text() == "already-exported"
    assert not (release.path / REFUSAL).exists() and "release.declined" not in room.kinds()


def test_a_withdrawal_comes_after_the_export_it_takes_back(room: Room, tmp_path: Path) -> None:
    release = room.exported(tmp_path / "a.zip").release
    race(room, tmp_path, withdraw)
    assert room.kinds()[-2:] == ["release.exported", "release.withdrawn"]
    assert room.workspace.state(release) == "withdrawn"


@pytest.mark.parametrize("name", ["b.zip", "folder"])
def test_what_came_under_the_name_meanwhile_stays(room: Room, tmp_path: Path, name: str) -> None:
    room.signed()
    out = tmp_path / name

    def somebody_else() -> None:
        out.write_text("mine")

    with pytest.raises(BadInputError) as refused:
        export_release(room.workspace, out, now=NOW, on_tile=somebody_else)
    assert refused.value.code == "out-exists" and out.read_text() == "mine"


def test_an_empty_folder_that_came_meanwhile_stays_empty(room: Room, tmp_path: Path) -> None:
    room.signed()
    out = tmp_path / "folder"
    with pytest.raises(BadInputError) as refused:
        export_release(room.workspace, out, now=NOW, on_tile=lambda: out.mkdir(exist_ok=True))
    assert refused.value.code == "out-exists" and list(out.iterdir()) == []
    assert export_release(room.workspace, tmp_path / "free", now=NOW).path.is_dir()


def test_a_disk_without_hard_links(room: Room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    room.signed()
    # Only the last step is such a disk's; the signed files inside the site are written elsewhere.
    monkeypatch.setattr("site_client.release.export.os.link", no_links)
    out = export_release(room.workspace, tmp_path / "b.zip", now=NOW).path
    assert out.read_bytes()[:2] == b"PK"
