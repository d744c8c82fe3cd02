"""Where a site keeps its releases: one folder per sealed draft, named by its manifest's digest, and the
event log.

``SITE_DIR/releases/<id>/`` holds ``manifest.json``, ``tiles/``, ``sample-sheet.png``, ``README.txt``; once
requested ``request.dsse.json``, ``policy.yaml`` and, where one was given, ``signers.json``; once audited ``audit/``;
once signed ``verdict.dsse.json``, ``signers/`` and ``certificates/``; once refused ``refusal.dsse.json``. State is read
from the files themselves and from the signed log, never from a flag beside them.
"""

from __future__ import annotations

import fcntl
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pixcell_core.cli.contract import emit_note
from pixcell_core.contracts.canonical import load_document, parse_document, parse_json, read_bounded
from pixcell_core.contracts.gate import Signers, Withdrawals
from pixcell_core.contracts.log_heads import MAX_PROOF_BYTES, RECEIPT_FILE, AnchorReceipt
from pixcell_core.contracts.release import ReleaseManifest
from pixcell_core.errors import BadInputError, PixcellError, RefusedError
from pixcell_core.trust.bundle_files import MANIFEST, PAGE, REPORT, REQUEST, SIGNERS, VERDICT
from pixcell_core.trust.dsse import Envelope
from pixcell_core.trust.keys import KeyFileError, SigningKey, VerifyKey
from pixcell_core.trust.log import EventLog, LogEntry, LogReport, read_entries, verify_log
from pixcell_core.trust.party_log import same_log
from site_client.approvals.site_folder import SiteFolder

ReleaseState = Literal["damaged", "draft", "sealed", "audited", "signed", "refused", "exported", "withdrawn"]

REFUSAL, POLICY, REVOCATIONS = "refusal.dsse.json", "policy.yaml", "revocations.dsse.json"
CERTIFICATES = "certificates"

ORIGINS = "origins.json"
"""Which source file became which tile. Private to the site; no bundle may hold a file of this name."""

DECLINED = "release.declined"
"""Kind of the event by which a signer's no stands in the logs of that signer and of the site."""

_NEVER = datetime.min.replace(tzinfo=UTC)
_RELEASE_ID = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class ReleaseFolder:
    """One sealed draft."""

    path: Path

    @property
    def release_id(self) -> str:
        """First 16 hexadecimal digits of the manifest's digest."""
        return self.path.name

    @property
    def tiles(self) -> Path:
        """The sealed tiles: what must be audited, and what ships."""
        return self.path / "tiles"

    @property
    def report(self) -> Path:
        """The audit evidence that was signed."""
        return self.path / REPORT

    @property
    def page(self) -> Path:
        """The shareable page of the audit that was signed."""
        return self.path / PAGE

    def manifest(self) -> ReleaseManifest:
        """The sealed manifest; refused where it was changed since, because the folder is named by its digest."""
        manifest = load_document(ReleaseManifest, self.path / MANIFEST)
        if release_id_of(manifest) != self.release_id:
            raise RefusedError(
                f"The manifest of release {self.release_id} was changed after sealing.",
                hint="Draft the release again from its tiles.",
                code="manifest-changed",
            )
        return manifest

    def sealed_at(self) -> datetime | None:
        """When it was sealed; None where its manifest is missing or was changed."""
        try:
            return self.manifest().created_at
        except PixcellError:
            return None

    def origin_of(self, tile: str) -> str | None:
        """The generator's file that became this tile; None where the record of it is gone."""
        path = self.path / ORIGINS
        named = parse_json(read_bounded(path), name=ORIGINS) if path.is_file() else {}
        found = named.get(tile) if isinstance(named, dict) else None
        return found if isinstance(found, str) else None

    def verdict(self) -> Envelope | None:
        """The signed verdict, if there is one."""
        return self._envelope(VERDICT)

    def request(self) -> Envelope | None:
        """What the site asked the signers for, if it asked in writing."""
        return self._envelope(REQUEST)

    def refusal(self) -> Envelope | None:
        """A signer's no, if there is one."""
        return self._envelope(REFUSAL)

    def signers(self) -> Signers | None:
        """Who may sign; None where the standing rule holds (the site's release key and one auditor)."""
        path = self.path / SIGNERS
        return load_document(Signers, path) if path.exists() else None

    def certificates(self) -> dict[str, Envelope]:
        """The certificates that signers gave, by key id."""
        folder = self.path / CERTIFICATES
        return {f"sha256:{path.stem}": Envelope.load(path) for path in sorted(folder.glob("*.json"))}

    def revocations(self) -> Envelope | None:
        """The newest revocation list that a signer gave."""
        return self._envelope(REVOCATIONS)

    def _envelope(self, name: str) -> Envelope | None:
        path = self.path / name
        return Envelope.load(path) if path.exists() else None


