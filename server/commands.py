"""Registers the commands of every room of the coordinator with the root command."""

from __future__ import annotations

from importlib import import_module

import typer

ROOMS = ("registry", "enrolment", "pretraining", "studies", "hub", "rounds", "log_anchor")


def register(root: typer.Typer) -> None:
    """Add each room's commands to `root`."""
    for room in ROOMS:
        import_module(f"server.{room}.commands").register(root)
