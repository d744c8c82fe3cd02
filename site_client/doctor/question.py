"""What every check is given: the site, the moment, and what the admin said about this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from pixcell_core.contracts.study import Study
from site_client.agent.proxy import WayOut
from site_client.approvals.site_folder import SiteFolder, SiteIdentity
from site_client.doctor.finding import Finding


@dataclass(frozen=True)
class Question:
    """`study` is the one whose lock is compared; `other_host` is only contacted where the admin names one."""

    folder: SiteFolder
    identity: SiteIdentity
    hub: str
    way_out: WayOut
    study: Study | None = None
    base: Path | None = None
    device: str = "cpu"
    other_host: str | None = None
    timeout_s: float = 10.0
    deep: bool = False
    now: datetime = field(default_factory=lambda: datetime.now(UTC))


Check = Callable[[Question], Finding]
