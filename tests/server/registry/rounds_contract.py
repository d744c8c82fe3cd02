"""What every registry promises of heads, boards and rounds, also where a process is killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from pixcell_core.contracts.round import RoundRecord
from pixcell_core.contracts.spool import arrays_digest
from pixcell_core.contracts.study import Study
from pixcell_core.errors import BadInputError, RefusedError
from server.enrolment.sites import SiteBook
from server.layout import ServerLayout
from server.registry.events import ActLog
from server.registry.registry import Registry
from server.registry.sealed import seal
from server.registry.tables import Base
from server.rounds.board import RunBoard
from server.rounds.heads import HeadBook
from server.rounds.store import RoundStore
from server.studies.book import StudyBook
from tests.server.registry.children import KILLED, in_children, killed_at
from tests.server.registry.ground import ADAPTER, STATE, RegistryGround, head, record_of, request_file


class RoundsContract(RegistryGround):
    """What every registry promises of heads, boards and rounds, also where a process is killed."""

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

        kills, torn = 0, False
        while not torn and killed_at(kills + 1, careless) == KILLED:
            look = self.reopened(registry)
            torn = bool(StudyBook(look).ids()) and not ActLog(look).since()
            look.close()
            kills += 1
        assert torn, f"none of {kills} kills left a study without its act"
