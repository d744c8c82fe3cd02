"""Which Flower bundles may stand behind a task: only one that a valid approval of this site names by its digest.

The bundle is never opened here: what runs is the app installed at the site. Its digest is compared all the same, so
that a hub that announces other code than the study names is refused and seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pixcell_core.contracts.canonical import digest
from pixcell_core.errors import RefusedError
from site_client.agent.site_log import SiteLog
from site_client.approvals.book import ApprovalBook
from site_client.approvals.site_folder import SiteFolder

NOT_APPROVED = "app-not-approved"
PUBLIC_REASON = "this site approved no study with the app that the hub sent"


class AppRefusedError(RefusedError):
    """The hub sent a task with a bundle that no approved study names."""

    default_code = NOT_APPROVED


@dataclass
class AppGate:
    """Judges the bundle of one task. `app_digest` is that of the received bytes, whatever the hub called them."""

    folder: SiteFolder
    app_digest: str = ""
    approved: bool = field(default=False)

    def receive(self, content: bytes) -> None:
        """Take the bundle's bytes: compute their digest, look for a valid approval of it, log a refusal."""
        self.app_digest = digest(bytes(content))
        self.approved = self.app_digest in ApprovalBook(self.folder).apps()
        if not self.approved:
            SiteLog(self.folder.logs).say("app-refused", app=self.app_digest)

    def require(self, announced: str) -> None:
        """Refuse a task whose bundle is not approved, or is not the one that was announced (`fab_hash`, hex).

        Raises `AppRefusedError`.
        """
        if f"sha256:{announced}" != self.app_digest:
            SiteLog(self.folder.logs).say("app-altered", app=self.app_digest)
            self.approved = False
        if not self.approved:
            raise AppRefusedError(PUBLIC_REASON, hint="The site's own log names it.")
