"""Checks of this machine: user, keys, folders, disk, lock, release, telemetry, accelerator, shared memory."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pixcell_core.contracts.artifacts import base_digest, installed_code_digest
from site_client.agent.supervisor import LOCK_FILE
from site_client.doctor.finding import Finding
from site_client.doctor.question import Question

FLOWER = "1.41.0"
"""The release of Flower whose names are replaced; any other stops the agent."""

MIB = 1 << 20
SMALL_SHARED_MEMORY = 64 * MIB
"""What a container gets by default; loaders of a trainer on an accelerator die of it."""

PUBLIC_ENDINGS = (".pub", ".crt")
MUST_BE = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "HF_HUB_OFFLINE": "1"}


def check_user(asked: Question) -> Finding:
    """Nothing here needs root."""
    if os.geteuid() == 0:
        return Finding(
            name="user",
            status="warn",
            found="this runs as root",
            remedy="Run agent and trainer as users of their own (in containers: `user:`).",
        )
    capabilities = _capabilities()
    if capabilities:
        return Finding(
            name="user",
            status="warn",
            found=f"uid {os.geteuid()} with capabilities {capabilities:#x}",
            remedy="Drop all capabilities (in containers: `cap_drop: [ALL]`).",
        )
    return Finding(name="user", status="ok", found=f"uid {os.geteuid()}, no capabilities")


def check_keys(asked: Question) -> Finding:
    """Private keys are for their owner alone."""
    keys = asked.folder.keys
    if not keys.is_dir():
        return Finding(
            name="keys",
            status="fail",
            found="there is no folder of keys",
            remedy="Enrol: pixcell site enroll",
        )
    open_ones = [
        path.name
        for path in sorted(keys.iterdir())
        if path.suffix not in PUBLIC_ENDINGS and path.is_file() and stat.S_IMODE(path.stat().st_mode) & 0o077
    ]
    if stat.S_IMODE(keys.stat().st_mode) & 0o077:
        open_ones.insert(0, f"{keys.name}/")
    if open_ones:
        return Finding(
            name="keys",
            status="fail",
            found=f"others can read: {', '.join(open_ones)}",
            remedy=f"chmod 700 {keys} and 600 the files; if anybody may have read them, enrol anew.",
        )
    lacking = [p.name for p in (asked.folder.node_key, asked.folder.approval_key) if not p.is_file()]
    if lacking:
        return Finding(
            name="keys",
            status="fail",
            found=f"missing: {', '.join(lacking)}",
            remedy="Restore them from a backup, or enrol anew.",
        )
    return Finding(name="keys", status="ok", found="private keys are readable by their owner alone")


def check_writable(asked: Question) -> Finding:
    """Every folder that agent and trainer write to, and the temporary one, take a file."""
    folder = asked.folder
    refused = []
    for place in (
        folder.agent,
        folder.logs,
        folder.spool,
        folder.approvals,
        folder.ledger,
        Path(tempfile.gettempdir()),
    ):
        nearest = place if place.exists() else folder.root
        try:
            with tempfile.TemporaryFile(dir=nearest) as probe:
                probe.write(b"x")
                probe.flush()
        except OSError as error:
            refused.append(f"{place}: {error.strerror or type(error).__name__}")
    if refused:
        return Finding(
            name="scratch",
            status="fail",
            found=f"{len(refused)} folders cannot be written to",
            details=tuple(refused),
            remedy="Give this user the folders; mount them read-write and with room.",
        )
    return Finding(name="scratch", status="ok", found="every folder written to takes a file")


def check_disk(asked: Question) -> Finding:
    """Room for two checkpoints of the base model."""
    free = shutil.disk_usage(asked.folder.root).free
    if asked.base is None:
        return Finding(
            name="disk",
            status="skip",
            found=f"{free // MIB} MiB free; give --base FOLDER to compare with two checkpoints",
        )
    size = sum(path.stat().st_size for path in asked.base.rglob("*") if path.is_file())
    found = f"{free // MIB} MiB free, two checkpoints take {2 * size // MIB} MiB"
    if free < 2 * size:
        return Finding(name="disk", status="fail", found=found, remedy="Make room before a study starts.")
    return Finding(name="disk", status="ok", found=found)


def check_lock(asked: Question) -> Finding:
    """Whether an agent runs here. The kernel keeps the lock, so it goes with its process and is never stale."""
    path = asked.folder.agent / LOCK_FILE
    if not path.is_file():
        return Finding(name="lock", status="skip", found="no agent ever ran here")
    with path.open("ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return Finding(name="lock", status="ok", found="an agent of this site is running")
    return Finding(name="lock", status="ok", found="no agent is running, and nothing is left locked")


def check_release(asked: Question) -> Finding:
    """Flower's release, and the code and base against the study's lock."""
    try:
        flower = version("flwr")
    except PackageNotFoundError:
        flower = "none"
    if flower != FLOWER:
        return Finding(
            name="release",
            status="fail",
            found=f"Flower {flower} is installed, this release needs {FLOWER}",
            remedy="Install this release's own environment.",
        )
    if asked.study is None:
        return Finding(
            name="release",
            status="skip",
            found=f"Flower {flower}; no study to compare with (none approved, or give --study FILE)",
        )
    if asked.study.code_digest != installed_code_digest():
        return Finding(
            name="release",
            status="fail",
            found=f"study {asked.study.id} names other training code than is installed here",
            remedy="Install the release that the study was written for.",
        )
    if asked.base is not None and base_digest(asked.base) != asked.study.base_digest:
        return Finding(
            name="release",
            status="fail",
            found=f"study {asked.study.id} names another base model than --base",
            remedy="Fetch the study's base model.",
        )
    more = " and the base model" if asked.base is not None else ""
    return Finding(name="release", status="ok", found=f"Flower {flower}; the code{more} are the study's own")


def check_telemetry(asked: Question) -> Finding:
    """No telemetry, no update check, no downloads. The agent sets this itself; the environment should not ask for them."""
    wrong = [
        f"{name}={os.environ.get(name)}" for name, value in MUST_BE.items() if os.environ.get(name) != value
    ]
    if wrong:
        return Finding(
            name="telemetry",
            status="warn",
            found=f"the environment says otherwise: {', '.join(wrong)}",
            remedy="The agent switches all of it off; take these out of the environment all the same.",
        )
    return Finding(name="telemetry", status="ok", found="telemetry, update checks and downloads are off")


def check_accelerator(asked: Question) -> Finding:
    """Whether the device that the trainer is to use is there and usable."""
    if asked.device == "cpu":
        there = any(Path("/dev").glob("nvidia[0-9]*"))
        hint = "; this machine has one: give --device cuda" if there else ""
        return Finding(name="accelerator", status="skip", found=f"the trainer is to use the CPU{hint}")
    import torch

    from pixcell_core.models.devices import choose_device

    device = choose_device(asked.device)
    torch.ones(8, device=device).sum().item()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return Finding(name="accelerator", status="ok", found=f"{device} computes ({name})")


def check_shared_memory(asked: Question) -> Finding:
    """The size of /dev/shm, which a trainer's loaders use."""
    place = Path("/dev/shm")
    if not place.is_dir():
        return Finding(name="shared-memory", status="skip", found="this system has no /dev/shm")
    size = shutil.disk_usage(place).total
    if size <= SMALL_SHARED_MEMORY:
        return Finding(
            name="shared-memory",
            status="fail" if asked.device != "cpu" else "warn",
            found=f"{size // MIB} MiB",
            remedy="Give the container more (docker: --shm-size=1g, compose: shm_size).",
        )
    return Finding(name="shared-memory", status="ok", found=f"{size // MIB} MiB")


MACHINE_CHECKS = (
    check_user,
    check_keys,
    check_writable,
    check_disk,
    check_lock,
    check_release,
    check_telemetry,
    check_accelerator,
    check_shared_memory,
)


def _capabilities() -> int:
    """This process's effective capabilities (Linux), 0 elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1], 16) for line in lines if line.startswith("CapEff:")), 0)
