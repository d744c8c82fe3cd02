"""Reading a ledger: check every line, and add up what was charged. Needs no lock and no private key."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pixcell_core.errors import RefusedError
from pixcell_core.private.accounting import Epsilon, GaussianEvent
from pixcell_core.private.ledger_chain import verify_chain
from pixcell_core.private.ledger_record import AnyRecord, LedgerHead, OpenedRecord, head_of
from pixcell_core.trust.keys import VerifyKey
from site_client.ledger.journal import read_head, read_lines
from site_client.ledger.spending import Spending


class LedgerBrokenError(RefusedError):
    """The ledger does not verify; nothing may be charged to it, and its sum is not to be trusted."""

    default_code = "ledger-broken"


@dataclass(frozen=True)
class BudgetCap:
    """The most a site allows its patients to be used for: epsilon at delta, per patient, over everything."""

    epsilon: float
    delta: float


@dataclass(frozen=True)
class LedgerCheck:
    """The result of verifying a ledger.

    Attributes:
        ok: every record is whole, chained and signed, and none is missing at the end.
        records: how many records verified before the first bad one.
        first_bad: sequence number of the first bad or missing record; None when ok.
        reason: what is wrong with it; empty when ok.
        torn_tail: bytes of a last line that a crash cut off before it could count; no fault.
    """

    ok: bool
    records: int
    first_bad: int | None
    reason: str
    torn_tail: int

    def __str__(self) -> str:
        if self.ok:
            tail = f"; a torn last line of {self.torn_tail} bytes never counted" if self.torn_tail else ""
            return f"ledger verified: {self.records} records, all chained and signed{tail}"
        return f"ledger broken at record {self.first_bad}: {self.reason}"


@dataclass(frozen=True)
class LedgerView:
    """The verified beginning of a ledger, and whether that is all of it."""

    records: tuple[AnyRecord, ...]
    check: LedgerCheck
    key: VerifyKey | None
    recorded_head: LedgerHead | None

    @property
    def head(self) -> LedgerHead | None:
        """The last verified record; None for a ledger that was never opened."""
        return head_of(self.records[-1]) if self.records else None

    @property
    def cap(self) -> BudgetCap | None:
        """The cap in force: that of the last opening record."""
        opened = [r for r in self.records if isinstance(r, OpenedRecord)]
        return BudgetCap(opened[-1].cap_epsilon, opened[-1].cap_delta) if opened else None

    @property
    def site(self) -> str | None:
        """The site's name as the ledger has it."""
        return self.records[0].site if self.records else None

    def verify(self) -> LedgerCheck:
        """Return what was found when the ledger was read."""
        return self.check

    def require_whole(self) -> LedgerView:
        """Return this view, or raise `LedgerBrokenError` that names the first bad record."""
        if not self.check.ok:
            raise LedgerBrokenError(
                f"The privacy ledger is broken at record {self.check.first_bad}: {self.check.reason}.",
                hint="Restore the ledger folder from a backup and compare its head with the coordinator's "
                "copy. Do not delete it: that would hide what was spent.",
            )
        return self

    @cached_property
    def spending(self) -> Spending:
        """What was charged, in order, per cohort and per study."""
        return Spending.of(self.records)

    def cohorts(self) -> tuple[str, ...]:
        """Return the cohorts that were ever charged; `all` stands for every patient of the site."""
        return self.spending.cohorts

    def totals(self, cohort: str | None = None) -> tuple[GaussianEvent, ...]:
        """Return what was charged, grouped by (q, sigma): every reserved step, taken or not.

        With a cohort: what its patients were used for, the charges to `all` among it. None: everything to anybody.
        """
        return self.spending.totals(cohort)

    def epsilon(self, delta: float, cohort: str | None = None) -> Epsilon:
        """Return the epsilon per patient of everything charged to `cohort`; None: to the cohort that paid most."""
        return self.spending.epsilon(delta, cohort)

    def contains(self, head: LedgerHead) -> bool:
        """Whether an earlier exchanged head stands in this chain; False means that the past was rewritten."""
        return 0 <= head.sequence < len(self.records) and head_of(self.records[head.sequence]) == head


def read_ledger(folder: Path, key: VerifyKey | None = None) -> LedgerView:
    """Read and verify the ledger in `folder`, stopping at the first bad record.

    Args:
        folder: the ledger's folder; a missing one is an empty ledger.
        key: the key it must be signed with. Without it, the key that the first record names.
    """
    # The head first: a writer at work may append between the two reads, never take away.
    recorded = read_head(folder)
    lines, tail = read_lines(folder)
    chain = verify_chain(lines, key)
    if tail and chain.problem is None:
        # A last line that lacks nothing but its newline counts.
        longer = verify_chain([tail], key, after=chain)
        chain = longer if longer.problem is None else chain
    records = chain.records
    problem = chain.problem or _compare_with_recorded(records, recorded, bool(tail))
    whole_tail = len(records) > len(lines)
    check = LedgerCheck(
        ok=problem is None,
        records=len(records),
        first_bad=None if problem is None else problem[0],
        reason="" if problem is None else problem[1],
        torn_tail=0 if whole_tail else len(tail),
    )
    return LedgerView(records, check, chain.key if records else key, recorded)


def _compare_with_recorded(
    records: tuple[AnyRecord, ...], recorded: LedgerHead | None, has_tail: bool
) -> tuple[int, str] | None:
    """Compare the chain with the head last known to be on disk; a crash leaves it one behind at most."""
    if recorded is None:
        # Before the first head is on disk only the opening record can exist, and it charges nothing.
        return (
            (len(records), "head.json is missing, so records may be missing too")
            if len(records) > 1
            else None
        )
    if recorded.sequence >= len(records):
        what = (
            "is damaged"
            if has_tail and recorded.sequence == len(records)
            else "and what followed it are missing"
        )
        return len(records), f"it was on disk once and {what} (the last known record is {recorded.sequence})"
    if recorded.sequence < 0 or head_of(records[recorded.sequence]).hash != recorded.hash:
        return max(0, recorded.sequence), "it is not the record that head.json remembers"
    return None
