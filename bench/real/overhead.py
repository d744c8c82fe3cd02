"""What a round costs over bare Flower FedAvg, both in real processes with the same sites and the same payload.

    python -m bench.real.overhead [--sites 5] [--parameters 5000000] [--rounds 4] [--repeats 1]

Theirs: flower-superlink with TLS and node authentication, one flower-supernode per site, stock FedAvg, a ClientApp that
answers with a fixed float32 array. Ours: the hub behind mutual TLS, one agent per site, a stand-in for its trainer that
answers the spool with the same array. One after the other on the same machine, `--repeats` times; the first round of
every run is left out. Processor seconds are those of all processes of either side.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from bench.real.consortium import Consortium, load, say
from bench.real.meter import Lap, Meter
from pixcell_core.contracts.artifacts import installed_code_digest
from pixcell_core.contracts.canonical import digest
from pixcell_core.contracts.spool import Arrays, arrays_to_bytes
from server.layout import START_ADAPTER, ServerLayout
from site_client.agent.supervisor import free_port
from tests.server.processes import pixcell, wait_until

BASE, RANK, TENSORS = digest(b"a base that nobody opens"), 4, 40
BIN = Path(sys.executable).parent
FLOWER_APP = Path(__file__).parent / "bare_flower"
PATIENCE_S = 600.0


@dataclass(frozen=True)
class Measured:
    """Laps of one side, and the peak memory of its server, MB."""

    laps: list[Lap]
    peak_mb: float

    @property
    def wall(self) -> float:
        """Median wall seconds of a round."""
        return statistics.median(lap.wall for lap in self.laps)

    @property
    def cpu(self) -> float:
        """Median processor seconds of a round."""
        return statistics.median(lap.total for lap in self.laps)

    def parts(self) -> str:
        """The same by group."""
        names = self.laps[0].cpu
        return ", ".join(f"{n} {statistics.median(lap.cpu[n] for lap in self.laps):.1f}" for n in names)


def start_of(parameters: int) -> Arrays:
    """An adapter of zeros in `TENSORS` tensors."""
    rows = parameters // (RANK * TENSORS)
    return {
        f"m{i:03d}.lora_B.default.weight": np.zeros((rows, RANK), dtype=np.float32) for i in range(TENSORS)
    }


# --- ours --------------------------------------------------------------------------------------------------


class Ours:
    """The consortium with stand-ins for its trainers; runs studies and measures their rounds."""

    def __init__(self, its: Consortium, update: Path, parameters: int, rounds: int) -> None:
        self._its, self._parameters, self._rounds = its, parameters, rounds
        self._code = installed_code_digest()
        self._standins: list[subprocess.Popen[bytes]] = []
        for site in its.sites:
            words = [
                sys.executable,
                "-m",
                "bench.real.standin",
                "--site-dir",
                its.site(site),
                "--update",
                update,
            ]
            words += ["--base-digest", BASE, "--code-digest", self._code]
            with (its.root / f"{site}.standin.log").open("wb") as log:
                self._standins.append(subprocess.Popen([*map(str, words)], stdout=log, stderr=log))

    def measure(self, name: str, masked: bool) -> Measured:
        """One study of some rounds."""
        its, out = self._its, self._its.root / f"{name}.json"
        self._create(name, out, masked)
        its.approve(out)
        groups: dict[str, Callable[[], list[int]]] = {
            "hub": lambda: [its.processes.running["hub"].pid],
            "agents": lambda: [its.processes.running[site].pid for site in its.sites],
            "stand-ins": lambda: [process.pid for process in self._standins],
        }
        meter = Meter(groups, watched="hub")
        pixcell("run", "start", name, "--dir", its.server, "--ready-timeout", "300")
        committed, end = 0, time.monotonic() + PATIENCE_S
        while committed < self._rounds:
            state = its.board(name, history=False)
            assert state.state != "failed" and time.monotonic() < end, f"{state}\n{its.logs()}"
            if state.committed > committed:
                assert state.committed == committed + 1, "a round was too short to be seen"
                committed = state.committed
                meter.lap()
            meter.look()
            time.sleep(0.1)
        wait_until(lambda: its.board(name, history=False).state == "completed", 60, name)
        records = its.store(name).records()
        assert all(record.included == tuple(sorted(its.sites)) for record in records[1:]), records
        return Measured(meter.laps, meter.peak_mb)

    def stop(self) -> None:
        """End the stand-ins."""
        for process in self._standins:
            process.terminate()
            process.wait()

    def _create(self, name: str, out: Path, masked: bool) -> None:
        settings = {
            "base_digest": BASE,
            "code_digest": self._code,
            "rounds": self._rounds,
            "steps_per_round": 1,
            "noise_multiplier": 1.0,
            "max_grad_norm": 1.0,
            "delta": 1e-5,
            "epsilon_cap": 8.0,
            "expected_patients": 10,
            "tiles_per_patient": 2,
            "learning_rate": 0.1,
            "tile_size": 64,
            "mpp": 1.0,
            "quorum": len(self._its.sites),
            "round_timeout_s": 300.0,
            # Replies otherwise wait for whole multiples of 5 s, which is a choice, not a cost of the machinery.
            "reply_grid_s": 0.0,
            "max_update_norm": 1e6,
            "adapter": {"rank": RANK, "targets": ["block"]},
        }
        file = self._its.root / f"{name}.yaml"
        file.write_text(yaml.safe_dump(settings))
        words = ["--masking", "--coordinate-bound", "0.01"] if masked else []
        server = self._its.server
        pixcell("study", "create", "--dir", server, "--id", name, "--settings", file, "--out", out, *words)
        run = ServerLayout(server).run(name)
        run.mkdir(parents=True, exist_ok=True)
        (run / START_ADAPTER).write_bytes(arrays_to_bytes(start_of(self._parameters)))


# --- theirs ------------------------------------------------------------------------------------------------


class Theirs:
    """Flower as it is installed, with the keys and certificates of the same consortium."""

    def __init__(self, its: Consortium, folder: Path) -> None:
        self._its, self._folder = its, folder
        self._port = free_port()
        self._processes: list[tuple[str, subprocess.Popen[bytes]]] = []

    def open(self) -> None:
        """Start the SuperLink, register the sites' keys, start the SuperNodes."""
        pki = self._its.server / "pki"
        self._start(
            "superlink",
            *("flower-superlink", "--ssl-ca-certfile", pki / "ca.crt", "--ssl-certfile", pki / "server.crt"),
            *("--ssl-keyfile", pki / "server.key", "--enable-supernode-auth", "--host", "127.0.0.1"),
            *("--port", self._port, "--database", self._folder / "state.db"),
            "--disable-runtime-dependency-installation",
        )
        home = self._home("cli")
        config = f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{self._port}"\n'
        (home / "config.toml").write_text(config + f'root-certificates = "{pki / "ca.crt"}"\n')
        wait_until(lambda: _listens(self._port), 120, self._log("superlink"))
        for site in self._its.sites:
            public = self._folder / f"{site}.pub"
            request = json.loads(self._its.folder(site).request.read_text())
            public.write_text(request["node_key"] + "\n")
            self._flwr("supernode", "register", public, "here", "--name", site, "--format", "json")
        for site in self._its.sites:
            self._start(
                site,
                *("flower-supernode", "--root-certificates", pki / "ca.crt"),
                *("--superlink", f"127.0.0.1:{self._port}"),
                *("--auth-supernode-private-key", self._its.folder(site).node_key),
                *("--host", "127.0.0.1", "--port", free_port()),
            )

    def measure(self, update: Path, rounds: int) -> tuple[Measured, float]:
        """One run; also the processor seconds of a client's process before its app begins, per message."""
        marks = self._folder / "marks"
        marks.unlink(missing_ok=True)
        config = f'rounds={rounds} sites={len(self._its.sites)} update="{update}" marks="{marks}"'
        groups: dict[str, Callable[[], list[int]]] = {
            "superlink": lambda: [p.pid for name, p in self._processes if name == "superlink"],
            "supernodes": lambda: [p.pid for name, p in self._processes if name != "superlink"],
        }
        meter = Meter(groups, watched="superlink")
        self._flwr("run", FLOWER_APP, "here", "-c", config)
        seen, end = 0, time.monotonic() + PATIENCE_S
        while True:
            lines = marks.read_text().splitlines() if marks.exists() else []
            assert not any("error" in line for line in lines), f"{lines}\n{self._log('superlink')}"
            assert time.monotonic() < end, f"{lines}\n{self._log('superlink')}"
            laps = [line for line in lines if "cpu" not in line]
            # The first mark is the start of round 1, the second its end: that round is left out.
            if len(laps) > seen:
                seen = len(laps)
                if seen > 1:
                    meter.lap()
            if laps and laps[-1].endswith("end"):
                break
            meter.look()
            time.sleep(0.1)
        time.sleep(1.0)
        cpu = [float(line.split()[-1]) for line in marks.read_text().splitlines() if " cpu " in line]
        return Measured(meter.laps, meter.peak_mb), statistics.median(cpu)

    def stop(self) -> None:
        """End everything started here, children included."""
        from bench.real.meter import family

        everybody = family([process.pid for _, process in self._processes])
        for _, process in reversed(self._processes):
            process.terminate()
        for _, process in self._processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for left in everybody:
            if left.is_running():
                left.kill()

    def _start(self, name: str, *words: object) -> None:
        with (self._folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [str(BIN / str(words[0])), *map(str, words[1:])],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=self._environment(name),
            )
        self._processes.append((name, process))

    def _flwr(self, *words: object) -> None:
        done = subprocess.run(
            [str(BIN / "flwr"), *map(str, words)],
            env=self._environment("cli"),
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"

    def _home(self, name: str) -> Path:
        home = self._folder / "homes" / name
        home.mkdir(parents=True, exist_ok=True)
        return home

    def _environment(self, name: str) -> dict[str, str]:
        return os.environ | {
            "FLWR_HOME": str(self._home(name)),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        }

    def _log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text(errors="replace")[-4000:]


def _listens(port: int) -> bool:
    import socket

    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def client_start_cpu(times: int = 3) -> float:
    """Processor seconds of a flwr-clientapp process that gets as far as its arguments: the cost of a new process."""
    found = []
    for _ in range(times):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([str(BIN / "flwr-clientapp"), "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(found)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=5)
    parser.add_argument("--parameters", type=int, default=5_000_000)
    parser.add_argument("--rounds", type=int, default=4, help="Rounds of a run; the first is left out.")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", choices=("plain", "masked", "theirs", "memory"), help="One side alone.")
    given = parser.parse_args()
    say(load())
    sites = tuple(f"site-{i:02d}" for i in range(1, given.sites + 1))
    with tempfile.TemporaryDirectory(prefix="pixcell-overhead-") as text:
        root = Path(text)
        update = root / "update.npy"
        rng = np.random.default_rng(0)
        # As many as the tensors of the adapter hold.
        size = sum(value.size for value in start_of(given.parameters).values())
        np.save(update, rng.standard_normal(size, dtype=np.float32) * np.float32(1e-4))
        its = Consortium(root, sites)
        its.open()
        its.processes.end("hub")
        found: dict[str, list[Measured]] = {"theirs": [], "plain": [], "masked": []}
        starts = []
        for turn in range(given.repeats):
            if given.only in (None, "theirs"):
                folder = root / f"flower-{turn}"
                folder.mkdir()
                theirs = Theirs(its, folder)
                try:
                    theirs.open()
                    measured, start = theirs.measure(update, given.rounds)
                finally:
                    theirs.stop()
                show("bare Flower", measured)
                found["theirs"].append(measured)
                starts.append(start)
            if given.only == "theirs":
                continue
            its.start_hub()
            ours = None
            try:
                wait_until(its.hub_is_ready, 120, "the hub")
                its.start_sites()
                ours = Ours(its, update, given.parameters, given.rounds)
                for kind in ("plain", "masked"):
                    if given.only in (None, kind, "memory") and (given.only != "memory" or kind == "plain"):
                        measured = ours.measure(f"{kind}-{turn}", kind == "masked")
                        show(kind, measured)
                        found[kind].append(measured)
            finally:
                if ours is not None:
                    ours.stop()
                its.stop()
    if given.only is None:
        compare(found, starts, given.sites)
    say(load())


def show(name: str, measured: Measured) -> None:
    """One line."""
    print(
        f"{name}: {measured.wall:.1f} s wall, {measured.cpu:.1f} CPU-s a round ({measured.parts()}); "
        f"rounds {[round(lap.total, 1) for lap in measured.laps]} CPU-s, {[round(lap.wall, 1) for lap in measured.laps]} s; "
        f"server's peak {measured.peak_mb:.0f} MB",
        flush=True,
    )


def compare(found: dict[str, list[Measured]], starts: list[float], sites: int) -> None:
    """Ratios, paired by turn; once as Flower is, and once without what starting a process per message costs it."""
    started, bare = client_start_cpu(), statistics.median(starts)
    print(
        f"flwr-clientapp: {started:.2f} CPU-s to start, {bare:.2f} until its app begins; {sites} of them a round"
    )
    for kind in ("plain", "masked"):
        pairs = list(zip(found[kind], found["theirs"], strict=True))
        cpu = statistics.median(ours.cpu / theirs.cpu for ours, theirs in pairs)
        wall = statistics.median(ours.wall / theirs.wall for ours, theirs in pairs)
        warm = statistics.median(ours.cpu / (theirs.cpu - sites * started) for ours, theirs in pairs)
        print(f"{kind}: {cpu:.2f} x the CPU, {wall:.2f} x the wall time of bare Flower; ", end="")
        print(f"{warm:.2f} x its CPU without the start of its client processes")


if __name__ == "__main__":
    main()
