"""An enrolled site whose study asks its patients to vote: what the tests of private conditions share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch

from pixcell_core.contracts.artifacts import base_digest, installed_code_digest
from pixcell_core.contracts.study import ConditioningPolicy, PatientVotes, Study
from pixcell_core.private.condition_search import Interpolation, VotedConditions
from pixcell_core.private.ledger_record import ReserveRecord
from pixcell_core.private.noise import NoiseSource, SystemNoiseSource
from site_client.approvals.book import ApprovalBook
from site_client.approvals.enrolment import enrol
from site_client.approvals.site_folder import SiteFolder
from site_client.generate.candidates import PublicCandidates
from site_client.generate.private_votes import PatientVote
from site_client.ledger.site import ledger_folder, ledger_public_key
from site_client.ledger.view import read_ledger
from tests.site_client.trainer.site_fixture import make_ca

from .conftest import WIDTH
from .test_generation import write_study


def bank_of(count: int = 12, width: int = WIDTH, seed: int = 9) -> torch.Tensor:
    return torch.randn(count, 1, width, generator=torch.Generator().manual_seed(seed))


@dataclass
class VotingSite:
    """One site, its study and the public candidates."""

    folder: SiteFolder
    base: Path
    candidates: Path
    study_file: Path
    bank: torch.Tensor = field(default_factory=bank_of)
    now: datetime = field(default_factory=lambda: datetime.now(UTC).replace(microsecond=0))

    def study(self, *, approve: bool = True, votes: dict[str, Any] | None = None, **changes: Any) -> Study:
        """Write the study, and sign it."""
        settings = {
            "noise_multiplier": 4.0,
            "iterations": 2,
            "candidates": 8,
            "labels": ("stroma",),
            "candidates_digest": PublicCandidates.of(self.bank, "bank").digest,
        } | (votes or {})
        study = write_study(
            self.study_file,
            self.base,
            **{
                "conditioning": ConditioningPolicy(
                    mode="private", votes=PatientVotes.model_validate(settings)
                ),
                "code_digest": installed_code_digest(),
                "created_at": self.now,
                "expires_at": self.now + timedelta(days=1),
                **changes,
            },
        )
        if approve:
            ApprovalBook(self.folder).decide(study, "approve")
        return study

    def vote(
        self,
        study: Study,
        source: NoiseSource | None = None,
        on_point: Callable[[str], None] = lambda point: None,
    ) -> PatientVote:
        """The vote of this site for a study."""
        vary = Interpolation(self.bank)
        return PatientVote(self.folder, study, self.bank, vary, source or SystemNoiseSource(), on_point)

    def ask(self, study: Study) -> VotedConditions:
        """Ask the patients, or take what they answered before."""
        return self.vote(study).result()

    def charges(self) -> list[ReserveRecord]:
        """Everything the ledger charged, verified."""
        root = self.folder.root
        view = read_ledger(ledger_folder(root), ledger_public_key(root)).require_whole()
        return [r for r in view.records if isinstance(r, ReserveRecord)]

    def steps_charged(self) -> int:
        """How many questions were charged."""
        return sum(r.steps for r in self.charges() if r.purpose == "conditions")


def voting_site(root: Path, base: Path) -> VotingSite:
    """Enrol the site in `root`, which has features already, and write its public candidates beside it."""
    folder = SiteFolder(root)
    enrol(folder, "east", "127.0.0.1:1", make_ca(root.parent / "ca.crt"))
    made = VotingSite(folder, base, root.parent / "candidates.safetensors", root.parent / "study.json")
    PublicCandidates.of(made.bank, "bank").write(made.candidates)
    assert base_digest(base)
    return made
