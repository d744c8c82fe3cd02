"""The study's own cap: training and private conditions together, whatever the site's cap would still allow."""

from __future__ import annotations

from collections.abc import Iterable

from pixcell_core.contracts.study import Study
from pixcell_core.errors import RefusedError
from pixcell_core.private.accounting import GaussianEvent
from pixcell_core.private.filters import BudgetExceededError, BudgetFilter
from pixcell_core.private.ledger_record import EVERY_PATIENT, BaseRecord
from site_client.ledger.spending import Spending


class StudyBudgetError(RefusedError):
    """The charge would pass the study's own cap; nothing was drawn and nothing was charged."""

    default_code = "study-budget-exceeded"


def require_study_room(
    records: Iterable[BaseRecord],
    study: Study,
    event: GaussianEvent,
    *,
    cohort: str = EVERY_PATIENT,
    epsilon_cap: float | None = None,
) -> None:
    """Refuse a charge that would pass the study's cap, which may be narrower than the site's.

    A study's settings are fixed before it runs, but it may be stopped, and its conditions may be drawn, after its
    models were seen; its cap is therefore kept by the same filter as the site's.

    Args:
        records: the site's ledger, oldest first (`Ledger.records`).
        study: the study; its charges are those with its digest, for training and for conditions.
        event: the charge that is asked for.
        cohort: whom it would be charged to.
        epsilon_cap: a narrower cap that the site approved; the smaller one holds.

    Raises:
        StudyBudgetError: before anything is drawn or charged.
    """
    cap = min(study.epsilon_cap, epsilon_cap) if epsilon_cap is not None else study.epsilon_cap
    allowed = BudgetFilter(cap, study.delta)
    for events in Spending.of(records, study=study.digest).sequences_after([event], cohort):
        try:
            allowed.require(events, spent=events[:-1])
        except BudgetExceededError as error:
            raise StudyBudgetError(
                f"Over the cap of study {study.id}, which holds for its training and its conditions together. "
                + error.message,
                hint="The study is over for this site, or it needs another plan.",
            ) from error
