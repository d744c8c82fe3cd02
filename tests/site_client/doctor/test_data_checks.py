"""The doctor's checks of slides, approvals, budget and logs: once well, once wrong."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pixcell_core.cli.main import build
from pixcell_core.contracts.canonical import digest
from site_client.agent.link_record import LinkRecorder
from site_client.approvals.book import ApprovalBook
from site_client.doctor import data_checks
from site_client.doctor.finding import HIDDEN
from site_client.doctor.question import Question
from site_client.doctor.visit import visit
from site_client.ledger.ledger import RoundCharge
from site_client.ledger.site import open_site_ledger
from site_client.ledger.view import BudgetCap
from tests.server.consortium import make_study
from tests.site_client.agent.peers import (
    DAY,
)
from tests.site_client.doctor.findings import result, statuses


def test_without_a_catalogue_the_checks_of_slides_are_skipped_and_say_why(asked: Question) -> None:
    for check in (data_checks.check_slides, data_checks.check_patients, data_checks.check_tiles):
        finding = result(check, asked)
        assert finding.status == "skip" and "no-catalogue" in finding.found and finding.private


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site's folder with three procedural patients, entered and cut."""
    root = tmp_path_factory.mktemp("slides")
    steps = (
        ["synthesise", "--site-dir", str(root / "site"), "--out", str(root / "slides"), "--patients", "3"],
        ["add", "--site-dir", str(root / "site"), "--slides", str(root / "slides")],
        ["tile", "--site-dir", str(root / "site"), "--tile-size", "128"],
    )
    for step in steps:
        done = CliRunner().invoke(build(), ["site", "data", *step])
        assert done.exit_code == 0, done.output
    return root / "site"


@pytest.fixture
def with_slides(asked: Question, slides: Path) -> Question:
    """The site with slides of its own; `site.json` and the rest stay."""
    (asked.folder.root / "catalogue.db").write_bytes((slides / "catalogue.db").read_bytes())
    return asked


def slide_files(asked: Question) -> list[Path]:
    from site_client.catalogue import Catalogue

    with Catalogue(asked.folder.root) as catalogue:
        return [slide.path for slide in catalogue.slides()]


def test_slides_that_open_are_counted_by_format(with_slides: Question) -> None:
    finding = result(data_checks.check_slides, with_slides)
    assert finding.status == "ok" and "3 slides (3 " in finding.found and finding.private
    assert result(data_checks.check_tiles, with_slides).status == "ok"


