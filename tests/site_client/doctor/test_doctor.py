"""Each check of the doctor: once where all is well, and once where what it looks for is wrong."""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pixcell_core.cli.main import build
from pixcell_core.contracts.artifacts import installed_code_digest
from pixcell_core.contracts.canonical import digest
from pixcell_core.trust.dsse import sign_envelope
from pixcell_core.trust.keys import SigningKey
from site_client.agent.link_record import LinkRecorder
from site_client.agent.proxy import STRAIGHT, WayOut, parse_proxy
from site_client.agent.supervisor import lock_agent
from site_client.approvals.book import ApprovalBook
from site_client.doctor import data_checks, machine_checks, network_checks
from site_client.doctor.finding import HIDDEN, DoctorReport, Finding
from site_client.doctor.question import Check, Question
from site_client.doctor.visit import NAMES, visit
from site_client.ledger.ledger import RoundCharge
from site_client.ledger.site import open_site_ledger
from site_client.ledger.view import BudgetCap
from tests.server.consortium import make_study
from tests.site_client.agent.peers import (
    DAY,
    Answer,
    Authority,
    ConnectProxy,
    TlsServer,
    install_kit,
    make_site,
    unused_port,
)

HERE = ("127.0.0.1",)
HEALTHY = Answer(200, "application/json", b"{}")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("pki") / "ours")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("pki") / "theirs", "Hospital TLS inspection")


@pytest.fixture
def serve() -> Iterator[Callable[..., Any]]:
    started: list[Any] = []

    def start(kind: type[Any], *arguments: Any, **settings: Any) -> Any:
        started.append(kind(*arguments, **settings))
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.fixture
def hub(authority: Authority, serve: Callable[..., Any]) -> TlsServer:
    made: TlsServer = serve(
        TlsServer, authority.issue("hub", hosts=HERE), authority.ca, lambda path, body: HEALTHY
    )
    return made


@pytest.fixture
def asked(tmp_path: Path, authority: Authority, hub: TlsServer) -> Question:
    """A site that lacks nothing it needs to reach its hub."""
    folder = make_site(tmp_path, authority, hub.address)
    return Question(folder, folder.identity(), hub.address, STRAIGHT, timeout_s=5.0)


def result(check: Check, asked: Question) -> Finding:
    """A check as the visit runs it, errors and all."""
    return visit(asked, checks=(check,)).checks[0]


def statuses(asked: Question, *checks: Check) -> list[str]:
    return [result(check, asked).status for check in checks]


# ---- the network


def test_a_site_that_reaches_its_hub_has_nothing_to_do(asked: Question, hub: TlsServer) -> None:
    report = visit(asked, checks=network_checks.NETWORK_CHECKS)
    assert {c.name: c.status for c in report.checks} == {
        "kit": "ok",
        "kit-version": "skip",
        "authority": "ok",
        "proxy": "ok",
        "dns": "ok",
        "tcp": "ok",
        "tls": "ok",
        "hub": "ok",
        "clock": "ok",
        "firewall": "skip",
    }
    assert hub.asked == ["/health"] and hub.peers == ["east"], "one question to the hub for all checks"


@pytest.mark.parametrize(
    ("ends", "status"), [(29 * DAY, "warn"), (31 * DAY, "ok"), (-timedelta(hours=1), "fail")]
)
def test_the_kit_is_warned_of_thirty_days_ahead(
    asked: Question, authority: Authority, ends: timedelta, status: str
) -> None:
    install_kit(asked.folder, authority, ends=ends)
    finding = result(network_checks.check_kit, asked)
    assert finding.status == status
    assert ("install-kit" in finding.remedy) == (status != "ok")


def test_no_kit_is_a_failure_with_the_command(asked: Question) -> None:
    asked.folder.tls_key.unlink()
    finding = result(network_checks.check_kit, asked)
    assert finding.status == "fail" and "pixcell site install-kit" in finding.remedy


def test_the_kits_version_is_read_where_it_is_written(asked: Question) -> None:
    signed = sign_envelope("application/vnd.pixcell.kit+json", b'{"version":3}', [SigningKey.generate()])
    asked.folder.kit.write_bytes(signed.to_bytes())
    assert "version 3" in result(network_checks.check_kit_version, asked).found


def test_the_hubs_certificate_is_warned_of_thirty_days_ahead(
    asked: Question, authority: Authority, serve: Callable[..., Any]
) -> None:
    soon = serve(
        TlsServer, authority.issue("hub", hosts=HERE, ends=20 * DAY), authority.ca, lambda p, b: HEALTHY
    )
    finding = result(network_checks.check_certificate, replace(asked, hub=soon.address))
    assert (finding.status == "warn" and "19 days" in finding.found) or "20 days" in finding.found


def test_interception_is_told_with_the_name_of_who_does_it(
    asked: Question, stranger: Authority, serve: Callable[..., Any]
) -> None:
    proxy = serve(ConnectProxy, intercept=stranger.issue("hub", hosts=HERE))
    through = replace(asked, way_out=WayOut(parse_proxy(proxy.url), "command line"))
    finding = result(network_checks.check_certificate, through)
    assert finding.status == "fail" and "CN=Hospital TLS inspection" in finding.found
    assert statuses(through, network_checks.check_hub, network_checks.check_clock) == ["fail", "skip"]
    assert proxy.opened == b""


