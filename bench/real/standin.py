"""Stands where a site's trainer stands and answers every job of the spool with one fixed update.

    python -m bench.real.standin --site-dir DIR --update FILE.npy --base-digest D --code-digest D

It reads and checks jobs and writes answers as a trainer does; it trains nothing and charges nothing. For measuring what
a round costs besides training.
"""

from __future__ import annotations

import argparse
import os
import secrets
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from pixcell_core.contracts.spool import Arrays, TrainerBeat, TrainResult, arrays_digest
from site_client.approvals.site_folder import SiteFolder
from site_client.trainer.spool import Spool

BEAT_S, LOOK_S = 1.0, 0.1


def serve(spool: Spool, flat: np.ndarray, base_digest: str, code_digest: str) -> None:
    """Answer jobs until the process is ended. `flat` is the update, float32 of shape (parameters,)."""
    instance = secrets.token_hex(8)
    spool.open()

    def pulse() -> None:
        while True:
            spool.write_beat(
                TrainerBeat(
                    process=os.getpid(),
                    instance=instance,
                    beat_at=datetime.now(UTC),
                    base_digest=base_digest,
                    code_digest=code_digest,
                    ready=True,
                )
            )
            time.sleep(BEAT_S)

    threading.Thread(target=pulse, daemon=True).start()
    while True:
        taken = spool.take()
        if taken is None:
            time.sleep(LOOK_S)
            continue
        job, start = spool.read_job(taken)
        update: Arrays = {}
        at = 0
        for name in sorted(start):
            update[name] = flat[at : at + start[name].size].reshape(start[name].shape)
            at += start[name].size
        result = TrainResult(
            job_id=job.job_id,
            study_digest=job.study_digest,
            round=job.round,
            input_digest=job.input_digest,
            status="ok",
            update_digest=arrays_digest(update),
        )
        spool.answer(result, update)


def main() -> None:
    """Serve one site."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--site-dir", type=Path, required=True)
    parser.add_argument("--update", type=Path, required=True)
    parser.add_argument("--base-digest", required=True)
    parser.add_argument("--code-digest", required=True)
    given = parser.parse_args()
    spool = Spool(SiteFolder(given.site_dir).spool)
    serve(spool, np.load(given.update), given.base_digest, given.code_digest)


if __name__ == "__main__":
    main()
