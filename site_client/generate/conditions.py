"""Which embeddings steer the surrogates, and what each policy promises.

`own`      each surrogate follows one private tile. No differential-privacy claim for the release.
`blend`    each surrogate follows the mean of k similar tiles of k different patients. No differential-privacy claim;
           the link to any one patient is weaker, nothing more.
`private`  conditions come from patients' votes on public candidates, charged in the ledger before they are asked.
A policy is built around what it may look at: `own` and `blend` around the private tiles, `private` around the noisy
histograms alone, so that it could not reach a patient if it tried.
Legend: m tiles, n tokens, d embedding width.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.private.condition_search import VotedConditions
from pixcell_core.training.feature_store import FeatureStore
from site_client.generate.policy_names import BLEND, OWN, POLICIES, PRIVATE

SMALLEST_BLEND = 3


@dataclass(frozen=True)
class TileEmbeddings:
    """Every private tile's embedding: `vectors` (m, n, d) float32, and per tile its patient, identifier and label."""

    vectors: torch.Tensor
    patients: tuple[str, ...]
    tiles: tuple[str, ...]
    labels: tuple[str | None, ...]

    @classmethod
    def from_store(cls, store: FeatureStore) -> TileEmbeddings:
        """Read all embeddings of a feature store."""
        vectors, patients, tiles, labels = [], [], [], []
        for patient in store.patients:
            embedded = store.embeddings(patient).float()
            vectors.append(embedded)
            patients += [patient] * len(embedded)
            tiles += store.tiles(patient)
            labels += store.labels(patient)
        if not vectors:
            raise BadInputError(
                "The feature store holds no patient.",
                hint="Add slides, split and extract features first: `pixcell site data add`, `pixcell site features`.",
                code="no-patients",
            )
        return cls(torch.cat(vectors), tuple(patients), tuple(tiles), tuple(labels))


@dataclass(frozen=True)
class Condition:
    """One condition: `vector` (n, d), the label it stands for, and the private tiles behind it (never leave)."""

    vector: torch.Tensor
    label: str | None
    sources: tuple[str, ...]


class ConditionPolicy(Protocol):
    """Chooses conditions; `name` and `promise` stand in the record of every surrogate and in every release."""

    name: str
    promise: str

    def draw(self, count: int, rng: np.random.Generator) -> list[Condition]:
        """Choose `count` conditions."""


def _anchors(pool: TileEmbeddings, count: int, rng: np.random.Generator) -> list[int]:
    """Rows to start from: patients in turn, so that nobody is shown more than others; tiles at random."""
    rows: dict[str, list[int]] = {}
    for row, patient in enumerate(pool.patients):
        rows.setdefault(patient, []).append(row)
    names = sorted(rows)
    order: list[str] = []
    while len(order) < count:
        order += [names[i] for i in rng.permutation(len(names))]
    return [int(rng.choice(rows[name])) for name in order[:count]]


class OwnTile:
    """Each surrogate is conditioned on one private tile, as in PixCell's own experiment."""

    name = OWN
    promise = (
        "Each surrogate follows the embedding of one private tile. No differential-privacy claim covers the "
        "conditions: a surrogate may resemble its tile, its patient and its label, however the model was trained; "
        "the audit alone decides."
    )

    def __init__(self, pool: TileEmbeddings) -> None:
        self._pool = pool

    def draw(self, count: int, rng: np.random.Generator) -> list[Condition]:
        """One private tile per condition."""
        pool = self._pool
        return [
            Condition(pool.vectors[r], pool.labels[r], (pool.tiles[r],)) for r in _anchors(pool, count, rng)
        ]


