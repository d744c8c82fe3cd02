"""A study that is possible, for tests and measurements that care about a few of its settings."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from pixcell_core.contracts.canonical import digest
from pixcell_core.contracts.study import AdapterSettings, Study


def any_study(**changes: Any) -> Study:
    """A study of three sites and three small rounds that begins now and lasts a day; `changes` replace settings."""
    now = datetime.now(UTC).replace(microsecond=0)
    settings: dict[str, Any] = {
        "id": "study-one",
        "created_at": now,
        "expires_at": now + timedelta(days=1),
        "base_digest": digest(b"base"),
        "code_digest": digest(b"code"),
        "adapter": AdapterSettings(rank=2, targets=("block",)),
        "rounds": 3,
        "steps_per_round": 2,
        "noise_multiplier": 1.0,
        "max_grad_norm": 1.0,
        "delta": 1e-5,
        "epsilon_cap": 8.0,
        "expected_patients": 10,
        "tiles_per_patient": 2,
        "learning_rate": 0.1,
        "tile_size": 64,
        "mpp": 1.0,
        "sites": ("east", "north", "west"),
        "quorum": 2,
    }
    return Study.model_validate(settings | changes)
