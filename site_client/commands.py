"""Registers the commands of every room of the site with the root command."""

from __future__ import annotations

from importlib import import_module

import typer

ROOMS = ("slides", "features", "ledger", "approvals", "agent", "doctor", "trainer", "generate", "release")


def register(root: typer.Typer) -> None:
    """Add each room's commands to `root`."""
    for room in ROOMS:
        import_module(f"site_client.{room}.commands").register(root)
