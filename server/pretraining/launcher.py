"""One attempt at a pretraining job: torchrun's launcher with the worker processes, in one process group.

Usage: python -m server.pretraining.launcher JOB-FOLDER ATTEMPT, with a pipe on standard input whose other end the hub
holds. When the hub is gone, however it ended, the pipe closes and the whole group goes with it.

The launcher imports the training code once and forks the workers. They meet by a file, and gloo speaks on loopback:
torchrun's usual meeting is a port open to the network whose content is unpickled, which no hospital should have.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from pathlib import Path

EXIT_DONE, EXIT_FAILED, EXIT_STOPPED = 0, 1, 10


def main(folder: Path, attempt: int) -> int:
    """Run the attempt to its end; returns how it ended, with the reason in the job's failure file."""
    threading.Thread(target=_end_with_the_hub, daemon=True).start()
    os.environ.update(
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1", TORCHELASTIC_ENABLE_FILE_TIMER="0", HF_HUB_OFFLINE="1"
    )
    if Path("/sys/class/net/lo").exists():
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"

    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    import pixcell_core.starter
    import pixcell_core.training.trainer  # noqa: F401 - imported here, once, for all workers
    from server.pretraining.book import JobFolder
    from server.pretraining.worker import STOPPED, work, write_failure

    job = JobFolder(folder)
    meeting = job.work / "meeting"
    shutil.rmtree(meeting, ignore_errors=True)
    meeting.mkdir(parents=True)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=job.request().settings.processes,
        run_id=f"{job.name}-{attempt}",
        rdzv_backend="c10d",
        rdzv_endpoint=str(meeting / "launcher"),
        rdzv_configs={"store_type": "file"},
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="fork",
        logs_specs=DefaultLogsSpecs(log_dir=str(meeting / "logs")),
    )
    try:
        ended = elastic_launch(config, work)(str(folder), attempt, str(meeting / "workers"))
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        how = f"signal {-first.exitcode}" if first.exitcode < 0 else f"exit code {first.exitcode}"
        # A worker that could say more has done so; this is for one that could not.
        write_failure(job, attempt, "worker-killed", f"Process {rank} ended by {how}.", again=True)
        return EXIT_FAILED
    finally:
        shutil.rmtree(meeting, ignore_errors=True)
    return EXIT_STOPPED if STOPPED in ended.values() else EXIT_DONE


def _end_with_the_hub() -> None:
    while os.read(0, 4096):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
