"""What a study will cost each patient of a site, read off its public settings before anything runs."""

from __future__ import annotations

from pixcell_core.contracts.study import Study
from pixcell_core.private.accounting import GaussianEvent


def round_event(study: Study) -> GaussianEvent:
    """The charge of one round of training: T steps of the Gaussian mechanism on a Poisson(q) sample."""
    return GaussianEvent(study.sample_rate, study.noise_multiplier, study.steps_per_round)


def condition_event(study: Study) -> GaussianEvent | None:
    """The charge of the private conditions: every iteration asks all patients once. None where votes are not used."""
    votes = study.conditioning.votes
    return None if votes is None else GaussianEvent(1.0, votes.noise_multiplier, votes.iterations)


def planned_events(study: Study) -> list[GaussianEvent]:
    """All charges of a study that runs to its end: every round, and the private conditions once."""
    training = GaussianEvent(study.sample_rate, study.noise_multiplier, study.rounds * study.steps_per_round)
    conditions = condition_event(study)
    return [training] if conditions is None else [training, conditions]
