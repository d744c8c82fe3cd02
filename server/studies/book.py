"""The coordinator's book of studies: settings in, one canonical document out, never altered afterwards."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from sqlalchemy import insert, select
from sqlalchemy.exc import IntegrityError

from pixcell_core.contracts.canonical import first_complaint
from pixcell_core.contracts.study import Study
from pixcell_core.errors import BadInputError, RefusedError
from server.registry.events import note_act
from server.registry.registry import Registry
from server.registry.sealed import altered, seal, unseal
from server.registry.tables import StudyRow


class StudyBook:
    """Studies of the registry."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def ids(self) -> list[str]:
        """Ids of all studies, sorted."""
        with self._registry.read() as connection:
            return sorted(connection.execute(select(StudyRow.study_id)).scalars())

    def has(self, study_id: str) -> bool:
        """Whether a study of this id is kept."""
        with self._registry.read() as connection:
            wanted = select(StudyRow.study_id).where(StudyRow.study_id == study_id)
            return connection.execute(wanted).first() is not None

    def get(self, study_id: str) -> Study:
        """The study of this id; an input error if there is none, or if its row was altered."""
        with self._registry.read() as connection:
            row = connection.execute(select(StudyRow.__table__).where(StudyRow.study_id == study_id)).first()
        if row is None:
            known = ", ".join(self.ids()) or "none"
            raise BadInputError(
                f"There is no study {study_id} here.", hint=f"Known studies: {known}.", code="unknown-study"
            )
        study = unseal(Study, row.document, row.digest, what=f"study {study_id}")
        if study.id != study_id:
            raise altered(f"study {study_id}")
        return study

    def add(self, study: Study) -> Study:
        """Keep a study. The same study twice is fine; another one under a taken id is not."""
        try:
            with self._registry.write() as connection:
                connection.execute(insert(StudyRow).values(study_id=study.id, **seal(study)))
                note_act(connection, "study-created", study.id)
        except IntegrityError:
            kept = self.get(study.id)
            if kept.digest == study.digest:
                return kept
            raise RefusedError(
                f"Another study is already called {study.id}.",
                hint="Give the changed study a new --id: sites approved the old one.",
                code="study-exists",
            ) from None
        return study


def read_settings(path: Path) -> dict[str, Any]:
    """Settings of a study from a YAML file."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadInputError(
            f"Cannot read the settings in {path}: {type(error).__name__}.",
            hint="Give a YAML file of `name: value` lines.",
            code="bad-settings",
        ) from error
    if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
        raise BadInputError(f"{path.name} is not a list of settings.", hint="Write `name: value` lines.")
    return value


LEAKS = {
    "early_stopping": "the step at which a site stops would tell about its patients, and no noise covers it",
    "patience": "the step at which a site stops would tell about its patients, and no noise covers it",
    "report_loss": "a loss depends on the patients and has no noise of its own",
    "report_metrics": "metrics depend on the patients and have no noise of their own",
    "report_gradient_norms": "norms of patients' gradients have no noise of their own",
    "aggregation_weights": "weights by patients or tiles would tell how many there are; every site weighs the same",
    "weight_by_patients": "weights by patients would tell how many there are; every site weighs the same",
}
"""Settings other systems have that would carry something about patients past the noise."""


def make_study(settings: Mapping[str, Any]) -> Study:
    """A study from settings; an unknown name is an error that shows the nearest known one."""
    known = [name for name in Study.model_fields if name != "schema_version"]
    for name in settings:
        if name in LEAKS:
            raise RefusedError(
                f"A study cannot have '{name}': {LEAKS[name]}.",
                hint="Leave it out. What a site sends may depend on its patients through the noised update alone.",
                code="setting-leaks",
            )
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise BadInputError(
                f"A study has no setting '{name}'.",
                hint=f"Did you mean '{near[0]}'?" if near else f"Known settings: {', '.join(known)}.",
                code="unknown-setting",
            )
    try:
        study = Study.model_validate(dict(settings))
    except ValidationError as error:
        where, why = first_complaint(error, "the study")
        raise BadInputError(
            f"This study is not possible: {where}: {why}.",
            hint="Correct that setting. Nothing was written.",
            code="impossible-study",
        ) from error
    _require_sense(study)
    return study


def _require_sense(study: Study) -> None:
    """Refuse settings of the aggregation that each stand alone and together do nothing, or only harm."""
    settings = study.aggregation
    if settings.rule == "trimmed-mean" and math.floor(settings.trim * study.quorum + 1e-9) < 1:
        raise BadInputError(
            f"This study is not possible: a trim of {settings.trim:g} takes nobody away from {study.quorum} sites.",
            hint=f"Give --trim of at least 1/{study.quorum} (and below 0.5), or a larger quorum, or --rule median.",
            code="impossible-study",
        )
    if settings.rule != "mean" and study.quorum < 3:
        raise BadInputError(
            f"This study is not possible: {study.quorum} sites have no {settings.rule} that one of them cannot move.",
            hint="A robust rule needs a quorum of 3 at least.",
            code="impossible-study",
        )
    if study.optimizer == "sgd" and study.learning_rate * settings.proximal_mu > 1.0:
        raise BadInputError(
            "This study is not possible: learning_rate x proximal_mu is above 1, so that the pull overshoots the start.",
            hint=f"Give --proximal-mu of at most {1.0 / study.learning_rate:g}.",
            code="impossible-study",
        )
