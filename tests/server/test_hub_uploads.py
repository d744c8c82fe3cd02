"""An upload whose sender died is given up long before Flower would."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import pytest

from server.hub import service

MODULES = ("in_memory_corestate", "sql_corestate")
NAME = "OBJECT_PUSH_SESSION_TTL_SECONDS"


def state_modules() -> list[ModuleType]:
    """Flower's modules that keep uploads."""
    return [import_module(f"flwr.supercore.corestate.{name}") for name in MODULES]


def test_silent_uploads_end_after_more_than_one_request_and_less_than_a_minute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in state_modules():
        monkeypatch.setattr(module, NAME, 180)
    service.limit_uploads()
    for module in state_modules():
        assert 30 < getattr(module, NAME) < 60


def test_a_flower_without_that_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in state_modules():
        monkeypatch.setattr(module, NAME, 180)
    monkeypatch.delattr(state_modules()[1], NAME)
    with pytest.raises(RuntimeError, match="was not tested"):
        service.limit_uploads()
