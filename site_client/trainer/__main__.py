"""Runs the trainer without the rest of the command line: `python -m site_client.trainer site trainer ...`.

The supervisor starts it this way, so that the process that sees patients imports as little as possible.
"""

from __future__ import annotations

import typer

from site_client.trainer.commands import register


def main() -> None:
    """Run the one command of this process."""
    root = typer.Typer(pretty_exceptions_enable=False)
    register(root)
    root()


if __name__ == "__main__":
    main()
