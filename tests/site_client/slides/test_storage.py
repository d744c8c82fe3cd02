"""Writing is whole or absent, one process at a time, and every refusal of the disk is told as one."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from pixcell_core.errors import BadInputError, PixcellError, RefusedError
from site_client.slides.storage import (
    StorageFullError,
    atomic_path,
    exclusive,
    storage_errors,
    sweep_partials,
)
from tests.site_client.slides.process import environment


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    final = tmp_path / "f"
    final.write_text("old")
    with pytest.raises(ValueError), atomic_path(final) as partial:
        partial.write_text("ne")
        raise ValueError
    assert final.read_text() == "old" and list(tmp_path.iterdir()) == [final]
    with atomic_path(final) as partial:
        partial.write_text("new")
    assert final.read_text() == "new" and list(tmp_path.iterdir()) == [final]


def test_the_device_that_is_always_full(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageFullError) as caught,
        storage_errors("writing", tmp_path),
        open("/dev/full", "w") as full,
    ):
        full.write("x" * 100_000)
    assert caught.value.exit_code == 1 and "run the same command again" in caught.value.hint


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, "x"), StorageFullError),
        (OSError(errno.EDQUOT, "x"), StorageFullError),
        (OSError(errno.EFBIG, "x"), StorageFullError),
        (OSError(errno.EROFS, "x"), BadInputError),
        (
            RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
            StorageFullError,
        ),
        (NotADirectoryError(errno.ENOTDIR, "x"), BadInputError),
        (ValueError("a bug of ours"), ValueError),
        (RefusedError("no", hint="h"), RefusedError),
    ],
)
def test_which_error_is_which(tmp_path: Path, error: Exception, kind: type[Exception]) -> None:
    with pytest.raises(kind) as caught, storage_errors("writing", tmp_path):
        raise error
    assert type(caught.value) is kind


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "site").write_text("")
    with pytest.raises(PixcellError) as caught, storage_errors("working", tmp_path / "site"):
        (tmp_path / "site" / "slides").mkdir(parents=True)
    assert caught.value.code == "not-a-folder"


def test_leftovers_of_a_killed_process_are_swept(tmp_path: Path) -> None:
    (tmp_path / ".slide.tiff.123.partial").write_text("half")
    (tmp_path / "slide.tiff").write_text("whole")
    assert sweep_partials(tmp_path) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["slide.tiff"]


HOLD = """
import sys, time
from pathlib import Path
from site_client.slides.storage import exclusive
with exclusive(Path(sys.argv[1]), "working"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_process_at_a_time_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], env=environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(RefusedError) as caught, exclusive(tmp_path, "working"):
            pass
        assert caught.value.code == "busy"
    finally:
        other.kill()
        other.wait()
    with exclusive(tmp_path, "working"):
        pass
