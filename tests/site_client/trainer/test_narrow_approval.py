"""A cap that the site signed narrower than the study's holds in the trainer, whatever the study would allow."""

from __future__ import annotations

import numpy as np
import pytest

from site_client.approvals.book import ApprovalBook
from site_client.trainer.service import Trainer, TrainerSettings
from tests.site_client.trainer.site_fixture import TinySite, make_study, start_of
from tests.site_client.trainer.test_trainer import ask, steps_charged


@pytest.fixture
def trainer(tiny_site: TinySite) -> Trainer:
    """The site's trainer, not yet running."""
    return Trainer(TrainerSettings(tiny_site.folder, tiny_site.base, poll_s=0.002), lambda text: None)


def test_the_narrower_cap_refuses_what_the_studys_would_admit(tiny_site: TinySite, trainer: Trainer) -> None:
    study, book = make_study(tiny_site.base), ApprovalBook(tiny_site.folder)
    start = start_of(tiny_site.base, study)
    book.decide(study, "approve")
    assert ask(tiny_site, trainer, study, start)[0].code == "ok"
    # The ledger exists and keeps its owner's cap of 20; one round of epsilon 1.4 or so is spent.
    book.decide(study, "approve", epsilon_cap=1.5)
    moved = {name: value + np.float32(1) for name, value in start.items()}
    refused, update = ask(tiny_site, trainer, study, moved, 2)
    assert (refused.code, update) == ("study-budget-exceeded", {})
    assert steps_charged(tiny_site) == study.steps_per_round
    # The mutant: under the study's own cap the same round is admitted.
    book.decide(study, "approve")
    assert ask(tiny_site, trainer, study, moved, 2)[0].code == "ok"


def test_a_new_ledger_takes_the_narrower_cap(tiny_site: TinySite, trainer: Trainer) -> None:
    study = make_study(tiny_site.base)
    ApprovalBook(tiny_site.folder).decide(study, "approve", epsilon_cap=0.5)
    refused, _ = ask(tiny_site, trainer, study, start_of(tiny_site.base, study))
    assert refused.code in {"budget-exceeded", "study-budget-exceeded"} and steps_charged(tiny_site) == 0
