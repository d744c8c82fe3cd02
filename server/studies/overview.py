"""A study as the coordinator sees it: its settings, who takes part and with what approval, and what it will cost."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pixcell_core.contracts.masking import MIN_COHORT
from pixcell_core.contracts.remedies import remedy_of
from pixcell_core.contracts.study import Study
from server.layout import ServerLayout


class Planned(BaseModel):
    """What a whole study costs each patient of a site, read off its public settings."""

    epsilon: float
    delta: float
    unit: str
    adjacency: str
    covers: str
    does_not_cover: str
    statement: str
    within_cap: bool


class Participant(BaseModel):
    """One site of a study. `approval` is `ok`, or the code of what is wrong with it."""

    site: str
    fingerprint: str
    approval: str
    reason: str
    remedy: str
    decided_at: datetime | None
    expires_at: datetime | None
    epsilon_cap: float | None


class StudyShown(BaseModel):
    """A study, its digest and its file; with its participants and its cost where they were asked for."""

    digest: str
    file: Path | None = None
    study: dict[str, Any]
    participants: list[Participant] | None = None
    planned: Planned | None = None

    def __str__(self) -> str:
        s = self.study
        text = (
            f"Study {s['id']}\ndigest: {self.digest}\n"
            + (f"file: {self.file}\n" if self.file else "")
            + f"sites: {', '.join(s['sites'])} (quorum {s['quorum']})\n"
            f"{s['rounds']} rounds x {s['steps_per_round']} steps, q = {s['sample_rate']}, sigma = "
            f"{s['noise_multiplier']}, C = {s['max_grad_norm']}\n"
            f"{_aggregated(s['aggregation'])}\n{_waited(s)}\n"
            f"cap per site: epsilon {s['epsilon_cap']} per patient at delta {s['delta']}, neighbouring cohorts: "
            f"{s['adjacency']}; {_covered(s['conditioning'])}\n"
        )
        if self.planned is not None:
            text += f"planned per site, for all rounds: {self.planned.statement}\n"
            if not self.planned.within_cap:
                text += "The plan passes the cap: sites will refuse the last rounds.\n"
        for one in self.participants or []:
            until = f", valid to {one.expires_at:%Y-%m-%d %H:%M} UTC" if one.expires_at else ""
            text += f"  {one.site}: " + ("approved" + until if one.approval == "ok" else one.reason) + "\n"
            if one.approval != "ok":
                text += f"    → {one.remedy}\n"
        return text + "Read the digest to every site: what they approve must show the same."


def show_study(layout: ServerLayout, study: Study) -> StudyShown:
    """The whole picture: reads the enrolled sites, the approvals seen in rounds, and computes the planned epsilon."""
    from server.enrolment.sites import SiteBook
    from server.rounds.approvals_seen import ApprovalsSeen

    book = SiteBook(layout.registry())
    enrolled = {site: book.get(site) for site in study.sites}
    participants = [
        Participant(
            site=seen.site,
            fingerprint=enrolled[seen.site].fingerprint,
            approval=seen.code,
            reason=seen.reason,
            remedy="" if seen.code == "ok" else remedy_of(seen.code),
            decided_at=seen.approval.decided_at if seen.approval else None,
            expires_at=min(seen.approval.expires_at, study.expires_at) if seen.approval else None,
            epsilon_cap=seen.approval.epsilon_cap if seen.approval else None,
        )
        for seen in ApprovalsSeen(layout.run(study.id)).read(study, enrolled)
    ]
    return StudyShown(
        digest=study.digest,
        study=study.model_dump(mode="json"),
        participants=participants,
        planned=plan_of(study),
    )


def plan_of(study: Study) -> Planned:
    """What the study's own accountant says of all its rounds and private conditions together."""
    from pixcell_core.private.accounting import epsilon
    from pixcell_core.private.study_charges import planned_events

    found = epsilon(planned_events(study), study.delta)
    return Planned(
        epsilon=found.value,
        delta=found.delta,
        unit=found.unit,
        adjacency=found.adjacency,
        covers=found.covers,
        does_not_cover=found.does_not_cover,
        statement=str(found),
        within_cap=found.value <= study.epsilon_cap,
    )


def _covered(conditioning: dict[str, Any]) -> str:
    """What the study's cap says about conditions."""
    if conditioning["mode"] != "private":
        return f"it covers the adapter, not surrogates' conditions ({conditioning['mode']})"
    votes = conditioning["votes"]
    return (
        f"it covers the adapter and the private conditions ({votes['iterations']} rounds of patients' votes, "
        f"sigma = {votes['noise_multiplier']})"
    )


def _aggregated(settings: dict[str, Any]) -> str:
    """How replies become one, in words."""
    rule = {
        "mean": "the mean of the sites' updates, all of one weight",
        "median": "the median of the sites' updates per coordinate",
        "trimmed-mean": f"the mean per coordinate without the share {settings['trim']} at either end",
    }[settings["rule"]]
    parts = [rule]
    if settings["server_optimizer"] == "adam":
        parts.append(f"FedAdam at the server, rate {settings['server_learning_rate']}")
    elif settings["server_learning_rate"] != 1.0:
        parts.append(f"times {settings['server_learning_rate']}")
    if settings["proximal_mu"]:
        parts.append(f"FedProx, mu = {settings['proximal_mu']}")
    masking = settings["masking"]
    parts.append(
        "updates are seen by the coordinator"
        if masking is None
        else f"under masks: the coordinator sees the sum of at least {max(masking['threshold'], MIN_COHORT)} sites "
        "and no single update"
    )
    return "aggregation: " + "; ".join(parts)


def _waited(study: dict[str, Any]) -> str:
    """How long a round waits, in words."""
    whole = f"a round waits at most {study['round_timeout_s']:g} s"
    if study["straggler_rule"] == "grace":
        whole += f", and {study['straggler_grace_s']:g} s more once the quorum has answered"
    return whole
