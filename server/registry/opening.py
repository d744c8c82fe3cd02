"""The registry of a coordinator's folder, opened once in each process."""

from __future__ import annotations

import os
from pathlib import Path

from server.registry.address import RegistryAddress
from server.registry.registry import Registry
from server.registry.schema import require_current

KEPT = 8
"""Folders whose connections stay open in one process; a coordinator has one, a test of many has many."""

_OPEN: dict[tuple[int, Path], Registry] = {}


def open_registry(folder: Path) -> Registry:
    """The registry that a coordinator's folder names, with its tables made if it is new.

    Raises what `RegistryAddress.of_folder`, `registry_errors` and `require_current` raise.
    """
    key = (os.getpid(), folder.absolute())
    found = _OPEN.get(key)
    if found is None:
        found = Registry(RegistryAddress.of_folder(folder))
        require_current(found)
        _OPEN[key] = found
        ours = [k for k in _OPEN if k[0] == os.getpid()]
        for oldest in ours[:-KEPT]:
            # Whoever still holds it goes on with new connections.
            _OPEN.pop(oldest).close()
    return found
