"""The tests with measurements of their own: what they were given, checked at once, and their parts of the evidence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pixcell_core.contracts.release import ReleaseManifest
from privacy_audit import (
    cliques,
    conditioning,
    context,
    disclosure,
    dp_evidence,
    given_embeddings,
    linkability,
    membership,
    review_candidates,
    review_queue,
    strata,
)
from privacy_audit.base_twins import TwinTiles, open_twins, read_origins
from privacy_audit.blinding import Blinding
from privacy_audit.conditioning import Conditions, read_conditions
from privacy_audit.evidence_parts import DisclosureEvidence, EvidencePart, PrivacyClaimEvidence
from privacy_audit.gallery import data_uri
from privacy_audit.given_embeddings import GivenEmbeddings
from privacy_audit.ledger_export import LedgerTrust
from privacy_audit.membership_inputs import WeightsRequest, check_fit, encode, load_models
from privacy_audit.neighbours import Standardiser
from privacy_audit.policy import Policy
from privacy_audit.review_candidates import Candidate
from privacy_audit.screen import ScreenScores
from privacy_audit.subject import Cohort, Group
from privacy_audit.tiles import TileSource

if TYPE_CHECKING:
    from pixcell_core.models import PixCellTransformer2DModel

Sources = tuple[TileSource, TileSource, TileSource]


@dataclass(frozen=True)
class Extras:
    """What may be given beside the three folders; every one left out leaves a test out, and the report says so."""

    conditions: Path | None = None
    weights: WeightsRequest | None = None
    ledger_export: Path | None = None
    ledger_trust: LedgerTrust | None = None
    manifest: ReleaseManifest | None = None
    canary_report: Path | None = None
    embeddings: Path | None = None
    base_twins: Path | None = None
    origins: Path | None = None


@dataclass(frozen=True)
class Prepared:
    """The extras, read and checked before anything long begins."""

    conditions: Conditions | None
    given: GivenEmbeddings | None
    privacy: PrivacyClaimEvidence | None
    weights: WeightsRequest | None
    models: tuple[PixCellTransformer2DModel, PixCellTransformer2DModel] | None
    twins: TwinTiles | None


def prepare(extras: Extras, sources: Sources) -> Prepared:
    """Read everything that was given.

    Raises:
        BadInputError: with the file and what is wrong with it.
    """
    train, _, synthetic = sources
    drawn = read_origins(extras.origins, synthetic.ids) if extras.origins else {}
    return Prepared(
        conditions=read_conditions(
            extras.conditions, [drawn.get(name, name) for name in synthetic.ids], train.ids
        )
        if extras.conditions
        else None,
        given=given_embeddings.read(extras.embeddings, sources) if extras.embeddings else None,
        privacy=dp_evidence.read(
            extras.ledger_export, extras.canary_report, trust=extras.ledger_trust, manifest=extras.manifest
        ),
        weights=extras.weights,
        models=load_models(extras.weights) if extras.weights else None,
        twins=open_twins(extras.base_twins, synthetic, drawn) if extras.base_twins else None,
    )


def gather(
    prepared: Prepared,
    sources: Sources,
    groups: tuple[Group, Group, Group],
    cohort: Cohort,
    standardise: Standardiser,
    scores: tuple[ScreenScores, ScreenScores],
    policy: Policy,
    seed: int,
) -> dict[str, EvidencePart]:
    """Measure every part; `scores` are the screen's of the released and of the holdout tiles."""
    train, holdout, synthetic = groups
    released, null = scores
    parts: dict[str, EvidencePart] = {
        "strata": strata.gather(
            train, holdout, cohort, standardise, released, null, list(sources[0].classes)
        ),
        "linkability": linkability.gather(
            synthetic,
            train,
            holdout,
            cohort,
            standardise,
            policy.linkability,
            np.random.default_rng([seed, 10]),
        ),
        "cliques": cliques.gather(synthetic, standardise, policy),
        "disclosure": disclosure.gather(sources[2], sources[1], np.random.default_rng([seed, 11])),
        "context": context.gather(
            synthetic, train, holdout, cohort, standardise, policy.context.tiles_per_patient
        ),
    }
    if prepared.conditions is not None:
        parts["conditioning"] = conditioning.gather(
            prepared.conditions, synthetic, train, holdout, cohort, standardise, policy.copies
        )
    if prepared.given is not None:
        parts["given"] = given_embeddings.gather(prepared.given, cohort)
    if prepared.privacy is not None:
        parts["dp"] = prepared.privacy
    if prepared.weights is not None and prepared.models is not None:
        inputs = encode(prepared.weights, sources[0], sources[1], cohort, policy.membership.tiles_per_patient)
        base, generator = prepared.models
        check_fit(generator, inputs)
        parts["membership"] = membership.gather(inputs, base, generator, policy.membership, seed)
    return parts


def family_size(parts: dict[str, EvidencePart], cohort: Cohort, policy: Policy) -> int:
    """How many p-values `judge` will adjust together; one more than those where nothing can be permuted among the isolated.

    Near copies, copies and attribution of the isolated, the closest tile and the two views; and what was given.
    """
    attacks = 0
    if "membership" in parts:
        enough = int((~cohort.is_train).sum()) >= policy.membership.min_patients_for_tpr
        attacks = len(membership.ATTACKS) * (2 if enough else 1)
    return 6 + ("conditioning" in parts) + ("given" in parts) + attacks


def write_review_queue(
    out: Path,
    sources: Sources,
    groups: tuple[Group, Group, Group],
    scores: tuple[ScreenScores, ScreenScores],
    marks: DisclosureEvidence | None,
    policy: Policy,
    blinding: Blinding,
    seed: int,
) -> None:
    """The blinded queue for a pathologist: nearest pairs, then tiles that may bear a mark, among innocent ones."""
    train, holdout, synthetic = groups
    training = (train.ids, train.features.digests)
    pairs = review_candidates.pairs(
        "pair", synthetic.ids, synthetic.features.digests, scores[0].match, scores[0].score, *training
    )
    decoys = review_candidates.pairs(
        "decoy", holdout.ids, holdout.features.digests, scores[1].match, scores[1].score, *training
    )
    chosen = review_candidates.choose(pairs, decoys, policy.review, np.random.default_rng([seed, 12]))
    if marks is not None:
        chosen += _marks(marks, synthetic, holdout, policy, np.random.default_rng([seed, 13]))
    left = {"pair": sources[2], "decoy": sources[1], "mark": sources[2], "clean": sources[1]}

    def picture(source: TileSource, row: int) -> str:
        return data_uri(source.read(row, row + 1)[0].permute(1, 2, 0).contiguous().numpy())

    pictures = [
        (
            picture(left[one.kind], one.left_row),
            None if one.training_row is None else picture(sources[0], one.training_row),
        )
        for one in chosen
    ]
    review_queue.write(out, chosen, pictures, blinding)


def _marks(
    marks: DisclosureEvidence, synthetic: Group, holdout: Group, policy: Policy, rng: np.random.Generator
) -> list[Candidate]:
    """The worst hits of the detectors among holdout tiles that are none."""
    released, clean = disclosure.severity(marks, policy.disclosure)
    hit, none = np.flatnonzero(released > 1.0), np.flatnonzero(clean <= 1.0)
    return review_candidates.choose_marks(
        review_candidates.singles("mark", synthetic.ids, synthetic.features.digests, hit, released[hit]),
        review_candidates.singles(
            "clean", holdout.ids, holdout.features.digests, marks.holdout_row[none], clean[none]
        ),
        policy.review,
        rng,
    )