def test_permission_gone_and_broken_are_told_apart(
    with_slides: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbidden, gone, broken = slide_files(with_slides)
    kept = {path: path.read_bytes() for path in (gone, broken)}
    real = Path.open

    def guarded(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self == forbidden:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **kwargs)

    try:
        gone.unlink()
        broken.write_bytes(kept[broken][: len(kept[broken]) // 2])
        monkeypatch.setattr(Path, "open", guarded)
        if os.geteuid() != 0:
            forbidden.chmod(0)
        finding = result(data_checks.check_slides, with_slides)
    finally:
        monkeypatch.undo()
        forbidden.chmod(stat.S_IRUSR | stat.S_IWUSR)
        for path, data in kept.items():
            path.write_bytes(data)
    assert finding.status == "fail"
    for part in ("1 may not be read", "1 gone", "1 broken"):
        assert part in finding.found, finding
    assert len(finding.details) == 3


def test_too_few_patients_and_a_missing_split(with_slides: Question, tmp_path: Path) -> None:
    from sqlalchemy import create_engine, text

    finding = result(data_checks.check_patients, with_slides)
    assert finding.status == "warn" and "split" in finding.remedy
    engine = create_engine(f"sqlite:///{with_slides.folder.root / 'catalogue.db'}")
    with engine.begin() as connection:
        for trigger in connection.execute(
            text("select name from sqlite_master where type='trigger'")
        ).scalars():
            connection.execute(text(f"drop trigger {trigger}"))
        first = connection.execute(text("select min(id) from patient")).scalar_one()
        connection.execute(text("pragma foreign_keys=off"))
        connection.execute(text(f"delete from slide where patient_id <> {first}"))
        connection.execute(text(f"delete from patient where id <> {first}"))
    engine.dispose()
    finding = result(data_checks.check_patients, with_slides)
    assert finding.status == "fail" and "1 patients" in finding.found


def test_a_patient_without_a_tile_is_named_at_the_site_and_nowhere_else(with_slides: Question) -> None:
    from sqlalchemy import create_engine, text

    engine = create_engine(f"sqlite:///{with_slides.folder.root / 'catalogue.db'}")
    with engine.begin() as connection:
        for trigger in connection.execute(
            text("select name from sqlite_master where type='trigger'")
        ).scalars():
            connection.execute(text(f"drop trigger {trigger}"))
        name = connection.execute(text("select name from patient order by name")).scalars().first()
        connection.execute(
            text(
                "update tiling set tiles = 0 where slide_id in "
                "(select slide.id from slide join patient on patient.id = patient_id where name = :name)"
            ),
            {"name": name},
        )
    engine.dispose()
    finding = result(data_checks.check_tiles, with_slides)
    assert finding.status == "warn" and finding.details == (name,)
    shared = visit(with_slides, checks=(data_checks.check_tiles,), shareable=True)
    assert shared.checks[0].found == HIDDEN and str(name) not in shared.model_dump_json()


def test_approvals_that_end_soon_or_name_no_app(asked: Question) -> None:
    assert result(data_checks.check_approvals, asked).status == "skip"
    book, now = ApprovalBook(asked.folder), datetime.now(UTC).replace(microsecond=0)
    app = digest(b"bundle")
    book.decide(make_study(id="long", app_digest=app, expires_at=now + 90 * DAY), "approve")
    assert result(data_checks.check_approvals, asked).status == "ok"
    book.decide(make_study(id="short", app_digest=app, expires_at=now + 9 * DAY), "approve")
    finding = result(data_checks.check_approvals, asked)
    assert finding.status == "warn" and "short" in finding.found and "long" not in finding.found
    book.decide(make_study(id="nameless"), "approve")
    finding = result(data_checks.check_approvals, asked)
    assert finding.status == "fail" and "nameless" in finding.found


def test_a_heartbeat_that_is_old_is_warned_of(asked: Question) -> None:
    assert result(data_checks.check_heartbeat, asked).status == "skip"
    LinkRecorder(asked.folder.agent, 1, lambda: asked.now).accepted()
    assert result(data_checks.check_heartbeat, asked).status == "ok"
    later = replace(asked, now=asked.now + timedelta(minutes=5))
    assert result(data_checks.check_heartbeat, later).status == "warn"


def charge(asked: Question, steps: int) -> None:
    """Spend some of a budget of epsilon 8 at delta 1e-5."""
    round_charge = RoundCharge("study", 1, 1.0, 4.0, steps, 0.1, digest(b"code"))
    with (
        open_site_ledger(asked.folder.root, site="east", cap=BudgetCap(8.0, 1e-5)) as ledger,
        ledger.reserve(round_charge) as take,
    ):
        for step in range(steps):
            take(step)


def test_the_budget_is_told_with_unit_and_delta(asked: Question) -> None:
    assert statuses(asked, data_checks.check_ledger, data_checks.check_budget) == ["skip", "skip"]
    charge(asked, 1)
    finding = result(data_checks.check_budget, asked)
    assert finding.status == "ok" and "of 8 per patient at delta 1e-05" in finding.found
    assert result(data_checks.check_ledger, asked).status == "ok"


def test_a_ledger_that_was_edited_fails_and_its_budget_is_not_told(asked: Question) -> None:
    charge(asked, 2)
    file = next(p for p in asked.folder.ledger.iterdir() if p.suffix == ".jsonl")
    file.write_bytes(file.read_bytes().replace(b'"steps":1', b'"steps":0', 1))
    assert statuses(asked, data_checks.check_ledger, data_checks.check_budget) == ["fail", "skip"]


def test_a_ledger_that_lost_what_was_shown_fails(asked: Question) -> None:
    charge(asked, 2)
    shutil_copy = {p.name: p.read_bytes() for p in asked.folder.ledger.iterdir() if p.is_file()}
    charge(asked, 2)
    for name, data in shutil_copy.items():
        (asked.folder.ledger / name).write_bytes(data)
    finding = result(data_checks.check_ledger, asked)
    assert finding.status == "fail" and "older than" in finding.found
