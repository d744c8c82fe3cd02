"""A small site with surrogate tiles, and an audit's output written by hand so that each lie can be told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pixcell_core.contracts.artifacts import AUDITING_CODE, code_digest
from pixcell_core.contracts.release import ReleaseManifest
from pixcell_core.errors import PixcellError, RefusedError
from pixcell_core.trust.bundle import BundleReport, verify_bundle
from pixcell_core.trust.bundle_files import open_bundle
from pixcell_core.trust.keys import SigningKey
from pixcell_core.trust.tile_png import pixel_digest
from privacy_audit.policy import load_policy
from privacy_audit.request import seed_of
from site_client.release.draft import seal_draft
from site_client.release.export import ExportedBundle, export_release
from site_client.release.progress import Progress, progress_of
from site_client.release.request import request_release
from site_client.release.signing import SignedVerdict, sign_release
from site_client.release.workspace import ReleaseFolder, ReleaseWorkspace

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
AUDITOR, SECOND, OFFICER = SigningKey.generate(), SigningKey.generate(), SigningKey.generate()
PAGE = b"<!doctype html><title>Audit</title><svg></svg><p>PASS</p>\n"


def write_surrogates(folder: Path, count: int = 6, side: int = 48, seed: int = 5) -> Path:
    """Tiles and the record as the generator writes them."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    names = [f"surrogate-{number:06d}.png" for number in range(1, count + 1)]
    drawn = {}
    for name in names:
        pixels = rng.integers(0, 255, (side, side, 3), dtype=np.uint8)
        drawn[name] = pixel_digest(pixels)
        Image.fromarray(pixels).save(folder / name, dpi=(72, 72))
    record = {
        "tiles": count,
        "tile_size": side,
        "conditioning_policy": "blend",
        "conditioning_promise": "Each surrogate follows the mean of 3 patients; no claim covers the conditions.",
        "guidance_scale": 2.0,
        "num_inference_steps": 20,
        "base_digest": "sha256:" + "1" * 64,
        "adapter_digest": "sha256:" + "2" * 64,
        "study_digest": "sha256:" + "3" * 64,
        "labels": {name: "tumour" if number % 2 else None for number, name in enumerate(names)},
        "pixel_digests": drawn,
    }
    (folder / "generation.json").write_text(json.dumps(record))
    return folder


def audit_report(manifest: ReleaseManifest) -> dict[str, Any]:
    """A report in the audit's own form that passes these tiles."""
    test = {
        "section": "near copies",
        "claim": "no tile is a copy",
        "statistic": "copies",
        "value": 0.0,
        "threshold": 0.0,
        "direction": "lower is safer",
        "why": "none found",
        "cannot_show": "other kinds",
    }
    digests = sorted(tile.file_digest for tile in manifest.tiles)
    files = [
        {"name": tile.name, "sha256": tile.file_digest, "pixel_sha256": tile.pixel_digest}
        for tile in manifest.tiles
    ]
    reference = {"tiles": "200 to 499", "patients": "50 to 99", "root": "sha256:" + "5" * 64}
    return {
        "verdict": "PASS",
        "summary": "These tiles may be put before the signer.",
        "created_at": "2026-03-01T11:00:00Z",
        "tool": {
            "name": "pixcell audit",
            "version": "0.1.0",
            "eye": "second eye",
            "libraries": {},
            "code": code_digest(AUDITING_CODE),
        },
        "policy": {"name": "default", "words": "default", "digest": load_policy().digest, "settings": {}},
        "seed": seed_of(manifest.tiles_root, load_policy().digest),
        "subjects": {
            "synthetic": {
                "tiles": len(files),
                "root": manifest.tiles_root,
                "sorted_sha256": digests,
                "files": files,
            },
            "train": reference,
            "holdout": reference,
        },
        "tests": [
            {"name": "exact copies", "status": "PASS", **test},
            {"name": "context numbers", "status": "FAIL", "gating": False, **test},
        ],
        "flagged": [],
        "proven_kinds": ["exact copy", "near copy"],
        "not_tested": ["membership by weights"],
        "evidence_digest": "sha256:" + "6" * 64,
    }


def set_verdict(status: str) -> Callable[[dict[str, Any]], None]:
    """An edit that gives the report another verdict, and the test that carries it."""

    def change(report: dict[str, Any]) -> None:
        report["verdict"] = report["tests"][0]["status"] = status

    return change


