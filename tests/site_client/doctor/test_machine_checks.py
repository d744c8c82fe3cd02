"""The doctor's checks of the machine: once where all is well, and once where what it looks for is wrong."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pixcell_core.contracts.artifacts import installed_code_digest
from site_client.agent.supervisor import lock_agent
from site_client.doctor import machine_checks
from site_client.doctor.question import Question
from tests.server.consortium import make_study
from tests.site_client.doctor.findings import result


def test_root_is_warned_of(asked: Question, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert result(machine_checks.check_user, asked).status == "warn"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(machine_checks, "_capabilities", lambda: 0)
    assert result(machine_checks.check_user, asked).status == "ok"
    monkeypatch.setattr(machine_checks, "_capabilities", lambda: 1 << 12)
    assert result(machine_checks.check_user, asked).status == "warn"


def test_keys_that_others_can_read_are_named(asked: Question) -> None:
    assert result(machine_checks.check_keys, asked).status == "ok"
    asked.folder.approval_key.chmod(0o640)
    finding = result(machine_checks.check_keys, asked)
    assert finding.status == "fail" and "approval" in finding.found
    asked.folder.approval_key.chmod(0o600)
    asked.folder.keys.chmod(0o755)
    assert "keys/" in result(machine_checks.check_keys, asked).found
    asked.folder.keys.chmod(0o700)
    asked.folder.node_key.unlink()
    assert "missing: node" in result(machine_checks.check_keys, asked).found


def test_a_folder_that_takes_no_file_is_named(asked: Question, monkeypatch: pytest.MonkeyPatch) -> None:
    assert result(machine_checks.check_writable, asked).status == "ok"
    real = machine_checks.tempfile.TemporaryFile

    def read_only(dir: Path) -> Any:
        if dir == asked.folder.logs:
            raise OSError(30, "Read-only file system")
        return real(dir=dir)

    monkeypatch.setattr(machine_checks.tempfile, "TemporaryFile", read_only)
    finding = result(machine_checks.check_writable, asked)
    assert finding.status == "fail" and "Read-only file system" in finding.details[0]


def test_room_for_two_checkpoints(asked: Question, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert result(machine_checks.check_disk, asked).status == "skip"
    base = tmp_path / "base"
    base.mkdir()
    (base / "w.safetensors").write_bytes(b"x" * 1000)
    usage = machine_checks.shutil.disk_usage(tmp_path)
    for free, status in ((1999, "fail"), (2000, "ok")):
        monkeypatch.setattr(
            machine_checks.shutil, "disk_usage", lambda _, free=free: usage._replace(free=free)
        )
        assert result(machine_checks.check_disk, replace(asked, base=base)).status == status


def test_a_lock_is_held_by_a_process_and_never_stale(asked: Question) -> None:
    assert result(machine_checks.check_lock, asked).status == "skip"
    held = lock_agent(asked.folder)
    assert "is running" in result(machine_checks.check_lock, asked).found
    held.close()
    assert "no agent is running" in result(machine_checks.check_lock, asked).found


def test_the_installed_code_is_compared_with_the_studys(
    asked: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert result(machine_checks.check_release, asked).status == "skip"
    same = make_study(code_digest=installed_code_digest())
    assert result(machine_checks.check_release, replace(asked, study=same)).status == "ok"
    assert result(machine_checks.check_release, replace(asked, study=make_study())).status == "fail"
    monkeypatch.setattr(machine_checks, "version", lambda name: "1.42.0")
    finding = result(machine_checks.check_release, replace(asked, study=same))
    assert finding.status == "fail" and "1.42.0" in finding.found


def test_telemetry_that_is_asked_for_is_found(asked: Question, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in machine_checks.MUST_BE.items():
        monkeypatch.setenv(name, value)
    assert result(machine_checks.check_telemetry, asked).status == "ok"
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    assert "FLWR_TELEMETRY_ENABLED=1" in result(machine_checks.check_telemetry, asked).found


def test_a_device_that_is_not_there_fails(asked: Question) -> None:
    import torch

    assert result(machine_checks.check_accelerator, asked).status == "skip"
    finding = result(machine_checks.check_accelerator, replace(asked, device="cuda:99"))
    assert finding.status == "fail" and "cuda:99" in finding.found and torch.cuda.device_count() < 99


def test_the_containers_default_of_shared_memory_is_too_small(
    asked: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = machine_checks.shutil.disk_usage("/")
    for size, device, status in ((64, "cpu", "warn"), (64, "cuda", "fail"), (1024, "cuda", "ok")):
        monkeypatch.setattr(
            machine_checks.shutil, "disk_usage", lambda _, size=size: usage._replace(total=size << 20)
        )
        assert result(machine_checks.check_shared_memory, replace(asked, device=device)).status == status
