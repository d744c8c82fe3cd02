"""Small studies for the tests of the ledger: public settings alone, nothing that could run."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from pixcell_core.contracts.study import AdapterSettings, ConditioningPolicy, PatientVotes, Study
from tests.any_study import any_study


def make_study(votes: bool = False, **changes: Any) -> Study:
    """A study of 4 rounds of 10 steps, sigma 20; with `votes`, 2 iterations of private conditions at sigma 20."""
    settings: dict[str, Any] = {
        "id": "lung",
        "created_at": datetime(2026, 1, 1, tzinfo=UTC),
        "expires_at": datetime(2030, 1, 1, tzinfo=UTC),
        "base_digest": "sha256:" + "b" * 64,
        "code_digest": "sha256:" + "c" * 64,
        "adapter": AdapterSettings(targets=("to_v",)),
        "rounds": 4,
        "steps_per_round": 10,
        "noise_multiplier": 20.0,
        "epsilon_cap": 4.0,
        "expected_patients": 50,
        "tiles_per_patient": 4,
        "tile_size": 256,
        "mpp": 0.5,
        "sites": ("north",),
        "quorum": 1,
    }
    if votes:
        asked = PatientVotes(noise_multiplier=20.0, iterations=2, candidates_digest="sha256:" + "d" * 64)
        settings["conditioning"] = ConditioningPolicy(mode="private", votes=asked)
    return any_study(**settings | changes)
