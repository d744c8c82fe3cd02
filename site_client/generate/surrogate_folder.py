"""A folder of surrogates and what the site keeps about it: one policy, one model and one seed per folder."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixcell_core.errors import BadInputError
from site_client.generate.surrogates import write_record


@dataclass(frozen=True)
class SurrogateFolder:
    """The folder `out` of surrogates of the site in `site_dir`."""

    site_dir: Path
    out: Path

    @property
    def private(self) -> Path:
        """Where the site keeps what must never leave; closed to other accounts, whoever made it."""
        folder = self.site_dir / "private"
        folder.mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700)
        return folder

    def check(self, asked: dict[str, Any], seed: int | None) -> int | None:
        """The seed of a run that may go on here; None where the folder is new.

        A run may go on only where everything that decides a tile, `asked`, is as it was: otherwise tiles of two models
        or two policies would stand under one record, or the private record would name the wrong tiles behind one.

        Raises:
            BadInputError: surrogates of other settings are here, or the name is taken by another folder.
        """
        path = self._kept
        if not path.exists():
            return None
        before = {"place": self._place, "asked": None, **json.loads(path.read_text())}
        if before["place"] != self._place and any(Path(before["place"]).glob("surrogate-*.png")):
            raise BadInputError(
                f"This site already drew surrogates into another folder called {self.out.name}.",
                hint="Give this folder a name of its own: the site's private record is kept by that name.",
                code="surrogates-name-taken",
            )
        same_seed = seed is None or seed == before["seed"]
        if before["asked"] == asked and before["place"] == self._place and same_seed:
            return int(before["seed"])
        if any(self.out.glob("surrogate-*.png")):
            raise BadInputError(
                f"{self.out.name} already holds surrogates drawn with other settings.",
                hint="Draw into another folder, or remove this one.",
                code="surrogates-differ",
            )
        return None

    def settle(self, asked: dict[str, Any], seed: int | None) -> int:
        """The seed of this folder: that of the run that goes on, the one asked for, or one drawn once and kept."""
        earlier = self.check(asked, seed)
        if earlier is not None:
            return earlier
        settled = seed if seed is not None else secrets.randbits(62)
        write_record(self._kept, {"asked": asked, "place": self._place, "seed": settled})
        return settled

    @property
    def _kept(self) -> Path:
        return self.private / f"generation-{self.out.name}.json"

    @property
    def _place(self) -> str:
        return str(self.out.resolve())
