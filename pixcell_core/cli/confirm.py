"""The question before an act that cannot be undone."""

from __future__ import annotations

import sys

import typer

from pixcell_core.errors import BadInputError, RefusedError


def confirm(question: str, *, otherwise: str, hint: str = "Add --yes if you mean it.") -> None:
    """Ask the person at the terminal; return only where the answer is yes.

    Args:
        otherwise: what is said after a no: that nothing was signed, or changed.
        hint: what to do where nobody is at the terminal.

    Raises:
        BadInputError: nobody is at the terminal (`needs-yes`).
        RefusedError: the answer is no.
    """
    if not sys.stdin.isatty():
        raise BadInputError("Nobody is at the terminal to answer.", hint=hint, code="needs-yes")
    if not typer.confirm(question, err=True):
        raise RefusedError(f"Not confirmed; {otherwise}.", hint="Run it again when you are sure.")
