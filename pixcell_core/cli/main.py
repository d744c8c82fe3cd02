"""The root command `pixcell`: one tree of verbs, filled by whichever packages are installed."""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import entry_points

import click
import typer
import typer.core

from pixcell_core import __version__
from pixcell_core.cli.contract import SCHEMA_VERSION, emit_note

GROUP_HELP = {
    "site": "One hospital: slides, features, approvals, budget, training, surrogates.",
    "site data": "Slides and tiles: synthesise, add, check, tile, split, show.",
    "site budget": "The privacy ledger of this site.",
    "site candidates": "Public embeddings that patients vote for under private conditions.",
    "study": "Studies: the signed documents every site approves.",
    "run": "Runs: central pretraining and federated rounds: start, watch, stop, resume.",
    "hub": "The coordinator's hub that sites connect to.",
    "registry": "The coordinator's database: show, choose, check, copy, upgrade.",
    "kit": "Kits: who may join the consortium, until when, and who no more.",
    "model": "The model: weights in every form, sampling, training, evaluation; and the starter that ships.",
    "private": "The privacy promise of training: plan what it costs, audit the mechanism that keeps it.",
    "audit": "The privacy audit of surrogate tiles.",
    "audit policy": "Thresholds of the audit and where each number comes from.",
    "release": "The gate: what is drafted, requested, reviewed and signed leaves; anyone verifies it.",
    "log": "Append-only signed logs.",
    "key": "Signing keys of people: make one, show its fingerprint.",
}


def group(root: typer.Typer, *path: str) -> typer.Typer:
    """Return the sub-command group at `path`, creating it (and its parents) on first use."""
    here = root
    for depth, name in enumerate(path, start=1):
        found = next((g.typer_instance for g in here.registered_groups if g.name == name), None)
        if found is None:
            found = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
            here.add_typer(found, name=name, help=GROUP_HELP.get(" ".join(path[:depth]), ""))
        here = found
    return here


def build() -> typer.Typer:
    """Build the root command from every installed `pixcell.commands` entry point."""
    # Help is plain text here; with rich at hand typer writes a backslash before every [default].
    typer.core.HAS_RICH = False
    root = typer.Typer(
        name="pixcell",
        help="Federated, privacy-preserving synthesis of histopathology tiles.\n\n"
        "Start with `pixcell demo --out DIR`: three hospitals on this machine, from slides to audited releases.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )

    @root.callback(invoke_without_command=True)
    def version(show: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
        if show:
            typer.echo(__version__)
            raise typer.Exit

    for entry in sorted(entry_points(group="pixcell.commands"), key=lambda e: e.name):
        entry.load()(root)
    return root


def run() -> None:
    """Entry point of the `pixcell` script.

    Arguments that cannot be understood exit 4 (click's own default is 2, which here means no connection); with
    `--format json` they too are answered by an envelope.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    os.environ.setdefault("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1")
    try:
        left = build()(standalone_mode=False)
    except click.UsageError as error:
        error.show()
        _say_as_envelope("bad-arguments", error.format_message(), "Add --help to see what is possible.")
        sys.exit(4)
    except click.ClickException as error:
        error.show()
        _say_as_envelope("bad-input", error.format_message(), "Add --help to see what is possible.")
        sys.exit(4)
    except (click.Abort, KeyboardInterrupt):
        emit_note("error [interrupted]: Stopped by Ctrl-C.")
        _say_as_envelope("interrupted", "Stopped by Ctrl-C.", "Run the same command again.")
        sys.exit(1)
    sys.exit(left if isinstance(left, int) else 0)


def _say_as_envelope(code: str, message: str, hint: str) -> None:
    """Print the error envelope where the arguments, as far as they can be read, ask for JSON."""
    asked = " ".join(sys.argv[1:])
    if "--format json" not in asked and "--format=json" not in asked:
        return
    from pixcell_core.error_catalogue import number_of

    body = {
        "schema_version": SCHEMA_VERSION,
        "status": "error",
        "code": code,
        "number": number_of(code),
        "message": message,
        "hint": hint,
    }
    print(json.dumps(body), flush=True)


if __name__ == "__main__":
    run()
