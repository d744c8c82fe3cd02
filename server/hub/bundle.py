"""The Flower app bundle of a run: two lines that point at the code installed on this machine.

Sites never unpack it. It exists because Flower starts no run without one.
"""

from __future__ import annotations

from pixcell_core import __version__

STUDY_KEY = "study-id"
FOLDER_KEY = "folder"

_PROJECT = f"""[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "pixcell-rounds"
version = "{__version__}"
description = "Points at the round loop installed at the coordinator"
license = {{ text = "Apache-2.0" }}
dependencies = []

[tool.flwr.app]
publisher = "pixcell"
fab-include = ["pixcell_rounds/**/*.py"]

[tool.flwr.app.components]
serverapp = "pixcell_rounds.apps:server_app"
clientapp = "pixcell_rounds.apps:client_app"

[tool.flwr.app.config]
{STUDY_KEY} = ""
{FOLDER_KEY} = ""
"""

_APPS = '''"""The coordinator's round loop; the client side is installed at each site and never sent."""

from flwr.clientapp import ClientApp

from server.rounds import server_app as installed

server_app = installed.app
client_app = ClientApp()
'''


def build_bundle() -> bytes:
    """The bundle's bytes; the same on every call."""
    from flwr.cli.build import build_fab_from_files

    bundle, _ = build_fab_from_files(
        {
            "pyproject.toml": _PROJECT.encode(),
            "pixcell_rounds/__init__.py": b'"""Points at the installed round loop."""\n',
            "pixcell_rounds/apps.py": _APPS.encode(),
        }
    )
    return bytes(bundle)
