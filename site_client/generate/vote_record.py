"""What the votes of a study released, kept at the site: a resumed run uses it again and asks nobody.

Using a stored result again is post-processing: no charge and no new noise. A file that is damaged is refused and never
replaced in silence, since asking again is a new charge. Losing the file loses the result and not the charge.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from pixcell_core.contracts.canonical import digest
from pixcell_core.contracts.study import Study
from pixcell_core.errors import BadInputError
from pixcell_core.private.condition_search import VotedConditions
from pixcell_core.trust.durable import write_whole
from site_client.slides.storage import storage_errors


@dataclass(frozen=True)
class VoteRecord:
    """The place of one study's stored votes in a site's private folder; other settings have another place."""

    folder: Path
    study: Study
    variation: str

    @property
    def path(self) -> Path:
        """Where the result lies: named by the study's digest, which covers all its settings, and the variation."""
        asked = digest({"study": self.study.digest, "variation": self.variation})
        return self.folder / "votes" / f"{asked.removeprefix('sha256:')[:32]}.safetensors"

    def read(self) -> VotedConditions | None:
        """The stored result; None where these votes were never finished.

        Raises:
            BadInputError: the file is damaged, or not what its name says.
        """
        votes = self.study.conditioning.votes
        if votes is None or not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as handle:
                said = json.loads((handle.metadata() or {})["record"])
                voted = VotedConditions(
                    handle.get_tensor("candidates"),
                    handle.get_tensor("histograms").numpy(),
                    votes,
                    self.variation,
                )
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise self._damaged() from error
        if said != {"study": self.study.digest, "variation": self.variation, "result": voted.digest}:
            raise self._damaged()
        return voted

    def prepare(self) -> None:
        """Make the folder, closed to other accounts, and write in it, so that a disk that refuses is met before a charge.

        Raises:
            PixcellError: the folder cannot be made or written, or the disk is full.
        """
        with storage_errors("keeping the patients' votes", self.path.parent):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.path.parent.mkdir(mode=0o700, exist_ok=True)
        probe = self.path.with_suffix(".probe")
        write_whole(probe, b"", mode=0o600)
        probe.unlink()

    def write(self, voted: VotedConditions) -> None:
        """Store a result, flushed to disk before anybody uses it."""
        record = {"study": self.study.digest, "variation": self.variation, "result": voted.digest}
        tensors = {
            "candidates": voted.candidates.contiguous(),
            "histograms": torch.from_numpy(voted.histograms).contiguous(),
        }
        write_whole(self.path, save(tensors, {"record": json.dumps(record)}), mode=0o600)

    def _damaged(self) -> BadInputError:
        return BadInputError(
            f"The stored votes of study {self.study.id} are damaged ({self.path}).",
            hint="Restore the file from a backup. Removing it asks the patients again: a new charge to their budget.",
            code="votes-damaged",
        )
