"""Where every registry is tested: documents to keep, and a registry on an empty database."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Connection, text

from pixcell_core.contracts.canonical import digest
from pixcell_core.contracts.enrolment import EnrolmentRequest
from pixcell_core.contracts.round import KnownHead, RoundRecord
from pixcell_core.contracts.spool import arrays_digest
from pixcell_core.contracts.study import Study
from pixcell_core.trust.keys import SigningKey
from server.enrolment.sites import SiteBook
from server.layout import ServerLayout
from server.registry.inspection import Inspection
from server.registry.registry import Registry
from server.registry.schema import require_current
from server.rounds.board import RunBoard
from server.rounds.heads import HeadBook
from server.rounds.store import RoundStore
from server.studies.book import StudyBook
from tests.server.consortium import make_node_key, make_study

ADAPTER = {"block.lora_B.default.weight": np.full((6, 2), 0.5, dtype=np.float32)}
STATE = {"block.lora_B.default.weight.m": np.full((6, 2), 0.25, dtype=np.float32)}


def head(sequence: int, name: str = "") -> KnownHead:
    return KnownHead(sequence=sequence, hash=digest(f"{name}{sequence}".encode()))


def request_file(folder: Path, site: str, node_key: str | None = None) -> Path:
    """An enrolment request with fresh keys."""
    request = EnrolmentRequest(
        site=site,
        node_key=node_key or make_node_key(),
        approval_key=SigningKey.generate().verify_key.to_pem().decode(),
        created_at=datetime.now(UTC),
    )
    path = folder / f"{site}.request.json"
    path.write_bytes(request.to_bytes())
    return path


def record_of(study: Study, number: int, previous: RoundRecord | None, **changes: Any) -> RoundRecord:
    """A record of the round `number` with the tensors of this module."""
    now = datetime.now(UTC)
    values: dict[str, Any] = {
        "study_id": study.id,
        "study_digest": study.digest,
        "round": number,
        "previous": previous.digest if previous else None,
        "adapter_digest": arrays_digest(ADAPTER),
        "included": ("east", "north"),
        "excluded": (),
        "started_at": now,
        "committed_at": now,
    }
    return RoundRecord.model_validate(values | changes)


class RegistryGround(ABC):
    """Inherit, and say how a database is reached."""

    @pytest.fixture
    @abstractmethod
    def fresh(self, tmp_path: Path) -> Registry:
        """A registry on an empty database."""

    @pytest.fixture
    def registry(self, fresh: Registry) -> Registry:
        """A registry with its tables."""
        require_current(fresh)
        return fresh

    @pytest.fixture
    def study(self) -> Study:
        """A study of three sites."""
        return make_study()

    def reopened(self, registry: Registry, **changes: Any) -> Registry:
        """Another registry object on the same database, as in another process."""
        return Registry(registry.address, **changes)

    def store(
        self,
        registry: Registry,
        folder: Path,
        study: Study,
        on_step: Callable[[str], None] = lambda step: None,
    ) -> RoundStore:
        """The store of a study in the layout's place."""
        made = RoundStore(registry, ServerLayout(folder).run(study.id), study, on_step)
        made.open()
        return made

    def drop_rule(self, connection: Connection, rule: str) -> None:
        """Drop one trigger."""
        on = f" ON {rule.split('_')[0]}" if connection.dialect.name == "postgresql" else ""
        connection.execute(text(f"DROP TRIGGER {rule}{on}"))

    def problems(self, registry: Registry, folder: Path) -> list[tuple[str, str]]:
        """What a full check finds, without the rules this test dropped itself."""
        return [(p.subject, p.code) for p in Inspection(ServerLayout(folder), registry).run()]

    def filled(self, registry: Registry, study: Study, folder: Path) -> None:
        """One row in every table."""
        SiteBook(registry).add(request_file(folder, "east"))
        StudyBook(registry).add(study)
        RunBoard(registry, study.id).submit(study)
        HeadBook(registry).note("east", head(5))
        self.store(registry, folder, study).commit(record_of(study, 0, None), ADAPTER)

    @abstractmethod
    def break_it(self, registry: Registry) -> None:
        """Bring the database into a state in which it fails, and use it."""