@dataclass
class Room:
    """One site and its auditor."""

    workspace: ReleaseWorkspace
    source: Path
    audits: Path
    count: int = field(default=0)
    draws: int = field(default=0)
    now: datetime = NOW
    auditor: SigningKey = AUDITOR
    second: SigningKey = SECOND
    page: bytes = PAGE

    def draft(self, **options: Any) -> ReleaseFolder:
        """Seal the surrogates."""
        return seal_draft(self.workspace, self.source, now=NOW, site="north", **options)

    def draw_others(self, count: int = 6) -> None:
        """Let the next draft be of other surrogates."""
        self.draws += 1
        self.source = write_surrogates(
            self.source.parent / f"surrogates-{self.draws}", count, seed=100 + self.draws
        )

    def audit(self, release: ReleaseFolder, change: Callable[[dict[str, Any]], None] | None = None) -> Path:
        """Write what an audit of the sealed tiles would say; `change` edits it."""
        report = audit_report(release.manifest())
        if change is not None:
            change(report)
        self.count += 1
        out = self.audits / f"audit-{self.count}"
        out.mkdir(parents=True)
        (out / "report.json").write_text(json.dumps(report))
        (out / "report.html").write_bytes(PAGE)
        return out

    def sign(
        self, release: ReleaseFolder, audit: Path, key: SigningKey = AUDITOR, **options: Any
    ) -> SignedVerdict:
        """Sign without computing the audit again: these audits have no evidence."""
        options = {"now": NOW, "check_audit": lambda audit, tiles: None, **options}
        return sign_release(self.workspace, audit, key, release_id=release.release_id, **options)

    def rule(self, needed: int = 3, **changes: Any) -> Path:
        """A signers' document: the site's release key, two auditors, the data-protection officer."""
        named = [
            ("site", "release desk", self.workspace.site_key()),
            ("auditor", "first auditor", self.auditor),
            ("auditor", "second auditor", self.second),
            ("data-protection", "privacy office", OFFICER),
        ]
        signers = [{"role": role, "name": name, "key_id": key.key_id} for role, name, key in named]
        path = self.audits.parent / f"signers-{self.count}-{needed}.json"
        path.write_text(json.dumps({"site": "north", "needed": needed, "signers": signers, **changes}))
        return path

    def requested(self, **options: Any) -> ReleaseFolder:
        """A draft with a written request."""
        release = self.draft()
        request_release(self.workspace, now=self.now, release_id=release.release_id, **options)
        return release

    def countersign(self, release: ReleaseFolder, key: SigningKey, role: Any = "site") -> SignedVerdict:
        """Sign what an auditor signed."""
        return sign_release(self.workspace, None, key, now=self.now, role=role, release_id=release.release_id)

    def progress(self, release: ReleaseFolder) -> Progress:
        """How far a release has come."""
        return progress_of(self.workspace, release, self.now)

    def signed(self) -> ReleaseFolder:
        """A release that passed and was signed."""
        release = self.draft()
        self.sign(release, self.audit(release))
        return release

    def exported(self, out: Path) -> ExportedBundle:
        """The whole road."""
        self.signed()
        return export_release(self.workspace, out, now=NOW)

    def refusal(self, act: Callable[[], object]) -> str:
        """The code of an act's refusal, which must be the newest event of the log."""
        with pytest.raises(RefusedError) as error:
            act()
        assert error.value.hint
        newest = self.workspace.log().entries()[-1]
        assert (newest.kind, newest.data["code"]) == ("release.refused", error.value.code)
        return error.value.code

    def refused(self, code: str, act: Callable[[], object]) -> PixcellError:
        """The refusal of an act, which must be the newest event of the log."""
        with pytest.raises(RefusedError) as error:
            act()
        assert error.value.code == code, error.value
        assert error.value.hint
        newest = self.workspace.log().entries()[-1]
        assert (newest.kind, newest.data["code"]) == ("release.refused", code)
        return error.value

    def kinds(self) -> list[str]:
        """Kinds of the events in the site's log."""
        return [entry.kind for entry in self.workspace.log().entries()]


@pytest.fixture
def room(tmp_path: Path) -> Room:
    """A site that is not enrolled, with six surrogates."""
    site = tmp_path / "site"
    site.mkdir()
    return Room(ReleaseWorkspace(site), write_surrogates(tmp_path / "surrogates"), tmp_path / "audits")


class Sample:
    """One exported bundle in memory, and its verification."""

    def __init__(
        self, folder: Path, archive: Path, auditor_key: SigningKey, now: datetime, site_key: SigningKey
    ) -> None:
        self.files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        self.archive = archive.read_bytes()
        self.auditor_key, self.now, self.site_key = auditor_key, now, site_key
        self.auditor = auditor_key.verify_key

    def verify(self, path: Path, *, trust: bool = False) -> BundleReport:
        with open_bundle(path) as files:
            return verify_bundle(files, trusted_keys=[self.auditor] if trust else None, now=self.now)

    def written(self, folder: Path, files: dict[str, bytes]) -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        for name, data in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return folder

    def refuses(self, path: Path) -> PixcellError:
        with pytest.raises(PixcellError) as refused:
            self.verify(path)
        return refused.value


class InMemory:
    """A bundle as a dictionary, so that thousands of mutants cost no disk."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self._files = files

    def names(self) -> list[str]:
        return sorted(self._files)

    def read(self, name: str) -> bytes:
        return self._files[name]

    def check_form(self) -> None:
        return None


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    place = tmp_path_factory.mktemp("sample")
    (place / "site").mkdir()
    room = Room(ReleaseWorkspace(place / "site"), write_surrogates(place / "surrogates"), place / "audits")
    release = room.draft()
    audit = room.audit(release)
    room.sign(release, audit, AUDITOR)
    room.sign(release, audit, SECOND)
    export_release(room.workspace, place / "folder", now=NOW)
    export_release(room.workspace, place / "one.zip", now=NOW)
    return Sample(place / "folder", place / "one.zip", AUDITOR, NOW, room.workspace.site_key())
