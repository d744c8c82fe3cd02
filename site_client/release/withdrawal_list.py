"""One signer's list of the releases of one site that were taken back: it only grows, and the signer's log remembers it.

The list is a file that others are given; the log says up to which number it had come. A file that was put back to an
earlier state is refused, so that no withdrawal is undone by copying.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pixcell_core.contracts.canonical import parse_document
from pixcell_core.contracts.gate import WITHDRAWALS_PAYLOAD_TYPE, Withdrawals, WithdrawnRelease, written
from pixcell_core.errors import RefusedError
from pixcell_core.trust.dsse import Envelope, sign_envelope, verify_envelope
from pixcell_core.trust.durable import write_whole
from pixcell_core.trust.keys import SigningKey
from pixcell_core.trust.log import EventLog, LogEntry, read_entries

WITHDRAWN = "release.withdrawn"
"""Kind of the event by which a withdrawal stands in the logs of its signer and of the site."""


class WithdrawalListError(RefusedError):
    """A list of withdrawals is not the one that its signer's log remembers."""

    default_code = "withdrawals-rolled-back"


@dataclass(frozen=True)
class WithdrawalList:
    """The list of who holds `key` about the releases of `site`, kept in `path`, remembered in `log`."""

    path: Path
    site: str
    key: SigningKey
    log: EventLog

    def events(self) -> list[LogEntry]:
        """The withdrawals of this key and site in the log, oldest first; early ones name neither and are the site's."""
        return [
            entry
            for entry in read_entries(self.log.folder)
            if entry.kind == WITHDRAWN
            and entry.data.get("key", self.key.key_id) == self.key.key_id
            and entry.data.get("site", self.site) == self.site
        ]

    def published(self) -> Withdrawals | None:
        """The list so far, if its signature is true and nothing is missing from it; None before the first withdrawal.

        Raises `withdrawals-rolled-back` where the log knows a newer one than lies here.
        """
        found = None
        if self.path.exists():
            payload = verify_envelope(
                Envelope.load(self.path), [self.key.verify_key], payload_type=WITHDRAWALS_PAYLOAD_TYPE
            )
            found = parse_document(Withdrawals, payload, name=self.path.name)
        known = {str(entry.data["manifest"]): int(entry.data["number"]) for entry in self.events()}
        newest = max(known.values(), default=0)
        number = 0 if found is None else found.number
        if number < newest or any(found is None or found.of(manifest) is None for manifest in known):
            raise WithdrawalListError(
                f"{self.path.name} has number {number}, and the log says that number {newest} was given out.",
                hint="The list was put back to an earlier state. Restore the newest one: recipients have copies.",
            )
        return found

    def take_back(self, manifest_digest: str, reason: str, now: datetime) -> tuple[Withdrawals, Envelope]:
        """Put a release on the list and write it; one that stands on it already (interrupted before) is left as it is."""
        before = self.published()
        moment = now.astimezone(UTC).replace(microsecond=0)
        entry = written(WithdrawnRelease, manifest_digest=manifest_digest, reason=reason, withdrawn_at=moment)
        if before is not None and before.of(manifest_digest) is not None:
            return before, Envelope.load(self.path)
        withdrawals = Withdrawals(
            site=self.site,
            number=1 if before is None else before.number + 1,
            issued_at=moment,
            withdrawn=(*(() if before is None else before.withdrawn), entry),
        )
        envelope = sign_envelope(WITHDRAWALS_PAYLOAD_TYPE, withdrawals.to_bytes(), [self.key])
        write_whole(self.path, envelope.to_bytes())
        return withdrawals, envelope
