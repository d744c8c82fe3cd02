"""Progress of long work: plain lines where there is no terminal, a bar where there is one, never on stdout."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from types import SimpleNamespace

import pytest

from pixcell_core.cli import progress as module
from pixcell_core.cli.progress import progress


def test_without_a_terminal_a_plain_line_says_count_unit_and_rate(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("encoding tiles", total=10, unit="tiles") as bar:
        bar.advance(4)
        bar.advance()
    out, said = capsys.readouterr()
    assert out == ""
    assert said.startswith("encoding tiles: 5/10 tiles, ") and said.endswith(" tiles/s\n")
    assert said.count("\n") == 1, "quick work says one line only"
    assert "\x1b" not in said and "\r" not in said


def test_slow_work_speaks_every_few_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with progress("drawing", unit="tiles") as bar:
        for _ in range(10):
            now[0] += 2.0
            bar.advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "drawing: 3 tiles, 0.5 tiles/s",
        "drawing: 6 tiles, 0.5 tiles/s",
        "drawing: 9 tiles, 0.5 tiles/s",
        "drawing: 10 tiles, 0.5 tiles/s",
    ]


def test_the_last_line_is_said_even_when_the_work_fails(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), progress("reading", total=3) as bar:
        bar.advance()
        raise RuntimeError
    assert "reading: 1/3 items" in capsys.readouterr().err


def test_on_a_terminal_there_is_a_bar_with_rate_on_stderr() -> None:
    program = (
        "from pixcell_core.cli.progress import progress\n"
        "with progress('drawing surrogates', total=3, unit='tiles') as bar:\n"
        "    for _ in range(3): bar.advance()\n"
        "print('result')"
    )
    main, side = pty.openpty()
    running = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=side,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(side)
    shown = b""
    while True:
        try:
            part = os.read(main, 4096)
        except OSError:
            break
        if not part:
            break
        shown += part
    out, _ = running.communicate(timeout=60)
    os.close(main)
    assert running.returncode == 0
    assert out == b"result\n", "stdout carries the result alone"
    text = shown.decode()
    assert "drawing surrogates" in text and "3/3" in text and "tiles/s" in text
