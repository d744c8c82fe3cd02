"""What every registry promises where rows were edited behind its back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pixcell_core.contracts.canonical import digest
from pixcell_core.contracts.study import Study
from pixcell_core.errors import BadInputError
from server.layout import ServerLayout
from server.registry import sealed
from server.registry.inspection import RULES
from server.registry.registry import Registry
from server.registry.sealed import seal
from server.registry.tables import Base
from server.rounds.heads import SiteHead
from server.studies.book import StudyBook
from tests.server.registry.ground import RegistryGround, head, record_of


class EditingContract(RegistryGround):
    """What every registry promises where rows were edited behind its back."""

    def spoil(self, registry: Registry, table: str, values: dict[str, Any]) -> None:
        """Change every row of a table behind the program's back, as its owner could."""
        with registry.write() as connection:
            for rule in sorted(RULES):
                if rule.startswith(table) and "update" in rule:
                    self.drop_rule(connection, rule)
            connection.execute(Base.metadata.tables[table].update().values(**values))

    EDITED: tuple[tuple[str, str, str, Callable[[Study], dict[str, Any]]], ...] = (
        ("sites", "site east", "registry-altered", lambda study: {"document": b"{}"}),
        ("sites", "site east", "registry-altered", lambda study: {"node_key_digest": digest(b"other")}),
        ("studies", "study study-one", "registry-altered", lambda study: {"document": b"{}"}),
        (
            "studies",
            "study study-one",
            "registry-altered",
            lambda study: {"document": study.model_copy(update={"epsilon_cap": 99.0}).to_bytes()},
        ),
        (
            "studies",
            "study study-one",
            "registry-altered",
            lambda study: seal(study.model_copy(update={"id": "other"})),
        ),
        ("studies", "study study-one", "registry-altered", lambda study: seal(head(1))),
        ("heads", "head of east", "heads-broken", lambda study: {"document": b"{}"}),
        ("heads", "head of east", "heads-broken", lambda study: {"sequence": 1}),
        (
            "heads",
            "head of east",
            "heads-broken",
            lambda study: {"sequence": 5, **seal(SiteHead(site="west", head=head(5)))},
        ),
        ("runs", "run study-one", "registry-altered", lambda study: {"document": b"{}"}),
        ("rounds", "rounds of study-one", "rounds-broken", lambda study: {"document": b"{}"}),
        (
            "rounds",
            "rounds of study-one",
            "rounds-broken",
            lambda study: seal(record_of(study, 1, None)),
        ),
        (
            "rounds",
            "rounds of study-one",
            "rounds-of-another-study",
            lambda study: seal(record_of(study, 0, None, study_digest=digest(b"other"))),
        ),
    )

    @pytest.mark.parametrize("case", range(len(EDITED)))
    def test_an_edited_row_is_found(
        self, registry: Registry, study: Study, tmp_path: Path, case: int
    ) -> None:
        table, subject, code, change = self.EDITED[case]
        self.filled(registry, study, tmp_path)
        assert self.problems(registry, tmp_path) == []
        self.spoil(registry, table, change(study))
        found = [p for p in self.problems(registry, tmp_path) if p[1] != "rule-missing"]
        assert (subject, code) in found

    def test_without_the_digest_an_edited_study_would_pass(
        self, registry: Registry, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        StudyBook(registry).add(study)
        wider = study.model_copy(update={"epsilon_cap": 99.0})
        self.spoil(registry, "studies", {"document": wider.to_bytes()})
        with pytest.raises(BadInputError):
            StudyBook(registry).get(study.id)
        monkeypatch.setattr(sealed, "digest", lambda data: study.digest)
        assert StudyBook(registry).get(study.id) == wider

    def test_lost_tensors_are_found(self, registry: Registry, study: Study, tmp_path: Path) -> None:
        self.filled(registry, study, tmp_path)
        place = ServerLayout(tmp_path).run(study.id) / "rounds" / "00000" / "adapter.safetensors"
        data = bytearray(place.read_bytes())
        data[-1] ^= 1
        place.write_bytes(data)
        assert [p[0] for p in self.problems(registry, tmp_path)] == [f"rounds of {study.id}"]
        place.unlink()
        assert self.problems(registry, tmp_path) == [(f"rounds of {study.id}", "rounds-broken")]
