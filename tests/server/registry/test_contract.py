"""The registry's contract on SQLite and on PostgreSQL, and what is special about each."""

from __future__ import annotations

import os
import resource
import signal
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Engine, event, text

from pixcell_core.contracts.spool import arrays_digest
from pixcell_core.contracts.study import Study
from pixcell_core.errors import BadInputError, ConnectionFailedError, PixcellError
from server.registry.address import RegistryAddress
from server.registry.events import ActLog, note_act
from server.registry.faults import StorageFullError
from server.registry.opening import KEPT, open_registry
from server.registry.registry import Registry
from server.registry.schema import backup, require_current
from server.rounds.board import RunBoard
from server.studies.book import StudyBook
from tests.server.registry.children import in_children
from tests.server.registry.cluster import Cluster
from tests.server.registry.contract import RegistryContract
from tests.server.registry.ground import ADAPTER, record_of


class TestSqlite(RegistryContract):
    """The default: one file, write-ahead log."""

    @pytest.fixture
    def fresh(self, tmp_path: Path) -> Iterator[Registry]:  # type: ignore[override]
        made = Registry(RegistryAddress.of_folder(tmp_path))
        yield made
        made.close()

    def break_it(self, registry: Registry) -> None:
        registry.close()
        assert registry.address.file is not None
        registry.address.file.write_bytes(b"this is no database" * 400)
        registry.ping()

    def test_the_file_is_private_and_readers_do_not_wait(self, registry: Registry, tmp_path: Path) -> None:
        for path in tmp_path.glob("registry.db*"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
        with registry.write() as connection:
            assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
            note_act(connection, "unseen", "x")
            assert ActLog(self.reopened(registry)).since() == []

    def test_commits_are_flushed_and_boards_are_not(self, registry: Registry) -> None:
        with registry.write() as connection:
            assert connection.execute(text("PRAGMA synchronous")).scalar() == 2
        with registry.write(durable=False) as connection:
            assert connection.execute(text("PRAGMA synchronous")).scalar() == 1
        with registry.write() as connection:
            assert connection.execute(text("PRAGMA synchronous")).scalar() == 2

    def test_a_full_disk_is_one_error_and_nothing_half_done(
        self, registry: Registry, study: Study, tmp_path: Path
    ) -> None:
        pages: list[Any] = []

        def cap(raw: Any, _record: Any) -> None:
            used = raw.execute("PRAGMA page_count").fetchone()[0]
            pages.append(raw.execute(f"PRAGMA max_page_count={used}").fetchone()[0])

        event.listen(Engine, "connect", cap)
        try:
            full = self.reopened(registry)
            log = ActLog(full)
            with pytest.raises(StorageFullError) as caught:
                for i in range(10_000):
                    log.note("act", f"{i}" * 40)
            assert caught.value.code == "disk-full" and pages
            kept = len(log.since(limit=100_000))
            many = tuple(f"site-{i:05d}-{'x' * 28}" for i in range(500))
            with pytest.raises(StorageFullError):
                StudyBook(full).add(study.model_copy(update={"sites": many}))
            full.close()
        finally:
            event.remove(Engine, "connect", cap)
        assert len(ActLog(registry).since(limit=100_000)) == kept and StudyBook(registry).ids() == []
        StudyBook(registry).add(study)
        assert self.problems(registry, tmp_path) == []

    def test_files_that_may_not_grow_leave_the_last_round_as_it_was(
        self, registry: Registry, study: Study, tmp_path: Path
    ) -> None:
        StudyBook(registry).add(study)
        store = self.store(registry, tmp_path, study)
        first = store.commit(record_of(study, 0, None), ADAPTER).record
        big = {"block.lora_B.default.weight": np.ones((512, 512), dtype=np.float32)}
        record = record_of(study, 1, first, adapter_digest=arrays_digest(big))
        registry.close()

        def limited(size: int) -> Any:
            def job() -> str:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
                store.commit(record, big)
                return "committed"

            return job

        # Too little for the tensors.
        for size in (100_000, 4096):
            assert in_children([limited(size)]) == ["disk-full"]
            again = self.store(registry, tmp_path, study)
            assert [r.round for r in again.records()] == [0]
            assert [p.name for p in (tmp_path / "runs" / study.id / "rounds").iterdir()] == ["00000"]
            registry.close()
        # Enough for small tensors, but not for the write-ahead log of the row that names them.
        small = record_of(study, 1, first)

        def grow_only_the_log() -> str:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            with registry.read():
                pass
            limit = 2048
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            store.commit(small, ADAPTER)
            return "committed"

        assert in_children([grow_only_the_log]) == ["disk-full"]
        again = self.store(registry, tmp_path, study)
        assert [r.round for r in again.records()] == [0]
        assert again.commit(small, ADAPTER).record == small
        assert self.problems(registry, tmp_path) == []

    def test_a_file_that_cannot_be_opened_is_one_error(self, tmp_path: Path) -> None:
        (tmp_path / "registry.db").mkdir()
        with pytest.raises(BadInputError) as caught:
            require_current(Registry(RegistryAddress.of_folder(tmp_path)))
        assert caught.value.code == "registry-unreadable"

    def test_a_damaged_file_is_one_error(self, registry: Registry) -> None:
        with pytest.raises(BadInputError) as caught:
            self.break_it(registry)
        assert caught.value.code == "registry-broken"

    def test_many_folders_of_one_process_keep_few_connections(self, tmp_path: Path) -> None:
        opened = [open_registry(tmp_path / str(i)) for i in range(KEPT + 4)]
        assert open_registry(tmp_path / str(KEPT + 3)) is opened[-1]
        files = [str(p.resolve()) for p in Path("/proc/self/fd").iterdir() if p.is_symlink()]
        assert sum("registry.db" in name and str(tmp_path) in name for name in files) <= 3 * 2 * KEPT
        ActLog(opened[0]).note("still", "usable")
        assert len(ActLog(open_registry(tmp_path / "0")).since()) == 1
        for registry in opened:
            registry.close()

    def test_a_backup_is_whole_while_others_write(
        self, registry: Registry, study: Study, tmp_path: Path
    ) -> None:
        self.filled(registry, study, tmp_path)
        with registry.write() as connection:
            note_act(connection, "not-yet", "x")
            backup(registry, tmp_path / "copy.db")
        copy = Registry(RegistryAddress.parse("sqlite:///copy.db", None, tmp_path))
        require_current(copy)
        assert self.problems(copy, tmp_path) == []
        assert "not-yet" not in [a.kind for a in ActLog(copy).since()]
        assert stat.S_IMODE((tmp_path / "copy.db").stat().st_mode) == 0o600
        copy.close()

    def test_a_write_ahead_log_of_a_killed_process_is_taken_up(
        self, registry: Registry, study: Study
    ) -> None:
        def die() -> None:
            RunBoard(registry, study.id).submit(study)
            os.kill(os.getpid(), signal.SIGKILL)

        in_children([die])
        assert RunBoard(self.reopened(registry), study.id).read() is not None
        raw = sqlite3.connect(registry.address.file)  # type: ignore[arg-type]
        assert raw.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        raw.close()


class TestPostgresql(RegistryContract):
    """By URL: a server of its own, started for these tests from the system's packages."""

    @pytest.fixture
    def fresh(self, cluster: Cluster, tmp_path: Path) -> Iterator[Registry]:  # type: ignore[override]
        cluster.empty()
        made = self.at(cluster, tmp_path)
        yield made
        made.close()

    def at(
        self, cluster: Cluster, folder: Path, url: str | None = None, password: str | None = None
    ) -> Registry:
        """A registry at the cluster, or somewhere that is wrong."""
        file = cluster.password_file(folder, password) if password else cluster.password_file(folder)
        return Registry(RegistryAddress.parse(url or cluster.url, file, folder))

    def break_it(self, registry: Registry) -> None:
        with registry.write() as connection:
            connection.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    def test_commits_are_flushed_and_boards_are_not(self, registry: Registry) -> None:
        with registry.write() as connection:
            assert connection.execute(text("SHOW synchronous_commit")).scalar() == "on"
        with registry.write(durable=False) as connection:
            assert connection.execute(text("SHOW synchronous_commit")).scalar() == "off"
        with registry.read() as connection:
            assert connection.execute(text("SHOW transaction_read_only")).scalar() == "on"

    @pytest.mark.parametrize(
        ("change", "password", "code"),
        [
            ({}, "wrong", "registry-refused"),
            ({"username": "nobody"}, None, "registry-refused"),
            ({"database": "absent"}, None, "registry-down"),
            ({"port": 1}, None, "registry-down"),
            ({"host": "no-such-host.invalid"}, None, "registry-down"),
        ],
    )
    def test_what_cannot_be_reached_is_one_error_without_the_password(
        self, cluster: Cluster, tmp_path: Path, change: dict[str, Any], password: str | None, code: str
    ) -> None:
        from sqlalchemy.engine import make_url

        url = make_url(cluster.url).set(**change).render_as_string()
        with pytest.raises(ConnectionFailedError) as caught:
            require_current(self.at(cluster, tmp_path, url, password))
        assert caught.value.code == code and caught.value.exit_code == 2
        for secret in ("correct horse", "wrong"):
            assert secret not in str(caught.value)

    def test_a_user_who_may_not_is_told_so(
        self, cluster: Cluster, registry: Registry, tmp_path: Path
    ) -> None:
        cluster.ask("DROP ROLE IF EXISTS guest")
        cluster.ask("CREATE ROLE guest LOGIN PASSWORD 'guest-pass'")
        guest = self.at(cluster, tmp_path, cluster.url.replace("pixcell@", "guest@"), "guest-pass")
        with pytest.raises(ConnectionFailedError) as caught:
            ActLog(guest).note("never", "x")
        assert caught.value.code == "registry-forbidden"
        guest.close()

    def test_a_connection_that_breaks_in_a_transaction_loses_all_of_it_and_the_next_one_works(
        self, registry: Registry
    ) -> None:
        with pytest.raises(ConnectionFailedError) as caught, registry.write() as connection:
            note_act(connection, "never", "x")
            connection.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
        assert caught.value.code == "registry-down"
        assert ActLog(registry).since() == []

    def test_a_server_that_was_restarted_costs_nothing(self, cluster: Cluster, registry: Registry) -> None:
        ActLog(registry).note("before", "x")
        cluster.ask(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'registry' AND pid <> pg_backend_pid()"
        )
        ActLog(registry).note("after", "x")
        assert len(ActLog(registry).since()) == 2

    def test_the_password_is_in_no_text_about_the_registry(self, registry: Registry) -> None:
        engine = registry._here()
        for words in (
            registry.address.shown,
            repr(registry.address),
            repr(engine),
            str(registry.address.url),
        ):
            assert "correct horse" not in words

    def test_a_lock_of_one_study_does_not_hold_another(self, registry: Registry) -> None:
        hasty = self.reopened(registry, busy_s=0.3)
        with registry.write(lock="rounds/one"), hasty.write(lock="rounds/two") as connection:
            note_act(connection, "fine", "x")
        with pytest.raises(PixcellError), registry.write(lock="rounds/one"), hasty.write(lock="rounds/one"):
            pass
        hasty.close()
