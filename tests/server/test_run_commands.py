"""`pixcell run start|watch|stop|resume` on a real loop: the hub's part is played by a thread that takes requests."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import typer
from flwr.app import Message
from sqlalchemy import text
from typer.testing import CliRunner

from pixcell_core.contracts.canonical import digest
from pixcell_core.contracts.round import Exclusion, RoundRecord, RunState, SiteState
from pixcell_core.contracts.spool import arrays_to_bytes
from pixcell_core.errors import PixcellError
from server.enrolment.pki import initialise
from server.enrolment.sites import SiteBook
from server.layout import START_ADAPTER, ServerLayout
from server.rounds.board import RunBoard
from server.rounds.commands import register
from server.rounds.run_view import show_run
from server.rounds.server_app import run_study
from server.rounds.watching import _Lines
from server.studies.book import StudyBook
from tests.server.consortium import Consortium, make_study
from tests.server.enrolled import PASSPHRASE


class Desk:
    """A coordinator's folder with the enrolled sites of a consortium, a hub that takes requests, and the commands."""

    def __init__(self, folder: Path, consortium: Consortium) -> None:
        self.layout, self.consortium = ServerLayout(folder), consortium
        initialise(self.layout, ["127.0.0.1"], PASSPHRASE)
        for site, request in consortium.enrolled.items():
            path = folder.parent / f"{site}.json"
            path.write_bytes(request.to_bytes())
            SiteBook(self.layout.registry()).add(path)
        self.layout.hub.mkdir(parents=True, exist_ok=True)
        self.layout.nodes.write_text(json.dumps({s: str(n) for s, n in consortium.nodes.items()}))
        self.add(consortium)
        self.layout.ready.write_text("{}")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def add(self, consortium: Consortium) -> None:
        """Keep the consortium's study and its start."""
        StudyBook(self.layout.registry()).add(consortium.study)
        run = self.layout.run(consortium.study.id)
        run.mkdir(parents=True, exist_ok=True)
        (run / START_ADAPTER).write_bytes(arrays_to_bytes(consortium.start()))

    def _serve(self) -> None:
        while not self._ended.wait(0.01):
            for request in self.layout.requests.glob("*.json"):
                request.unlink()
                try:
                    run_study(
                        self.consortium.grid, self.layout, StudyBook(self.layout.registry()).get(request.stem)
                    )
                except PixcellError:
                    continue

    def close(self) -> None:
        """End the hub's part."""
        self._ended.set()
        self._thread.join(timeout=30)

    def run(self, *words: str, study: str = "study-one") -> tuple[int, dict[str, Any]]:
        """Exit code and envelope of `pixcell run ...`."""
        root = typer.Typer()
        root.callback()(lambda: None)
        register(root)
        verb, *more = words
        given = ["run", verb, study, "--dir", str(self.layout.root), *more, "--format", "json"]
        result = CliRunner().invoke(root, given)
        return result.exit_code, json.loads(result.stdout)


@pytest.fixture
def desk_of(tmp_path: Path, consortium_of: Callable[..., Consortium]) -> Iterator[Callable[..., Desk]]:
    made: list[Desk] = []

    def make(**changes: Any) -> Desk:
        made.append(Desk(tmp_path / "server", consortium_of(**changes)))
        return made[-1]

    yield make
    for desk in made:
        desk.close()


QUICK = ("--poll", "0.01", "--ready-timeout", "2")


def test_a_run_is_started_and_waited_for(desk_of: Callable[..., Desk]) -> None:
    desk = desk_of()
    code, body = desk.run("start", *QUICK, "--wait")
    assert code == 0, body
    shown = body["data"]
    assert shown["run"]["state"] == "completed" and shown["run"]["committed"] == 3
    assert shown["bytes_in"] == sum(s["bytes_in"] for s in shown["run"]["sites"]) > 0
    assert shown["not_counted"] == [] and shown["left_s"] is None and Path(shown["adapter"]).is_file()
    assert desk.run("watch", "--once")[1]["data"]["run"]["state"] == "completed"
    code, body = desk.run("resume", *QUICK)
    assert (code, body["code"]) == (1, "run-completed")
    code, body = desk.run("stop")
    assert (code, body["code"]) == (1, "run-not-active")


def slow_second_round(question: Message, reply: Message) -> list[Message]:
    """Everybody takes a while over round 2."""
    if question.metadata.group_id == "2":
        time.sleep(0.5)
    return [reply]