@dataclass(frozen=True)
class ReleaseWorkspace:
    """The release room of one site."""

    site_dir: Path

    @property
    def releases(self) -> Path:
        """Folder of all sealed drafts."""
        return self.site_dir / "releases"

    @property
    def key_path(self) -> Path:
        """The site's release key: it signs exports and this room's event log."""
        return self.site_dir / "keys" / "release"

    @property
    def withdrawals_file(self) -> Path:
        """The site's signed list of everything it took back; public."""
        return self.releases / "withdrawals.dsse.json"

    @property
    def auditors(self) -> Path:
        """Public keys (``*.pub``) of the auditors this site accepts; while the folder is absent, any."""
        return self.site_dir / "auditors"

    def require(self) -> ReleaseWorkspace:
        """This workspace, if the site's folder exists."""
        if not self.site_dir.is_dir():
            raise BadInputError(
                f"There is no site folder at {self.site_dir}.",
                hint="Give the folder that holds this site's slides, features and keys.",
                code="no-site-folder",
            )
        return self

    def site_name(self, asked: str | None = None) -> str:
        """This site's public name: as enrolled, or as asked where the site is not enrolled."""
        identity = SiteFolder(self.site_dir)
        enrolled = identity.identity().site if identity.identity_file.is_file() else None
        if enrolled and asked and enrolled != asked:
            raise BadInputError(
                f"This site is enrolled as {enrolled}, not {asked}.",
                hint="Leave --site out.",
                code="other-site",
            )
        name = enrolled or asked
        if not name:
            raise BadInputError(
                "This site has no name yet.", hint="Enrol it first, or give --site NAME.", code="no-site-name"
            )
        return name

    def site_key(self) -> SigningKey:
        """The site's release key, made on first use."""
        return SigningKey.load_or_create(self.key_path)

    def log(self) -> EventLog:
        """The site's event log."""
        return EventLog(self.site_dir / "log", self.site_key())

    def accepted_auditors(self) -> dict[str, VerifyKey] | None:
        """Keys whose verdicts this site accepts, by key id; None where the site names none and takes any."""
        if not self.auditors.is_dir():
            return None
        keys = [VerifyKey.load(path) for path in sorted(self.auditors.glob("*.pub"))]
        if not keys:
            raise KeyFileError(
                f"{self.auditors} names no auditor, so nobody's verdict would be accepted.",
                hint="Put the auditors' public keys there as *.pub, or remove the folder.",
            )
        return {key.key_id: key for key in keys}

    def recorded_signers(self, release: ReleaseFolder) -> list[VerifyKey]:
        """Public keys of those who signed this release here, kept at signing."""
        return [VerifyKey.load(path) for path in sorted((release.path / "signers").glob("*.pub"))]

    def record_signer(self, release: ReleaseFolder, key: VerifyKey) -> None:
        """Keep the public half of a key that signed this release."""
        folder = release.path / "signers"
        folder.mkdir(exist_ok=True)
        key.save(folder / f"{key.key_id.removeprefix('sha256:')}.pub")

    def log_state(self) -> LogReport:
        """The verified state of the site's event log: whole, the site's, and no shorter than the coordinator holds it.

        Raises :class:`LogBrokenError` where an event was changed, or cut off after its head was anchored.
        """
        folder = self.log().folder
        kept = folder / RECEIPT_FILE
        anchored = (load_document(AnchorReceipt, kept, MAX_PROOF_BYTES).head,) if kept.is_file() else ()
        return verify_log(folder, trusted_keys=[self.site_key().verify_key], earlier_heads=anchored)

    def note(self, kind: str, data: dict[str, Any], *, now: datetime, own: EventLog | None = None) -> None:
        """Make an act an event: first of the log of who acts, where that is not the site's, then of the site's."""
        log = self.log()
        if own is not None and not same_log(own, log):
            own.append(kind, data, now=now)
        log.append(kind, data, now=now)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let one act at a time into this room, between processes: what one has looked at no other changes meanwhile."""
        self.releases.mkdir(parents=True, exist_ok=True)
        with (self.releases / ".lock").open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                emit_note("note: another command is at work on this site's releases; waiting for it.")
                fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    @contextmanager
    def recording_refusals(
        self, act: str, facts: Mapping[str, str], *, now: datetime, own: EventLog | None = None
    ) -> Iterator[None]:
        """Act alone in this room; every refusal inside is an event of the site's log and of who acted, then goes on."""
        with self.alone(), self._recording(act, facts, now, own):
            yield

    @contextmanager
    def _recording(
        self, act: str, facts: Mapping[str, str], now: datetime, own: EventLog | None
    ) -> Iterator[None]:
        try:
            yield
        except RefusedError as error:
            data, log = {**facts, "act": act, "code": error.code}, self.log()
            log.append("release.refused", data, now=now)
            if own is not None and not same_log(own, log):
                # A log of theirs that is itself what was refused cannot take it; the site's holds it.
                with suppress(PixcellError):
                    own.append("release.refused", data, now=now)
            raise

    def all_releases(self) -> list[ReleaseFolder]:
        """Every sealed draft, damaged ones first, then from the oldest on."""
        if not self.releases.is_dir():
            return []
        found = [ReleaseFolder(p) for p in self.releases.iterdir() if _RELEASE_ID.fullmatch(p.name)]
        return sorted(found, key=lambda release: (release.sealed_at() or _NEVER, release.release_id))

    def find(self, release_id: str | None) -> ReleaseFolder:
        """The release asked for; without an id the newest."""
        releases = self.all_releases()
        if not releases:
            raise BadInputError(
                "This site has no sealed release.",
                hint=f"First: pixcell release draft --site-dir {self.site_dir} --tiles DIR",
                code="no-release",
            )
        if release_id is None:
            return releases[-1]
        matching = [release for release in releases if release.release_id == release_id]
        if not matching:
            known = ", ".join(release.release_id for release in releases)
            raise BadInputError(
                f"There is no release {release_id!r} here.", hint=f"Known: {known}.", code="no-release"
            )
        return matching[0]

    def events_of(self, release: ReleaseFolder) -> list[LogEntry]:
        """What the site's log says about a release, oldest first."""
        return [entry for entry in self._entries() if entry.data.get("release") == release.release_id]

    def declined(self, release: ReleaseFolder) -> bool:
        """Whether a signer refused these tiles: by the file here or by an event, under this or an earlier draft's name.

        A crash may leave either without the other, and files can be deleted: one of them is enough.
        """
        return (release.path / REFUSAL).exists() or any(
            entry.kind == DECLINED and _is_about(entry, release) for entry in self._entries()
        )

    def withdrawn(self, release: ReleaseFolder) -> bool:
        """Whether it was taken back: by an event, or by any list of withdrawals here, whoever signed that."""
        if any(entry.kind == "release.withdrawn" for entry in self.events_of(release)):
            return True
        manifest = release.manifest().digest
        for path in sorted(self.releases.glob("withdrawals*.dsse.json")):
            said = Envelope.load(path).unsafe_unverified_payload()
            if parse_document(Withdrawals, said, name=path.name).of(manifest) is not None:
                return True
        return False

    def _entries(self) -> list[LogEntry]:
        return read_entries(self.site_dir / "log")

    def state(self, release: ReleaseFolder) -> ReleaseState:
        """How far a release has come, by its files and the log; `progress_of` also looks into the files."""
        if release.sealed_at() is None:
            return "damaged"
        if self.withdrawn(release):
            return "withdrawn"
        if any(entry.kind == "release.exported" for entry in self.events_of(release)):
            return "exported"
        if self.declined(release):
            return "refused"
        steps: tuple[tuple[str, ReleaseState], ...] = (
            (VERDICT, "signed"),
            (REPORT, "audited"),
            (REQUEST, "sealed"),
        )
        return next((state for name, state in steps if (release.path / name).exists()), "draft")


def release_id_of(manifest: ReleaseManifest) -> str:
    """First 16 hexadecimal digits of the manifest's digest."""
    return manifest.digest.removeprefix("sha256:")[:16]


def _is_about(entry: LogEntry, release: ReleaseFolder) -> bool:
    """Whether an event is about this release, or about the very same tiles sealed at another time."""
    manifest = release.manifest()
    return (
        entry.data.get("manifest") == manifest.digest or entry.data.get("tiles_root") == manifest.tiles_root
    )
