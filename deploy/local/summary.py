"""The end of a demonstration: one table per site, what it proves, what it does not, and where to look."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from deploy.local.consortium import SiteOutcome
from deploy.local.plan import DemoPlan


class DemoSummary(BaseModel):
    """What a demonstration ended with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    out: Path
    sites: list[dict[str, Any]]
    seconds: dict[str, float]
    total_seconds: float
    peak_memory_mb: float
    notes: list[str]
    as_expected: bool

    @property
    def exit_code(self) -> int:
        """1 when something happened that the demonstration does not expect (a broken bundle, a released plant)."""
        return 0 if self.as_expected else 1

    def render(self) -> Any:
        """A table of sites, the honest words about privacy, paths and times."""
        from rich.console import Group
        from rich.table import Table

        table = Table(title="What became of each hospital")
        for column in ("site", "slides", "patients", "tiles", "epsilon*", "audit", "release"):
            table.add_column(column)
        for site in self.sites:
            epsilon = (
                "—"
                if site["epsilon_value"] is None
                else f"{math.ceil(site['epsilon_value'] * 100) / 100:.2f}"
            )
            if site["bundle"]:
                release = "bundle verified" if site["bundle_verified"] else "BUNDLE DOES NOT VERIFY"
                release += f", {site['withheld']} withheld" if site["withheld"] else ""
            else:
                release = "refused"
            counts = (str(site[k]) for k in ("slides", "patients", "tiles"))
            table.add_row(site["name"], *counts, epsilon, site["verdict"], release)
        paths = Table(title="Where to look", show_header=False)
        for site in self.sites:
            paths.add_row(site["name"], "report", site["report"])
            paths.add_row("", "report with real tiles, stays at the site", site["site_report"])
            paths.add_row("", "surrogates", site["sheet"])
            paths.add_row(
                "", "bundle" if site["bundle"] else "why refused", site["bundle"] or site["why_refused"]
            )
        times = Table(
            title=f"Time: {self.total_seconds:.0f} s, peak memory {self.peak_memory_mb / 1000:.1f} GB"
        )
        times.add_column("stage")
        times.add_column("seconds", justify="right")
        for stage, spent in self.seconds.items():
            times.add_row(stage, f"{spent:.1f}")
        return Group(table, *self.notes, "", paths, times)


def honest_words(plan: DemoPlan, outcomes: list[SiteOutcome]) -> list[str]:
    """What the numbers mean, and what they do not."""
    notes = []
    spent = [o for o in outcomes if o.epsilon_value is not None and o.delta is not None]
    if spent:
        first = spent[0]
        private = plan.conditioning == "private"
        what = (
            "on the adapter and on the conditions together" if private else "on the adapter's training alone"
        )
        notes.append(
            f"* epsilon per patient (all slides and tiles of one patient) at delta {first.delta:g}, spent in this site's "
            f"ledger {what}. Not covered: {first.not_covered}"
        )
        notes.append(
            f"  With about {plan.training_patients} training patients per site this is a weak promise: the noise on each "
            "coordinate is large against what such a cohort can teach, so the adapter learns little. Hundreds of "
            "patients, or a larger epsilon said openly, change that; more rounds do not."
        )
    for outcome in outcomes:
        if outcome.planted:
            found = sorted(set(outcome.planted) & set(outcome.flagged))
            notes.append(
                f"  {outcome.name} was made dishonest: it hid {len(outcome.planted)} of its real tiles among its "
                f"surrogates. The audit named {len(found)} of them and {len(set(outcome.flagged) - set(outcome.planted))} "
                f"other tiles; its release was {'written' if outcome.bundle else 'refused'}."
            )
        elif outcome.withheld:
            notes.append(
                f"  {outcome.name}: tiles flagged by the audit, no more than chance explains: {outcome.withheld} of "
                f"{plan.surrogates}. Withheld; the rest was audited again, and the bundle says that it is filtered."
            )
        if outcome.verdict == "REVIEW" and not outcome.planted:
            notes.append(
                f"  {outcome.name} stands at REVIEW: a named person has to sign an exception "
                "(`pixcell release sign --exception … --approver …`); the demonstration signs none."
            )
    if plan.slides is not None:
        notes.append(
            "  A handful of patients proves that the road carries real slides. It proves no privacy claim: the audit "
            "says INVALID by its own preconditions, which is the right answer."
        )
    return notes


def judge(plan: DemoPlan, outcomes: list[SiteOutcome]) -> bool:
    """Whether bundles verify, no plant was released, and every plant was named (or the audit said INVALID)."""
    for outcome in outcomes:
        if outcome.bundle and not outcome.bundle_verified:
            return False
        unseen = set(outcome.planted) - set(outcome.flagged)
        if outcome.planted and (outcome.bundle or (unseen and outcome.verdict != "INVALID")):
            return False  # an audit that says INVALID vouches for nothing, and nothing leaves either
        if plan.slides is not None and outcome.verdict != "INVALID":
            return False
    return True
