"""A site's ledger as evidence: believed only where every line of its export is chained and signed by the site's key.

An export is a file that anyone could write. Its chain is verified from the first record to the last against the key that
the site is known by; its statement must follow from those records; and it must be the ledger that the release was
sealed at, whole up to that point. Only then is anything in it counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography import x509

from pixcell_core.contracts import canonical_bytes, load_document, parse_json, read_bounded
from pixcell_core.contracts.release import ReleaseManifest
from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.private.events import GaussianEvent
from pixcell_core.private.ledger_chain import Chain, verify_chain
from pixcell_core.private.ledger_record import EVERY_PATIENT, OpenedRecord, ReserveRecord, head_of
from pixcell_core.trust.dsse import Envelope
from pixcell_core.trust.keys import VerifyKey
from pixcell_core.trust.signer_certificates import revocations_of
from pixcell_core.trust.vouched_keys import open_vouched_key

MAX_EXPORT_BYTES = 256 * 1024 * 1024


class PrivacyEvidenceError(BadInputError):
    """A ledger's export or a canary report cannot be used as evidence."""

    default_code = "bad-privacy-evidence"


class LedgerRefusedError(RefusedError):
    """An export of a ledger is not what the site signed, is another site's, or lacks its end: nothing of it counts."""

    default_code = "ledger-export-broken"


@dataclass(frozen=True)
class VerifiedLedger:
    """What a verified export says: `claimed` epsilon per `unit` at `delta`, and the charges it must follow from."""

    site: str
    unit: str
    claimed: float
    delta: float
    charges: tuple[ReserveRecord, ...]

    @property
    def recomputed(self) -> float:
        """Epsilon of the patients of the dearest cohort, by our own accountant, over everything ever charged."""
        from pixcell_core.private.accounting import epsilon

        names = {record.cohort for record in self.charges} | {EVERY_PATIENT}
        lists = {
            name: [
                GaussianEvent(record.sample_rate, record.noise_multiplier, record.steps)
                for record in self.charges
                if record.cohort in (EVERY_PATIENT, name)
            ]
            for name in names
        }
        return max(epsilon(events, self.delta).value for events in lists.values())


@dataclass(frozen=True)
class LedgerTrust:
    """What shows whose ledger an export is: the site's ledger key, or the authority that stands behind the site's kit.

    `revocations` are lists of kits that were taken back; `now` is when the kit must be good.
    """

    key: VerifyKey | None = None
    ca: x509.Certificate | None = None
    revocations: tuple[Envelope, ...] = ()
    now: datetime | None = None


def read_ledger_export(
    path: Path, trust: LedgerTrust, manifest: ReleaseManifest | None = None
) -> VerifiedLedger:
    """Read an export of `pixcell site budget export`, plain or in its envelope, and verify all of it.

    Args:
        trust: whose ledger it must be, from elsewhere than the export.
        manifest: of the release that is audited, where it was sealed: its site and the head of the ledger it names.

    Raises:
        PrivacyEvidenceError: no export of a ledger, or numbers that cannot be.
        LedgerRefusedError: `ledger-export-unproven` (no key was given), `ledger-export-of-another` (another key or
            site), `ledger-export-broken` (an edited, unsigned, missing or reordered record, or a statement that does not
            follow), `ledger-export-cut` (records at its end are missing).
        RefusedError: the kit behind the ledger's key is not good (`kit-expired`, `signer-revoked`, …).
    """
    value = data_of(path)
    lines, statement = value.get("lines"), value.get("statement")
    if value.get("schema_version") != "budget-export/v1" or not isinstance(lines, list):
        raise unusable(path, "an export of a ledger")
    if not isinstance(statement, dict) or not all(isinstance(line, dict) for line in lines):
        raise unusable(path, "an export of a ledger")
    claimed = number(path, statement.get("epsilon_spent"))
    delta = number(path, statement.get("delta"))
    if trust.key is None and trust.ca is None:
        raise LedgerRefusedError(
            f"Nothing shows whose ledger {path.name} is: no key was given to check it with.",
            hint="Get the site's public ledger key (SITE/keys/ledger.key.pub), compare it aloud (pixcell key show), and "
            "give it with --ledger-key; or the consortium's authority with --ledger-ca.",
            code="ledger-export-unproven",
        )
    chain = verify_chain([canonical_bytes(line) for line in lines], trust.key)
    _require_whole(path, chain, trust.key, lines)
    if trust.ca is not None:
        _require_certificate(path, chain, value.get("certificate"), trust)
    _require_statement(path, chain, statement, delta)
    if manifest is not None:
        _require_release(path, chain, manifest)
    charges = tuple(record for record in chain.records if isinstance(record, ReserveRecord))
    opened = chain.records[0]
    assert isinstance(opened, OpenedRecord)
    return VerifiedLedger(opened.site, opened.unit, claimed, delta, charges)


