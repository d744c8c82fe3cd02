"""The charges in a ledger's export, for planning what comes next. A plan trusts them; a ledger checks its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pixcell_core.contracts.canonical import parse_json, read_bounded
from pixcell_core.errors import BadInputError
from pixcell_core.private.events import GaussianEvent

_LARGEST_EXPORT = 256 * 1024 * 1024
_EVERYBODY = "all"


def spent_before(path: Path, cohort: str | None = None) -> list[GaussianEvent]:
    """Return the charges of an export of `pixcell site budget export`, oldest first.

    Args:
        path: the export, plain or as printed with ``--format json``.
        cohort: charges to this cohort and to all patients; without it every charge counts, which no patient exceeds.

    Raises:
        BadInputError: no export of a ledger.
    """
    value = parse_json(read_bounded(path, _LARGEST_EXPORT), name=path.name, max_bytes=_LARGEST_EXPORT)
    if isinstance(value, dict) and value.get("status") == "ok" and "data" in value:
        value = value["data"]
    try:
        if value["schema_version"] != "budget-export/v1":
            raise KeyError("schema_version")
        records = [line["record"] for line in value["lines"]]
        return [_event(r) for r in records if r["kind"] == "reserve" and _concerns(r, cohort)]
    except (KeyError, TypeError, ValueError) as error:
        raise BadInputError(
            f"{path.name} is not an export of a privacy ledger.",
            hint="Give the file that `pixcell site budget export --out` wrote.",
            code="bad-document",
        ) from error


def _event(record: dict[str, Any]) -> GaussianEvent:
    steps = record["steps"]
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise TypeError("steps")
    return GaussianEvent(float(record["sample_rate"]), float(record["noise_multiplier"]), steps)


def _concerns(record: dict[str, Any], cohort: str | None) -> bool:
    return cohort is None or record.get("cohort", _EVERYBODY) in (_EVERYBODY, cohort)
