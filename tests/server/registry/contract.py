"""What every registry promises, whichever database keeps it. Each database's test class inherits these tests."""

from __future__ import annotations

import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, select, text
from sqlalchemy.exc import IntegrityError

from pixcell_core.contracts.canonical import digest
from pixcell_core.contracts.enrolment import EnrolmentRequest
from pixcell_core.contracts.round import KnownHead, RoundRecord
from pixcell_core.contracts.spool import arrays_digest
from pixcell_core.contracts.study import Study
from pixcell_core.errors import BadInputError, PixcellError, RefusedError, TimedOutError
from pixcell_core.trust.keys import SigningKey
from server.enrolment.sites import SiteBook
from server.layout import ServerLayout
from server.registry import sealed
from server.registry.events import ActLog, note_act
from server.registry.inspection import RULES, Inspection, rules_of
from server.registry.registry import Registry
from server.registry.schema import HEAD, REVISIONS, migrate, require_current, revision_of
from server.registry.sealed import seal
from server.registry.tables import Base, EventRow
from server.rounds.board import RunBoard
from server.rounds.heads import HeadBook, SiteHead
from server.rounds.store import RoundStore
from server.studies.book import StudyBook
from tests.server.consortium import make_node_key, make_study
from tests.server.registry.children import KILLED, in_children, killed_at

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