@pytest.mark.parametrize(
    ("settings", "code"),
    [({"refuse": 403}, "proxy-refused"), ({"credentials": "u:p"}, "proxy-needs-credentials")],
)
def test_a_proxy_that_says_no_is_the_hubs_failure_and_named(
    asked: Question, serve: Callable[..., Any], settings: dict[str, Any], code: str
) -> None:
    proxy = serve(ConnectProxy, **settings)
    through = replace(asked, way_out=WayOut(parse_proxy(proxy.url), "command line"))
    assert f"[{code}]" in result(network_checks.check_hub, through).found
    assert statuses(through, network_checks.check_port, network_checks.check_certificate) == ["ok", "skip"]


def test_an_exposed_credentials_file_is_found(asked: Question, tmp_path: Path) -> None:
    secret = tmp_path / "proxy.txt"
    secret.write_text("u:p")
    secret.chmod(0o644)
    proxy = parse_proxy("http://127.0.0.1:1", secret)
    finding = result(network_checks.check_proxy, replace(asked, way_out=WayOut(proxy, "command line")))
    assert finding.status == "fail" and "key-file-exposed" in finding.found


def test_nobody_at_the_address(asked: Question) -> None:
    nobody = replace(asked, hub=f"127.0.0.1:{unused_port()}")
    found = {c.name: c.status for c in visit(nobody, checks=network_checks.NETWORK_CHECKS).checks}
    assert (found["dns"], found["tcp"], found["tls"], found["hub"], found["clock"]) == (
        "ok",
        "fail",
        "skip",
        "fail",
        "skip",
    )


def test_no_such_name(asked: Question) -> None:
    nowhere = replace(asked, hub="no-such-hub.invalid:443")
    assert statuses(nowhere, network_checks.check_name, network_checks.check_port) == ["fail", "skip"]


@pytest.mark.parametrize(
    ("off_s", "status"), [(0, "ok"), (60, "warn"), (-60, "warn"), (600, "fail"), (-600, "fail")]
)
def test_the_clock_is_compared_with_the_hubs(
    asked: Question, authority: Authority, serve: Callable[..., Any], off_s: int, status: str
) -> None:
    def answer(path: str, body: bytes) -> Answer:
        there = datetime.now(UTC) + timedelta(seconds=off_s)
        return Answer(200, "application/json", b"{}", {"date": format_datetime(there, usegmt=True)})

    wrong = serve(TlsServer, authority.issue("hub", hosts=HERE), authority.ca, answer)
    finding = result(network_checks.check_clock, replace(asked, hub=wrong.address))
    assert finding.status == status
    assert ("behind" if off_s > 0 else "s") in finding.found


def test_a_hub_without_a_date_is_not_called_right(
    asked: Question, authority: Authority, serve: Callable[..., Any]
) -> None:
    silent = serve(
        TlsServer,
        authority.issue("hub", hosts=HERE),
        authority.ca,
        lambda p, b: Answer(200, "application/json", b"{}", {"date": "soon"}),
    )
    assert result(network_checks.check_clock, replace(asked, hub=silent.address)).status == "skip"


def test_another_host_is_contacted_only_when_named(asked: Question) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(0.2)
        place = f"127.0.0.1:{other.getsockname()[1]}"
        assert result(network_checks.check_other_host, asked).status == "skip"
        with pytest.raises(TimeoutError):
            other.accept()
        assert result(network_checks.check_other_host, replace(asked, other_host=place)).status == "warn"
        other.accept()[0].close()
    assert result(network_checks.check_other_host, replace(asked, other_host=place)).status == "ok"


# ---- the machine


