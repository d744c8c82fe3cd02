"""What may not be exported or trusted; each refusal has its own code and stands in the log."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pixcell_core.contracts.verdict import Verdict
from pixcell_core.errors import BadInputError, PixcellError, RefusedError
from pixcell_core.trust.bundle import verify_bundle
from pixcell_core.trust.bundle_files import open_bundle
from pixcell_core.trust.dsse import IN_TOTO_PAYLOAD_TYPE, Envelope, sign_envelope
from pixcell_core.trust.keys import SigningKey
from site_client.release.export import export_release
from site_client.release.workspace import ReleaseFolder, ReleaseWorkspace

if TYPE_CHECKING:
    from tests.site_client.release.conftest import Room

Change = Callable[[dict[str, Any]], None]


def nothing_written(folder: Path) -> None:
    assert not [p for p in folder.iterdir() if "out" in p.name], "nothing half-written may stay"


def test_export_without_a_verdict(room: Room, tmp_path: Path) -> None:
    room.draft()
    error = room.refused("no-verdict", lambda: export_release(room.workspace, tmp_path / "out", now=room.now))
    assert "pixcell release sign" in error.hint
    nothing_written(tmp_path)


def swap_tile(release: ReleaseFolder) -> None:
    path = release.tiles / "00003.png"
    shutil.copy(release.tiles / "00001.png", path)


def truncate_tile(release: ReleaseFolder) -> None:
    path = release.tiles / "00003.png"
    path.write_bytes(path.read_bytes()[:-1])


def link_tile(release: ReleaseFolder) -> None:
    path = release.tiles / "00003.png"
    path.rename(release.path / "real.png")
    path.symlink_to(release.path / "real.png")


def remove_tile(release: ReleaseFolder) -> None:
    (release.tiles / "00006.png").unlink()


@pytest.mark.parametrize("change", [swap_tile, truncate_tile, link_tile, remove_tile])
def test_tiles_changed_after_sealing(
    room: Room, tmp_path: Path, change: Callable[[ReleaseFolder], None]
) -> None:
    release = room.signed()
    change(release)
    assert (
        room.refusal(lambda: export_release(room.workspace, tmp_path / "out", now=room.now))
        == "sealed-tile-changed"
    )
    nothing_written(tmp_path)
    fresh = room.audit(release)
    assert room.refusal(lambda: room.sign(release, fresh, room.second)) == "sealed-tile-changed"


def test_a_tile_whose_digest_is_not_in_the_verdict(room: Room, tmp_path: Path) -> None:
    """A signed verdict of one release copied beside another's manifest opens nothing."""
    signed = room.signed()
    room.draw_others()
    other = room.draft()
    assert other.release_id != signed.release_id
    for name in ("verdict.dsse.json", "audit", "signers"):
        source = signed.path / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, other.path / name)
    error = room.refused(
        "verdict-of-other-tiles",
        lambda: export_release(room.workspace, tmp_path / "out", now=room.now, release_id=other.release_id),
    )
    assert "tile" in error.message
    nothing_written(tmp_path)


def test_unsealed_tiles_beside_the_sealed_ones_stay(room: Room, tmp_path: Path) -> None:
    release = room.signed()
    shutil.copy(release.tiles / "00001.png", release.tiles / "00007.png")
    out = export_release(room.workspace, tmp_path / "out", now=room.now).path
    assert len(list((out / "tiles").iterdir())) == 6


def test_an_edited_manifest(room: Room, tmp_path: Path) -> None:
    release = room.signed()
    path = release.path / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"site":"north"', b'"site":"south"'))
    assert room.workspace.state(release) == "damaged"
    room.refused("manifest-changed", lambda: export_release(room.workspace, tmp_path / "out", now=room.now))
    nothing_written(tmp_path)
    path.write_bytes(b"{")
    with pytest.raises(BadInputError):
        export_release(room.workspace, tmp_path / "out", now=room.now)


def test_a_damaged_release_does_not_block_the_others(room: Room, tmp_path: Path) -> None:
    damaged = room.draft()
    (damaged.path / "manifest.json").write_bytes(b"{}")
    room.draw_others(5)
    whole = room.signed()
    assert room.workspace.find(None) == whole
    states = [room.workspace.state(release) for release in room.workspace.all_releases()]
    assert states == ["damaged", "signed"]
    assert export_release(room.workspace, tmp_path / "out", now=room.now).report.tiles == 5


def test_an_expired_or_future_verdict(room: Room, tmp_path: Path) -> None:
    room.signed()
    times = (("verdict-expired", timedelta(days=366)), ("clock-wrong", timedelta(hours=-1)))
    for code, after in times:
        assert (
            room.refusal(lambda now=room.now + after: export_release(room.workspace, tmp_path / "o", now=now))
            == code
        )
    nothing_written(tmp_path)


def forged(release: ReleaseFolder, key: SigningKey, change: Callable[[dict[str, Any]], None]) -> Envelope:
    """A verdict that says something else, signed with a key of the forger's choice."""
    envelope = release.verdict()
    assert envelope is not None
    statement = json.loads(envelope.unsafe_unverified_payload())
    change(statement["predicate"])
    payload = Verdict.model_construct(**statement)
    return sign_envelope(IN_TOTO_PAYLOAD_TYPE, json.dumps(payload.__dict__).encode(), [key])


