"""Flower's SuperLink as the hub runs it: its app, with what must be otherwise than Flower has it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from server.layout import ServerLayout

LOOPBACK = "127.0.0.1"

UPLOAD_SILENCE_S = 45
"""An upload in which no object arrived for so long is given up. A SuperNode that died in one leaves a reply whose rest
never comes, and the round loop waits for it inside Flower: 180 s as Flower has it, longer than many rounds. An honest
site's request for one object takes 30 s at most."""

UNUSED_LAYERS = frozenset(
    {
        "ControlSensitiveResponseMiddleware",
        "ControlAuthenticationMiddleware",
        "ControlLicenseMiddleware",
        "ControlEventLogMiddleware",
        "RuntimeTracingMiddleware",
    }
)
"""Layers of Flower's app that only do something for the Control API, which neither door passes on, or for tracing."""


def make_superlink(layout: ServerLayout, events: Any) -> Any:
    """Flower's app over `hub/state.db`, with node authentication and our event log; not reachable by itself."""
    from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
    from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
    from flwr.superlink.config_loader import SuperLinkLifespanConfig
    from flwr.superlink.main import create_app

    from server.hub.runs import FLEET_KIND

    limit_uploads()
    app = create_app(
        SuperLinkLifespanConfig(
            control_address=f"{LOOPBACK}:0",
            health_server_address=None,
            host=LOOPBACK,
            port=0,
            insecure=True,
            certificates=None,
            superexec_auth_secret=(layout.secrets / "executor.secret").read_bytes(),
            authn_plugin=NoOpControlAuthnPlugin(),
            event_log_plugin=None,
            fleet_event_log_plugin=events,
            enable_event_log=True,
            artifact_provider=None,
            enable_supernode_auth=True,
            fleet_api_type=FLEET_KIND,
            fleet_api_address=None,
            simulation=False,
            ssl_ca_certfile=None,
            ssl_certfile=None,
            ssl_keyfile=None,
            database=str(layout.hub / "state.db"),
            isolation="process",
            runtime_dependency_install=False,
        ),
        SuperLinkLifespan,
    )
    drop_unused_layers(app)
    return app


def limit_uploads() -> None:
    """Give up silent uploads after `UPLOAD_SILENCE_S`. A name that is not there stops us: Flower has changed."""
    for name in ("in_memory_corestate", "sql_corestate"):
        module = import_module(f"flwr.supercore.corestate.{name}")
        if not hasattr(module, "OBJECT_PUSH_SESSION_TTL_SECONDS"):
            raise RuntimeError(
                f"{name} has no time to live of uploads: this release of Flower was not tested"
            )
        module.OBJECT_PUSH_SESSION_TTL_SECONDS = UPLOAD_SILENCE_S  # type: ignore[attr-defined]


def drop_unused_layers(app: Any) -> None:
    """Take out `UNUSED_LAYERS`: each costs every request of a site about half a millisecond of the hub.

    Raises `RuntimeError` where one is missing: Flower has changed.
    """
    there = {layer.cls.__name__ for layer in app.user_middleware}
    if not there >= UNUSED_LAYERS:
        missing = ", ".join(sorted(UNUSED_LAYERS - there))
        raise RuntimeError(f"Flower's app has no {missing}: this release of Flower was not tested")
    app.user_middleware = [layer for layer in app.user_middleware if layer.cls.__name__ not in UNUSED_LAYERS]