def test_root_is_warned_of(asked: Question, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert result(machine_checks.check_user, asked).status == "warn"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(machine_checks, "_capabilities", lambda: 0)
    assert result(machine_checks.check_user, asked).status == "ok"
    monkeypatch.setattr(machine_checks, "_capabilities", lambda: 1 << 12)
    assert result(machine_checks.check_user, asked).status == "warn"


def test_keys_that_others_can_read_are_named(asked: Question) -> None:
    assert result(machine_checks.check_keys, asked).status == "ok"
    asked.folder.approval_key.chmod(0o640)
    finding = result(machine_checks.check_keys, asked)
    assert finding.status == "fail" and "approval" in finding.found
    asked.folder.approval_key.chmod(0o600)
    asked.folder.keys.chmod(0o755)
    assert "keys/" in result(machine_checks.check_keys, asked).found
    asked.folder.keys.chmod(0o700)
    asked.folder.node_key.unlink()
    assert "missing: node" in result(machine_checks.check_keys, asked).found


def test_a_folder_that_takes_no_file_is_named(asked: Question, monkeypatch: pytest.MonkeyPatch) -> None:
    assert result(machine_checks.check_writable, asked).status == "ok"
    real = machine_checks.tempfile.TemporaryFile

    def read_only(dir: Path) -> Any:
        if dir == asked.folder.logs:
            raise OSError(30, "Read-only file system")
        return real(dir=dir)

    monkeypatch.setattr(machine_checks.tempfile, "TemporaryFile", read_only)
    finding = result(machine_checks.check_writable, asked)
    assert finding.status == "fail" and "Read-only file system" in finding.details[0]


def test_room_for_two_checkpoints(asked: Question, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert result(machine_checks.check_disk, asked).status == "skip"
    base = tmp_path / "base"
    base.mkdir()
    (base / "w.safetensors").write_bytes(b"x" * 1000)
    usage = machine_checks.shutil.disk_usage(tmp_path)
    for free, status in ((1999, "fail"), (2000, "ok")):
        monkeypatch.setattr(
            machine_checks.shutil, "disk_usage", lambda _, free=free: usage._replace(free=free)
        )
        assert result(machine_checks.check_disk, replace(asked, base=base)).status == status


def test_a_lock_is_held_by_a_process_and_never_stale(asked: Question) -> None:
    assert result(machine_checks.check_lock, asked).status == "skip"
    held = lock_agent(asked.folder)
    assert "is running" in result(machine_checks.check_lock, asked).found
    held.close()
    assert "no agent is running" in result(machine_checks.check_lock, asked).found


def test_the_installed_code_is_compared_with_the_studys(
    asked: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert result(machine_checks.check_release, asked).status == "skip"
    same = make_study(code_digest=installed_code_digest())
    assert result(machine_checks.check_release, replace(asked, study=same)).status == "ok"
    assert result(machine_checks.check_release, replace(asked, study=make_study())).status == "fail"
    monkeypatch.setattr(machine_checks, "version", lambda name: "1.42.0")
    finding = result(machine_checks.check_release, replace(asked, study=same))
    assert finding.status == "fail" and "1.42.0" in finding.found


def test_telemetry_that_is_asked_for_is_found(asked: Question, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in machine_checks.MUST_BE.items():
        monkeypatch.setenv(name, value)
    assert result(machine_checks.check_telemetry, asked).status == "ok"
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    assert "FLWR_TELEMETRY_ENABLED=1" in result(machine_checks.check_telemetry, asked).found


def test_a_device_that_is_not_there_fails(asked: Question) -> None:
    import torch

    assert result(machine_checks.check_accelerator, asked).status == "skip"
    finding = result(machine_checks.check_accelerator, replace(asked, device="cuda:99"))
    assert finding.status == "fail" and "cuda:99" in finding.found and torch.cuda.device_count() < 99


def test_the_containers_default_of_shared_memory_is_too_small(
    asked: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = machine_checks.shutil.disk_usage("/")
    for size, device, status in ((64, "cpu", "warn"), (64, "cuda", "fail"), (1024, "cuda", "ok")):
        monkeypatch.setattr(
            machine_checks.shutil, "disk_usage", lambda _, size=size: usage._replace(total=size << 20)
        )
        assert result(machine_checks.check_shared_memory, replace(asked, device=device)).status == status


# ---- the data


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


# ---- the visit


def test_every_check_is_asked_under_its_own_name_and_one_that_breaks_hides_none(
    asked: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    report = visit(asked, said.append)
    assert [c.name for c in report.checks] == list(NAMES.values()) and len(said) == len(NAMES)
    assert report.exit_code == (1 if report.fail else 0)

    def breaks(question: Question) -> Finding:
        raise ZeroDivisionError("a secret")

    broken = visit(asked, checks=(breaks, network_checks.check_kit))
    assert [c.status for c in broken.checks] == ["fail", "ok"] and "secret" not in broken.model_dump_json()


def test_the_report_fails_only_for_a_failure() -> None:
    def report(*statuses: Any) -> DoctorReport:
        return DoctorReport.of("east", tuple(Finding(name="x", status=s, found="") for s in statuses))

    assert report("ok", "warn", "skip").exit_code == 0
    assert report("ok", "fail").exit_code == 1


def test_the_command_prints_one_envelope_and_a_line_per_check(asked: Question) -> None:
    site = str(asked.folder.root)
    done = CliRunner().invoke(
        build(), ["site", "doctor", "--site-dir", site, "--proxy", "direct", "--format", "json"]
    )
    body = json.loads(done.stdout)
    assert {c["name"] for c in body["data"]["checks"]} == set(NAMES.values())
    assert "[1/27] kit: ok" in done.stderr
    assert done.exit_code == (1 if body["data"]["fail"] else 0)
    asked.folder.approval_key.chmod(0o644)
    assert (
        CliRunner().invoke(build(), ["site", "doctor", "--site-dir", site, "--proxy", "direct"]).exit_code
        == 1
    )


def test_a_folder_that_is_no_site_is_an_input_error(tmp_path: Path) -> None:
    assert CliRunner().invoke(build(), ["site", "doctor", "--site-dir", str(tmp_path)]).exit_code == 4
