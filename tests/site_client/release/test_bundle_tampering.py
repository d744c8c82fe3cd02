"""Any changed byte in a bundle fails: every file at many offsets, added, removed, renamed, reordered, rewritten."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixcell_core.contracts.canonical import digest, parse_document
from pixcell_core.contracts.release import BundleFile, BundleListing, ReleaseManifest
from pixcell_core.errors import PixcellError, RefusedError
from pixcell_core.trust.bundle import LISTING_PAYLOAD_TYPE, verify_bundle
from pixcell_core.trust.bundle_files import LISTING, MANIFEST, VERDICT
from pixcell_core.trust.bundle_rules import key_file_name
from pixcell_core.trust.dsse import IN_TOTO_PAYLOAD_TYPE, Envelope, add_signature, sign_envelope
from pixcell_core.trust.keys import SigningKey, VerifyKey
from tests.site_client.release.conftest import AUDITOR, InMemory

if TYPE_CHECKING:
    from tests.site_client.release.conftest import Room, Sample


def test_the_untouched_sample_verifies(sample: Sample, tmp_path: Path) -> None:
    assert sample.verify(sample.written(tmp_path / "b", sample.files), trust=True).trusted
    assert verify_bundle(InMemory(sample.files), trusted_keys=None, now=sample.now).tiles == 6
    path = tmp_path / "b.zip"
    path.write_bytes(sample.archive)
    assert sample.verify(path, trust=True).trusted


def offsets(size: int) -> list[int]:
    """Both ends and a spread between."""
    return sorted(
        {0, 1, 2, size // 7, size // 3, size // 2, size - 30, size - 3, size - 2, size - 1} & set(range(size))
    )


def test_a_changed_byte_in_every_file_at_many_offsets(sample: Sample) -> None:
    tried = 0
    for name, data in sample.files.items():
        for offset in offsets(len(data)):
            for flip in (0x01, 0x20, 0x80):
                changed = bytearray(data)
                changed[offset] ^= flip
                mutant = InMemory({**sample.files, name: bytes(changed)})
                with pytest.raises(PixcellError) as refused:
                    verify_bundle(mutant, trusted_keys=None, now=sample.now)
                if name.startswith("tiles/") or name.startswith("audit/") or name == "README.txt":
                    assert name in refused.value.message, "the first wrong thing is named"
                tried += 1
    assert tried > 300


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_mutation_of_any_file(sample: Sample, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(sample.files)))
    original = sample.files[name]
    at = data.draw(st.integers(0, len(original)))
    kind = data.draw(st.sampled_from(["replace", "insert", "delete", "truncate", "append"]))
    piece = data.draw(st.binary(min_size=1, max_size=8))
    changed = {
        "replace": original[:at] + piece + original[at + len(piece) :],
        "insert": original[:at] + piece + original[at:],
        "delete": original[:at] + original[at + len(piece) :],
        "truncate": original[:at],
        "append": original + piece,
    }[kind]
    if changed == original:
        return
    with pytest.raises(PixcellError):
        verify_bundle(InMemory({**sample.files, name: changed}), trusted_keys=None, now=sample.now)


def test_removed_files(sample: Sample, tmp_path: Path) -> None:
    for name in sample.files:
        left = {other: data for other, data in sample.files.items() if other != name}
        error = sample.refuses(sample.written(tmp_path / "b", left))
        assert isinstance(error, RefusedError)


@pytest.mark.parametrize(
    "name",
    [
        "tiles/00007.png",
        "keys/" + "0" * 64 + ".pub",
        "extra.txt",
        ".hidden",
        "tiles/.hidden",
        "audit/site/report.html",
        "tiles/tiles.csv",
        "tiles/00001.png.bak",
        "README.TXT",
    ],
)
def test_added_files(sample: Sample, tmp_path: Path, name: str) -> None:
    for data in (b"", sample.files["tiles/00001.png"]):
        error = sample.refuses(sample.written(tmp_path / "b", {**sample.files, name: data}))
        assert error.exit_code in (1, 4) and error.hint


def test_an_added_true_key_that_signed_nothing(sample: Sample, tmp_path: Path) -> None:
    key = SigningKey.generate().verify_key
    error = sample.refuses(sample.written(tmp_path / "b", {**sample.files, key_file_name(key): key.to_pem()}))
    assert error.code in {"file-added", "foreign-file"}


def test_renamed_and_swapped_files(sample: Sample, tmp_path: Path) -> None:
    files = dict(sample.files)
    files["tiles/00001.png"], files["tiles/00002.png"] = files["tiles/00002.png"], files["tiles/00001.png"]
    assert "tiles/00001.png" in sample.refuses(sample.written(tmp_path / "b", files)).message
    files = dict(sample.files)
    files["tiles/00009.png"] = files.pop("tiles/00006.png")
    sample.refuses(sample.written(tmp_path / "b", files))


def test_links_and_empty_folders(sample: Sample, tmp_path: Path) -> None:
    folder = sample.written(tmp_path / "b", sample.files)
    (folder / "tiles" / "empty").mkdir()
    assert "empty" in sample.refuses(folder).message
    folder = sample.written(tmp_path / "b", sample.files)
    (folder / "README.txt").rename(tmp_path / "elsewhere")
    (folder / "README.txt").symlink_to(tmp_path / "elsewhere")
    assert "link" in sample.refuses(folder).message
    folder = sample.written(tmp_path / "b", sample.files)
    (folder / "keys").rename(tmp_path / "keys")
    (folder / "keys").symlink_to(tmp_path / "keys")
    assert "link" in sample.refuses(folder).message


# --- a forger who signs again -------------------------------------------------------------------------------


def resigned(
    sample: Sample,
    files: dict[str, bytes],
    key: SigningKey,
    *,
    manifest_digest: str | None = None,
    keep: VerifyKey | None = None,
) -> dict[str, bytes]:
    """The bundle as a forger would leave it: the listing made anew and signed with the forger's own key."""
    old = Envelope.from_bytes(files[LISTING])
    listing = parse_document(BundleListing, old.unsafe_unverified_payload())
    auditors = [*Envelope.from_bytes(files[VERDICT]).key_ids, *([keep.key_id] if keep else [])]
    kept = {
        name: data
        for name, data in files.items()
        if name != LISTING and not (name.startswith("keys/") and f"sha256:{name[5:-4]}" not in auditors)
    }
    kept[key_file_name(key.verify_key)] = key.verify_key.to_pem()
    changed = listing.model_copy(
        update={
            "files": tuple(BundleFile(name=name, file_digest=digest(kept[name])) for name in sorted(kept)),
            "manifest_digest": manifest_digest or digest(kept[MANIFEST]),
        }
    )
    kept[LISTING] = sign_envelope(LISTING_PAYLOAD_TYPE, changed.to_bytes(), [key]).to_bytes()
    return kept


