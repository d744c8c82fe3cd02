"""Ledgers with a few rounds in them, for the tests of the ledger."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pixcell_core.trust.keys import SigningKey
from site_client.ledger.ledger import Ledger, RoundCharge
from site_client.ledger.view import BudgetCap

CODE = "sha256:" + "c0de" * 16


def make_charge(steps: int = 4, round: int = 1, sigma: float = 20.0, rate: float = 1.0) -> RoundCharge:
    return RoundCharge("lung-study", round, rate, sigma, steps, 0.1, CODE)


@pytest.fixture
def charge() -> Callable[..., RoundCharge]:
    return make_charge


@pytest.fixture
def key() -> SigningKey:
    return SigningKey.generate()


@pytest.fixture
def open_ledger(tmp_path: Path, key: SigningKey) -> Callable[..., Ledger]:
    def opened(cap: BudgetCap | None = BudgetCap(8.0, 1e-5), **kwargs: object) -> Ledger:
        arguments: dict[str, object] = {
            "site": "north",
            "clock": lambda: datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
            **kwargs,
        }
        return Ledger.open(tmp_path / "ledger", key, cap, **arguments)  # type: ignore[arg-type]

    return opened


@pytest.fixture
def filled(tmp_path: Path, open_ledger: Callable[..., Ledger]) -> Path:
    """A ledger folder of 1 opening, 2 rounds of 3 steps each charged one by one, and their spent records."""
    with open_ledger() as ledger:
        for number in (1, 2):
            with ledger.reserve(make_charge(3, number)) as steps:
                for index in range(3):
                    steps(index)
    return tmp_path / "ledger"
