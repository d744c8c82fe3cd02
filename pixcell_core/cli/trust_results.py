"""What the trust commands return: typed results with a text form for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from pixcell_core.trust.bundle import BundleReport, Check
from pixcell_core.trust.datasheet import AUDIENCE_WORDS
from pixcell_core.trust.dsse import Envelope
from pixcell_core.trust.log import LogEntry, LogReport


class LogVerified(LogReport):
    """A log that verifies."""

    def __str__(self) -> str:
        lines = [
            f"✓ {self.entries} events, each in its place, every head signed",
            f"✓ root {self.root or '(empty log)'}",
            f"{'✓ signed by a key you trust:' if self.key_trusted else '  signed by'} {self.key_id}",
        ]
        if self.earlier_heads_checked:
            lines.append(f"✓ {self.earlier_heads_checked} earlier head(s) lie in its past")
        else:
            lines.append(
                "  no earlier head was given: events cut off at the end would not show (--head FILE)"
            )
        if not self.key_trusted:
            lines.append("  no key was given: the log is whole, whose it is was not checked (--key FILE)")
        if self.unfinished_tail_bytes:
            lines.append(
                f"  {self.unfinished_tail_bytes} bytes of an interrupted write at the end: "
                "never acknowledged, the next event removes them"
            )
        return "\n".join(lines)


class LogShown(BaseModel):
    """The newest events of a log."""

    total: int
    events: list[LogEntry]

    def render(self) -> RenderableType:
        """A table: number, time, kind, facts."""
        table = Table(title=f"{len(self.events)} of {self.total} events")
        for name in ("#", "time", "event"):
            table.add_column(name, no_wrap=True)
        table.add_column("facts", overflow="fold")
        for entry in self.events:
            facts = Text(json.dumps(entry.data, sort_keys=True))
            table.add_row(str(entry.index), entry.time, entry.kind, facts)
        return table


class LogHead(BaseModel):
    """The newest head of a log with its signature."""

    tree_size: int
    root: str
    key_id: str
    head: Envelope

    def __str__(self) -> str:
        return f"{self.tree_size} events\nroot {self.root}\nsigned by {self.key_id}"


class ProofWritten(BaseModel):
    """A proof about a log in a file."""

    proof: Path
    about: str
    tree_size: int
    hashes: int

    def __str__(self) -> str:
        return (
            f"Proof of {self.about} under the head of {self.tree_size} events ({self.hashes} hashes): {self.proof}\n"
            "Check it without the log: pixcell log verify-proof PROOF --key LOG.pub --head HEAD"
        )


class ProofVerified(BaseModel):
    """A proof that holds."""

    about: str
    tree_size: int
    root: str
    head_compared: bool

    def __str__(self) -> str:
        held = (
            "✓ the head is the one you hold"
            if self.head_compared
            else "  no head was given: another head may be shown to others (--head FILE)"
        )
        return f"✓ {self.about}\n✓ under the signed head of {self.tree_size} events, root {self.root}\n{held}"


class HeadOffered(BaseModel):
    """An offer for the coordinator, in a file."""

    offer: Path
    party: str
    tree_size: int
    since: int

    def __str__(self) -> str:
        grown = f", grown from {self.since}" if self.since else ""
        return (
            f"{self.party} offers the head of {self.tree_size} events{grown}: {self.offer}\n"
            "Send it to the coordinator: pixcell log anchor OFFER --dir DIR. It holds no event, only hashes."
        )


class ReceiptAccepted(BaseModel):
    """A receipt that was checked and kept."""

    party: str
    anchored_size: int
    coordinator_size: int
    coordinator_key: str
    grown_since_last: bool

    def __str__(self) -> str:
        grown = (
            "✓ the coordinator's log only grew since the receipt before"
            if self.grown_since_last
            else "  the first receipt: there is no earlier head of the coordinator's log to compare with"
        )
        return (
            f"✓ the head of {self.anchored_size} events of {self.party} lies in the coordinator's log of "
            f"{self.coordinator_size} events\n✓ signed by {self.coordinator_key}\n{grown}"
        )


class KeyShown(BaseModel):
    """A public key by its identity and file."""

    key_id: str
    public_key: Path

    def __str__(self) -> str:
        words = self.key_id.removeprefix("sha256:")
        grouped = " ".join(words[at : at + 4] for at in range(0, len(words), 4))
        return f"{self.key_id}\n  to compare aloud: {grouped}\n  public key: {self.public_key}"


class BundleVerified(BundleReport):
    """A bundle that verifies."""

    def __str__(self) -> str:
        lines = [checks_text(self.checks), ""]
        lines.append(f"{self.tiles} synthetic tiles released by {self.site}: verdict {self.verdict}")
        lines.append(f"  for {AUDIENCE_WORDS[self.audience]}, until {self.expires_at:%Y-%m-%d}")
        lines.append(f"  judged by the audit policy {self.policy_digest}")
        if self.exception:
            lines.append(f"  exception by {self.approver}: {self.exception}")
        if self.privacy is None:
            lines.append("  no differential privacy is claimed")
        else:
            lines.append(f"  {self.privacy}")
            lines += [f"    covers {text}" for text in self.privacy.covers]
            lines += [f"    does not cover {text}" for text in self.privacy.does_not_cover]
        if self.proven_kinds:
            lines.append(f"  kinds of copy this audit proved it can see: {', '.join(self.proven_kinds)}")
        for signer in self.signers:
            known = "a key you trust" if signer.trusted else "a key you did not name"
            who = f" {signer.name}" if signer.name else ""
            by = f", certified as {signer.certificate}" if signer.certificate else ""
            lines.append(f"  {signer.role:<8}{who} {signer.key_id} ({known}{by})")
        if not self.trusted:
            lines.append("")
            lines.append(
                "WHOLE, BUT ORIGIN NOT PROVEN. Anyone could have made these keys. Get the auditor's public key\n"
                "from the auditor and check again: pixcell release verify BUNDLE --trust AUDITOR.pub"
            )
        return "\n".join(lines)


def checks_text(checks: Sequence[Check]) -> str:
    """One line per check, with a tick or a cross, in aligned columns."""
    width = max((len(check.name) for check in checks), default=0)
    return "\n".join(f"{'✓' if c.passed else '✗'} {c.name:<{width}}  {c.detail}" for c in checks)
