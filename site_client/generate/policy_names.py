"""Names of the conditioning policies, and what the ledger calls the votes; read without loading any model."""

from __future__ import annotations

from typing import Final

OWN: Final = "own"
BLEND: Final = "blend"
PRIVATE: Final = "private"
POLICIES: Final = (OWN, BLEND, PRIVATE)

VOTE_PURPOSE: Final = "conditions"
"""Purpose of a charge by which patients were asked for conditions; weights are charged as training."""
