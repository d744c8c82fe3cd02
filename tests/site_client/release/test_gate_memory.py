"""What the gate remembers although files are deleted, put back, written by hand or cut: refusals, withdrawals, seals."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pixcell_core.contracts.canonical import load_document
from pixcell_core.contracts.log_heads import RECEIPT_FILE, AnchorReceipt
from pixcell_core.errors import RefusedError
from pixcell_core.trust.bundle_files import MANIFEST
from pixcell_core.trust.keys import SigningKey
from pixcell_core.trust.log_proof import make_offer
from server.log_anchor.anchors import AnchorBook
from site_client.release.draft import seal_draft
from site_client.release.export import export_release
from site_client.release.refuse import refuse_release
from site_client.release.request import request_release
from site_client.release.review import review_release
from site_client.release.withdraw import withdraw_release
from site_client.release.workspace import REFUSAL, ReleaseFolder, ReleaseWorkspace, release_id_of
from tests.server.enrolled import make_enrolment
from tests.site_client.release.conftest import Room, write_surrogates
from tests.site_client.release.test_gate_road import believe

if TYPE_CHECKING:
    Acts = dict[str, Callable[[], object]]


def lines_of(room: Room) -> list[bytes]:
    return log_file(room).read_bytes().splitlines(keepends=True)


def log_file(room: Room) -> Path:
    return room.workspace.site_dir / "log" / "log.jsonl"


def cut(room: Room, lines: int = 1) -> None:
    """Take the newest events away, as somebody with an editor would."""
    log_file(room).write_bytes(b"".join(lines_of(room)[:-lines]))


def acts_on(room: Room, release: ReleaseFolder, out: Path) -> Acts:
    """Everything by which a closed release could go on."""
    audit, which = room.audit(release), release.release_id
    return {
        "export": lambda: export_release(room.workspace, out, now=room.now, release_id=which),
        "sign": lambda: room.sign(release, audit, room.second),
        "review": lambda: review_release(
            room.workspace, audit, now=room.now, release_id=which, check_audit=believe
        ),
        "refuse": lambda: refuse_release(
            room.workspace, room.second, "again", now=room.now, release_id=which
        ),
    }


def test_a_refusal_stands_without_its_file(room: Room, tmp_path: Path) -> None:
    release = room.signed()
    refuse_release(room.workspace, room.auditor, "Ink.", now=room.now)
    (release.path / REFUSAL).unlink()
    for act in acts_on(room, release, tmp_path / "b").values():
        room.refused("release-refused", act)
    progress = room.progress(release)
    assert progress.state == "refused" and "as the log says" in progress.blocked_by
    assert not (tmp_path / "b").exists()


def test_a_refusal_stands_without_its_event(room: Room, tmp_path: Path) -> None:
    release = room.signed()
    refuse_release(room.workspace, room.auditor, "Ink.", now=room.now)
    cut(room)
    assert "release.declined" not in room.kinds()
    for act in acts_on(room, release, tmp_path / "b").values():
        room.refused("release-refused", act)


def test_refused_tiles_drafted_again_are_refused_again(room: Room, tmp_path: Path) -> None:
    refused = room.signed()
    refuse_release(room.workspace, room.auditor, "Ink.", now=room.now)
    later = room.now + timedelta(minutes=1)
    again = seal_draft(room.workspace, room.source, now=later, site="north")
    assert again.release_id != refused.release_id and again.refusal() is None
    for act in acts_on(room, again, tmp_path / "b").values():
        room.refused("release-refused", act)
    assert room.progress(again).state == "refused"


def test_a_withdrawal_stands_without_its_event(room: Room, tmp_path: Path) -> None:
    release = room.exported(tmp_path / "a").release
    withdraw_release(room.workspace, "consent", now=room.now)
    cut(room)
    assert "release.withdrawn" not in room.kinds()
    assert (
        room.progress(release).state == "withdrawn" and "on a list here" in room.progress(release).blocked_by
    )
    for act in acts_on(room, release, tmp_path / "b").values():
        room.refused("release-withdrawn", act)
    assert not (tmp_path / "b").exists()


def test_a_withdrawal_stands_without_its_list(room: Room, tmp_path: Path) -> None:
    release = room.exported(tmp_path / "a").release
    withdraw_release(room.workspace, "consent", now=room.now)
    room.workspace.withdrawals_file.unlink()
    for act in acts_on(room, release, tmp_path / "b").values():
        room.refused("release-withdrawn", act)
    assert not (tmp_path / "b").exists()


def test_an_event_renamed_in_the_log_opens_nothing(room: Room, tmp_path: Path) -> None:
    release = room.signed()
    refuse_release(room.workspace, room.auditor, "Ink.", now=room.now)
    (release.path / REFUSAL).unlink()
    data = log_file(room).read_bytes()
    assert data.count(b"release.declined") == 1
    log_file(room).write_bytes(data.replace(b"release.declined", b"release.reviewed"))
    for act in acts_on(room, release, tmp_path / "b").values():
        room.refused("log-broken", act)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("lines", [1, 2])
def test_a_log_cut_behind_an_anchored_head_opens_nothing(tmp_path: Path, lines: int) -> None:
    made = make_enrolment(tmp_path / "consortium")
    site = made.party("north")
    room = Room(ReleaseWorkspace(site.root), write_surrogates(tmp_path / "s"), tmp_path / "audits")
    release = room.signed()
    refuse_release(room.workspace, room.auditor, "Ink.", now=room.now)
    offer = make_offer(site.root / "log", "north", SigningKey.load(site.approval_key))
    receipt = load_document(AnchorReceipt, AnchorBook(made.layout).anchor(offer).receipt)
    (site.root / "log" / RECEIPT_FILE).write_bytes(receipt.to_bytes())
    (release.path / REFUSAL).unlink()
    room.refused("release-refused", lambda: export_release(room.workspace, tmp_path / "b", now=room.now))
    cut(room, lines + 1)  # the refusal of the export above, and then what was anchored
    with pytest.raises(RefusedError) as refused:
        export_release(room.workspace, tmp_path / "b", now=room.now)
    assert refused.value.code == "log-broken" and not (tmp_path / "b").exists()


def rewritten(release: ReleaseFolder, **changes: Any) -> ReleaseFolder:
    """The same tiles under a manifest that somebody wrote by hand, in a folder of its right name."""
    forged = release.manifest().model_copy(update=changes)
    folder = release.path.with_name(release_id_of(forged))
    shutil.copytree(release.path, folder)
    (folder / MANIFEST).write_bytes(forged.to_bytes())
    return ReleaseFolder(folder)


@pytest.mark.parametrize(
    "changes", [{"ledger_head": "sha256:" + "7" * 64}, {"licence": "CC0-1.0"}, {"study_digest": None}]
)
def test_a_manifest_that_was_never_sealed_here(room: Room, tmp_path: Path, changes: dict[str, Any]) -> None:
    forged = rewritten(room.draft(), **changes)
    assert forged.manifest().digest not in log_file(room).read_text()
    acts = acts_on(room, forged, tmp_path / "b")
    for name in ("sign", "review", "refuse"):
        room.refused("unsealed", acts[name])
    room.refused(
        "unsealed", lambda: request_release(room.workspace, now=room.now, release_id=forged.release_id)
    )
    assert room.progress(forged).state == "damaged"
    assert "does not say" in room.progress(forged).blocked_by


def test_a_signed_manifest_that_was_never_sealed_here(room: Room, tmp_path: Path) -> None:
    """With a verdict that an auditor far away signed: the site's log still does not know the manifest."""
    release = room.signed()
    cut(room, len(lines_of(room)))
    room.refused("unsealed", lambda: export_release(room.workspace, tmp_path / "b", now=room.now))
    assert not (tmp_path / "b").exists() and release.verdict() is not None


def test_a_draft_is_in_the_log_before_it_is_in_the_folder(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("pixcell_core.trust.log.EventLog.append", stop)
        with pytest.raises(KeyboardInterrupt):
            room.draft()
    assert room.workspace.all_releases() == [] and room.kinds() == []
