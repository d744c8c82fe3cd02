"""The vote of a site's patients: charged before anything, asked once, kept, and lost safely in a crash."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pixcell_core.contracts.study import ConditioningPolicy
from pixcell_core.errors import BadInputError, PixcellError, RefusedError
from pixcell_core.private.accounting import GaussianEvent, epsilon
from pixcell_core.private.condition_search import Interpolation, public_seed, replayed
from pixcell_core.private.noise import SystemNoiseSource, UnsafeFixedKeySource
from pixcell_core.training.feature_store import FeatureStore
from site_client.approvals.book import ApprovalBook
from site_client.generate.private_votes import PatientVote
from site_client.ledger.ledger import RoundCharge
from site_client.ledger.site import open_site_ledger
from site_client.ledger.view import BudgetCap

from .conftest import PATIENTS, fill_store, tiny_base
from .voting_site import VotingSite, bank_of, voting_site


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def place(site: Path, base: Path) -> VotingSite:
    return voting_site(site, base)


def refusal(act: Callable[[], Any]) -> PixcellError:
    with pytest.raises(PixcellError) as refused:
        act()
    assert refused.value.hint
    return refused.value


def test_every_iteration_is_one_charge_of_all_patients_before_they_are_asked(place: VotingSite) -> None:
    study = place.study()
    voted = place.ask(study)
    assert voted.histograms.shape == (2, 1, 8) and voted.candidates.shape == (2, 8, 1, 8)
    charges = place.charges()
    assert [(r.study, r.purpose, r.round, r.steps) for r in charges] == [
        (study.digest, "conditions", 0, 1)
    ] * 2
    assert {(r.sample_rate, r.noise_multiplier, r.max_grad_norm) for r in charges} == {(1.0, 4.0, 1.0)}
    assert {r.code_digest for r in charges} == {study.code_digest}
    stored = place.folder.root / "private" / "votes"
    assert [p.stat().st_mode & 0o777 for p in stored.iterdir()] == [0o600]
    again = replayed(voted, place.bank, Interpolation(place.bank), seed=public_seed(study.digest))
    assert again.digest == voted.digest, "what was released follows from the noisy histograms alone"


def test_nothing_private_is_read_before_its_charge_is_on_disk(
    place: VotingSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    for name in ("embeddings", "labels"):
        real = getattr(FeatureStore, name)

        def watched(store: FeatureStore, patient: str, real: Any = real) -> Any:
            read.append(place.steps_charged())
            return real(store, patient)

        monkeypatch.setattr(FeatureStore, name, watched)

    class Watched(SystemNoiseSource):
        def gaussian(self, count: int) -> npt.NDArray[np.float64]:
            read.append(place.steps_charged())
            return super().gaussian(count)

    place.vote(place.study(), Watched()).result()
    once = 2 * len(PATIENTS) + 1
    assert read == [1] * once + [2] * once


def test_an_answer_is_kept_and_used_again_without_charge_or_noise(place: VotingSite) -> None:
    study = place.study()
    first = place.ask(study)

    class Silent(SystemNoiseSource):
        def gaussian(self, count: int) -> npt.NDArray[np.float64]:
            raise AssertionError("noise drawn")

    again = place.vote(study, Silent()).result()
    assert again.digest == first.digest and place.steps_charged() == 2
    stored = place.vote(study).stored()
    assert stored is not None and stored.digest == first.digest


def test_other_settings_are_another_charge(place: VotingSite) -> None:
    first = place.ask(place.study())
    for changes in ({"iterations": 1}, {"threshold": 1.0}, {"labels": ("stroma", "tumour")}):
        assert place.ask(place.study(votes=changes)).digest != first.digest
    assert place.steps_charged() == 2 + 1 + 2 + 2
    study = place.study()
    vary = Interpolation(place.bank)
    vary.name = "another variation"
    PatientVote(place.folder, study, place.bank, vary, SystemNoiseSource()).result()
    assert place.steps_charged() == 7 + 2


def test_a_fixed_key_gives_the_same_votes_and_the_system_never_does(
    place: VotingSite, tmp_path: Path
) -> None:
    found = []
    for name in ("one", "two"):
        fill_store(tmp_path / name / "site" / "features" / "train")
        twin = voting_site(tmp_path / name / "site", place.base)
        now = datetime(2026, 1, 1, tzinfo=UTC)
        study = twin.study(approve=False, created_at=now, expires_at=now + timedelta(days=9999))
        ApprovalBook(twin.folder).decide(study, "approve")
        found.append(twin.vote(study, UnsafeFixedKeySource()).result().digest)
    assert found[0] == found[1]
    free = place.study()
    assert not np.array_equal(place.ask(free).histograms[0], place.ask(place.study(title="b")).histograms[0])


@pytest.mark.parametrize("patients", [(), PATIENTS[:1]])
def test_a_cohort_of_nobody_or_of_one_is_refused_uncharged(
    tmp_path: Path, base: Path, patients: tuple[str, ...]
) -> None:
    """A promise to one patient alone is a promise about that patient's presence; the refusal stays at the site."""
    root = tmp_path / "lone" / "site"
    fill_store(root / "features" / "train", patients)
    lone = voting_site(root, base)
    study = lone.study()
    assert refusal(lambda: lone.ask(study)).code == "cohort-too-small"
    assert not lone.folder.ledger.exists()


