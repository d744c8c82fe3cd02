"""The trainer: it charges before it draws, asks the site's own approval, and survives being killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pixcell_core.contracts.round import KnownHead, TrainRequest
from pixcell_core.contracts.spool import Arrays, TrainJob, TrainResult, arrays_digest, l2_norm
from pixcell_core.contracts.study import AdapterSettings, Study
from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.private.averaging import AdapterAverage
from pixcell_core.private.ledger_record import ReserveRecord
from pixcell_core.private.noise import UnsafeFixedKeySource
from site_client.agent.handlers import job_id_of
from site_client.approvals.book import ApprovalBook
from site_client.ledger.site import ledger_folder
from site_client.ledger.view import read_ledger
from site_client.trainer.service import PUBLIC_REASONS, Trainer, TrainerSettings, public_code
from site_client.trainer.spool import Spool
from site_client.trainer.traces import TraceBook
from tests.site_client.trainer.site_fixture import (
    TARGETS,
    TinySite,
    layout_of,
    make_features,
    make_study,
    start_of,
)


def job_of(study: Study, start: Arrays, number: int = 1) -> TrainJob:
    """A job as the agent makes it."""
    now = datetime.now(UTC)
    request = TrainRequest(
        study_digest=study.digest, round=number, input_digest=arrays_digest(start), layout=layout_of(start)
    )
    return TrainJob(
        job_id=job_id_of(study, request),
        study=study.model_dump(mode="json"),
        study_digest=study.digest,
        round=number,
        created_at=now,
        expires_at=now + timedelta(seconds=60),
        input_digest=request.input_digest,
    )


def steps_charged(site: TinySite) -> int:
    """Steps the ledger holds charged."""
    folder = ledger_folder(site.folder.root)
    if not folder.is_dir():
        return 0
    return sum(r.steps for r in read_ledger(folder).require_whole().records if isinstance(r, ReserveRecord))


def ask(
    site: TinySite,
    trainer: Trainer,
    study: Study,
    start: Arrays,
    number: int = 1,
    heads: tuple[KnownHead | None, ...] = (),
) -> tuple[TrainResult, Arrays]:
    """Submit a job, let the trainer handle it, take the result away."""
    spool = Spool(site.folder.spool)
    job = job_of(study, start, number).model_copy(update={"known_heads": heads})
    spool.open()
    spool.submit(job, start)
    taken = spool.take()
    assert taken == job.job_id
    trainer.handle(taken)
    found = spool.result(job)
    assert found is not None
    spool.close_job(job.job_id)
    return found


@pytest.fixture
def said() -> list[str]:
    """What the trainer said."""
    return []


@pytest.fixture
def trainer(tiny_site: TinySite, said: list[str]) -> Trainer:
    """A trainer in this process."""
    return Trainer(TrainerSettings(tiny_site.folder, tiny_site.base), said.append)


def test_an_approved_round_gives_a_bounded_update_and_is_charged(
    tiny_site: TinySite, trainer: Trainer
) -> None:
    study = make_study(tiny_site.base)
    start = start_of(tiny_site.base, study)
    ApprovalBook(tiny_site.folder).decide(study, "approve")
    result, update = ask(tiny_site, trainer, study, start)
    assert result.status == "ok" and update.keys() == start.keys()
    assert 0 < l2_norm(update) <= study.update_norm_bound(sum(v.size for v in start.values()))
    assert steps_charged(tiny_site) == study.steps_per_round
    # The next round starts where the federation stands, not where this site ended.
    moved = {name: value + np.float32(0.01) for name, value in start.items()}
    second, other = ask(tiny_site, trainer, study, moved, 2)
    assert second.status == "ok" and arrays_digest(other) != arrays_digest(update)
    assert steps_charged(tiny_site) == 2 * study.steps_per_round


def test_the_same_question_gets_the_same_bytes_and_no_second_charge(
    tiny_site: TinySite, trainer: Trainer
) -> None:
    study = make_study(tiny_site.base)
    start = start_of(tiny_site.base, study)
    ApprovalBook(tiny_site.folder).decide(study, "approve")
    _, first = ask(tiny_site, trainer, study, start)
    _, again = ask(tiny_site, trainer, study, start)
    assert arrays_digest(first) == arrays_digest(again)
    assert steps_charged(tiny_site) == study.steps_per_round


def test_without_approval_nothing_is_drawn(tiny_site: TinySite, trainer: Trainer) -> None:
    study = make_study(tiny_site.base)
    start = start_of(tiny_site.base, study)
    book = ApprovalBook(tiny_site.folder)
    assert ask(tiny_site, trainer, study, start)[0].code == "not-approved"
    book.decide(study, "deny")
    assert ask(tiny_site, trainer, study, start)[0].code == "approval-denied"
    book.decide(study, "approve")
    book.decide(study, "revoke")
    assert ask(tiny_site, trainer, study, start)[0].code == "approval-withdrawn"
    assert steps_charged(tiny_site) == 0


def test_an_approval_does_not_stretch_to_a_changed_study(tiny_site: TinySite, trainer: Trainer) -> None:
    study = make_study(tiny_site.base)
    ApprovalBook(tiny_site.folder).decide(study, "approve")
    changed = study.model_copy(update={"noise_multiplier": 0.01})
    result, _ = ask(tiny_site, trainer, changed, start_of(tiny_site.base, study))
    assert result.code == "not-approved" and steps_charged(tiny_site) == 0


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"base_digest": "sha256:" + "0" * 64}, "base-differs"),
        ({"code_digest": "sha256:" + "0" * 64}, "code-differs"),
        ({"tile_size": 128}, "features-differ"),
        ({"mpp": 0.5}, "features-differ"),
        ({"noise_multiplier": 0.3, "epsilon_cap": 1.0}, "study-budget-exceeded"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_charge(
    tiny_site: TinySite, trainer: Trainer, change: dict[str, object], code: str
) -> None:
    study = make_study(tiny_site.base, **change)
    ApprovalBook(tiny_site.folder).decide(study, "approve")
    result, update = ask(tiny_site, trainer, study, start_of(tiny_site.base, study))
    assert (result.status, result.code, update) == ("refused", code, {})
    assert result.reason == PUBLIC_REASONS[code]
    assert steps_charged(tiny_site) == 0


def test_an_adapter_of_another_shape_is_refused(tiny_site: TinySite, trainer: Trainer) -> None:
    study = make_study(tiny_site.base)
    ApprovalBook(tiny_site.folder).decide(study, "approve")
    start = {name: value[:, :1] for name, value in start_of(tiny_site.base, study).items()}
    assert ask(tiny_site, trainer, study, start)[0].code == "adapter-mismatch"
    assert steps_charged(tiny_site) == 0


def test_a_budget_that_is_used_up_refuses_the_next_round(tiny_site: TinySite, trainer: Trainer) -> None:
    study = make_study(tiny_site.base, noise_multiplier=2.0, epsilon_cap=5.0, rounds=9)
    start = start_of(tiny_site.base, study)
    ApprovalBook(tiny_site.folder).decide(study, "approve")
    codes = []
    for number in range(1, 6):
        moved = {name: value + np.float32(number) for name, value in start.items()}
        codes.append(ask(tiny_site, trainer, study, moved, number)[0].code)
    assert codes[0] == "ok" and codes[-1] in {"budget-exceeded", "study-budget-exceeded"}
    assert steps_charged(tiny_site) == study.steps_per_round * codes.count("ok")


def test_results_and_reasons_name_no_patient(tiny_site: TinySite, trainer: Trainer, said: list[str]) -> None:
    study = make_study(tiny_site.base)
    ApprovalBook(tiny_site.folder).decide(study, "approve")
    ask(tiny_site, trainer, study, start_of(tiny_site.base, study))
    spool = tiny_site.folder.spool
    written = b"".join(p.read_bytes() for p in spool.rglob("*") if p.is_file()) + "".join(said).encode()
    assert b"secret-patient" not in written


def test_a_job_nobody_waits_for_draws_nothing(tiny_site: TinySite, trainer: Trainer) -> None:
    study = make_study(tiny_site.base)
    start = start_of(tiny_site.base, study)
    ApprovalBook(tiny_site.folder).decide(study, "approve")
    spool, job = Spool(tiny_site.folder.spool), job_of(study, start)
    spool.open()
    spool.submit(job, start)
    assert spool.take() == job.job_id
    spool.close_job(job.job_id)
    trainer.handle(job.job_id)
    assert spool.result(job) is None and steps_charged(tiny_site) == 0


def test_killed_in_a_round_it_stays_charged_and_the_next_try_is_a_new_charge(
    tiny_site: TinySite, tmp_path: Path
) -> None:
    study = make_study(tiny_site.base, steps_per_round=150, epsilon_cap=500.0, round_timeout_s=600.0)
    start = start_of(tiny_site.base, study)
    ApprovalBook(tiny_site.folder).decide(study, "approve")
    spool, job = Spool(tiny_site.folder.spool), job_of(study, start)
    spool.open()
    spool.submit(job, start)
    command = [sys.executable, "-m", "site_client.trainer", "site", "trainer"]
    command += ["--site-dir", str(tiny_site.folder.root), "--base", str(tiny_site.base)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 60
        while steps_charged(tiny_site) < 3 and time.monotonic() < end:
            time.sleep(0.05)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    before = steps_charged(tiny_site)
    assert before >= 3, (tmp_path / "log").read_text()
    assert spool.result(job) is None and spool.unfinished() == [job.job_id]
    said: list[str] = []
    restarted = Trainer(TrainerSettings(tiny_site.folder, tiny_site.base), said.append)
    restarted.handle(spool.unfinished()[0], again=True)
    found = spool.result(job)
    assert found is not None and found[0].status == "ok"
    assert steps_charged(tiny_site) == before + 150
    assert any("second charge" in line for line in said)


def test_a_ledger_put_back_to_an_earlier_day_is_not_charged_again(
    tiny_site: TinySite, trainer: Trainer
) -> None:
    study = make_study(tiny_site.base)
    start = start_of(tiny_site.base, study)
    ApprovalBook(tiny_site.folder).decide(study, "approve")
    first, _ = ask(tiny_site, trainer, study, start)
    folder = ledger_folder(tiny_site.folder.root)
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    moved = {name: value + np.float32(0.01) for name, value in start.items()}
    second, _ = ask(tiny_site, trainer, study, moved, 2, (first.ledger_head,))
    assert second.status == "ok" and second.ledger_head.sequence > first.ledger_head.sequence
    # With its head put back too, the ledger looks whole. Whoever saw the later head is not fooled.
    for name, data in kept.items():
        (folder / name).write_bytes(data)
    charged = steps_charged(tiny_site)
    later = {name: value + np.float32(0.02) for name, value in start.items()}
    refused, _ = ask(tiny_site, trainer, study, later, 2, (second.ledger_head,))
    assert (refused.status, refused.code) == ("refused", "ledger-rewound")
    assert steps_charged(tiny_site) == charged
    alone, _ = ask(tiny_site, trainer, study, later, 2)
    assert alone.status == "refused", "the site remembers its heads in another folder too"
    (tiny_site.folder.root / "private" / "ledger-heads.txt").unlink()
    told, _ = ask(tiny_site, trainer, study, later, 2, (second.ledger_head,))
    assert (told.status, told.code) == ("refused", "ledger-rewound")
    fooled, _ = ask(tiny_site, trainer, study, later, 2)
    assert fooled.status == "ok", "without a witness nobody could have told"


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": AdapterSettings(kind="lora", rank=2, targets=TARGETS, seed=7)},
        {"gradient_checkpointing": True},
        {"ema_decay": 0.9, "noise_draws": 3},
        {"sample_rate": 0.5},
        {"precision": "bfloat16"},
    ],
)
def test_a_study_trains_with_each_of_its_settings(
    tiny_site: TinySite, trainer: Trainer, changes: dict[str, Any]
) -> None:
    study = make_study(tiny_site.base, **changes)
    start = start_of(tiny_site.base, study)
    ApprovalBook(tiny_site.folder).decide(study, "approve")
    result, update = ask(tiny_site, trainer, study, start)
    assert result.status == "ok" and update.keys() == start.keys()
    moved = {name for name, value in update.items() if value.any()}
    assert moved == set(start), "everything that is trained is noised, so everything moves"
    assert any("lora_A" in name for name in moved) == (study.adapter.kind == "lora")


def test_averaging_sends_the_average_of_the_rounds_steps(
    tiny_site: TinySite, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("site_client.trainer.rounds.SystemNoiseSource", lambda: UnsafeFixedKeySource())
    monkeypatch.setattr(
        "pixcell_core.private.engine._system_seeded", lambda: torch.Generator().manual_seed(1)
    )
    steps: list[list[np.ndarray]] = []
    real = AdapterAverage.update

    def watched(self: AdapterAverage) -> None:
        steps.append([p.detach().numpy().astype(np.float64) for p in self._parameters])
        real(self)

    monkeypatch.setattr(AdapterAverage, "update", watched)
    study = make_study(tiny_site.base, ema_decay=0.5, steps_per_round=3)
    start = start_of(tiny_site.base, study)
    ApprovalBook(tiny_site.folder).decide(study, "approve")
    _, update = ask(tiny_site, trainer, study, start)
    assert len(steps) == 3
    by_shape = {value.shape: value.astype(np.float64) for value in update.values()}
    for first, second, third in zip(*steps, strict=True):
        average = (0.25 * first + 0.5 * second + third) / 1.75
        assert any(
            value.shape == average.shape and np.allclose(value, average, atol=1e-7)
            for value in update.values()
        )
        assert not np.allclose(by_shape[third.shape], third)


def test_a_cohort_is_charged_by_its_name_and_no_patient_stands_in_two(
    tiny_site: TinySite, said: list[str]
) -> None:
    study = make_study(tiny_site.base)
    start = start_of(tiny_site.base, study)
    ApprovalBook(tiny_site.folder).decide(study, "approve")
    liver = Trainer(TrainerSettings(tiny_site.folder, tiny_site.base, cohort="liver"), said.append)
    assert ask(tiny_site, liver, study, start)[0].status == "ok"
    records = read_ledger(ledger_folder(tiny_site.folder.root)).records
    assert {r.cohort for r in records if isinstance(r, ReserveRecord)} == {"liver"}
    kidney = Trainer(TrainerSettings(tiny_site.folder, tiny_site.base, cohort="kidney"), said.append)
    charged = steps_charged(tiny_site)
    moved = {name: value + np.float32(0.01) for name, value in start.items()}
    refused, _ = ask(tiny_site, kidney, study, moved, 2)
    # The site's own log says why; the hub is told nothing that depends on who the patients are.
    assert (refused.status, refused.code) == ("refused", "site-refused")
    assert "own log" in refused.reason and any("cohorts-overlap" in line for line in said)
    assert steps_charged(tiny_site) == charged


def test_a_cohort_of_one_is_refused_before_the_trainer_says_that_it_is_ready(
    tmp_path: Path, tiny_site: TinySite, said: list[str]
) -> None:
    make_features(tmp_path / "one", "east", patients=1)
    settings = TrainerSettings(tiny_site.folder, tiny_site.base, features=tmp_path / "one")
    with pytest.raises(RefusedError, match="at least 2 patients") as refused:
        Trainer(settings, said.append).run()
    assert refused.value.code == "cohort-too-small"
    assert Spool(tiny_site.folder.spool).beat() is None


def test_codes_that_could_tell_about_patients_stay_at_the_site() -> None:
    for code in ("cohort-too-small", "no-tiles", "running-statistics", "delta", "cohorts-broken"):
        assert public_code(RefusedError("x", hint="", code=code)) == "site-refused"
    for code in PUBLIC_REASONS:
        assert public_code(RefusedError("x", hint="", code=code)) == code


def test_losses_and_norms_stay_at_home(tiny_site: TinySite, trainer: Trainer, said: list[str]) -> None:
    study = make_study(tiny_site.base)
    start = start_of(tiny_site.base, study)
    ApprovalBook(tiny_site.folder).decide(study, "approve")
    result, _ = ask(tiny_site, trainer, study, start)
    steps = TraceBook(tiny_site.folder.root).steps("tiny")
    assert [(s.round, s.step) for s in steps] == [(1, 0), (1, 1)] and steps[0].mean_loss
    path = tiny_site.folder.root / "private" / "training-traces.jsonl"
    assert path.stat().st_mode & 0o077 == 0 and path.parent.stat().st_mode & 0o077 == 0
    outside = [p for p in tiny_site.folder.root.rglob("*") if p.is_file() and "private" not in p.parts]
    for value in (steps[0].mean_loss, steps[0].mean_gradient_norm):
        for text in (*(p.read_bytes() for p in outside), *(line.encode() for line in said)):
            assert repr(value)[:8].encode() not in text
    assert "loss" not in result.model_dump_json() and "norm" not in result.model_dump_json()
    path.write_bytes(b"{}\n")
    with pytest.raises(BadInputError, match="training traces"):
        TraceBook(tiny_site.folder.root).steps()