class RegistryContract(ABC):
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

    # -- tables and versions

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

    # -- transactions

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

    # -- what is written once

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

    # -- heads

    def test_heads_only_move_forward(self, registry: Registry) -> None:
        book = HeadBook(registry)
        assert book.last("east") is None
        book.note("east", None)
        for sequence, newest in ((3, 3), (7, 7), (5, 7), (7, 7)):
            book.note("east", head(sequence))
            assert book.last("east") == head(newest)
        with pytest.raises(RefusedError) as caught:
            book.note("east", head(7, "another"))
        assert caught.value.code == "ledger-forked" and book.last("east") == head(7)

    def test_heads_that_come_at_once_leave_the_newest(self, registry: Registry) -> None:
        book = HeadBook(registry)

        def note(numbers: list[int]) -> str:
            for number in numbers:
                book.note("east", head(number))
            return "noted"

        turns = [list(range(start, 60, 4)) for start in range(4)]
        assert in_children([lambda n=n: note(n) for n in turns]) == ["noted"] * 4  # type: ignore[misc]
        assert book.last("east") == head(59)

    # -- boards

    def test_a_board_shows_the_committed_rounds_and_does_not_carry_them(
        self, registry: Registry, study: Study, tmp_path: Path
    ) -> None:
        board, store = RunBoard(registry, study.id), self.store(registry, tmp_path, study)
        assert board.read() is None and board.version() == 0 and RunBoard.ids(registry) == []
        board.submit(study)
        first = store.commit(record_of(study, 0, None), ADAPTER).record
        state = board.read()
        assert state is not None and state.history == (first,)
        board.write(state.model_copy(update={"state": "running"}))
        with registry.read() as connection:
            kept = connection.execute(text("SELECT document FROM runs")).scalar_one()
        assert first.adapter_digest.encode() not in bytes(kept)
        assert board.version() == 2 and RunBoard.ids(registry) == [study.id]
        board.fail_if_unfinished("it was stopped")
        assert board.read().state == "failed" and board.version() == 3  # type: ignore[union-attr]
        board.fail_if_unfinished("again")
        assert board.read().reason == "it was stopped" and board.version() == 3  # type: ignore[union-attr]

    def test_many_writers_of_one_board_lose_no_write(self, registry: Registry, study: Study) -> None:
        board = RunBoard(registry, study.id)

        def write() -> str:
            for _ in range(10):
                board.submit(study)
            return "written"

        assert in_children([write] * 4) == ["written"] * 4
        assert board.version() == 40 and len(ActLog(registry).since()) == 40

    def count_up(self, registry: Registry, study: Study) -> int:
        """Four processes add five each to one number of a board; what it is afterwards."""
        board = RunBoard(registry, study.id)
        board.submit(study)

        def add() -> str:
            def more(state: Any) -> Any:
                time.sleep(0.002)
                return state.model_copy(update={"round": state.round + 1})

            for _ in range(5):
                board.change(more)
            return "added"

        in_children([add] * 4)
        return int(board.read().round)  # type: ignore[union-attr]

    def test_changes_that_depend_on_what_was_read_are_not_lost(
        self, registry: Registry, study: Study
    ) -> None:
        assert self.count_up(registry, study) == 20

    def test_without_the_version_they_would_be(
        self, registry: Registry, study: Study, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def careless(board: RunBoard, change: Callable[[Any], Any]) -> Any:
            return board.write(change(board.read()))

        monkeypatch.setattr(RunBoard, "change", careless)
        assert self.count_up(registry, study) < 20

    # -- rounds

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

    def test_rounds_come_back_as_a_chain_with_their_tensors(
        self, registry: Registry, study: Study, tmp_path: Path
    ) -> None:
        store = self.store(registry, tmp_path, study)
        assert store.latest() is None
        first = store.commit(record_of(study, 0, None), ADAPTER).record
        second = record_of(study, 1, first, state_digest=arrays_digest(STATE))
        store.commit(second, ADAPTER, STATE)
        latest = self.store(registry, tmp_path, study).latest()
        assert latest is not None and latest.record == second and latest.state is not None
        assert arrays_digest(latest.adapter) == arrays_digest(ADAPTER)
        assert arrays_digest(latest.state) == arrays_digest(STATE)
        assert [r.round for r in store.records()] == [0, 1]
        acts = [(a.kind, a.subject) for a in ActLog(registry).since()]
        assert acts == [("round-committed", f"{study.id}/0"), ("round-committed", f"{study.id}/1")]

    def test_a_round_counts_once_whoever_commits_it(
        self, registry: Registry, study: Study, tmp_path: Path
    ) -> None:
        store = self.store(registry, tmp_path, study)
        first = store.commit(record_of(study, 0, None), ADAPTER).record

        def commit(site: str) -> str:
            store.commit(record_of(study, 1, first, included=(site,)), ADAPTER)
            return site

        said = in_children([lambda s=f"site-{i}": commit(s) for i in range(6)])  # type: ignore[misc]
        winners = [s for s in said if s.startswith("site-")]
        assert len(winners) == 1 and said.count("round-committed-twice") == 5
        assert store.records()[1].included == (winners[0],)
        assert sorted(p.name for p in (ServerLayout(tmp_path).run(study.id) / "rounds").iterdir()) == [
            "00000",
            "00001",
        ]
        with pytest.raises(RefusedError) as caught:
            store.commit(record_of(study, 1, first), ADAPTER)
        assert caught.value.code == "round-committed-twice"
        # By constraint too: a program without our manners cannot count a round twice.
        with pytest.raises(IntegrityError), registry.write() as connection:
            row = {"study_id": study.id, "round": 1, "previous": None, **seal(record_of(study, 1, None))}
            connection.execute(Base.metadata.tables["rounds"].insert().values(**row))

    def test_a_round_that_does_not_follow_is_refused(
        self, registry: Registry, study: Study, tmp_path: Path
    ) -> None:
        store = self.store(registry, tmp_path, study)
        first = store.commit(record_of(study, 0, None), ADAPTER).record
        for bad in (
            record_of(study, 2, first),
            record_of(study, 1, None),
            record_of(study, 1, record_of(study, 0, None)),
        ):
            with pytest.raises(BadInputError) as caught:
                store.commit(bad, ADAPTER)
            assert caught.value.code == "rounds-broken"
        assert len(store.records()) == 1
        with pytest.raises(ValueError, match="other tensors"):
            store.commit(record_of(study, 1, first), STATE)

    def test_rounds_of_another_study_of_that_name_are_refused(
        self, registry: Registry, study: Study, tmp_path: Path
    ) -> None:
        self.store(registry, tmp_path, study).commit(record_of(study, 0, None), ADAPTER)
        other = study.model_copy(update={"rounds": 9})
        with pytest.raises(RefusedError) as caught:
            self.store(registry, tmp_path, other).records()
        assert caught.value.code == "rounds-of-another-study"

    def test_a_kill_at_every_step_of_a_commit_leaves_a_round_or_none(
        self, registry: Registry, study: Study, tmp_path: Path
    ) -> None:
        steps: list[str] = []
        previous: RoundRecord | None = None

        def commit(number: int, before: RoundRecord | None, kill_at: int) -> str:
            seen = 0

            def step(name: str) -> None:
                nonlocal seen
                seen += 1
                if seen == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

            store = self.store(registry, tmp_path, study, step)
            record = record_of(study, number, before, state_digest=arrays_digest(STATE))
            store.commit(record, ADAPTER, STATE)
            return "done"

        plain = record_of(study, 0, None, state_digest=arrays_digest(STATE))
        previous = self.store(registry, tmp_path, study, steps.append).commit(plain, ADAPTER, STATE).record
        assert len(steps) == 11
        for kill_at in range(1, len(steps) + 1):
            number = previous.round + 1
            said = in_children([lambda n=number, p=previous, k=kill_at: commit(n, p, k)])  # type: ignore[misc]
            assert said == [KILLED]
            store = self.store(registry, tmp_path, study)
            records = store.records()
            committed = len(records) == number + 1
            assert committed == (steps[kill_at - 1] == "done"), steps[kill_at - 1]
            acts = [a for a in ActLog(registry).since() if a.subject == f"{study.id}/{number}"]
            assert len(acts) == committed
            names = sorted(p.name for p in (ServerLayout(tmp_path).run(study.id) / "rounds").iterdir())
            assert names == [f"{i:05d}" for i in range(len(records))]
            previous = records[-1]
        assert self.store(registry, tmp_path, study).latest() is not None

    def test_a_row_before_its_files_would_be_noticed(
        self, registry: Registry, study: Study, tmp_path: Path
    ) -> None:
        class RowFirst(RoundStore):
            """The commit in the wrong order."""

            def _enter(self, record: RoundRecord, partial: Path) -> None:
                with self._registry.write() as connection:
                    row = {"study_id": record.study_id, "round": record.round, "previous": record.previous}
                    connection.execute(Base.metadata.tables["rounds"].insert().values(**row, **seal(record)))
                os.kill(os.getpid(), signal.SIGKILL)

        store = RowFirst(registry, ServerLayout(tmp_path).run(study.id), study)
        assert in_children([lambda: store.commit(record_of(study, 0, None), ADAPTER)]) == [KILLED]
        with pytest.raises(BadInputError) as caught:
            self.store(registry, tmp_path, study).records()
        assert caught.value.code == "rounds-broken"

    def test_a_loop_that_begins_meanwhile_makes_the_other_give_up_and_not_fail(
        self, registry: Registry, study: Study, tmp_path: Path
    ) -> None:
        def another_begins(step: str) -> None:
            if step == "flush-partial":
                self.store(registry, tmp_path, study)

        store = self.store(registry, tmp_path, study, another_begins)
        with pytest.raises(RefusedError) as caught:
            store.commit(record_of(study, 0, None), ADAPTER)
        assert caught.value.code == "round-committed-twice"
        assert self.store(registry, tmp_path, study).records() == []

    # -- kills inside transactions

    def test_a_kill_at_any_statement_leaves_nothing_half_done(
        self, registry: Registry, study: Study, tmp_path: Path
    ) -> None:
        request = request_file(tmp_path, "east")
        board = RunBoard(registry, study.id)

        def seen() -> tuple[Any, ...]:
            look = self.reopened(registry)
            found = (
                SiteBook(look).names(),
                StudyBook(look).ids(),
                RunBoard.ids(look),
                HeadBook(look).last("east"),
                [a.kind for a in ActLog(look).since()],
            )
            look.close()
            return found

        jobs: dict[str, tuple[Callable[[], Any], Callable[[tuple[Any, ...]], tuple[Any, ...]]]] = {
            "site": (
                lambda: SiteBook(registry).add(request).site,
                lambda s: (["east"], *s[1:4], [*s[4], "site-enrolled"]),
            ),
            "study": (
                lambda: StudyBook(registry).add(study).id,
                lambda s: (s[0], [study.id], *s[2:4], [*s[4], "study-created"]),
            ),
            "run": (
                lambda: board.submit(study).state,
                lambda s: (*s[:2], [study.id], s[3], [*s[4], "run-submitted"]),
            ),
            "head": (lambda: HeadBook(registry).note("east", head(3)), lambda s: (*s[:3], head(3), s[4])),
        }
        for name, (job, after) in jobs.items():
            before, count = seen(), 0
            whole = after(before)
            while True:
                count += 1
                said = killed_at(count, job)
                now = seen()
                assert now in (before, whole), (name, count)
                if said != KILLED or now == whole:
                    assert now == whole
                    break
            assert count >= 3, name

    def test_two_transactions_instead_of_one_would_be_noticed(self, registry: Registry, study: Study) -> None:
        def careless() -> None:
            with registry.write() as connection:
                row = {"study_id": study.id, **seal(study)}
                connection.execute(Base.metadata.tables["studies"].insert().values(**row))
            ActLog(registry).note("study-created", study.id)

        halves = 0
        while killed_at(halves + 1, careless) == KILLED:
            look = self.reopened(registry)
            if StudyBook(look).ids() and not ActLog(look).since():
                look.close()
                return
            look.close()
            halves += 1
        pytest.fail("no kill left a study without its act")

    # -- what was edited

    def spoil(self, registry: Registry, table: str, values: dict[str, Any]) -> None:
        """Change every row of a table behind the program's back, as its owner could."""
        with registry.write() as connection:
            for rule in sorted(RULES):
                if rule.startswith(table) and "update" in rule:
                    self.drop_rule(connection, rule)
            connection.execute(Base.metadata.tables[table].update().values(**values))

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

    # -- acts

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

    # -- failures of the database are one clear error

    def test_a_statement_that_is_refused_is_an_error_with_a_code(self, registry: Registry) -> None:
        registry.ping()
        registry.close()
        registry.ping()
        with pytest.raises(PixcellError) as caught:
            self.break_it(registry)
        assert caught.value.code in ("registry-broken", "registry-down") and caught.value.hint

    @abstractmethod
    def break_it(self, registry: Registry) -> None:
        """Bring the database into a state in which it fails, and use it."""