def spent_before(place: VotingSite, steps: int, study: str = "another-study", cap: float = 20.0) -> None:
    with open_site_ledger(place.folder.root, site="east", cap=BudgetCap(cap, 1e-5)) as ledger:
        charge = RoundCharge(study, 1, 1.0, 4.0, steps, 0.1, "sha256:" + "c0de" * 16)
        with ledger.reserve(charge) as reserve:
            for step in range(steps):
                reserve(step)


def test_the_sites_cap_refuses_before_anybody_is_asked(place: VotingSite) -> None:
    cap = 0.99 * epsilon([GaussianEvent(1.0, 4.0, 6)], 1e-5).value
    spent_before(place, 4, cap=cap)
    study = place.study()
    assert refusal(lambda: place.ask(study)).code == "budget-exceeded"
    assert place.steps_charged() == 0 and len(place.charges()) == 4
    one = place.study(votes={"iterations": 1})
    place.ask(one)
    assert place.steps_charged() == 1, "what fits is asked"


def test_the_studys_cap_counts_training_and_conditions_together(place: VotingSite) -> None:
    cap = 0.99 * epsilon([GaussianEvent(1.0, 4.0, 6)], 1e-5).value
    study = place.study(epsilon_cap=cap)
    spent_before(place, 4, study=study.digest)
    assert refusal(lambda: place.ask(study)).code == "study-budget-exceeded"
    assert place.steps_charged() == 0


def test_a_study_the_site_has_not_approved_asks_nobody(place: VotingSite) -> None:
    study = place.study(approve=False)
    assert refusal(lambda: place.ask(study)).code == "not-approved"
    ApprovalBook(place.folder).decide(study, "deny")
    assert refusal(lambda: place.ask(study)).code == "approval-denied"
    ApprovalBook(place.folder).decide(study, "approve")
    other = place.study(approve=False, votes={"noise_multiplier": 0.1})
    assert refusal(lambda: place.ask(other)).code == "not-approved", "less noise is another study"
    past = datetime.now(UTC) - timedelta(days=2)
    over = place.study(created_at=past, expires_at=past + timedelta(days=1))
    assert refusal(lambda: place.ask(over)).code == "approval-expired"
    assert not place.folder.ledger.exists(), "nothing was charged by any of them"


