"""Makes a study from flags and a settings file, with everything the coordinator's folder knows: sites, keys, digests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pixcell_core.contracts.artifacts import base_digest, installed_code_digest
from pixcell_core.contracts.atomic import write_atomically
from pixcell_core.contracts.canonical import digest
from pixcell_core.contracts.spool import arrays_to_bytes
from pixcell_core.contracts.study import Study
from pixcell_core.errors import BadInputError
from server.enrolment.sites import SiteBook
from server.layout import START_ADAPTER, ServerLayout
from server.studies.book import StudyBook, make_study, read_settings

DEFAULT_TARGETS = "attn1.to_q,attn1.to_k,attn1.to_v,attn1.to_out.0,attn2.to_v,attn2.to_out.0"


@dataclass(frozen=True)
class Wanted:
    """What the flags say. Mappings hold only what was given; flags win over the settings file.

    `masking` is None without `--masking`, else its settings without the identities, which the enrolled keys give.
    """

    study_id: str
    base: Path | None
    settings: Path | None
    values: Mapping[str, Any]
    adapter: Mapping[str, Any]
    conditions: Mapping[str, Any]
    aggregation: Mapping[str, Any]
    masking: Mapping[str, Any] | None
    days: int


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those that were given."""
    return {name: value for name, value in values.items() if value is not None}


def create_study(layout: ServerLayout, wanted: Wanted) -> Study:
    """Make the study, keep it, and make the adapter it starts from. Nothing is written where something is refused."""
    values = _values(layout, wanted)
    made = make_study(values)
    book = SiteBook(layout.registry())
    for site in made.sites:
        book.get(site)
    studies = StudyBook(layout.registry())
    if wanted.base is not None:
        from server.studies.start import start_adapter

        data = arrays_to_bytes(start_adapter(wanted.base, made.adapter))
        if studies.has(made.id):
            # Refuses another study of this name before the start of the one that is there is touched.
            studies.add(made)
        write_atomically(layout.run(made.id) / START_ADAPTER, data)
    return studies.add(made)


def _values(layout: ServerLayout, wanted: Wanted) -> dict[str, Any]:
    now = datetime.now(UTC).replace(microsecond=0)
    values: dict[str, Any] = {"created_at": now, "expires_at": now + timedelta(days=wanted.days)}
    values |= read_settings(wanted.settings) if wanted.settings else {}
    values |= dict(wanted.values) | {"id": wanted.study_id}
    chosen = {"targets": DEFAULT_TARGETS.split(",")} | dict(values.get("adapter", {}))
    values["adapter"] = chosen | dict(wanted.adapter)
    if wanted.conditions:
        before = dict(values.get("conditioning", {}))
        conditions = dict(wanted.conditions)
        votes = {**dict(before.get("votes") or {}), **conditions.pop("votes", {})}
        values["conditioning"] = before | conditions | ({"votes": votes} if votes else {})
    if wanted.base is not None:
        values["base_digest"] = base_digest(wanted.base)
    if "base_digest" not in values:
        raise BadInputError(
            "The study names no base model.", hint="Give --base FOLDER or --base-from JOB.", code="no-base"
        )
    values.setdefault("code_digest", installed_code_digest())
    values.setdefault("app_digest", installed_app_digest())
    values.setdefault("sites", SiteBook(layout.registry()).names())
    values.setdefault("quorum", len(values["sites"]))
    aggregation = dict(values.get("aggregation") or {}) | dict(wanted.aggregation)
    if wanted.masking is not None:
        before = dict(aggregation.get("masking") or {})
        aggregation["masking"] = _masking(layout, values, before | dict(wanted.masking))
    if aggregation:
        values["aggregation"] = aggregation
    return values


def _masking(layout: ServerLayout, values: Mapping[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Masking with the enrolled sites' own keys: approvals then cover whom a site masks with."""
    sites = [str(site) for site in values["sites"]]
    if len(sites) < 3:
        raise BadInputError(
            f"Secure aggregation needs at least 3 sites; the study has {len(sites)}.",
            hint="From the sum of two updates each site could work out the other's.",
            code="impossible-study",
        )
    if "coordinate_bound" not in settings:
        raise BadInputError(
            "Secure aggregation needs the largest value of a coordinate that a site sends.",
            hint="Give --coordinate-bound; steps x learning rate x C is never passed by the signal, add the noise's.",
            code="no-coordinate-bound",
        )
    book = SiteBook(layout.registry())
    identities = [{"site": site, "approval_key": book.get(site).approval_key} for site in sites]
    # Two thirds, where the quorum allows it: then no two groups of so many sites can be told different stories
    # unless the hub has a third of the sites on its side.
    most = min(int(values["quorum"]), -(-2 * len(sites) // 3))
    return {"threshold": max(2, len(sites) // 2 + 1, most), "identities": identities} | settings


def installed_app_digest() -> str:
    """Digest of the bundle that this coordinator's hub announces."""
    from server.hub.bundle import build_bundle

    return digest(build_bundle())
