"""What a site's agent is doing, from the files it writes: the answer of `pixcell site status` and of a health check."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from pixcell_core.contracts.canonical import parse_json, read_bounded
from pixcell_core.errors import PixcellError
from site_client.agent.handlers import alive
from site_client.agent.hub_client import WARN_DAYS, days_left, require_kit
from site_client.agent.link_record import read_link
from site_client.agent.link_trouble import LINK_TROUBLES
from site_client.agent.supervisor import FRESH_S
from site_client.approvals.book import ApprovalBook
from site_client.approvals.site_folder import SiteFolder
from site_client.trainer.spool import Spool

if TYPE_CHECKING:
    from rich.console import RenderableType


class StudyStanding(BaseModel):
    """One study this site decided about."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    study: str
    digest: str
    standing: str
    epsilon_cap: float | None
    unit: str
    delta: float
    expires_at: datetime


class SiteStatus(BaseModel):
    """Healthy means: the hub accepted a heartbeat of this agent within the last `fresh_s` seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    site: str
    hub: str
    healthy: bool
    state: str
    reason: str
    last_heartbeat_at: datetime | None
    heartbeat_age_s: float | None
    fresh_s: float
    certificate_days_left: float | None
    warnings: tuple[str, ...]
    trainer: str
    studies: tuple[StudyStanding, ...]

    @property
    def exit_code(self) -> int:
        """1 where the site is not healthy."""
        return 0 if self.healthy else 1

    def render(self) -> RenderableType:
        """What the site admin reads."""
        from rich.console import Group
        from rich.table import Table

        age = "never" if self.heartbeat_age_s is None else f"{self.heartbeat_age_s:.0f} s ago"
        left = (
            "no kit" if self.certificate_days_left is None else f"{self.certificate_days_left:.0f} days left"
        )
        lines = [
            f"{self.site}: {'healthy' if self.healthy else 'NOT healthy'} ({self.state}) {self.reason}".rstrip(),
            f"hub {self.hub}; last accepted heartbeat {age}; certificate {left}; trainer {self.trainer}",
            *(f"warning: {text}" for text in self.warnings),
        ]
        table = Table("study", "standing", "epsilon cap", "expires")
        for s in self.studies:
            cap = "-" if s.epsilon_cap is None else f"{s.epsilon_cap:g} per {s.unit} at delta {s.delta:g}"
            table.add_row(s.study, s.standing, cap, f"{s.expires_at:%Y-%m-%d}")
        return Group(*lines, *([table] if self.studies else []))


def site_status(folder: SiteFolder, *, now: datetime | None = None, fresh_s: float = FRESH_S) -> SiteStatus:
    """Read the state of a site. Raises `BadInputError` (`not-enrolled`) where the folder is none."""
    moment = now or datetime.now(UTC)
    identity = folder.identity()
    state, reason = _state(folder)
    link = read_link(folder.agent)
    age = None if link is None else link.age_s(moment)
    fresh = age is not None and -5.0 <= age <= fresh_s and state != "stopped"
    if not fresh and state == "connected":
        # The supervisor itself may be stopped: what it wrote last does not count any more.
        state, reason = "silent", "The hub has not accepted a heartbeat lately."
    if fresh:
        state, reason = "connected", ""
    warnings = []
    left: float | None = None
    try:
        left = days_left(require_kit(folder, moment), moment)
        if left < WARN_DAYS:
            warnings.append(
                f"the certificate ends in {left:.0f} days: ask the coordinator to renew the kit, "
                "then `pixcell site install-kit`"
            )
    except PixcellError as error:
        warnings.append(f"[{error.code}] {error.message} {error.hint}")
    if link is not None and link.trouble and not fresh:
        said, remedy = LINK_TROUBLES.get(link.trouble, ("", ""))
        state, reason = (state, reason) if state == "stopped" else (link.trouble, f"{said} {remedy}")
    return SiteStatus(
        site=identity.site,
        hub=identity.hub,
        healthy=fresh,
        state=state,
        reason=reason,
        last_heartbeat_at=None if link is None else link.accepted_at,
        heartbeat_age_s=age,
        fresh_s=fresh_s,
        certificate_days_left=left,
        warnings=tuple(warnings),
        trainer=_trainer(folder, moment),
        studies=study_standings(folder, moment),
    )


def study_standings(folder: SiteFolder, now: datetime) -> tuple[StudyStanding, ...]:
    """What this site decided about each study, and whether it holds at `now`."""
    return tuple(
        StudyStanding(
            study=s.study.id,
            digest=s.study.digest,
            standing="approved" if s.valid else s.code,
            epsilon_cap=s.approval.epsilon_cap if s.approval else None,
            unit=s.study.unit,
            delta=s.study.delta,
            expires_at=s.approval.expires_at if s.approval else s.study.expires_at,
        )
        for s in ApprovalBook(folder).studies(now)
    )


def _state(folder: SiteFolder) -> tuple[str, str]:
    """What the supervisor wrote last; `never-started` where it wrote nothing."""
    try:
        body = parse_json(read_bounded(folder.agent / "state.json", 4096))
    except PixcellError:
        return "never-started", "The agent was not started here: pixcell site start"
    if not isinstance(body, dict):
        return "never-started", ""
    return str(body.get("state", ""))[:60], str(body.get("reason", ""))[:1000]


def _trainer(folder: SiteFolder, now: datetime) -> str:
    try:
        beat = Spool(folder.spool).beat()
    except PixcellError:
        beat = None
    if beat is None or not alive(beat, now):
        return "not running"
    return "ready" if beat.ready else "starting"