def same(files: dict[str, bytes]) -> None:
    return None


def drop_last_tile(files: dict[str, bytes]) -> None:
    del files["tiles/00006.png"]


def other_tile(files: dict[str, bytes]) -> None:
    files["tiles/00006.png"] = files["tiles/00005.png"]


def other_readme(files: dict[str, bytes]) -> None:
    files["README.txt"] = b"trust me\n"


def other_page(files: dict[str, bytes]) -> None:
    files["audit/report.html"] += b" "


def other_report(files: dict[str, bytes]) -> None:
    files["audit/report.json"] += b" "


def pad_key(files: dict[str, bytes]) -> None:
    name = key_file_name(AUDITOR.verify_key)
    files[name] += b"\n"


def strip_signature(files: dict[str, bytes]) -> None:
    envelope = Envelope.from_bytes(files[VERDICT])
    files[VERDICT] = envelope.model_copy(update={"signatures": envelope.signatures[:1]}).to_bytes()


@pytest.mark.parametrize(
    "change", [same, drop_last_tile, other_tile, other_readme, other_page, other_report, strip_signature]
)
def test_a_new_listing_by_another_key_is_refused(
    sample: Sample, tmp_path: Path, change: Callable[[dict[str, bytes]], None]
) -> None:
    files = dict(sample.files)
    change(files)
    forged = resigned(sample, files, SigningKey.generate())
    error = sample.refuses(sample.written(tmp_path / "b", forged))
    assert error.code in {"wrong-site-key", "foreign-file"}, (
        "the auditor's signature names the one exporting key"
    )


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (drop_last_tile, "wrong-tiles"),
        (other_tile, "bundle-changed"),
        (other_readme, "bundle-changed"),
        (other_page, "bundle-changed"),
        (other_report, "bundle-changed"),
        (pad_key, "bundle-changed"),
        (lambda files: files.update({"audit/gallery.html": b"real tiles"}), "foreign-file"),
        (lambda files: files.update({"tiles/00007.png": files["tiles/00001.png"]}), "wrong-tiles"),
        (lambda files: files.update({"audit/report.json": b"[]"}), "bundle-changed"),
    ],
)
def test_the_site_itself_cannot_change_what_was_judged(
    sample: Sample, tmp_path: Path, change: Callable[[dict[str, bytes]], None], code: str
) -> None:
    """The listing is made anew with the true site key: the auditor's signature still holds the content."""
    files = dict(sample.files)
    change(files)
    error = sample.refuses(sample.written(tmp_path / "b", resigned(sample, files, sample.site_key)))
    assert error.code == code


