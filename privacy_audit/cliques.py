"""Cliques: groups of near-duplicates among the released tiles. What a generator repeats it may have learnt by heart.

Carlini et al. (USENIX Security 2023) found memorised pictures so, without the training set: many generations that are
copies of each other. Needs no private tile, and so it also finds copies of tiles that nobody handed to the audit.

Every pair cannot be compared. Candidates are each tile's nearest few by eye and by pooled shape, of which only those are
followed that correlate at reduced size, and the few that share the most votes of keypoints, which find what is turned
or zoomed. Candidates get the screen's score, see `pairs`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import torch

from pixcell_core.cli.progress import progress
from privacy_audit.evidence_parts import CliqueEvidence
from privacy_audit.geometry import COARSE_SIDE, pooled
from privacy_audit.neighbours import Standardiser, most_similar, nearest
from privacy_audit.pairs import correlations, pair_scores
from privacy_audit.policy import Policy
from privacy_audit.result import Status, TestResult
from privacy_audit.subject import Group
from privacy_audit.votes import VoteIndex

NAME = "cliques of released tiles"
_PAIRS_AT_ONCE = 4096
_TILES_AT_ONCE = 256
_COARSE_SCORE = 0.5  # reduced thumbnails: planted repeats lie near .8, other tiles under .4


def gather(synthetic: Group, standardise: Standardiser, policy: Policy) -> CliqueEvidence:
    """Score the candidate pairs of released tiles; keep those at the confirming score."""
    pairs = sorted(_alike(synthetic, standardise, policy) | _voted(synthetic, policy))
    scores = pair_scores(
        synthetic, synthetic, pairs, policy.copies, "comparing released tiles with each other"
    )
    kept = np.flatnonzero(scores >= policy.copies.confirm_score)
    return CliqueEvidence(
        left=np.array([pairs[place][0] for place in kept], dtype=np.int64),
        right=np.array([pairs[place][1] for place in kept], dtype=np.int64),
        score=np.asarray(scores[kept], dtype=np.float64),
    )


def _alike(synthetic: Group, standardise: Standardiser, policy: Policy) -> set[tuple[int, int]]:
    """Pairs among the nearest by eye and by pooled shape that also correlate at reduced size."""
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
    kept: set[tuple[int, int]] = set()
    with progress("looking for released tiles alike", total=len(pairs), unit="pairs") as bar:
        for start in range(0, len(pairs), _PAIRS_AT_ONCE):
            block = pairs[start : start + _PAIRS_AT_ONCE]
            coarse = correlations(
                synthetic, synthetic, block, policy.copies.min_overlap, side=COARSE_SIDE
            ).score
            kept |= {pair for pair, score in zip(block, coarse, strict=True) if score >= _COARSE_SCORE}
            bar.advance(len(block))
    return kept


def _voted(synthetic: Group, policy: Policy) -> set[tuple[int, int]]:
    """Pairs that share the most votes of keypoints: each tile with as many others as the screen verifies."""
    keep = policy.copies.voted_candidates
    if not keep:
        return set()
    index = VoteIndex(synthetic.features.keypoints)
    pairs: set[tuple[int, int]] = set()
    with progress("voting of keypoints among released tiles", total=len(synthetic), unit="tiles") as bar:
        for start in range(0, len(synthetic), _TILES_AT_ONCE):
            block = synthetic.features.keypoints[start : start + _TILES_AT_ONCE]
            for row, votes in enumerate(index.vote(block, keep + 1), start):
                others = [int(other) for other in votes.row if other != row][:keep]
                pairs |= {(min(row, other), max(row, other)) for other in others}
            bar.advance(len(block))
    return pairs


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
