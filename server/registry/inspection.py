"""Reads the whole registry again: every digest, every chain, every file a round names, every rule of the database."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sqlalchemy import Connection, inspect, select, text

from pixcell_core.errors import PixcellError
from server.enrolment.sites import SiteBook
from server.layout import ServerLayout
from server.registry.registry import Registry
from server.registry.tables import Base, HeadRow, RoundRow
from server.rounds.board import RunBoard
from server.rounds.heads import HeadBook
from server.rounds.store import RoundStore
from server.studies.book import StudyBook

RULES = frozenset(
    {
        "studies_update_refused",
        "studies_delete_refused",
        "rounds_update_refused",
        "rounds_delete_refused",
        "heads_update_refused",
        "heads_delete_refused",
        "events_update_refused",
        "events_delete_refused",
    }
)
"""Triggers that keep what is written once; a test holds them to the migrations."""


@dataclass(frozen=True)
class Problem:
    """One entry that is not as it was written."""

    subject: str
    code: str
    message: str


class Inspection:
    """Looks at one registry and the folders of its runs; changes nothing."""

    def __init__(self, layout: ServerLayout, registry: Registry) -> None:
        self._layout, self._registry = layout, registry
        self._problems: list[Problem] = []

    def run(self) -> list[Problem]:
        """Every problem there is; none where all is whole."""
        self._problems = []
        self._look("database", self._database)
        sites, studies = SiteBook(self._registry), StudyBook(self._registry)
        for site in sites.names():
            self._look(f"site {site}", lambda site=site: sites.get(site))  # type: ignore[misc]
        for study_id in studies.ids():
            self._look(f"study {study_id}", lambda i=study_id: studies.get(i))  # type: ignore[misc]
        for site in self._column(select(HeadRow.site)):
            self._look(f"head of {site}", lambda s=site: HeadBook(self._registry).last(s))  # type: ignore[misc]
        for study_id in RunBoard.ids(self._registry):
            board = RunBoard(self._registry, study_id)
            self._look(f"run {study_id}", lambda b=board: b.read(history=False))  # type: ignore[misc]
        for study_id in self._column(select(RoundRow.study_id).distinct()):
            self._look(f"rounds of {study_id}", lambda i=study_id: self._rounds(i))  # type: ignore[misc]
        return self._problems

    def _look(self, subject: str, check: Callable[[], object]) -> None:
        try:
            check()
        except PixcellError as error:
            self._problems.append(Problem(subject, error.code, error.message))

    def _database(self) -> None:
        with self._registry.read() as connection:
            missing = sorted(RULES - rules_of(connection))
            if connection.dialect.name == "sqlite":
                said = connection.execute(text("PRAGMA integrity_check(1)")).scalar()
                if said != "ok":
                    self._problems.append(Problem("database", "registry-broken", "SQLite finds it damaged."))
        for rule in missing:
            why = f"The database no longer keeps the rule {rule}."
            self._problems.append(Problem("database", "rule-missing", why))

    def _rounds(self, study_id: str) -> None:
        study = StudyBook(self._registry).get(study_id)
        store = RoundStore(self._registry, self._layout.run(study_id), study)
        for record in store.records():
            store.read(record)

    def _column(self, wanted: object) -> list[str]:
        with self._registry.read() as connection:
            return sorted(connection.execute(wanted).scalars())  # type: ignore[call-overload]


def rules_of(connection: Connection) -> set[str]:
    """Names of the triggers in the database."""
    if connection.dialect.name == "sqlite":
        wanted = "SELECT name FROM sqlite_master WHERE type = 'trigger'"
    else:
        wanted = "SELECT tgname FROM pg_trigger WHERE NOT tgisinternal AND tgenabled <> 'D'"
    return set(connection.execute(text(wanted)).scalars())


def rows_of(connection: Connection) -> dict[str, int]:
    """Rows per table, of the tables that are there."""
    there = set(inspect(connection).get_table_names())
    return {name: _count(connection, name) for name in _ours() if name in there}


def _ours() -> Iterable[str]:
    return sorted(Base.metadata.tables)


def _count(connection: Connection, name: str) -> int:
    return int(connection.execute(text(f"SELECT count(*) FROM {name}")).scalar_one())
