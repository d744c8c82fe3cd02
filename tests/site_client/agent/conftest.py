"""A site with its kit."""

from __future__ import annotations

from pathlib import Path

import pytest

from site_client.approvals.site_folder import SiteFolder
from tests.site_client.agent.peers import (
    Authority,
    make_site,
)


@pytest.fixture
def site(tmp_path: Path, authority: Authority) -> SiteFolder:
    return make_site(tmp_path, authority)