class Blend:
    """Each surrogate is conditioned on the mean of k similar tiles of k different patients."""

    name = BLEND

    def __init__(self, pool: TileEmbeddings, k: int = SMALLEST_BLEND) -> None:
        if k < SMALLEST_BLEND:
            raise RefusedError(
                f"A blend of {k} patients is below the smallest allowed, {SMALLEST_BLEND}.",
                hint=f"Ask for k of at least {SMALLEST_BLEND}, or state the policy `own` openly.",
                code="blend-too-small",
            )
        self.k, self._pool = k, pool
        self.promise = (
            f"Each surrogate follows the mean embedding of tiles of {k} different patients, all of equal weight. No "
            "differential-privacy claim covers the conditions: the link to any one patient is weaker, not removed. "
            f"Whoever knows the other {k - 1} patients' tiles can compute the last one's, one patient may stand "
            "behind many surrogates, and labels are those of private tiles."
        )

    def draw(self, count: int, rng: np.random.Generator) -> list[Condition]:
        """Blend each anchor with its nearest tiles, one per further patient, of the anchor's label where it has one.

        Raises:
            RefusedError: fewer patients than k; a smaller blend is never taken instead.
        """
        pool = self._pool
        if len(set(pool.patients)) < self.k:
            raise RefusedError(
                f"Blending needs {self.k} patients, this site has {len(set(pool.patients))} in training.",
                hint="Add patients; a smaller blend is not offered.",
                code="too-few-patients",
            )
        flat = torch.nn.functional.normalize(pool.vectors.flatten(1), dim=1)
        patients = np.array(pool.patients)
        return [self._around(pool, flat, patients, anchor) for anchor in _anchors(pool, count, rng)]

    def _around(
        self, pool: TileEmbeddings, flat: torch.Tensor, patients: np.ndarray, anchor: int
    ) -> Condition:
        order = torch.argsort(flat @ flat[anchor], descending=True).tolist()
        chosen, seen = [anchor], {patients[anchor]}
        for want_label in (True, False):
            for row in order:
                if len(chosen) == self.k:
                    break
                if patients[row] in seen or (want_label and pool.labels[row] != pool.labels[anchor]):
                    continue
                chosen.append(row)
                seen.add(patients[row])
        vectors = pool.vectors[chosen]
        mean = vectors.mean(0)
        # A mean of vectors is shorter than they are; give it their length back so that it stays a likely embedding.
        mean = mean * (vectors.flatten(1).norm(dim=1).mean() / mean.norm().clamp(min=1e-6))
        label = Counter(pool.labels[row] for row in chosen).most_common(1)[0][0]
        return Condition(mean, label, tuple(pool.tiles[row] for row in chosen))


class PrivateConditions:
    """Conditions drawn from what the patients' votes released: a public candidate and a public label each."""

    name = PRIVATE

    def __init__(self, voted: VotedConditions) -> None:
        self._voted = voted
        votes, winners = voted.votes, voted.winners
        plural = "s" if votes.iterations > 1 else ""
        nothing = (
            " No bin of any histogram passed the threshold: conditions are uniform over candidates and labels."
            if winners.uniform
            else ""
        )
        self.promise = (
            "Conditions and labels come from votes of this site's training patients on public embeddings (unit "
            "patient, neighbouring cohorts by add-or-remove-one: all tiles of one patient together move the "
            f"histogram by an L2 norm of 1 at most), seen through Gaussian noise of noise multiplier "
            f"{votes.noise_multiplier:g} in {votes.iterations} iteration{plural}, each charged in the site's "
            "ledger before it was drawn; sampling and variations are post-processing. They promise nothing without the "
            f"epsilon and delta of the privacy statement beside them.{nothing}"
        )

    def draw(self, count: int, rng: np.random.Generator) -> list[Condition]:
        """Draw bins in proportion to the winning shares; no private tile stands behind any condition."""
        shares, labels = self._voted.winners.shares, self._voted.labels
        bins = rng.choice(shares.size, size=count, p=shares.ravel() / shares.sum())
        iterations, rows, columns = np.unravel_index(bins, shares.shape)
        return [
            Condition(self._voted.candidates[int(iteration), int(column)], labels[int(row)], ())
            for iteration, row, column in zip(iterations, rows, columns, strict=True)
        ]


def check_policy_name(name: str) -> str:
    """Return `name` where there is such a policy.

    Raises:
        BadInputError: an unknown name; no policy is ever taken in place of another.
    """
    if name not in POLICIES:
        raise BadInputError(
            f"There is no conditioning policy {name!r} at this site.",
            hint=f"Choose one of: {', '.join(POLICIES)}.",
            code="unknown-policy",
        )
    return name


def pool_policy(name: str, k: int, pool: TileEmbeddings) -> ConditionPolicy:
    """The policy `own` or `blend` around the private tiles.

    Raises:
        BadInputError: another name; `private` is never built around private tiles.
        RefusedError: a blend of too few patients.
    """
    if name == OwnTile.name:
        return OwnTile(pool)
    if name == Blend.name:
        return Blend(pool, k)
    raise BadInputError(
        f"The policy {name!r} does not look at private tiles.",
        hint="Only own and blend do.",
        code="unknown-policy",
    )
