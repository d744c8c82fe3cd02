"""What several sites' promises say together about one person: the worst site alone, or the sum of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pixcell_core.errors import BadInputError
from pixcell_core.private.accounting import Epsilon, GaussianEvent, epsilon

DISJOINT = (
    "declared by the sites, not proved: nobody is a patient of more than one site; "
    "then a person is touched by one site's charges alone"
)
OVERLAPPING = "nothing is assumed: one person may be a patient of every site, and all sites' charges add up"


@dataclass(frozen=True)
class ConsortiumEpsilon:
    """The number of a consortium, with the assumption it rests on and what holds without it.

    Attributes:
        stated: what is stated under `assumption`.
        assumption: in words; to be shown wherever `stated` is.
        disjoint: whether patients were declared to be at one site only.
        worst_site: the site with the largest epsilon of its own.
        worst: that site's epsilon: true for a person who is a patient of one site.
        composed: all sites' charges composed: true for a person who is a patient of every site.
        per_site: each site's own epsilon.
    """

    stated: Epsilon
    assumption: str
    disjoint: bool
    worst_site: str
    worst: Epsilon
    composed: Epsilon
    per_site: Mapping[str, Epsilon]

    def __str__(self) -> str:
        other = (
            f"without that assumption {_number(self.composed)}"
            if self.disjoint
            else f"were patients at one site only, {_number(self.worst)} ({self.worst_site})"
        )
        return f"{_number(self.stated)}; assumption: {self.assumption}; {other}"


def consortium_epsilon(
    per_site: Mapping[str, Sequence[GaussianEvent]], delta: float, *, disjoint: bool
) -> ConsortiumEpsilon:
    """Return what can be said about one person over all sites.

    Under disjoint patients each person's data enters one site's charges, so that the maximum over sites holds
    (parallel composition, McSherry 2009). Otherwise the transcripts of all sites compose, whatever their order.

    Args:
        per_site: each site's charges.
        delta: one for all; the maximum of statements at different deltas is none.
        disjoint: whether the sites declare that they share no patient.

    Raises:
        BadInputError: no site, or a delta that promises too little.
    """
    if not per_site:
        raise BadInputError(
            "A consortium of no site has no epsilon.", hint="Name at least one site.", code="no-sites"
        )
    own = {site: epsilon(events, delta) for site, events in sorted(per_site.items())}
    worst_site = max(own, key=lambda site: own[site].value)
    composed = epsilon([event for events in per_site.values() for event in events], delta)
    worst = own[worst_site]
    return ConsortiumEpsilon(
        stated=worst if disjoint else composed,
        assumption=DISJOINT if disjoint else OVERLAPPING,
        disjoint=disjoint,
        worst_site=worst_site,
        worst=worst,
        composed=composed,
        per_site=own,
    )


def _number(value: Epsilon) -> str:
    return str(value).split(" (all slides", 1)[0] + f" at delta {value.delta:g}"
