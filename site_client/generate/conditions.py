"""Which embeddings steer the surrogates, and what each policy promises.

`own`    each surrogate follows one private tile. No differential-privacy claim for the release.
`blend`  each surrogate follows the mean of k similar tiles of k different patients. No differential-privacy claim;
         the link to any one patient is weaker, nothing more.
A policy with a differential-privacy claim needs a charge in the ledger and has its own mechanism and its own name.
Legend: m tiles, n tokens, d embedding width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.training.feature_store import FeatureStore

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
    """Chooses conditions; named in every release."""

    name: str
    promise: str

    def draw(self, pool: TileEmbeddings, count: int, rng: np.random.Generator) -> list[Condition]:
        """Choose `count` conditions from the private pool."""


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

    name = "own"
    promise = (
        "Each surrogate follows the embedding of one private tile. No differential-privacy claim covers the release; "
        "the audit alone decides."
    )

    def draw(self, pool: TileEmbeddings, count: int, rng: np.random.Generator) -> list[Condition]:
        """One private tile per condition."""
        return [
            Condition(pool.vectors[r], pool.labels[r], (pool.tiles[r],)) for r in _anchors(pool, count, rng)
        ]


class Blend:
    """Each surrogate is conditioned on the mean of k similar tiles of k different patients."""

    name = "blend"

    def __init__(self, k: int = SMALLEST_BLEND) -> None:
        if k < SMALLEST_BLEND:
            raise RefusedError(
                f"A blend of {k} patients is below the smallest allowed, {SMALLEST_BLEND}.",
                hint=f"Ask for k of at least {SMALLEST_BLEND}, or state the policy `own` openly.",
                code="blend-too-small",
            )
        self.k = k
        self.promise = (
            f"Each surrogate follows the mean embedding of tiles of {k} different patients. No differential-privacy "
            "claim covers the conditions; the link to any one patient is weaker, not removed."
        )

    def draw(self, pool: TileEmbeddings, count: int, rng: np.random.Generator) -> list[Condition]:
        """Blend each anchor with its nearest tiles, one per further patient, of the anchor's label where it has one."""
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


def policy_named(name: str, k: int) -> ConditionPolicy:
    """The policy of that name.

    Raises:
        BadInputError: an unknown name.
        RefusedError: a policy this site cannot carry out.
    """
    if name == "own":
        return OwnTile()
    if name == "blend":
        return Blend(k)
    known: Sequence[str] = ("own", "blend")
    raise BadInputError(
        f"There is no conditioning policy {name!r} at this site.",
        hint=f"Choose one of: {', '.join(known)}.",
        code="unknown-policy",
    )
