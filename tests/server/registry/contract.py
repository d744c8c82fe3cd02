"""What every registry promises, whichever database keeps it. Each database's test class inherits these tests."""

from __future__ import annotations

from tests.server.registry.editing_contract import EditingContract
from tests.server.registry.rounds_contract import RoundsContract
from tests.server.registry.tables_contract import TablesContract


class RegistryContract(TablesContract, RoundsContract, EditingContract):
    """Inherit, and say how a database is reached."""
