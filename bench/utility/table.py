"""The record as a table: means over seeds with t intervals, and the share of the gain without privacy that is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

Row = dict[str, Any]
MISSING = "-"


@dataclass(frozen=True)
class Spread:
    """Mean, and half the width of its 95 % t interval over seeds (NaN for a single seed)."""

    mean: float
    half: float
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value per seed."""
        count = len(values)
        half = math.nan
        if count > 1:
            half = float(stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / math.sqrt(count))
        return cls(float(np.mean(values)), half, count)

    def text(self, digits: int = 2) -> str:
        """As a table shows it."""
        if math.isnan(self.half):
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} ± {self.half:.{digits}f}"


def retention(rows: Sequence[Row], references: Sequence[Row], measure: str) -> Spread | None:
    """Percent of the gain of `references` that `rows` keep; paired by seed where both have it."""
    per_seed = {row["seed"]: float(row[measure]) for row in references}
    shares = [100 * float(r[measure]) / per_seed[r["seed"]] for r in rows if per_seed.get(r["seed"], 0.0) > 0]
    return Spread.of(shares) if shares else None


def render(rows: Sequence[Row]) -> str:
    """The table in Markdown."""
    head = (
        "question",
        "patients",
        "epsilon",
        "adapter",
        "k x K",
        "numbers trained",
        "seeds",
        "gain, %",
        "kept of the same recipe without privacy, %",
        "kept of ordinary training, %",
        "weighted gain, %",
        "Frechet",
        "TSTR linear / k-NN",
    )
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["group"], str(row["setting"])), []).append(row)
    ordinary = [r for r in rows if r["setting"]["optimizer"] == "minibatch"]
    for (group, _), members in groups.items():
        lines.append(" | ".join(_cells(group, members, _same_recipe(members[0], rows), ordinary)))
    for name, key in (("base", "surrogates_base"), ("real tiles", "real_tiles")):
        found = next((r[key] for r in rows if key in r and r["setting"]["patients"] == 400), None)
        if found:
            lines.append(
                f"{name}: Frechet {found['frechet']:.0f}, TSTR {found['linear']:.2f} / {found['nearest']:.2f}"
            )
    return "\n".join(f"| {line} |" if " | " in line else line for line in lines)


def _same_recipe(row: Row, rows: Sequence[Row]) -> list[Row]:
    """The runs without clipping and noise that are otherwise like `row`."""
    free = {"epsilon", "step_length"}
    wanted = {k: v for k, v in row["setting"].items() if k not in free}
    return [
        r
        for r in rows
        if r["setting"]["epsilon"] == "inf"
        and {k: v for k, v in r["setting"].items() if k not in free} == wanted
    ]


def _cells(group: str, members: list[Row], same: list[Row], ordinary: list[Row]) -> list[str]:
    setting = members[0]["setting"]
    private = setting["epsilon"] != "inf"
    kept = retention(members, same, "gain_percent") if private else None
    like = [r for r in ordinary if r["setting"]["patients"] == setting["patients"]]
    kept_ordinary = retention(members, like, "gain_percent") if setting["optimizer"] != "minibatch" else None
    looked = [r["surrogates"] for r in members if "surrogates" in r]
    name = (
        setting["kind"]
        + f" r={setting['rank']}"
        + (" Adam, batches of 32" if not kept and _is_ordinary(setting) else "")
    )
    return [
        group,
        str(setting["patients"]),
        f"{setting['epsilon']:g}" if private else "infinity",
        name,
        f"{setting['tiles']} x {setting['draws']}",
        str(members[0]["trained_parameters"]),
        str(len(members)),
        Spread.of([r["gain_percent"] for r in members]).text(),
        kept.text(0) if kept else MISSING,
        kept_ordinary.text(0) if kept_ordinary else MISSING,
        Spread.of([r["weighted_gain_percent"] for r in members]).text(),
        Spread.of([w["frechet"] for w in looked]).text(0) if looked else MISSING,
        (f"{np.mean([w['linear'] for w in looked]):.2f} / {np.mean([w['nearest'] for w in looked]):.2f}")
        if looked
        else MISSING,
    ]


def _is_ordinary(setting: Row) -> bool:
    return bool(setting["optimizer"] == "minibatch")
