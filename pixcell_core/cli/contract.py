"""What every command promises: one JSON envelope on stdout, people's words on stderr, fixed exit codes."""

from __future__ import annotations

import functools
import json
import math
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from datetime import date
from enum import Enum, StrEnum
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import click
import typer
from pydantic import BaseModel

from pixcell_core.errors import PixcellError

SCHEMA_VERSION = 1
P = ParamSpec("P")
R = TypeVar("R")


class OutputFormat(StrEnum):
    """How a command prints its result."""

    TEXT = "text"
    JSON = "json"


FormatOption = Annotated[OutputFormat, typer.Option("--format", help="text for people, json for programs.")]


class CommandExit(SystemExit):
    """Leaves with a code of the contract; kept apart from click's own usage errors."""


def emit_note(text: str) -> None:
    """Say something to the person at the terminal; never part of the result."""
    print(text, file=sys.stderr, flush=True)


def to_json(value: Any) -> Any:
    """Turn a command's result into plain JSON values; JSON has no infinity and no NaN, they become null."""
    if isinstance(value, BaseModel):
        return to_json(value.model_dump(mode="json"))
    if is_dataclass(value) and not isinstance(value, type):
        return to_json(asdict(value))
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [to_json(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Enum):
        return to_json(value.value)
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _print_bug(form: OutputFormat, error: Exception) -> None:
    """Keep the trace in a file and say one line: a traceback on a terminal helps nobody."""
    with tempfile.NamedTemporaryFile("w", prefix="pixcell-bug-", suffix=".txt", delete=False) as trace:
        traceback.print_exception(error, file=trace)
    _print_error(
        form,
        "bug",
        f"Something we did not foresee: {type(error).__name__}.",
        f"This is our fault. The trace is in {trace.name}; read it for private paths before you share it.",
    )


def _print_result(result: Any, form: OutputFormat) -> None:
    if form is OutputFormat.JSON:
        print(
            json.dumps({"schema_version": SCHEMA_VERSION, "status": "ok", "data": to_json(result)}),
            flush=True,
        )
        return
    if result is None:
        return
    render = getattr(result, "render", None)
    if callable(render):
        from rich.console import Console

        Console().print(render())
    elif isinstance(result, (dict, list)):
        print(json.dumps(to_json(result), indent=2))
    else:
        print(result, flush=True)


def _print_error(form: OutputFormat, code: str, message: str, hint: str) -> None:
    from pixcell_core.error_catalogue import number_of

    number = number_of(code)
    if form is OutputFormat.JSON:
        body = {
            "schema_version": SCHEMA_VERSION,
            "status": "error",
            "code": code,
            "number": number,
            "message": message,
            "hint": hint,
        }
        print(json.dumps(body), flush=True)
    emit_note(f"error [{code}]{f' {number}' if number else ''}: {message}\n  → {hint}")


def command(function: Callable[P, R]) -> Callable[P, None]:
    """Wrap a command so that its result and its errors follow the contract.

    The result is printed on stdout (an envelope with `--format json`); a `PixcellError` becomes one clear
    error and its own exit code; Ctrl-C exits 1; anything else is our bug and exits 5 with the trace in a file.
    """

    # Typer evaluates annotations at start-up; result types are imported only when their command runs.
    function.__annotations__["return"] = None

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        form = OutputFormat(str(kwargs.get("format", OutputFormat.TEXT)))
        try:
            result = function(*args, **kwargs)
        except PixcellError as error:
            _print_error(form, error.code, error.message, error.hint)
            raise CommandExit(getattr(error, "command_exit", error.exit_code)) from None
        except (KeyboardInterrupt, typer.Abort):
            _print_error(
                form,
                "interrupted",
                "Stopped by Ctrl-C.",
                "Run the same command again: finished parts are kept.",
            )
            raise CommandExit(1) from None
        except (typer.Exit, click.ClickException, SystemExit):
            raise
        except Exception as error:
            _print_bug(form, error)
            raise CommandExit(5) from None
        try:
            _print_result(result, form)
        except BrokenPipeError:
            raise
        except Exception as error:
            _print_bug(form, error)
            raise CommandExit(5) from None
        code = getattr(result, "exit_code", 0)
        if code:
            raise CommandExit(int(code))

    return wrapped