def test_an_answer_outlives_its_study_but_not_the_sites_approval(
    place: VotingSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = place.study()
    first = place.ask(study)
    require = ApprovalBook.require
    late = datetime.now(UTC) + timedelta(days=30)
    monkeypatch.setattr(
        ApprovalBook, "require", lambda book, study, now=None: require(book, study, now or late)
    )
    assert place.ask(study).digest == first.digest
    monkeypatch.undo()
    ApprovalBook(place.folder).decide(study, "revoke")
    assert refusal(lambda: place.ask(study)).code == "approval-withdrawn"


def test_what_cannot_be_asked_is_refused_uncharged(
    place: VotingSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = place.study(code_digest="sha256:" + "1" * 64)
    assert refusal(lambda: place.ask(code)).code == "code-differs"
    blend = place.study(conditioning=ConditioningPolicy())
    assert refusal(lambda: place.ask(blend)).code == "policy-not-approved"
    study = place.study()
    place.bank = bank_of(width=9)
    error = refusal(lambda: place.ask(study))
    assert isinstance(error, BadInputError) and error.code == "features-do-not-fit"
    for shard in (place.folder.train_features / "shards").glob("*.safetensors"):
        shard.write_bytes(b"torn")
    assert refusal(lambda: place.ask(study)).code == "feature-store-damaged"
    assert not place.folder.ledger.exists()
    place.bank = bank_of(7)
    fill_store(place.folder.train_features)
    error = refusal(lambda: place.ask(study))
    assert isinstance(error, RefusedError) and error.code == "too-few-candidates"
    assert place.steps_charged() == 0


def test_a_damaged_answer_is_never_replaced_in_silence(place: VotingSite) -> None:
    study = place.study()
    place.ask(study)
    (kept,) = (place.folder.root / "private" / "votes").iterdir()
    whole = kept.read_bytes()
    torn = [whole[:-9], whole[:20], b"", whole[:-1] + bytes([whole[-1] ^ 1])]
    for data in torn:
        kept.write_bytes(data)
        assert refusal(lambda: place.ask(study)).code == "votes-damaged"
    other = place.study(title="another")
    place.ask(other)
    (stranger,) = set((place.folder.root / "private" / "votes").iterdir()) - {kept}
    kept.write_bytes(stranger.read_bytes())
    assert refusal(lambda: place.ask(study)).code == "votes-damaged", (
        "another study's answer is not this one's"
    )
    assert place.steps_charged() == 4
    kept.unlink()
    place.ask(study)
    assert place.steps_charged() == 6, "lost is asked again, and paid again"


def test_a_place_that_cannot_keep_the_answer_is_met_before_the_charge(
    place: VotingSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = place.study()
    (place.folder.root / "private").mkdir(mode=0o700, exist_ok=True)
    (place.folder.root / "private" / "votes").write_bytes(b"")
    assert refusal(lambda: place.ask(study)).code == "not-a-folder"
    (place.folder.root / "private" / "votes").unlink()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert refusal(lambda: place.ask(study)).code == "write-failed"
    monkeypatch.undo()
    assert not place.folder.ledger.exists()
    place.ask(study)
    kept = [p.name for p in (place.folder.root / "private" / "votes").iterdir()]
    assert len(kept) == 1 and kept[0].endswith(".safetensors"), "no probe stays"


def test_of_two_runs_at_once_the_second_uses_what_the_first_paid_for(
    place: VotingSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = place.study()
    first, second = place.vote(study), place.vote(study)
    opened = open_site_ledger
    name = "site_client.generate.private_votes.open_site_ledger"
    answers = []

    def overtaken(*args: Any, **kwargs: Any) -> Any:
        """The other run finishes while this one waits for the lock."""
        monkeypatch.setattr(name, opened)
        answers.append(first.result())
        return opened(*args, **kwargs)

    monkeypatch.setattr(name, overtaken)
    assert second.result().digest == answers[0].digest and place.steps_charged() == 2


def killed_at(place: VotingSite, study: Any, wanted: int, evidence: Path) -> str:
    """A real process that kills itself at its `wanted`-th point; returns the points it passed."""

    class Evident(SystemNoiseSource):
        def gaussian(self, count: int) -> npt.NDArray[np.float64]:
            with evidence.open("ab", buffering=0) as stream:
                stream.write(b"n")
            return super().gaussian(count)

    passed: list[str] = []

    def on_point(point: str) -> None:
        passed.append(point)
        if len(passed) == wanted:
            os.write(writing, ",".join(passed).encode())
            os.kill(os.getpid(), signal.SIGKILL)

    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            place.vote(study, Evident(), on_point).result()
            os.write(writing, b"finished")
        finally:
            os._exit(0)
    os.close(writing)
    said = os.read(reading, 1000).decode()
    os.close(reading)
    os.waitpid(child, 0)
    return said


@pytest.mark.parametrize(
    ("wanted", "last", "kept"), [(1, "charged", 0), (2, "charged", 0), (3, "voted", 0), (4, "stored", 1)]
)
def test_killed_between_charge_and_answer_the_charge_stays_and_the_next_run_pays_anew(
    place: VotingSite, tmp_path: Path, wanted: int, last: str, kept: int
) -> None:
    torch.set_num_threads(1)
    study, evidence = place.study(), tmp_path / "evidence"
    said = killed_at(place, study, wanted, evidence)
    assert said.split(",")[-1] == last and len(said.split(",")) == wanted
    drawn = evidence.stat().st_size if evidence.exists() else 0
    before = place.steps_charged()
    assert before >= drawn and before == min(wanted, 2), "never less than was drawn"
    stored = place.vote(study).stored()
    assert (stored is not None) == bool(kept), "an answer is whole or not there"
    voted = place.ask(study)
    assert place.steps_charged() == before + (0 if kept else 2)
    assert stored is None or stored.digest == voted.digest
