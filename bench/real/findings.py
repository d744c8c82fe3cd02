"""What must hold of a study that ran through kills: read from the disk of the coordinator and of every site.

The reading is apart from the judging: `verdict` is a function of plain data, so that tests can plant a fault.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.real.consortium import Consortium
from pixcell_core.contracts.canonical import load_document
from pixcell_core.contracts.round import RoundRecord, RunState
from pixcell_core.contracts.spool import Arrays, TrainResult, flatten, read_arrays
from pixcell_core.contracts.study import Study
from pixcell_core.private.ledger_record import ReserveRecord
from site_client.ledger.site import ledger_folder, ledger_public_key
from site_client.ledger.view import read_ledger


@dataclass(frozen=True)
class Standing:
    """What the disks say of one study.

    `charged`: per site, steps by round. `adapters`: the last two committed, older first. `answers`: per site, the last
    update its trainer gave out, where it belongs to the last round. `attempts_kept`: states of masked rounds that were
    left behind.
    """

    study: Study
    board: RunState
    records: tuple[RoundRecord, ...]
    charged: Mapping[str, Mapping[int, int]]
    adapters: tuple[Arrays, Arrays]
    answers: Mapping[str, Arrays]
    attempts_kept: int = 0


def read_standing(consortium: Consortium, name: str) -> Standing:
    """Read everything. Raises what a broken chain of rounds, altered tensors or a broken ledger raise."""
    study, store = consortium.study(name), consortium.store(name)
    records = store.records()
    rounds = [store.read(record).adapter for record in records]
    answers = {}
    for site in study.sites:
        found = last_answer(consortium.site(site), study, records[-1].round, records[-2].adapter_digest)
        if found is not None:
            answers[site] = found
    masked = consortium.server / "runs" / name / "masked"
    return Standing(
        study,
        consortium.board(name),
        tuple(records),
        {site: steps_charged(consortium.site(site), study) for site in study.sites},
        (rounds[-2], rounds[-1]),
        answers,
        len(list(masked.iterdir())) if masked.is_dir() else 0,
    )


def steps_charged(site: Path, study: Study) -> dict[int, int]:
    """Steps of a study by round, from a ledger that must verify with the site's key."""
    folder = ledger_folder(site)
    if not folder.is_dir():
        return {}
    by_round: Counter[int] = Counter()
    for record in read_ledger(folder, ledger_public_key(site)).require_whole().records:
        if isinstance(record, ReserveRecord) and record.study == study.digest:
            by_round[record.round] += record.steps
    return dict(by_round)


def last_answer(site: Path, study: Study, number: int, input_digest: str) -> Arrays | None:
    """The update that the site's trainer gave out last, if it was for this round from this adapter."""
    for place in (site / "spool" / "answered").glob("r*"):
        result = load_document(TrainResult, place / "result.json")
        asked = (result.study_digest, result.round, result.input_digest)
        if asked == (study.digest, number, input_digest) and result.update_digest is not None:
            return read_arrays(place / "arrays.safetensors", result.update_digest)
    return None


def verdict(found: Standing) -> list[str]:
    """Everything that is wrong; empty for a study that lost nothing, counted nothing twice and hid no charge."""
    study, wrong = found.study, []
    if found.board.state != "completed" or found.board.committed != study.rounds:
        wrong.append(f"the run is {found.board.state} after {found.board.committed} of {study.rounds} rounds")
    if [record.round for record in found.records] != list(range(study.rounds + 1)):
        wrong.append(f"committed rounds are {[record.round for record in found.records]}")
    for before, after in zip(found.records, found.records[1:], strict=False):
        if after.previous != before.digest:
            wrong.append(f"round {after.round} does not follow round {before.round}")
        if len(set(after.included)) != len(after.included) or len(after.included) < study.quorum:
            wrong.append(f"round {after.round} counts {after.included}, the quorum is {study.quorum}")
        silent = set(study.sites) - set(after.included) - {gone.site for gone in after.excluded}
        if silent:
            wrong.append(f"round {after.round} leaves out {sorted(silent)} without a reason")
        for site in after.included:
            charged = found.charged[site].get(after.round, 0)
            if charged < study.steps_per_round:
                wrong.append(
                    f"{site} counts in round {after.round} with {charged} of {study.steps_per_round} steps charged"
                )
    for state in found.board.sites:
        counted = sum(state.site in record.included for record in found.records)
        if state.rounds_counted != counted:
            wrong.append(
                f"the board counts {state.rounds_counted} rounds of {state.site}, the records {counted}"
            )
    if found.attempts_kept:
        wrong.append(f"{found.attempts_kept} attempts of masked rounds were kept")
    return [*wrong, *_last_round(found)]


def _last_round(found: Standing) -> list[str]:
    """The last step of the adapter is the mean of what the included sites' trainers gave out, each exactly once."""
    included = found.records[-1].included
    if missing := [site for site in included if site not in found.answers]:
        return [f"{missing} count in the last round, and their trainers keep no answer to it"]
    before, after = (flatten(adapter).astype(np.float64) for adapter in found.adapters)
    updates = [flatten(found.answers[site]).astype(np.float64) for site in included]
    masking = found.study.aggregation.masking
    if masking is not None:
        updates = [np.clip(u, -masking.coordinate_bound, masking.coordinate_bound) for u in updates]
    off = float(np.abs(after - before - np.mean(updates, axis=0)).max())
    # float32 of the adapter and, under masks, the fixed-point grid; a lost or doubled update is orders above it.
    if off > 1e-5 * float(np.abs(updates).max()) + 1e-9:
        return [f"the last step differs from the mean of the sites' updates by {off:.2e}"]
    return []