@pytest.mark.parametrize(("words", "kept"), [((), {1, 2}), (("--after-round",), {2})])
def test_a_run_is_stopped_and_goes_on(
    desk_of: Callable[..., Desk], words: tuple[str, ...], kept: set[int]
) -> None:
    desk = desk_of()
    desk.consortium.grid.tamper = slow_second_round
    assert desk.run("start", *QUICK)[0] == 0
    board = RunBoard(desk.layout.registry(), "study-one")
    end = time.monotonic() + 20.0
    while (state := board.read()) is None or state.round != 2:
        assert time.monotonic() < end
        time.sleep(0.005)
    assert desk.run("start", *QUICK)[1]["code"] == "run-active"
    assert desk.run("resume", *QUICK)[1].get("code") == "run-active"
    code, body = desk.run("stop", *words, "--timeout", "20")
    assert code == 0 and body["data"]["run"]["state"] == "stopped", body
    assert body["data"]["run"]["committed"] in kept
    time.sleep(0.1)
    trained = {name: list(site.trained) for name, site in desk.consortium.sites.items()}
    assert all(max(rounds) == 2 for rounds in trained.values())
    code, body = desk.run("resume", *QUICK, "--wait")
    assert code == 0 and body["data"]["run"]["committed"] == 3, body
    assert [s["rounds_counted"] for s in body["data"]["run"]["sites"]] == [3, 3, 3]


def test_a_run_that_fails_says_why_and_what_to_do(desk_of: Callable[..., Desk]) -> None:
    desk = desk_of(rounds=1)
    for name in ("east", "north"):
        desk.consortium.sites[name].refuse = "budget-exceeded"
    code, body = desk.run("start", *QUICK, "--wait")
    assert (code, body["code"]) == (1, "run-failed") and "the quorum is 2" in body["message"]
    shown = desk.run("watch", "--once")[1]["data"]
    assert [(n["site"], n["code"]) for n in shown["not_counted"]] == [
        ("east", "budget-exceeded"),
        ("north", "budget-exceeded"),
    ]
    assert all("privacy budget" in n["remedy"] for n in shown["not_counted"])
    assert desk.run("watch")[1]["code"] == "run-failed"
    for name in ("east", "north"):
        desk.consortium.sites[name].refuse = ""
    assert desk.run("resume", *QUICK, "--wait")[0] == 0


def test_what_cannot_be_started_is_one_clear_error(desk_of: Callable[..., Desk]) -> None:
    desk = desk_of()
    assert desk.run("watch", "--once")[1]["code"] == "no-run"
    assert desk.run("stop")[1]["code"] == "no-run"
    assert desk.run("resume")[1]["code"] == "no-run"
    assert desk.run("start", study="nobody")[1]["code"] == "unknown-study"
    code, body = desk.run("start", "--round-timeout", "6")
    assert (code, body["code"]) == (4, "round-timeout") and "5 s" in body["hint"]
    desk.layout.ready.unlink()
    code, body = desk.run("start")
    assert (code, body["code"]) == (2, "hub-down")


def test_an_expired_study_is_not_started(desk_of: Callable[..., Desk]) -> None:
    desk, now = desk_of(), datetime.now(UTC).replace(microsecond=0)
    old = make_study(id="old", created_at=now - timedelta(days=3), expires_at=now - timedelta(days=1))
    StudyBook(desk.layout.registry()).add(old)
    code, body = desk.run("start", study="old")
    assert (code, body["code"]) == (1, "study-expired")


def test_a_study_that_was_edited_in_the_registry_is_one_clear_error(desk_of: Callable[..., Desk]) -> None:
    desk = desk_of()
    with desk.layout.registry().write() as connection:
        connection.execute(text("DROP TRIGGER studies_update_refused"))
        found = connection.execute(text("SELECT document FROM studies")).scalar_one()
        changed = bytes(found).replace(b'"rounds":3', b'"rounds":4')
        assert changed != found
        connection.execute(text("UPDATE studies SET document = :changed"), {"changed": changed})
    code, body = desk.run("start")
    assert (code, body["code"]) == (4, "registry-altered") and body["hint"]
    assert not RunBoard(desk.layout.registry(), "study-one").read()


def test_a_study_for_another_bundle_is_refused_before_a_site_is_asked(desk_of: Callable[..., Desk]) -> None:
    desk = desk_of(app_digest=digest(b"another release"))
    code, body = desk.run("start", *QUICK, "--wait")
    assert (code, body["code"]) == (1, "run-failed") and "app digest" in body["message"]
    assert not desk.consortium.grid.sent