def test_a_verdict_that_was_changed_under_its_signature(room: Room, tmp_path: Path) -> None:
    release = room.signed()
    envelope = release.verdict()
    assert envelope is not None
    other = forged(release, room.second, lambda predicate: predicate.update(verdict="PASS"))
    mixed = envelope.model_copy(update={"payload": other.payload})
    (release.path / "verdict.dsse.json").write_bytes(mixed.to_bytes())
    room.refused("signature-refused", lambda: export_release(room.workspace, tmp_path / "out", now=room.now))


def test_a_verdict_by_a_stranger_or_by_the_site(room: Room, tmp_path: Path) -> None:
    release = room.signed()
    path = release.path / "verdict.dsse.json"
    path.write_bytes(forged(release, room.second, lambda predicate: None).to_bytes())
    assert (
        room.refusal(lambda: export_release(room.workspace, tmp_path / "out", now=room.now))
        == "unknown-auditor"
    )
    site_key = room.workspace.site_key()
    room.workspace.record_signer(release, site_key.verify_key)
    path.write_bytes(forged(release, site_key, lambda predicate: None).to_bytes())
    assert (
        room.refusal(lambda: export_release(room.workspace, tmp_path / "out", now=room.now))
        == "auditor-is-site"
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.update(verdict="FAIL"),
        lambda p: p.update(verdict="REVIEW"),
        lambda p: p.update(verdict="INVALID"),
    ],
)
def test_a_verdict_that_forbids_opens_nothing_even_when_signed(
    room: Room, tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    release = room.signed()
    room.workspace.record_signer(release, room.auditor.verify_key)
    path = release.path / "verdict.dsse.json"
    path.write_bytes(forged(release, room.auditor, change).to_bytes())
    assert (
        room.refusal(lambda: export_release(room.workspace, tmp_path / "out", now=room.now))
        == "verdict-forbids"
    )
    nothing_written(tmp_path)


def test_an_exception_cannot_be_put_on_a_fail(room: Room, tmp_path: Path) -> None:
    release = room.signed()
    path = release.path / "verdict.dsse.json"

    def change(predicate: dict[str, Any]) -> None:
        predicate.update(verdict="FAIL", exception={"reason": "because", "approver": "release board"})

    path.write_bytes(forged(release, room.auditor, change).to_bytes())
    with pytest.raises(PixcellError, match="only REVIEW"):
        export_release(room.workspace, tmp_path / "out", now=room.now)


@pytest.mark.parametrize("name", ["README.txt", "sample-sheet.png", "audit/report.json", "audit/report.html"])
def test_other_files_changed_after_sealing_or_signing(room: Room, tmp_path: Path, name: str) -> None:
    release = room.signed()
    path = release.path / name
    path.write_bytes(path.read_bytes() + b" ")
    assert room.refusal(lambda: export_release(room.workspace, tmp_path / "out", now=room.now)) == "unsealed"
    nothing_written(tmp_path)


def test_the_gallery_put_in_place_of_the_page(room: Room, tmp_path: Path) -> None:
    release = room.signed()
    release.page.write_bytes(b"<p>SITE ONLY \xe2\x80\x93 do not export</p>")
    assert room.refusal(lambda: export_release(room.workspace, tmp_path / "out", now=room.now)) == "site-only"


def test_out_that_exists_or_has_no_place(room: Room, tmp_path: Path) -> None:
    room.signed()
    (tmp_path / "there").mkdir()
    (tmp_path / "link.zip").symlink_to(tmp_path / "nowhere")
    for out in (tmp_path / "there", tmp_path / "link.zip", tmp_path / "no" / "folder"):
        with pytest.raises(BadInputError):
            export_release(room.workspace, out, now=room.now)


def test_a_full_disk_leaves_nothing(room: Room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room.signed()

    def full(stream: object, members: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("site_client.release.export.write_archive", full)
    with pytest.raises(PixcellError, match="No space left") as error:
        export_release(room.workspace, tmp_path / "out.zip", now=room.now)
    assert error.value.code == "write-failed"
    nothing_written(tmp_path)


def test_places_that_do_not_exist(room: Room, tmp_path: Path) -> None:
    nowhere = ReleaseWorkspace(tmp_path / "nowhere")
    for act in (lambda: nowhere.require(), lambda: room.workspace.find(None)):
        with pytest.raises(BadInputError):
            act()
    room.draft()
    with pytest.raises(BadInputError, match="Known"):
        room.workspace.find("0" * 16)
    with pytest.raises(BadInputError), open_bundle(tmp_path / "nowhere"):
        pass
    with pytest.raises(RefusedError), open_bundle(room.source / "generation.json"):
        pass


def test_trust_in_another_auditor(room: Room, tmp_path: Path) -> None:
    out = room.exported(tmp_path / "out").path
    with open_bundle(out) as files:
        for keys, threshold in (
            ([room.second.verify_key], 1),
            ([room.auditor.verify_key, room.second.verify_key], 2),
        ):
            with pytest.raises(RefusedError) as error:
                verify_bundle(files, trusted_keys=keys, threshold=threshold, now=room.now)
            assert error.value.code == "untrusted-signer"
        with pytest.raises(RefusedError) as late:
            verify_bundle(files, trusted_keys=None, now=room.now + timedelta(days=400))
        assert late.value.code == "verdict-expired"
        with pytest.raises(BadInputError):
            verify_bundle(files, trusted_keys=[room.auditor.verify_key], threshold=2, now=room.now)
