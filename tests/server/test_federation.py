"""A whole consortium of real processes over TLS: a coordinator, three sites, three trainers, and one that is killed."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pixcell_core.contracts.round import RunState
from pixcell_core.contracts.spool import l2_norm, read_arrays
from pixcell_core.contracts.study import Study
from pixcell_core.private.ledger_record import ReserveRecord
from server.registry.opening import open_registry
from server.rounds.board import RunBoard
from server.rounds.store import RoundStore
from server.studies.book import StudyBook
from site_client.ledger.journal import LEDGER_FILE
from site_client.ledger.view import read_ledger
from tests.server.enrolled import enrol_site, init_consortium
from tests.server.processes import Processes, pixcell, site_process, wait_until
from tests.site_client.trainer.site_fixture import TARGETS, make_base, make_features

pytestmark = pytest.mark.end_to_end

SITES = ("east", "north", "west")
ROUNDS, STEPS = 2, 2


@dataclass
class Federation:
    """Folders and processes of a running consortium."""

    root: Path
    processes: Processes

    @property
    def server(self) -> Path:
        """The coordinator's folder."""
        return self.root / "server"

    def site(self, name: str) -> Path:
        """A site's folder."""
        return self.root / name

    def study(self, name: str, **changes: str) -> Path:
        """Create a study and let every site approve it; returns the study's file."""
        flags = {
            "--rounds": str(ROUNDS),
            "--steps": str(STEPS),
            "--sigma": "4",
            "--clip": "0.1",
            "--delta": "1e-5",
            "--epsilon-cap": "100",
            "--expected-patients": "5",
            "--tiles-per-patient": "2",
            "--learning-rate": "0.1",
            "--rank": "2",
            "--targets": ",".join(TARGETS),
            "--tile-size": "64",
            "--mpp": "1.0",
            "--quorum": "2",
            "--round-timeout": "60",
            "--base": str(self.root / "base"),
        } | changes
        out = self.root / f"{name}.json"
        arguments = [text for pair in flags.items() for text in pair if text]
        pixcell("study", "create", "--dir", self.server, "--id", name, "--out", out, *arguments)
        for site in SITES:
            pixcell("site", "approve", out, "--site-dir", self.site(site), "--yes")
        return out

    def state(self, name: str) -> RunState:
        """The run's board."""
        state = RunBoard(open_registry(self.server), name).read()
        assert state is not None
        return state

    def store(self, study: Study) -> RoundStore:
        """The committed rounds of a study."""
        return RoundStore(open_registry(self.server), self.server / "runs" / study.id, study)

    def steps_charged(self, site: str, study: str) -> int:
        """Steps of a study that a site's ledger holds charged."""
        digest = StudyBook(open_registry(self.server)).get(study).digest
        records = read_ledger(self.site(site) / "ledger").require_whole().records
        return sum(r.steps for r in records if isinstance(r, ReserveRecord) and r.study == digest)

    def logs(self) -> str:
        """What everybody said, for a failed assertion."""
        parts = [self.processes.log("hub"), *(self.processes.log(site) for site in SITES)]
        parts += [p.read_text(errors="replace")[-2000:] for p in self.root.rglob("trainer.log")]
        return "\n-----\n".join(parts)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Hub, three agents and three trainers, ready."""
    root = tmp_path_factory.mktemp("federation")
    made = Federation(root, Processes(root))
    make_base(root / "base")
    init_consortium(made.server)
    made.processes.start("hub", "hub", "start", "--dir", made.server, "--ready-file", root / "hub.json")
    for site in SITES:
        make_features(made.site(site) / "features" / "train", site)
    try:
        wait_until((root / "hub.json").exists, 60, "the hub")
        address = json.loads((root / "hub.json").read_text())["address"]
        for site in SITES:
            enrol_site(made.server, made.site(site), site, address)
            made.processes.start(
                site,
                "site",
                "start",
                "--site-dir",
                made.site(site),
                "--with-trainer",
                "--base",
                root / "base",
                "--poll",
                "0.3",
                "--ready-file",
                root / f"{site}.ready",
            )
        for site in SITES:
            wait_until((root / f"{site}.ready").exists, 120, f"{site}: {made.processes.log(site)}")
        yield made
    finally:
        made.processes.stop()


def test_three_hospitals_train_together_over_tls(federation: Federation) -> None:
    federation.study("plain")
    began = time.monotonic()
    shown = pixcell("run", "start", "plain", "--dir", federation.server, "--wait", "--timeout", "120")
    print(f"{ROUNDS} rounds in {time.monotonic() - began:.1f} s")
    assert shown["run"]["state"] == "completed" and shown["run"]["committed"] == ROUNDS, federation.logs()
    assert [s["rounds_counted"] for s in shown["run"]["sites"]] == [ROUNDS] * 3
    study = StudyBook(open_registry(federation.server)).get("plain")
    records = federation.store(study).records()
    assert [r.included for r in records[1:]] == [SITES] * ROUNDS
    adapter = read_arrays(Path(shown["adapter"]), records[-1].adapter_digest)
    assert l2_norm(adapter) > 0 and all(np.isfinite(v).all() for v in adapter.values())
    for site in SITES:
        assert federation.steps_charged(site, "plain") == ROUNDS * STEPS


def test_three_hospitals_train_under_masks_and_no_single_update_reaches_the_hub(
    federation: Federation,
) -> None:
    federation.study("masked", **{"--masking": "", "--coordinate-bound": "0.05", "--quorum": "3"})
    began = time.monotonic()
    shown = pixcell("run", "start", "masked", "--dir", federation.server, "--wait", "--timeout", "240")
    print(f"{ROUNDS} masked rounds in {time.monotonic() - began:.1f} s")
    assert shown["run"]["state"] == "completed" and shown["run"]["committed"] == ROUNDS, federation.logs()
    study = StudyBook(open_registry(federation.server)).get("masked")
    records = federation.store(study).records()
    assert [r.included for r in records[1:]] == [SITES] * ROUNDS
    adapter = read_arrays(Path(shown["adapter"]), records[-1].adapter_digest)
    assert l2_norm(adapter) > 0 and all(np.isfinite(v).all() for v in adapter.values())
    assert not (federation.server / "runs" / "masked" / "masked").exists() or not list(
        (federation.server / "runs" / "masked" / "masked").iterdir()
    ), "an attempt was kept after its round was committed"
    for site in SITES:
        assert federation.steps_charged(site, "masked") == ROUNDS * STEPS
        assert list((federation.site(site) / "agent" / "masking").glob("*.json"))


def test_nothing_of_a_patient_is_at_the_coordinator_and_no_bundle_at_a_site(federation: Federation) -> None:
    for path in federation.server.rglob("*"):
        if path.is_file():
            assert b"secret-patient" not in path.read_bytes(), path
    for log in federation.root.glob("*.log"):
        assert "secret-patient" not in log.read_text(errors="replace")
    for site in SITES:
        assert not list(federation.site(site).rglob("apps")), "a bundle of the hub was unpacked"
        for private in (federation.site(site) / "keys").iterdir():
            if private.suffix not in (".pub", ".crt"):
                assert private.stat().st_mode & 0o077 == 0, private


def test_a_trainer_killed_in_a_round_does_not_stop_the_others(federation: Federation) -> None:
    study_file = federation.study("killed", **{"--rounds": "1", "--steps": "60", "--epsilon-cap": "900"})
    assert study_file.exists()
    pixcell("run", "start", "killed", "--dir", federation.server)
    ledger = federation.site("north") / "ledger" / LEDGER_FILE
    lines_before = len(ledger.read_bytes().splitlines())
    wait_until(lambda: len(ledger.read_bytes().splitlines()) > lines_before + 3, 60, federation.logs())
    site_process(federation.processes, "north", "site_client.trainer").send_signal(signal.SIGKILL)
    spent = federation.steps_charged("north", "killed")
    shown = pixcell("run", "watch", "killed", "--dir", federation.server, "--timeout", "200")
    assert shown["run"]["state"] == "completed", federation.logs()
    study = StudyBook(open_registry(federation.server)).get("killed")
    for record in federation.store(study).records()[1:]:
        assert {"east", "west"} <= set(record.included)
        # The supervisor starts a new trainer, which tries once more as a new charge, or the record says why not.
        assert "north" in record.included or [e for e in record.excluded if e.site == "north" and e.reason]
    assert federation.steps_charged("north", "killed") >= spent
    counted = sum("north" in r.included for r in federation.store(study).records())
    assert federation.steps_charged("north", "killed") >= 60 * counted
    if "north" in federation.store(study).records()[1].included:
        assert federation.steps_charged("north", "killed") > 60 * counted
    for site in ("east", "west"):
        assert federation.steps_charged(site, "killed") == 60


def test_a_withdrawn_approval_takes_effect_at_the_next_run(federation: Federation) -> None:
    study_file = federation.study("withdrawn", **{"--quorum": "3"})
    pixcell("site", "revoke", study_file, "--site-dir", federation.site("west"), "--yes")
    error = pixcell(
        "run", "start", "withdrawn", "--dir", federation.server, "--wait", "--ready-timeout", "20", expect=1
    )
    assert (
        error["code"] == "run-failed"
        and "west: not approved (this site withdrew its approval)" in error["message"]
    )
    assert federation.steps_charged("west", "withdrawn") == 0


def test_a_killed_agent_rejoins_and_a_run_resumes(federation: Federation) -> None:
    site_process(federation.processes, "east", "site start").send_signal(signal.SIGKILL)
    federation.study("resumed")
    shown = pixcell("run", "start", "resumed", "--dir", federation.server, "--wait", "--timeout", "150")
    assert shown["run"]["state"] == "completed", federation.logs()
