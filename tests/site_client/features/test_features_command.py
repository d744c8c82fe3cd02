"""`pixcell site features` as a real process: Ctrl-C between patients, then the same command finishes the work."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from pixcell_core.training.feature_store import FeatureStore

REPOSITORY = Path(__file__).resolve().parents[3]
#: The real networks with seeded random weights: the command must not depend on how well they were trained.
PROGRAM = """
import torch, typer
torch.manual_seed(0)
from pixcell_core import starter
from pixcell_core.models import TileAutoencoder, TileEncoder
encoder, autoencoder = TileEncoder().eval(), TileAutoencoder().eval()
starter.load_encoder, starter.load_autoencoder = lambda: encoder, lambda: autoencoder
from site_client.features import commands
root = typer.Typer()
root.callback()(lambda: None)
commands.register(root)
root()
"""


def start(site: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            PROGRAM,
            "site",
            "features",
            "--site-dir",
            str(site),
            "--tiles-per-patient",
            "6",
            *words,
        ],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_ctrl_c_and_again(prepared_site: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    shutil.copy(prepared_site / "catalogue.db", site)
    shards = site / "features" / "train" / "shards"
    running = start(site)
    limit = time.monotonic() + 140
    while not list(shards.glob("*.safetensors")) and running.poll() is None and time.monotonic() < limit:
        time.sleep(0.002)
    os.killpg(running.pid, signal.SIGINT)
    out, err = running.communicate(timeout=140)
    assert running.returncode == 1 and "error [interrupted]" in err and "Traceback" not in err and not out, (
        err
    )
    kept = {p: p.stat().st_mtime_ns for p in shards.glob("*.safetensors")}
    assert kept

    out, err = start(site, "--format", "json").communicate(timeout=140)
    data = json.loads(out)["data"]
    assert data["encoded"] < 36 and [p["patients"] for p in data["parts"]] == [3, 3]
    assert "tiles/s" in err
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    store = FeatureStore.open(site / "features" / "train")
    assert store.embeddings(store.patients[0]).shape == (6, 1, 256)
    assert store.latents(store.patients[0]).shape == (6, 32, 16, 16)
