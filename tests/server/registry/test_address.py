"""Where the registry is: what `registry.yaml` may say, and that no password is ever shown or taken from a URL."""

from __future__ import annotations

from pathlib import Path

import pytest

from pixcell_core.errors import BadInputError
from server.registry.address import RegistryAddress

SECRET = "hunter2-hunter2"


def test_without_a_file_it_is_a_database_in_the_folder(tmp_path: Path) -> None:
    address = RegistryAddress.of_folder(tmp_path)
    assert address.file == tmp_path / "registry.db" and address.backend == "sqlite"


def test_relative_paths_are_taken_from_the_folder(tmp_path: Path) -> None:
    (tmp_path / "registry.yaml").write_text("url: sqlite:///sub/other.db\n")
    assert RegistryAddress.of_folder(tmp_path).file == tmp_path / "sub" / "other.db"
    absolute = RegistryAddress.parse(f"sqlite:///{tmp_path}/there.db", None, Path("/elsewhere"))
    assert absolute.file == tmp_path / "there.db"


@pytest.mark.parametrize(
    "text",
    [
        f"postgresql://pixcell:{SECRET}@db/registry",
        f"postgresql://pixcell@db/registry?password={SECRET}",
        f"postgresql://pixcell@db/registry?options=-c%20fsync=off&x={SECRET}",
        f"mysql://pixcell@db/{SECRET}",
        f"not a url {SECRET}",
        "postgresql://db/registry",
        "postgresql://pixcell@db",
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///a.db?mode=ro",
        "sqlite:///file:a.db",
        "postgresql://pixcell@db:many/registry",
        "",
    ],
)
def test_a_url_that_cannot_be_is_one_error_that_does_not_repeat_it(tmp_path: Path, text: str) -> None:
    with pytest.raises(BadInputError) as caught:
        RegistryAddress.parse(text, None, tmp_path)
    assert caught.value.code == "bad-registry-address" and SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "- a", "url: [", "url: 5", "url: sqlite:///a.db\npassword: x\n", "\x00", "x" * 70_000]
)
def test_a_settings_file_that_is_none_is_one_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "registry.yaml").write_text(text)
    with pytest.raises(BadInputError) as caught:
        RegistryAddress.of_folder(tmp_path)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("url", "mode"),
    [
        ("postgresql://pixcell@db.example.org/registry", "verify-full"),
        ("postgresql://pixcell@/registry?host=db.example.org", "verify-full"),
        ("postgresql://pixcell@localhost/registry?host=/run/postgresql,db.example.org", "verify-full"),
        ("postgresql://pixcell@db.example.org/registry?sslmode=require", "require"),
        ("postgresql://pixcell@127.0.0.1/registry", None),
        ("postgresql://pixcell@/registry?host=/run/postgresql", None),
    ],
)
def test_another_machine_is_asked_over_tls_unless_told_otherwise(
    tmp_path: Path, url: str, mode: str | None
) -> None:
    assert RegistryAddress.parse(url, None, tmp_path).url.query.get("sslmode") == mode


def test_the_password_comes_from_a_file_that_nobody_else_reads(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET + "\n")
    (tmp_path / "registry.yaml").write_text(
        "url: postgresql://pixcell@localhost/registry\npassword_file: secret\n"
    )
    address = RegistryAddress.of_folder(tmp_path)
    (tmp_path / "secret").chmod(0o640)
    with pytest.raises(BadInputError, match="read by others") as caught:
        address.with_password()
    assert SECRET not in str(caught.value)
    (tmp_path / "secret").chmod(0o600)
    assert address.with_password().password == SECRET
    assert SECRET not in f"{address} {address!r} {address.shown}"
    (tmp_path / "secret").unlink()
    with pytest.raises(BadInputError):
        address.with_password()