def test_other_byte_forms_of_signed_documents(sample: Sample, tmp_path: Path) -> None:
    """Reformatted, idle or mismatched parts are refused even when every key involved signs them again."""
    spaced = json.dumps(json.loads(sample.files[MANIFEST]), indent=1).encode()
    wanted = digest(sample.files[MANIFEST])
    statement = Envelope.from_bytes(sample.files[VERDICT]).unsafe_unverified_payload()
    pretty = json.dumps(json.loads(statement), indent=1).encode()
    idle = SigningKey.generate().verify_key
    by_auditor = sign_envelope(IN_TOTO_PAYLOAD_TYPE, pretty, [sample.auditor_key]).to_bytes()
    mutants = [
        resigned(sample, {**sample.files, MANIFEST: spaced}, sample.site_key, manifest_digest=wanted),
        resigned(sample, dict(sample.files), sample.site_key, manifest_digest=digest(b"another")),
        resigned(sample, {**sample.files, VERDICT: by_auditor}, sample.site_key),
        resigned(sample, {**sample.files, key_file_name(idle): idle.to_pem()}, sample.site_key, keep=idle),
    ]
    for mutant, code in zip(
        mutants, ("bundle-changed", "wrong-manifest", "bundle-changed", "foreign-file"), strict=True
    ):
        assert sample.refuses(sample.written(tmp_path / "b", mutant)).code == code


def test_a_second_signature_on_the_listing(sample: Sample, tmp_path: Path) -> None:
    """An auditor's true signature where only the site's belongs is a change like any other."""
    envelope = Envelope.from_bytes(sample.files[LISTING])
    files = {**sample.files, LISTING: add_signature(envelope, sample.auditor_key).to_bytes()}
    assert sample.refuses(sample.written(tmp_path / "b", files)).code == "bundle-changed"


def test_a_forged_manifest_needs_the_auditor(sample: Sample, tmp_path: Path) -> None:
    key = SigningKey.generate()
    files = dict(sample.files)
    manifest = parse_document(ReleaseManifest, files[MANIFEST])
    files[MANIFEST] = manifest.model_copy(update={"site_key_id": key.key_id}).to_bytes()
    error = sample.refuses(sample.written(tmp_path / "b", resigned(sample, files, key)))
    assert error.code == "verdict-of-other-tiles"


def test_a_wholly_forged_bundle_is_whole_but_never_trusted(
    room: Room, sample: Sample, tmp_path: Path
) -> None:
    """Without --trust a forger's own bundle verifies: that is why `trusted` is false, and --trust exists."""
    from site_client.release.export import export_release

    release = room.draft()
    room.sign(release, room.audit(release), SigningKey.generate())
    out = export_release(room.workspace, tmp_path / "forged", now=room.now).path
    assert not sample.verify(out).trusted
    with pytest.raises(RefusedError) as refused:
        sample.verify(out, trust=True)
    assert refused.value.code == "untrusted-signer"
