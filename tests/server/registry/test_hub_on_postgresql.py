"""A real hub whose registry is a PostgreSQL server that goes away and comes back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from server.layout import ServerLayout
from server.registry.opening import open_registry
from server.rounds.board import RunBoard
from server.studies.book import StudyBook
from tests.server.consortium import make_study
from tests.server.enrolled import init_consortium
from tests.server.processes import Processes, pixcell, wait_until
from tests.server.registry.cluster import Cluster

pytestmark = pytest.mark.end_to_end


@pytest.fixture
def coordinator(cluster: Cluster, tmp_path: Path) -> Iterator[tuple[ServerLayout, Processes]]:
    """A coordinator's folder with a study, its registry on the cluster."""
    cluster.empty()
    layout, processes = ServerLayout(tmp_path / "server"), Processes(tmp_path)
    init_consortium(layout.root)
    secret = cluster.password_file(tmp_path)
    pixcell("registry", "use", cluster.url, "--password-file", secret, "--dir", layout.root)
    StudyBook(open_registry(layout.root)).add(make_study())
    try:
        yield layout, processes
    finally:
        if cluster.process is None:
            cluster.start()
        processes.stop()
        open_registry(layout.root).close()


def test_requests_wait_while_the_registry_is_away(
    cluster: Cluster, coordinator: tuple[ServerLayout, Processes]
) -> None:
    layout, processes = coordinator
    processes.start("hub", "hub", "start", "--dir", layout.root)
    wait_until(layout.ready.exists, 60, processes.log("hub"))
    board = RunBoard(open_registry(layout.root), "study-one")
    # The executor and the run's own process reach the registry too: it is they who say how the run ends.
    pixcell("run", "start", "study-one", "--dir", layout.root)
    wait_until(lambda: board.read().state == "failed", 60, "the run to end")  # type: ignore[union-attr]
    assert "No site named east is enrolled" in board.read().reason  # type: ignore[union-attr]

    cluster.halt()
    error = pixcell("run", "watch", "study-one", "--once", "--dir", layout.root, expect=2)
    assert error["code"] == "registry-down" and "correct horse" not in str(error)
    request = layout.requests / "study-one.json"
    request.write_bytes(b"{}")
    wait_until(lambda: "registry-silent" in layout.events.read_text(), 30, "the hub to notice")
    assert request.exists() and layout.ready.exists()

    cluster.start()
    wait_until(lambda: not request.exists(), 30, "the request to be taken")
    wait_until(lambda: layout.events.read_text().count('"run-ended"') == 2, 60, "the second run to end")
    assert "registry-answers" in layout.events.read_text()
    assert processes.end("hub") == 0


def test_a_hub_does_not_start_on_a_newer_registry(tmp_path: Path) -> None:
    layout = ServerLayout(tmp_path / "server")
    init_consortium(layout.root)
    pixcell("registry", "check", "--dir", layout.root)
    with open_registry(layout.root).write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '0099'"))
    error = pixcell("hub", "start", "--dir", layout.root, expect=4)
    assert error["code"] == "registry-newer" and not layout.ready.exists()
