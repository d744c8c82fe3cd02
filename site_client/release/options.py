"""Options that more than one `pixcell release` command takes."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

SiteDirOption = Annotated[Path, typer.Option("--site-dir", help="The site's folder.")]
ReleaseOption = Annotated[
    str | None, typer.Option("--release", help="Which release (see `release show`); the newest if left out.")
]


class Audience(StrEnum):
    """Who may receive the tiles: parties to a written agreement, registered users, anyone."""

    AGREEMENT = "agreement"
    REGISTERED = "registered"
    PUBLIC = "public"
