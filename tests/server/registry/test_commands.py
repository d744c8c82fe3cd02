"""`pixcell registry`: shown, moved before use, brought up with a copy, checked; every failure is one error and its exit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import text
from typer.testing import CliRunner

from server.enrolment.pki import initialise
from server.layout import ServerLayout
from server.registry.address import RegistryAddress
from server.registry.commands import register
from server.registry.opening import open_registry
from server.registry.registry import Registry
from server.registry.schema import HEAD, MIGRATIONS, REVISIONS, migrate
from server.studies.book import StudyBook
from tests.server.consortium import make_study
from tests.server.enrolled import PASSPHRASE
from tests.server.registry.cluster import Cluster, require_binaries


@pytest.fixture
def layout(tmp_path: Path) -> ServerLayout:
    """A coordinator's folder as `pixcell init` makes it."""
    made = ServerLayout(tmp_path / "server")
    initialise(made, ["127.0.0.1"], PASSPHRASE)
    return made


def call(layout: ServerLayout, *words: str) -> tuple[int, dict[str, Any]]:
    """Exit code and envelope of a command."""
    root = typer.Typer()
    root.callback()(lambda: None)
    register(root)
    given = ["registry", *words, "--dir", str(layout.root), "--format", "json"]
    result = CliRunner().invoke(root, given)
    body = json.loads(result.stdout)
    return result.exit_code, body.get("data", body)


def older(layout: ServerLayout) -> Registry:
    """A registry of the first version, with a study in it."""
    made = Registry(RegistryAddress.of_folder(layout.root))
    migrate(made, REVISIONS[0])
    return made


def test_the_known_versions_are_those_of_the_migrations() -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    script = ScriptDirectory.from_config(config)
    assert tuple(reversed([r.revision for r in script.walk_revisions()])) == REVISIONS
    assert script.get_current_head() == HEAD


def test_without_postgresql_the_gate_fails_and_others_skip_with_the_reason(tmp_path: Path) -> None:
    assert require_binaries(tmp_path, {}) == tmp_path
    with pytest.raises(pytest.fail.Exception, match="apt-get install postgresql"):
        require_binaries(None, {"CI": "true"})
    with pytest.raises(pytest.skip.Exception, match="not installed"):
        require_binaries(None, {})


def test_show_tells_place_version_and_rows(layout: ServerLayout) -> None:
    assert call(layout, "show")[1]["version"] is None
    StudyBook(layout.registry()).add(make_study())
    code, body = call(layout, "show")
    assert code == 0 and body["version"] == body["wanted"] == HEAD
    assert body["url"] == f"sqlite:///{layout.root}/registry.db"
    assert body["rows"] == {"events": 1, "heads": 0, "rounds": 0, "runs": 0, "sites": 0, "studies": 1}
    code, body = call(layout, "acts")
    assert [(a["kind"], a["subject"]) for a in body["acts"]] == [("study-created", "study-one")]


def test_an_older_registry_is_upgraded_once_asked_and_a_copy_is_kept(layout: ServerLayout) -> None:
    older(layout)
    code, body = call(layout, "check")
    assert (code, body["code"]) == (1, "registry-older")
    code, body = call(layout, "upgrade")
    assert (code, body["code"]) == (4, "needs-yes")
    assert call(layout, "show")[1]["version"] == REVISIONS[0]
    code, body = call(layout, "upgrade", "--yes")
    assert (code, body["before"], body["after"]) == (0, REVISIONS[0], HEAD)
    copy = RegistryAddress.parse(f"sqlite:///{body['backup']}", None, layout.root)
    with Registry(copy).read() as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalar() == REVISIONS[0]
    assert call(layout, "upgrade", "--yes") == (0, {"before": HEAD, "after": HEAD, "backup": None})
    assert call(layout, "check")[0] == 0


def test_a_copy_in_the_way_stops_the_upgrade(layout: ServerLayout) -> None:
    older(layout)
    (layout.root / f"registry-before-{HEAD}.db").write_bytes(b"precious")
    assert call(layout, "upgrade", "--yes")[1]["code"] == "backup-exists"
    assert call(layout, "show")[1]["version"] == REVISIONS[0]