def sealed_manifest(tiles: Path) -> ReleaseManifest | None:
    """The manifest of the release whose sealed tiles lie in `tiles`; None where they are no sealed release."""
    path = tiles.resolve().parent / "manifest.json"
    return load_document(ReleaseManifest, path) if tiles.name == "tiles" and path.is_file() else None


def number(path: Path, value: Any) -> float:
    """A finite number that is not negative; anything else is refused."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise unusable(path, "numbers that can be")
    return float(value)


def unusable(path: Path, what: str) -> PrivacyEvidenceError:
    """The error for a file that does not hold `what`."""
    return PrivacyEvidenceError(
        f"{path.name} does not hold {what}.",
        hint="Give the files that `pixcell site budget export --out` and `pixcell private audit --format json` wrote.",
    )


def _require_whole(path: Path, chain: Chain, key: VerifyKey | None, lines: list[dict[str, Any]]) -> None:
    if not lines:
        raise _broken(path, "it holds no record")
    if chain.problem is None:
        return
    number, why = chain.problem
    if number == 0 and key is not None and lines[0].get("key_id") != key.key_id:
        raise LedgerRefusedError(
            f"The ledger in {path.name} is signed by another key than the site's {key.key_id}.",
            hint="It is another site's, or was written anew. Ask the site for its own export, and compare keys aloud.",
            code="ledger-export-of-another",
        )
    raise _broken(path, f"record {number}: {why}")


def _require_certificate(path: Path, chain: Chain, given: Any, trust: LedgerTrust) -> None:
    """The site's kit stands behind the very key that signed this chain: of this authority, good now, not taken back."""
    if given is None:
        raise LedgerRefusedError(
            f"{path.name} carries no certificate of the consortium for the ledger's key.",
            hint="The site installs its kit and exports again; or give the ledger's key itself: --ledger-key.",
            code="ledger-export-unproven",
        )
    assert chain.key is not None and trust.ca is not None
    envelope = Envelope.from_bytes(canonical_bytes(given), name=f"the certificate in {path.name}")
    open_vouched_key(
        envelope,
        chain.key,
        chain.records[0].site,
        ca=trust.ca,
        moments=[trust.now or datetime.now(UTC)],
        revocations=revocations_of(trust.revocations, trust.ca),
        purpose="ledger",
    )


def _require_statement(path: Path, chain: Chain, statement: dict[str, Any], delta: float) -> None:
    """The statement is unsigned: what it says of the records must be what they are."""
    head = chain.head
    assert head is not None
    stated = statement.get("records")
    if stated is not None and stated != len(chain.records):
        code = "ledger-export-cut" if isinstance(stated, int) and stated > len(chain.records) else None
        raise _broken(
            path, f"its statement counts {stated} records, and there are {len(chain.records)}", code
        )
    if statement.get("head") not in (None, f"{head.sequence} {head.hash}"):
        raise _broken(path, "its statement names another last record", "ledger-export-cut")
    opened = [record for record in chain.records if isinstance(record, OpenedRecord)][-1]
    pairs = (
        ("site", statement.get("site", opened.site), opened.site),
        ("unit", statement.get("unit"), opened.unit),
        ("delta", delta, opened.cap_delta),
    )
    for what, said, signed in pairs:
        if said != signed:
            raise _broken(path, f"its statement names another {what} than its records")


def _require_release(path: Path, chain: Chain, manifest: ReleaseManifest) -> None:
    site = chain.records[0].site
    if site != manifest.site:
        raise LedgerRefusedError(
            f"The ledger in {path.name} is of {site}, the release of {manifest.site}.",
            hint="Give the export of the site whose tiles these are.",
            code="ledger-export-of-another",
        )
    if manifest.ledger_head is not None and all(
        head_of(record).hash != manifest.ledger_head for record in chain.records
    ):
        raise LedgerRefusedError(
            f"{path.name} lacks the record that the release was sealed at: its end was cut off, or it was written anew.",
            hint="Ask the site for an export of its ledger as it is now: pixcell site budget export.",
            code="ledger-export-cut",
        )


def _broken(path: Path, why: str, code: str | None = None) -> LedgerRefusedError:
    return LedgerRefusedError(
        f"The ledger in {path.name} is not as the site signed it: {why}.",
        hint="Nothing in it counts. Ask the site to export it again: pixcell site budget export.",
        code=code or "ledger-export-broken",
    )


def data_of(path: Path) -> dict[str, Any]:
    """The JSON object in a file, out of its command's envelope."""
    value = parse_json(read_bounded(path, MAX_EXPORT_BYTES), name=path.name, max_bytes=MAX_EXPORT_BYTES)
    if isinstance(value, dict) and value.get("status") == "ok" and "data" in value:
        value = value["data"]
    if not isinstance(value, dict):
        raise unusable(path, "a document of this platform")
    return value
