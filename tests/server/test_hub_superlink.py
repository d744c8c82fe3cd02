"""What the hub changes in Flower's SuperLink: silent uploads end early, layers without a purpose here are left out."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import pytest
from fastapi import FastAPI
from flwr.superlink.main import _get_middleware

from server.hub import superlink

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
    superlink.limit_uploads()
    for module in state_modules():
        assert 30 < getattr(module, NAME) < 60


def test_a_flower_without_that_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in state_modules():
        monkeypatch.setattr(module, NAME, 180)
    monkeypatch.delattr(state_modules()[1], NAME)
    with pytest.raises(RuntimeError, match="was not tested"):
        superlink.limit_uploads()


def app_of_flower() -> FastAPI:
    """Flower's app as it comes."""
    return FastAPI(middleware=_get_middleware())


def test_the_layers_left_are_those_that_fleet_and_runtime_need() -> None:
    app = app_of_flower()
    superlink.drop_unused_layers(app)
    assert [layer.cls.__name__ for layer in app.user_middleware] == [
        "BaseHTTPMiddleware",
        "ProtobufTranslationMiddleware",
        "NodeAuthMiddleware",
        "FleetEventLogMiddleware",
    ]


def test_a_flower_with_other_layers_is_refused() -> None:
    app = app_of_flower()
    app.user_middleware = app.user_middleware[2:]
    with pytest.raises(RuntimeError, match="ControlSensitiveResponseMiddleware"):
        superlink.drop_unused_layers(app)
