"""Cliques: groups of near-duplicates among the released tiles. What a generator repeats it may have learnt by heart.

Carlini et al. (USENIX Security 2023) found memorised pictures so, without the training set: many generations that are
copies of each other. Needs no private tile, and so it also finds copies of tiles that nobody handed to the audit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import torch

from pixcell_core.cli.progress import progress
from privacy_audit.conditioning import pair_scores
from privacy_audit.evidence_parts import CliqueEvidence
from privacy_audit.geometry import pooled
from privacy_audit.neighbours import Standardiser, most_similar, nearest
from privacy_audit.policy import Policy
from privacy_audit.result import Status, TestResult
from privacy_audit.subject import Group

NAME = "cliques of released tiles"
_PAIRS_AT_ONCE = 4096


def gather(synthetic: Group, standardise: Standardiser, policy: Policy) -> CliqueEvidence:
    """Score each released tile with its nearest few by eye and by pooled shape; keep pairs at the confirming score."""
    k = min(policy.cliques.candidates + 1, len(synthetic))
    seen = standardise(synthetic.features.embeddings)
    by_eye = nearest(seen, seen, k)[1]
    shapes = torch.cat([pooled(part.float()) for part in synthetic.features.thumbs.split(512)])
    by_shape = most_similar(shapes, shapes, k)[1]
    pairs = sorted(
        {
            (min(row, int(other)), max(row, int(other)))
            for row, others in enumerate(torch.cat([by_eye, by_shape], dim=1).tolist())
            for other in others
            if other != row
        }
    )
    kept: list[tuple[int, int, float]] = []
    with progress("comparing released tiles with each other", total=len(pairs), unit="pairs") as bar:
        for start in range(0, len(pairs), _PAIRS_AT_ONCE):
            block = pairs[start : start + _PAIRS_AT_ONCE]
            scores = pair_scores(synthetic, synthetic, block, policy.copies.min_overlap)
            kept += [
                (left, right, float(score))
                for (left, right), score in zip(block, scores, strict=True)
                if score >= policy.copies.confirm_score
            ]
            bar.advance(len(block))
    return CliqueEvidence(
        left=np.array([pair[0] for pair in kept], dtype=np.int64),
        right=np.array([pair[1] for pair in kept], dtype=np.int64),
        score=np.array([pair[2] for pair in kept], dtype=np.float64),
    )


def groups(evidence: CliqueEvidence, smallest: int) -> list[tuple[int, ...]]:
    """Rows of released tiles that hang together by near-duplicate pairs, at least `smallest` of them, largest first."""
    parent: dict[int, int] = {}

    def root(item: int) -> int:
        parent.setdefault(item, item)
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for left, right in zip(evidence.left.tolist(), evidence.right.tolist(), strict=True):
        parent[root(left)] = root(right)
    members: dict[int, list[int]] = defaultdict(list)
    for item in list(parent):
        members[root(item)].append(item)
    found = [tuple(sorted(rows)) for rows in members.values() if len(rows) >= smallest]
    return sorted(found, key=lambda rows: (-len(rows), rows))


def result(evidence: CliqueEvidence, flagged: Iterable[int], released: int, policy: Policy) -> TestResult:
    """The test; `flagged` are rows of released tiles that are copies for certain."""
    limits = policy.cliques
    found = groups(evidence, limits.group_tiles)
    certain = set(flagged)
    hits = sum(1 for rows in found if certain & set(rows))
    if hits or len(found) >= limits.fail_groups:
        status = Status.FAIL
        why = (
            f"{len(found)} groups of at least {limits.group_tiles} released tiles are near-duplicates of each other"
            + (f", and {hits} of them hold a copy of a training tile." if hits else ".")
        )
    elif len(found) >= limits.review_groups:
        status = Status.REVIEW
        why = (
            f"{len(found)} group of at least {limits.group_tiles} released tiles shows nearly the same field: a person has "
            "to say whether it is a memorised tile or plain tissue."
        )
    else:
        status = Status.PASS
        why = f"No group of {limits.group_tiles} or more released tiles shows the same field."
    largest = groups(evidence, 2)
    return TestResult(
        name=NAME,
        section="near copies",
        claim="The generator does not return to the same few pictures.",
        statistic=f"groups of at least {limits.group_tiles} near-duplicates among the released tiles",
        value=float(len(found)),
        null="each released tile against its nearest released tiles",
        threshold=float(limits.review_groups - 1),
        direction="lower is safer",
        status=status,
        why=why,
        cannot_show="A memorised tile that this release shows fewer times.",
        details={
            "near_duplicate_pairs": len(evidence.left),
            "largest_group": len(largest[0]) if largest else 1,
            "released": released,
        },
    )