def a_state(**changes: Any) -> RunState:
    """A run in its third round of four; a round takes ten seconds."""
    now = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)
    history = tuple(
        RoundRecord(
            study_id="s",
            study_digest=digest(b"s"),
            round=number,
            previous=None,
            adapter_digest=digest(b"a"),
            included=("east",),
            excluded=(Exclusion(site="west", code="deadline", reason="no reply within 60 s"),),
            started_at=now + timedelta(seconds=10 * number - 10),
            committed_at=now + timedelta(seconds=10 * number),
        )
        for number in (1, 2)
    )
    values: dict[str, Any] = {
        "study_id": "s",
        "study_digest": digest(b"s"),
        "state": "running",
        "round": 3,
        "rounds": 4,
        "committed": 2,
        "replies": 1,
        "started_at": now,
        "updated_at": now,
        "deadline_at": now + timedelta(seconds=80),
        "sites": (
            SiteState(
                site="east", registered=True, approved=True, configured=True, bytes_in=1500, bytes_out=2
            ),
            SiteState(site="north", code="no-trainer", note="the site's [red]trainer[/red] is not running"),
            SiteState(site="west", training=True),
        ),
        "history": history,
    }
    return RunState.model_validate(values | changes)


def test_time_left_bytes_and_remedies_are_shown(tmp_path: Path) -> None:
    now = datetime(2026, 1, 1, 12, 0, 24, tzinfo=UTC)
    shown = show_run(tmp_path, a_state(), now)
    # Two rounds of ten seconds are left; four of them have passed.
    assert shown.left_s == pytest.approx(16.0) and shown.deadline_in_s == pytest.approx(56.0)
    assert (shown.bytes_in, shown.bytes_out) == (1500, 2)
    assert [(n.site, n.round, n.code) for n in shown.not_counted] == [
        ("north", None, "no-trainer"),
        ("west", 2, "deadline"),
    ]
    assert show_run(tmp_path, a_state(state="stopped"), now).left_s is None
    assert show_run(tmp_path, a_state(history=()), now).left_s is None
    assert show_run(tmp_path, a_state(), now + timedelta(hours=1)).deadline_in_s == 0.0
    assert show_run(tmp_path, a_state(), now + timedelta(hours=1)).left_s == pytest.approx(10.0)


def test_the_table_shows_what_peers_wrote_as_text_and_never_as_markup(tmp_path: Path) -> None:
    from rich.console import Console

    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(show_run(tmp_path, a_state()).render())
    text = console.export_text()
    assert "[red]trainer[/red]" in text and "1.5 kB" in text and "1 of 3 replies count" in text
    assert "The site starts its trainer" in text and "Ask the site how long a round takes" in text
    line = show_run(tmp_path, a_state()).line()
    assert "running: round 3/4, 2 committed" in line and "west training" in line


def test_a_narrow_terminal_shows_every_site_by_its_whole_name_and_loses_nothing(tmp_path: Path) -> None:
    from rich.console import Console

    state = a_state(reason="A reason that is said.")
    names = {f"hospital-{site.site}": site for site in state.sites}
    state = state.model_copy(
        update={"sites": tuple(s.model_copy(update={"site": name}) for name, s in names.items())}
    )
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(show_run(tmp_path, state).render())
    lines = console.export_text().splitlines()
    assert {line.split()[0] for line in lines if line.split()[1:2] in (["yes"], ["no"])} == set(names)
    assert "…" not in "".join(lines) and any(line.startswith("A reason that is said.") for line in lines)
    assert not [line for line in lines if "━" in line and "round" in line], "the bar has a line of its own"


def test_lines_are_said_when_something_happens_and_rarely_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("server.rounds.watching.time.monotonic", lambda: now[0])
    lines = _Lines()
    for seconds, state in [(0, a_state()), (1, a_state()), (7, a_state()), (8, a_state(replies=2))]:
        now[0] = 100.0 + seconds
        lines(show_run(tmp_path, state))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and "no change, 7 s" in said[1] and "2 of 3 replies" in said[2]


def test_a_terminal_sees_a_live_table(desk_of: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch) -> None:
    """The display of a terminal runs to the end on a real run."""
    desk = desk_of(rounds=2)
    monkeypatch.setattr("server.rounds.watching._is_terminal", lambda: True)
    code, body = desk.run("start", *QUICK, "--wait")
    assert code == 0 and body["data"]["run"]["committed"] == 2
