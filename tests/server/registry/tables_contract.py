"""What every registry promises of its tables, its transactions, and what is written once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError

from pixcell_core.contracts.study import Study
from pixcell_core.errors import BadInputError, PixcellError, RefusedError, TimedOutError
from server.enrolment.sites import SiteBook
from server.registry.events import ActLog, note_act
from server.registry.inspection import RULES, rules_of
from server.registry.registry import Registry
from server.registry.schema import HEAD, REVISIONS, migrate, require_current, revision_of
from server.registry.sealed import seal
from server.registry.tables import Base, EventRow
from server.rounds.heads import HeadBook
from server.studies.book import StudyBook
from tests.server.consortium import make_node_key
from tests.server.registry.children import KILLED, in_children, killed_at
from tests.server.registry.ground import ADAPTER, RegistryGround, head, record_of, request_file


class TablesContract(RegistryGround):
    """What every registry promises of its tables, its transactions, and what is written once."""

    def test_the_migrations_make_the_tables_that_the_program_declares(self, registry: Registry) -> None:
        with registry.read() as connection:
            assert revision_of(connection) == HEAD
            context = MigrationContext.configure(
                connection, opts={"compare_type": True, "target_metadata": Base.metadata}
            )
            assert compare_metadata(context, Base.metadata) == []
            assert rules_of(connection) == RULES

    def test_a_drifted_table_is_seen_by_the_comparison(self, registry: Registry) -> None:
        with registry.write() as connection:
            connection.execute(text("ALTER TABLE studies ADD COLUMN title VARCHAR"))
        with registry.read() as connection:
            found = compare_metadata(MigrationContext.configure(connection), Base.metadata)
        assert [change[0] for change in found] == ["remove_column"]

    @pytest.mark.parametrize("found", ["0099", "abcdef"])
    def test_a_newer_registry_is_refused_with_the_remedy_and_left_alone(
        self, registry: Registry, found: str
    ) -> None:
        with registry.write() as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = :found"), {"found": found})
        for act in (require_current, migrate):
            with pytest.raises(BadInputError, match=found) as caught:
                act(self.reopened(registry))
            assert caught.value.code == "registry-newer" and "Install the newer version" in caught.value.hint
        with registry.read() as connection:
            assert connection.execute(text("SELECT version_num FROM alembic_version")).scalar() == found

    def test_an_older_registry_waits_for_its_upgrade_and_keeps_its_rows(
        self, fresh: Registry, study: Study
    ) -> None:
        migrate(fresh, REVISIONS[0])
        with fresh.write() as connection:
            row = {"study_id": study.id, **seal(study)}
            connection.execute(Base.metadata.tables["studies"].insert().values(**row))
        with pytest.raises(RefusedError, match="version 0001") as caught:
            require_current(fresh)
        assert caught.value.code == "registry-older" and "registry upgrade" in caught.value.hint
        assert migrate(fresh) == (REVISIONS[0], HEAD)
        assert migrate(fresh) == (HEAD, HEAD)
        require_current(fresh)
        assert StudyBook(fresh).get(study.id) == study

    def test_somebody_elses_database_is_not_touched(self, fresh: Registry) -> None:
        with fresh.write() as connection:
            connection.execute(text("CREATE TABLE patients (id INTEGER)"))
        with pytest.raises(BadInputError) as caught:
            require_current(fresh)
        assert caught.value.code == "registry-foreign"
        with fresh.write() as connection:
            connection.execute(text("DROP TABLE patients"))

    def test_many_processes_find_a_new_database_and_make_it_once(self, fresh: Registry) -> None:
        def make() -> str:
            require_current(fresh)
            ActLog(fresh).note("opened", "registry")
            return "made"

        assert in_children([make] * 5) == ["made"] * 5
        assert len(ActLog(fresh).since()) == 5

    def test_a_kill_at_any_statement_of_the_making_leaves_nothing_or_all(self, fresh: Registry) -> None:
        # A few of the many statements: the first ones, then every seventh.
        kills = 0
        for count in [1, 2, 3, *range(7, 1000, 7)]:
            done = killed_at(count, lambda: require_current(fresh)) != KILLED
            kills += not done
            with self.reopened(fresh).read() as connection:
                found = revision_of(connection)
            if done:
                assert found == HEAD
                break
            assert found in (None, HEAD)
            if found == HEAD:
                break
        assert kills >= 5

    def test_a_block_that_raises_changes_nothing(self, registry: Registry) -> None:
        with pytest.raises(ZeroDivisionError), registry.write() as connection:
            note_act(connection, "never", "x")
            raise ZeroDivisionError
        assert ActLog(registry).since() == []

    def test_a_reader_sees_one_moment_and_cannot_write(self, registry: Registry) -> None:
        log = ActLog(self.reopened(registry))
        with registry.read() as connection:
            before = connection.execute(select(EventRow.id)).all()
            log.note("meanwhile", "x")
            assert connection.execute(select(EventRow.id)).all() == before == []
        assert len(log.since()) == 1

    def test_waiting_for_others_has_an_end(self, registry: Registry) -> None:
        hasty = self.reopened(registry, busy_s=0.3)
        with registry.write(lock="x"):
            began = time.monotonic()
            with pytest.raises(TimedOutError) as caught, hasty.write(lock="x"):
                pass
        assert caught.value.code == "registry-busy" and time.monotonic() - began < 5
        with hasty.write(lock="x") as connection:
            note_act(connection, "after", "x")

    def test_a_fork_gets_connections_of_its_own(self, registry: Registry) -> None:
        log = ActLog(registry)
        log.note("parent", "before")
        with registry.read() as connection:
            # The parent is inside a transaction while its children work and end.
            def child() -> int:
                log.note("child", "x")
                return len(log.since())

            assert sorted(in_children([child] * 3))[-1] == 4
            assert connection.execute(text("SELECT count(*) FROM events")).scalar() in (1, 4)
        log.note("parent", "after")
        assert [a.kind for a in log.since()].count("child") == 3 and len(log.since()) == 5

    def test_rows_that_never_change_are_kept_by_the_database_itself(
        self, registry: Registry, study: Study, tmp_path: Path
    ) -> None:
        StudyBook(registry).add(study)
        self.store(registry, tmp_path, study).commit(record_of(study, 0, None), ADAPTER)
        HeadBook(registry).note("east", head(5))
        for statement in (
            "UPDATE studies SET digest = 'x'",
            "DELETE FROM studies",
            "UPDATE rounds SET digest = 'x'",
            "DELETE FROM rounds",
            "UPDATE heads SET sequence = 4",
            "DELETE FROM heads",
            "UPDATE events SET kind = 'x'",
            "DELETE FROM events",
        ):
            with pytest.raises(IntegrityError), registry.write() as connection:
                connection.execute(text(statement))
        assert self.problems(registry, tmp_path) == []

    def test_a_rule_that_was_dropped_is_found(self, registry: Registry, tmp_path: Path) -> None:
        with registry.write() as connection:
            self.drop_rule(connection, "events_delete_refused")
        assert self.problems(registry, tmp_path) == [("database", "rule-missing")]

    def test_a_study_is_never_replaced(self, registry: Registry, study: Study) -> None:
        book = StudyBook(registry)
        book.add(study)
        assert book.add(study) == study and book.ids() == [study.id]
        assert book.has(study.id) and not book.has("other")
        with pytest.raises(RefusedError, match="already called") as caught:
            book.add(study.model_copy(update={"rounds": 7}))
        assert caught.value.code == "study-exists" and book.get(study.id) == study
        assert [(a.kind, a.subject) for a in ActLog(registry).since()] == [("study-created", study.id)]
        with pytest.raises(BadInputError, match="no study other"):
            book.get("other")

    def test_two_sites_cannot_share_a_key_even_when_they_come_at_once(
        self, registry: Registry, tmp_path: Path
    ) -> None:
        book, key = SiteBook(registry), make_node_key()
        files = [request_file(tmp_path, f"site-{i}", key) for i in range(4)]
        said = in_children([lambda f=file: book.add(f).site for file in files])  # type: ignore[misc]
        assert sorted(said)[:3] == ["shared-identity"] * 3 and book.names() == [sorted(said)[3]]

    def test_the_same_request_twice_is_fine_and_other_keys_are_not(
        self, registry: Registry, tmp_path: Path
    ) -> None:
        book = SiteBook(registry)
        east = book.add(request_file(tmp_path, "east"))
        assert book.add(tmp_path / "east.request.json") == east == book.get("east")
        with pytest.raises(RefusedError) as caught:
            book.add(request_file(tmp_path, "east"))
        assert caught.value.code == "site-exists" and book.all() == [east]
        with pytest.raises(BadInputError) as caught_other:
            book.get("west")
        assert caught_other.value.code == "unknown-site"

    def test_acts_of_many_processes_are_all_kept_in_an_order(self, registry: Registry) -> None:
        log = ActLog(registry)

        def note(name: str) -> str:
            for i in range(25):
                log.note("act", f"{name}/{i}")
            return name

        in_children([lambda n=f"p{i}": note(n) for i in range(4)])  # type: ignore[misc]
        acts = log.since()
        assert len({a.number for a in acts}) == 100
        for i in range(4):
            assert [a.subject for a in acts if a.subject.startswith(f"p{i}/")] == [
                f"p{i}/{j}" for j in range(25)
            ]
        assert log.since(acts[-2].number) == [acts[-1]] and log.since(0, 3) == acts[:3]

    def test_a_statement_that_is_refused_is_an_error_with_a_code(self, registry: Registry) -> None:
        registry.ping()
        registry.close()
        registry.ping()
        with pytest.raises(PixcellError) as caught:
            self.break_it(registry)
        assert caught.value.code in ("registry-broken", "registry-down") and caught.value.hint
