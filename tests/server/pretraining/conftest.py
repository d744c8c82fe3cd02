"""Tiles, a base and a finished model, and one job of two processes run to its end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from server.layout import ServerLayout
from server.pretraining.session import PretrainingRequest, pretrain
from tests.server.pretraining_ground import EVERY, STEPS, Ground, tick_until, workers
from tests.server.pretraining_inputs import write_inputs
from tests.server.test_pretraining import silent


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("jobs")
    write_inputs(root)
    whole = pretrain(
        PretrainingRequest(root / "base", root / "tiles", root / "whole", 32, STEPS, 4, 1e-3, 4, 1, EVERY),
        silent,
    )
    return Ground(root, ServerLayout(root / "none"), whole)


@pytest.fixture
def ground(shared: Ground, tmp_path: Path) -> Ground:
    """The shared tiles and base, with a coordinator's folder of its own."""
    layout = ServerLayout(tmp_path / "server")
    layout.pki.mkdir(parents=True)
    (layout.pki / "ca.crt").touch()
    return Ground(shared.root, layout, shared.undisturbed)


@pytest.fixture(scope="module")
def pair(shared: Ground, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    """A job of two processes with half the batch each, run to its end; what was listened to meanwhile is in `said`."""
    layout = ServerLayout(tmp_path_factory.mktemp("pair") / "server")
    layout.pki.mkdir(parents=True)
    (layout.pki / "ca.crt").touch()
    ground = Ground(shared.root, layout, shared.undisturbed)
    job, desk = ground.submit("pair", batch_size=2, processes=2), ground.desk()
    desk.tick()
    tick_until(desk, lambda: job.state().step > 0 or job.state().state != "running", "the first step")
    heard = [psutil.Process(job.state().process), *workers(job)]
    places = [c.laddr.ip for p in heard for c in p.net_connections("inet") if c.status == "LISTEN"]
    ground.events.say(
        "listening", processes=len(heard), off_loopback=len([p for p in places if p != "127.0.0.1"])
    )
    tick_until(desk, lambda: job.state().state not in ("running", "submitted"), "the end")
    assert job.state().state == "completed", (job.state(), job.log.read_text()[-3000:])
    yield ground
    desk.close()
