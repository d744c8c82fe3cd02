"""The vote of a site's patients for one study: allowed, charged, asked once, and kept.

The order is the promise: the approval, then what was stored before, then room in the study's and the site's budget,
then for each iteration the charge on disk, the patients, the noise. A crash anywhere leaves the charge and nothing
else; the next run charges again and draws new noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from pixcell_core.contracts.artifacts import installed_code_digest
from pixcell_core.contracts.round import KnownHead
from pixcell_core.contracts.study import Study
from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.private.condition_search import (
    Variation,
    VotedConditions,
    public_seed,
    search_conditions,
)
from pixcell_core.private.ledger_record import EVERY_PATIENT
from pixcell_core.private.noise import NoiseSource
from pixcell_core.private.votes import NoisyVotes, PatientTiles
from pixcell_core.training.feature_store import FeatureStore, shard_name
from site_client.approvals.act_log import note_charge
from site_client.approvals.book import ApprovalBook
from site_client.approvals.site_folder import SiteFolder
from site_client.generate.policy_names import VOTE_PURPOSE
from site_client.generate.vote_record import VoteRecord
from site_client.ledger.cohorts import CohortBook
from site_client.ledger.ledger import Ledger, RoundCharge
from site_client.ledger.site import open_site_ledger
from site_client.ledger.study_room import require_study_room
from site_client.ledger.view import BudgetCap

LEDGER_WAIT_S = 20.0


class StoreCohort:
    """The training patients of a feature store as voters."""

    def __init__(self, store: FeatureStore) -> None:
        self._store = store

    @property
    def patients(self) -> Sequence[str]:
        """Patients of the store, each once."""
        return self._store.patients

    def tiles(self, patient: str) -> PatientTiles:
        """All tiles of a patient with their labels."""
        return PatientTiles(self._store.embeddings(patient), tuple(self._store.labels(patient)))


class PatientVote:
    """Asks a site's patients for the conditions of one study.

    Args:
        site: the enrolled site.
        study: the study, whose policy is `private`.
        bank: the study's public embeddings (M, n, d).
        vary: makes later candidates from the winners.
        source: where the noise comes from; the system's for real use.
        on_point: told of each place where a process may die, for the tests of crashes.
    """

    def __init__(
        self,
        site: SiteFolder,
        study: Study,
        bank: torch.Tensor,
        vary: Variation,
        source: NoiseSource,
        on_point: Callable[[str], None] = lambda point: None,
    ) -> None:
        self._site, self._study, self._bank, self._vary = site, study, bank, vary
        self._source, self._on_point = source, on_point
        self._record = VoteRecord(site.root / "private", study, vary.name)

    def stored(self) -> VotedConditions | None:
        """The result of an earlier run with these settings, or None. Costs nothing."""
        return self._record.read()

    def result(self) -> VotedConditions:
        """The stored result, or a new one: charged, asked, stored.

        Raises:
            ApprovalError: the site has not approved exactly this study.
            RefusedError: other code than approved, a cohort of one, or no room under the study's or the site's cap;
                nothing was drawn and nothing was charged.
            BadInputError: the features do not fit the candidates, or a stored result is damaged.
        """
        votes = self._study.conditioning.votes
        if votes is None:
            raise RefusedError(
                f"Study {self._study.id} was not approved with private conditions.",
                hint="Approve a study whose conditioning is private; nothing was charged.",
                code="policy-not-approved",
            )
        book = ApprovalBook(self._site)
        if (stored := self.stored()) is not None:
            # What was paid for may be used after the study's end, but not against the site's word.
            book.require(self._study, now=self._study.created_at)
            return stored
        cap = book.approval(self._study).epsilon_cap
        if self._study.code_digest != installed_code_digest():
            raise RefusedError(
                "The code installed here is not the code the study names.",
                hint="Install the release that the study was written for. Nothing was charged.",
                code="code-differs",
            )
        store = FeatureStore.open(self._site.train_features)
        CohortBook.open(self._site.root).require(EVERY_PATIENT, store.patients)
        self._require_fit(store)
        charge = RoundCharge(
            study=self._study.digest,
            round=0,
            sample_rate=1.0,
            noise_multiplier=votes.noise_multiplier,
            steps=votes.iterations,
            max_grad_norm=1.0,
            code_digest=self._study.code_digest,
            purpose=VOTE_PURPOSE,
        )
        self._record.prepare()
        with self._ledger(len(store.patients), cap) as ledger:
            # Asked under the lock: of two runs at the same time the second finds what the first has paid for.
            if (stored := self.stored()) is not None:
                return stored
            require_study_room(ledger.records, self._study, charge.event, epsilon_cap=cap)
            with ledger.reserve(charge) as reserve:
                noisy = NoisyVotes(
                    self._cohort,
                    votes.labels,
                    noise_multiplier=votes.noise_multiplier,
                    source=self._source,
                    reserve=reserve,
                )
                voted = search_conditions(
                    self._bank, votes, noisy, self._vary, seed=public_seed(self._study.digest)
                )
                self._on_point("voted")
                self._record.write(voted)
                self._on_point("stored")
            head = KnownHead(sequence=ledger.head.sequence, hash=ledger.head.hash)
            note_charge(self._site, self._study.digest, charge.round, head)
        return voted

    def _cohort(self) -> StoreCohort:
        self._on_point("charged")
        return StoreCohort(FeatureStore.open(self._site.train_features))

    def _ledger(self, patients: int, epsilon_cap: float) -> Ledger:
        """The site's ledger; a new one takes the study's cap, an existing one keeps its owner's.

        `patients` only bounds delta (1 / 10 N) and is written nowhere.
        """
        root, site = self._site.root, self._site.identity().site
        try:
            return open_site_ledger(root, site=site, patients=patients, wait_seconds=LEDGER_WAIT_S)
        except BadInputError as error:
            if error.code != "budget-cap":
                raise
            cap = BudgetCap(epsilon_cap, self._study.delta)
            return open_site_ledger(root, site=site, cap=cap, patients=patients, wait_seconds=LEDGER_WAIT_S)

    def _require_fit(self, store: FeatureStore) -> None:
        """Compare the shape of the first patient's embeddings, read off the file's header, before anything is charged."""
        found = [_shape(store, patient) for patient in store.patients[:1]]
        if found and found[0] != tuple(self._bank.shape[1:]):
            raise BadInputError(
                f"This site's features have {found[0]} numbers per tile (tokens, width), the candidates "
                f"{tuple(self._bank.shape[1:])}.",
                hint="Make both with one encoder. Nothing was charged.",
                code="features-do-not-fit",
            )


def _shape(store: FeatureStore, patient: str) -> tuple[int, ...]:
    path: Path = store.path / "shards" / f"{shard_name(patient)}.safetensors"
    try:
        with safe_open(path, framework="pt") as handle:
            return tuple(int(size) for size in handle.get_slice("embeddings").get_shape()[1:])
    except (OSError, SafetensorError) as error:
        raise BadInputError(
            f"The feature store {store.path.name} is damaged: a shard has no embeddings.",
            hint="Remove the store folder and run `pixcell site features` again. Nothing was charged.",
            code="feature-store-damaged",
        ) from error
