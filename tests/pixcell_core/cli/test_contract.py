"""The command contract: one envelope on stdout, people's words on stderr, fixed exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path

import pytest
import typer
from pydantic import BaseModel
from typer.testing import CliRunner, Result

from pixcell_core.cli.contract import FormatOption, OutputFormat, command, to_json
from pixcell_core.cli.main import group
from pixcell_core.errors import (
    BadInputError,
    ConnectionFailedError,
    PixcellError,
    RefusedError,
    TimedOutError,
)


class Colour(Enum):
    PINK = "pink"


class Tally(BaseModel):
    tiles: int
    epsilon: float = float("inf")

    def __str__(self) -> str:
        return f"{self.tiles} tiles"


@dataclass(frozen=True)
class Failing:
    exit_code: int

    def __str__(self) -> str:
        return "done, and refused"


def call(function: object, *arguments: str) -> Result:
    """Run `function(format)` as a command of its own."""

    @command
    def act(format: FormatOption = OutputFormat.TEXT) -> object:
        return function()  # type: ignore[operator]

    root = typer.Typer()
    root.callback()(lambda: None)
    root.command("act")(act)
    return CliRunner().invoke(root, ["act", *arguments])


def fail(error: BaseException) -> object:
    def function() -> None:
        raise error

    return function


def test_a_result_is_one_envelope_on_stdout_and_its_own_words_in_text() -> None:
    result = call(lambda: Tally(tiles=3), "--format", "json")
    assert result.exit_code == 0 and result.stderr == ""
    assert json.loads(result.stdout) == {
        "schema_version": 1,
        "status": "ok",
        "data": {"tiles": 3, "epsilon": None},
    }
    assert "Infinity" not in result.stdout, "JSON knows no infinity"
    assert call(lambda: Tally(tiles=3)).stdout == "3 tiles\n"
    assert call(lambda: None).stdout == ""


@pytest.mark.parametrize(
    ("kind", "exit_code"),
    [
        (PixcellError, 1),
        (RefusedError, 1),
        (ConnectionFailedError, 2),
        (TimedOutError, 3),
        (BadInputError, 4),
    ],
)
def test_each_error_has_its_own_exit_code_and_says_what_to_do(
    kind: type[PixcellError], exit_code: int
) -> None:
    error = kind("The slide is upside down.", hint="Turn it.", code="slide-turned")
    result = call(fail(error), "--format", "json")
    assert result.exit_code == exit_code
    assert json.loads(result.stdout) == {
        "schema_version": 1,
        "status": "error",
        "code": "slide-turned",
        "number": None,
        "message": "The slide is upside down.",
        "hint": "Turn it.",
    }
    text = call(fail(error))
    assert text.exit_code == exit_code and text.stdout == ""
    assert "slide-turned" in text.stderr and "Turn it." in text.stderr and "Traceback" not in text.stderr


def test_a_bug_exits_5_with_the_trace_in_a_file_and_never_on_the_terminal() -> None:
    result = call(fail(ZeroDivisionError("patient Smith")), "--format", "json")
    assert result.exit_code == 5
    body = json.loads(result.stdout)
    assert (body["status"], body["code"]) == ("error", "bug")
    assert "Traceback" not in result.output and "Smith" not in result.output
    found = re.search(r"trace is in (\S+);", body["hint"])
    assert found
    trace = Path(found.group(1))
    text = trace.read_text()
    trace.unlink()
    assert "ZeroDivisionError: patient Smith" in text and "Traceback" in text


def test_a_result_that_cannot_be_shown_is_a_bug_too() -> None:
    result = call(lambda: {"generator": object()}, "--format", "json")
    assert result.exit_code == 5
    assert json.loads(result.stdout)["code"] == "bug"
    Path(re.search(r"trace is in (\S+);", result.stderr).group(1)).unlink()  # type: ignore[union-attr]


def test_interruption_exits_1_and_says_that_finished_parts_are_kept() -> None:
    for error in (KeyboardInterrupt(), typer.Abort()):
        result = call(fail(error), "--format", "json")
        assert result.exit_code == 1
        assert json.loads(result.stdout)["code"] == "interrupted"
        assert "kept" in result.stderr


def test_a_result_may_carry_its_own_exit_code() -> None:
    result = call(lambda: Failing(1))
    assert (result.exit_code, result.stdout) == (1, "done, and refused\n")
    assert call(lambda: Failing(0)).exit_code == 0


def test_everything_a_result_may_hold_becomes_plain_json() -> None:
    moment = datetime(2026, 1, 2, tzinfo=UTC)
    value = {1: (Path("a/b"), Colour.PINK, moment, float("nan"), 0.5, True, None, {"k": Tally(tiles=1)})}
    expected = ["a/b", "pink", "2026-01-02T00:00:00+00:00", None, 0.5, True, None]
    found = to_json(value)
    assert found == {"1": [*expected, {"k": {"tiles": 1, "epsilon": None}}]}
    json.dumps(found, allow_nan=False)


def test_groups_are_made_once_and_nest() -> None:
    root = typer.Typer()
    assert group(root, "site", "data") is group(root, "site", "data")
    assert group(root, "site") is not group(root, "site", "data")
    assert [g.name for g in root.registered_groups] == ["site"]


# --- the real process ---------------------------------------------------------------------------------------------

PROGRAM = "from pixcell_core.cli.main import run; run()"


def pixcell(*arguments: str, program: str = PROGRAM) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )


@pytest.mark.parametrize(
    "arguments",
    [("nonsense",), ("log", "verify"), ("key", "new", "--no-such-option"), ("model", "show", "x")],
)
def test_usage_errors_exit_4_not_clicks_2(arguments: tuple[str, ...]) -> None:
    done = pixcell(*arguments)
    assert done.returncode == 4, done.stderr
    assert done.stdout == "" and done.stderr and "Traceback" not in done.stderr


def test_a_usage_error_is_an_envelope_where_json_was_asked_for(tmp_path: Path) -> None:
    done = pixcell("log", "verify", "--format", "json", "--wrong")
    assert done.returncode == 4
    body = json.loads(done.stdout)
    assert (body["status"], body["code"]) == ("error", "bad-arguments") and body["message"] and body["hint"]


def test_a_failed_connection_still_exits_2_in_a_real_process() -> None:
    """Exit 2 means two things to click and to us; an exit code of an earlier command must not decide either."""
    program = (
        "import os, typer; os.environ['PIXCELL_EXIT'] = '2'\n"
        "import pixcell_core.cli.main as main\n"
        "from pixcell_core.cli.contract import command\n"
        "from pixcell_core.errors import ConnectionFailedError\n"
        "@command\n"
        "def act(): raise ConnectionFailedError('No hub.', hint='Start it.')\n"
        "root = typer.Typer(); root.callback()(lambda: None); root.command('act')(act)\n"
        "main.build = lambda: root\n"
        "main.run()"
    )
    assert pixcell("act", program=program).returncode == 2
    assert pixcell("act", "--wrong", program=program).returncode == 4
    assert pixcell("--help", program=program).returncode == 0


def test_ctrl_c_in_a_real_process_exits_1_without_a_traceback() -> None:
    program = (
        "import sys, time, typer\n"
        "import pixcell_core.cli.main as main\n"
        "from pixcell_core.cli.contract import FormatOption, OutputFormat, command\n"
        "@command\n"
        "def act(format: FormatOption = OutputFormat.TEXT):\n"
        "    print('begun', file=sys.stderr, flush=True); time.sleep(60)\n"
        "root = typer.Typer(); root.callback()(lambda: None); root.command('act')(act)\n"
        "main.build = lambda: root\n"
        "main.run()"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", program, "act", "--format", "json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stderr and running.stderr.readline() == "begun\n"
    running.send_signal(signal.SIGINT)
    out, said = running.communicate(timeout=60)
    assert running.returncode == 1
    assert json.loads(out)["code"] == "interrupted" and "Traceback" not in said


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    """CPU time of the whole process, as the operating system counts it: the machine may be busy."""
    program = (
        "import atexit, resource, sys\n"
        "def say():\n"
        "    used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "    names = 'torch numpy scipy sklearn cv2 diffusers transformers flwr sqlalchemy cryptography httpx fastapi'\n"
        "    heavy = [m for m in names.split() if m in sys.modules]\n"
        "    print('CPU', used.ru_utime + used.ru_stime, *heavy, file=sys.stderr)\n"
        "atexit.register(say)\n" + PROGRAM
    )
    began = time.monotonic()
    runs = [pixcell("--help", program=program) for _ in range(3)]
    assert time.monotonic() - began < 60
    for done in runs:
        assert done.returncode == 0 and "pixcell" in done.stdout
        for name in ("demo", "site", "audit", "release", "model", "study"):
            assert re.search(rf"^  {name}\b", done.stdout, re.MULTILINE), f"{name} is missing from --help"
    said = [done.stderr.strip().splitlines()[-1].split() for done in runs]
    assert all(words[2:] == [] for words in said), f"imported at start: {said}"
    assert min(float(words[1]) for words in said) < 1.5, said


def test_every_command_explains_itself() -> None:
    """Each verb of the tree can be asked for help, without importing what only its work needs."""
    program = (
        "import sys, click, typer.main\n"
        "from pixcell_core.cli.main import build\n"
        "def walk(node, path):\n"
        "    if isinstance(node, click.Group):\n"
        "        for name, child in node.commands.items(): walk(child, (*path, name))\n"
        "    else:\n"
        "        print(' '.join(path), '|', (node.help or '').strip().splitlines()[0] if node.help else '')\n"
        "walk(typer.main.get_command(build()), ())\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    done = pixcell(program=program)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().splitlines()[-1] == "False"
    lines = done.stdout.strip().splitlines()
    assert len(lines) > 20
    assert [line for line in lines if line.endswith("| ")] == [], "commands without help"


def test_version() -> None:
    from pixcell_core import __version__

    assert pixcell("--version").stdout.strip() == __version__