def test_a_backup_is_a_registry_and_writes_over_nothing(layout: ServerLayout, tmp_path: Path) -> None:
    StudyBook(layout.registry()).add(make_study())
    code, body = call(layout, "backup", "--out", str(tmp_path / "copy.db"))
    assert code == 0 and body["rows"]["studies"] == 1
    copy = Registry(RegistryAddress.parse(f"sqlite:///{tmp_path}/copy.db", None, tmp_path))
    assert StudyBook(copy).ids() == ["study-one"]
    copy.close()
    before = (tmp_path / "copy.db").read_bytes()
    assert call(layout, "backup", "--out", str(tmp_path / "copy.db"))[1]["code"] == "exists"
    assert (tmp_path / "copy.db").read_bytes() == before
    code, body = call(layout, "backup", "--out", str(tmp_path / "absent" / "copy.db"))
    assert (code, body["code"]) == (4, "not-writable")
    assert not list(tmp_path.glob(".copy*"))


def test_a_newer_registry_is_refused_by_every_command_that_would_use_it(layout: ServerLayout) -> None:
    with layout.registry().write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '0099'"))
    # By another name: a folder's registry is opened, and its version looked at, once in each process.
    fresh = ServerLayout(layout.root / ".." / "server")
    for words in (("check",), ("acts",), ("upgrade", "--yes")):
        code, body = call(fresh, *words)
        assert (code, body["code"]) == (4, "registry-newer"), words
    assert call(layout, "show")[1]["version"] == "0099"


def test_check_leaves_with_1_where_something_was_edited(layout: ServerLayout) -> None:
    registry = layout.registry()
    StudyBook(registry).add(make_study())
    assert call(layout, "check") == (
        0,
        {"rows": call(layout, "show")[1]["rows"], "problems": []},
    )
    with registry.write() as connection:
        connection.execute(text("DROP TRIGGER studies_update_refused"))
        connection.execute(text("UPDATE studies SET document = X'7B7D'"))
    code, body = call(layout, "check")
    assert code == 1
    assert [(p["subject"], p["code"]) for p in body["problems"]] == [
        ("database", "rule-missing"),
        ("study study-one", "registry-altered"),
    ]


def test_a_folder_that_was_not_initialised_is_refused(tmp_path: Path) -> None:
    assert call(ServerLayout(tmp_path), "show")[1]["code"] == "not-initialised"


def test_another_database_is_used_before_the_first_row_and_not_after(
    layout: ServerLayout, cluster: Cluster, tmp_path: Path
) -> None:
    cluster.empty()
    secret = cluster.password_file(tmp_path)
    code, body = call(layout, "use", cluster.url, "--password-file", str(secret))
    assert (code, body["version"]) == (0, HEAD) and "correct horse" not in json.dumps(body)
    assert "correct horse" not in (layout.root / "registry.yaml").read_text()
    registry = open_registry(layout.root)
    StudyBook(registry).add(make_study())
    assert cluster.ask("SELECT study_id FROM studies", "registry") == [("study-one",)]
    assert call(layout, "check")[0] == 0
    code, body = call(layout, "use", "sqlite:///elsewhere.db")
    assert (code, body["code"]) == (1, "registry-in-use")
    registry.close()


@pytest.mark.parametrize("password", ["wrong", None])
def test_a_database_that_refuses_or_is_down_leaves_with_2_and_nothing_changed(
    layout: ServerLayout, cluster: Cluster, tmp_path: Path, password: str | None
) -> None:
    secret = cluster.password_file(tmp_path, password) if password else cluster.password_file(tmp_path)
    url = cluster.url if password else cluster.url.replace(f":{cluster.port}/", ":1/")
    code, body = call(layout, "use", url, "--password-file", str(secret))
    assert (code, body["code"]) == (2, "registry-refused" if password else "registry-down")
    assert not (layout.root / "registry.yaml").exists()


def test_a_url_with_a_password_leaves_with_4_and_does_not_repeat_it(layout: ServerLayout) -> None:
    code, body = call(layout, "use", "postgresql://pixcell:hunter2@localhost/registry")
    assert (code, body["code"]) == (4, "bad-registry-address") and "hunter2" not in json.dumps(body)
