"""Kills parts of a running federation at random moments of whole studies, and checks that nothing is lost.

    python -m bench.real.kills [--seed 5] [--out FILE.jsonl]

One consortium of three sites with real trainers runs study after study, plain and under masks by turns. A killed hub or
agent is started again as a service manager would, everything else by whoever supervises it; a run that failed is
resumed. Every study must complete before its deadline, and its disks are judged by `bench.real.findings`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import psutil

from bench.real.consortium import Consortium, load, say
from bench.real.findings import read_standing, verdict
from tests.server.processes import pixcell
from tests.site_client.trainer.site_fixture import TARGETS, make_base, make_features

SITES = ("east", "north", "west")
ROUNDS, STEPS = 4, 20
ROUND_TIMEOUT_S, READY_TIMEOUT_S = 60.0, 60.0
RESTART_S = 90.0
"""Allowed for one start of processes on a busy machine: hub, agent or the command that resumes."""

PLAN = {
    "trainer": 6,
    "hub": 3,
    "hub-executor": 2,
    "round-loop": 2,
    "supervisor": 2,
    "supernode": 3,
    "executor": 2,
}
"""Kills by part; 20 in all."""


@dataclass
class Kill:
    """One kill: what, when (seconds into the study, the run's round), and what came of it."""

    number: int
    part: str
    site: str
    study: str = ""
    masked: bool = False
    at_s: float = 0.0
    round: int = 0
    board: str = ""
    recovery_s: float | None = None
    resumed: bool = False
    came: str = ""


@dataclass
class Run:
    """One study while it runs: its clock, and how often it was resumed."""

    name: str
    masked: bool
    began: float
    resumes: int = 0
    kills: list[Kill] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    @property
    def deadline_s(self) -> float:
        """Every start waits for its sites once; a resume repeats one round at most; a kill costs one restart."""
        starts = 1 + self.resumes
        return (
            starts * READY_TIMEOUT_S + (ROUNDS + self.resumes) * ROUND_TIMEOUT_S + len(self.kills) * RESTART_S
        )


class Stuck(AssertionError):
    """Something was not done in its time."""


class Operator:
    """Does what service managers and a coordinator do: restart hub and agents that fell, resume a run that failed."""

    def __init__(self, consortium: Consortium) -> None:
        self._its = consortium
        self._run: Run | None = None

    def start(self, name: str, masked: bool) -> Run:
        """Create a study, let all sites approve it, start its run."""
        its, out = self._its, self._its.root / f"{name}.json"
        flags = {
            "--rounds": ROUNDS,
            "--steps": STEPS,
            "--sigma": 4,
            "--clip": 0.1,
            "--delta": 1e-5,
            "--epsilon-cap": 100_000,
            "--expected-patients": 5,
            "--tiles-per-patient": 2,
            "--learning-rate": 0.1,
            "--rank": 2,
            "--targets": ",".join(TARGETS),
            "--tile-size": 64,
            "--mpp": 1.0,
            "--quorum": 2,
            "--round-timeout": ROUND_TIMEOUT_S,
            "--base": its.base,
        }
        words = [str(word) for pair in flags.items() for word in pair]
        words += ["--masking", "--coordinate-bound", "0.5"] if masked else []
        pixcell("study", "create", "--dir", its.server, "--id", name, "--out", out, *words)
        its.approve(out)
        run = Run(name, masked, time.monotonic())
        self._command("start", name)
        self._run = run
        return run

    def tend(self) -> None:
        """One look: restart what a service manager would restart, resume what failed."""
        its = self._its
        if not its.running("hub"):
            its.start_hub()
        for site in its.sites:
            if not its.running(site):
                its.start_site(site)
        run = self._run
        if run is None:
            return
        if time.monotonic() - run.began > run.deadline_s:
            raise Stuck(f"{run.name} is not done after {run.deadline_s:.0f} s\n{its.logs()}")
        if not its.hub_is_ready():
            return
        state = its.board(run.name, history=False)
        if state.state == "failed":
            run.reasons.append(state.reason)
            with suppress(AssertionError):
                # Refused where the hub fell again meanwhile; the next look tries again.
                self._command("resume", run.name)
                run.resumes += 1

    def wait(self, true: Callable[[], bool], seconds: float, what: str) -> float:
        """Tend until a condition holds; returns the seconds it took."""
        began = time.monotonic()
        while not true():
            if time.monotonic() - began > seconds:
                raise Stuck(f"waited {seconds:.0f} s for {what}\n{self._its.logs()}")
            self.tend()
            time.sleep(0.1)
        return time.monotonic() - began

    def state(self, run: Run) -> str:
        """The run's state now."""
        return self._its.board(run.name, history=False).state

    def _command(self, verb: str, name: str) -> None:
        pixcell("run", verb, name, "--dir", self._its.server, "--ready-timeout", f"{READY_TIMEOUT_S:g}")


def begun(operator: Operator, run: Run) -> bool:
    """Whether the run's loop has said something."""
    return operator.state(run) != "submitted"


def strike(its: Consortium, operator: Operator, run: Run, kill: Kill) -> bool:
    """Kill one part, wait until it and the run are back; False where the part was not there to be killed."""
    pid = its.process(kill.part, kill.site, run.name)
    if pid is None:
        return False
    state = its.board(run.name, history=False)
    try:
        family = psutil.Process(pid).children(recursive=True)
        os.kill(pid, signal.SIGKILL)
    except (psutil.Error, ProcessLookupError):
        return False
    kill.study, kill.masked, kill.round, kill.board = run.name, run.masked, state.round, state.state
    kill.at_s = round(time.monotonic() - run.began, 1)
    run.kills.append(kill)
    before, moment, hub = run.resumes, datetime.now(UTC), its.processes.running["hub"].pid
    say(f"kill {kill.number}: {kill.part} {kill.site} in round {kill.round} of {run.name}")

    def back() -> bool:
        if operator.state(run) not in ("running", "completed"):
            return False
        gone_on = operator.state(run) == "completed" or run.resumes > before
        match kill.part:
            case "hub" | "hub-executor":
                # A hub without its executor ends by itself; the next one hears the sites anew.
                fresh = its.processes.running["hub"].pid != hub and its.hub_is_ready()
                return fresh and gone_on and all(its.connected(site, moment) for site in its.sites)
            case "round-loop":
                return gone_on and its.process("round-loop", study=run.name) != pid
            case "executor":
                return its.process("executor", kill.site) not in (None, pid)
            case "trainer":
                return its.trainer_ready(kill.site) not in (None, pid)
            case _:
                now = its.process("supernode", kill.site)
                return now not in (None, pid) and its.connected(kill.site, moment)

    if kill.part in ("hub", "supervisor"):
        its.processes.running["hub" if kill.part == "hub" else kill.site].wait()
    kill.recovery_s = round(operator.wait(back, 240, f"{kill.part} {kill.site} to come back"), 1)
    kill.resumed = run.resumes > before
    orphans = [child for child in psutil.wait_procs(family, timeout=10)[1] if _left(child)]
    assert not orphans, f"{kill.part} left {[' '.join(child.cmdline()) for child in orphans]}"
    return True


def _left(child: psutil.Process) -> bool:
    try:
        return bool(child.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def finish(its: Consortium, operator: Operator, run: Run) -> list[str]:
    """Wait for the study's end, judge the disks, say of each kill what came of it; returns what is wrong."""
    operator.wait(lambda: operator.state(run) == "completed", run.deadline_s, f"{run.name} to complete")
    took = time.monotonic() - run.began
    found = read_standing(its, run.name)
    wrong = verdict(found)
    for kill in run.kills:
        lost = [
            f"round {record.round} without {gone.site} ({gone.code})"
            for record in found.records
            for gone in record.excluded
            if record.round in (kill.round, kill.round + 1) and kill.site in ("", gone.site)
        ]
        kill.came = "; ".join((["run resumed"] if kill.resumed else []) + lost) or "no round lost a site"
    charged = {site: sum(rounds.values()) for site, rounds in found.charged.items()}
    counted = {site: STEPS * sum(site in r.included for r in found.records) for site in its.sites}
    say(
        f"{run.name}: {took:.0f} s of at most {run.deadline_s:.0f}, {len(run.kills)} kills, {run.resumes} resumes; "
        f"steps charged {charged}, counted {counted}; {'WRONG: ' + '; '.join(wrong) if wrong else 'whole'}"
    )
    return wrong


@contextmanager
def federation(root: Path) -> Iterator[tuple[Consortium, Operator]]:
    """Three sites with tiny real trainers, ready."""
    its = Consortium(root, SITES, make_base(root / "base"), poll_s=0.3)
    for site in SITES:
        make_features(its.site(site) / "features" / "train", site)
    try:
        its.open()
        its.start_sites()
        yield its, Operator(its)
    finally:
        its.stop()


def plan(rng: random.Random, parts: dict[str, int]) -> list[Kill]:
    """The kills in a random order, each at a random site where it is a site's part."""
    order = [part for part, times in parts.items() for _ in range(times)]
    rng.shuffle(order)
    return [
        Kill(number, part, "" if part in ("hub", "hub-executor", "round-loop") else rng.choice(SITES))
        for number, part in enumerate(order, 1)
    ]


def main() -> None:
    """Run all kills, print the table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument(
        "--longest-pause", type=float, default=9.0, help="Seconds between recovery and next kill."
    )
    parser.add_argument("--kills", type=int, default=sum(PLAN.values()), help="So many of the plan.")
    parser.add_argument("--most", type=int, default=4, help="Kills in one study.")
    parser.add_argument("--studies", choices=("both", "plain", "masked"), default="both")
    parser.add_argument("--out", type=Path, default=Path("kills.jsonl"))
    given = parser.parse_args()
    rng = random.Random(given.seed)
    kills = plan(rng, PLAN)[: given.kills]
    left, wrong = list(kills), list[str]()
    runs: list[Run] = []
    began = time.monotonic()
    say(load())
    with (
        tempfile.TemporaryDirectory(prefix="pixcell-kills-") as text,
        federation(Path(text)) as (its, operator),
    ):
        say(f"ready after {time.monotonic() - began:.0f} s")
        while left:
            run = operator.start(
                f"study-{len(runs) + 1}",
                masked=given.studies == "masked" or (given.studies == "both" and len(runs) % 2 == 1),
            )
            runs.append(run)
            operator.wait(partial(begun, operator, run), 120, "the run to begin")
            while left and len(run.kills) < given.most and operator.state(run) != "completed":
                pause, start = rng.uniform(0.0, given.longest_pause), time.monotonic()
                while time.monotonic() - start < pause and operator.state(run) != "completed":
                    operator.tend()
                    time.sleep(0.05)
                if operator.state(run) != "completed" and strike(its, operator, run, left[0]):
                    done = left.pop(0)
                    say(f"  back after {done.recovery_s} s{', run resumed' if done.resumed else ''}")
            wrong += finish(its, operator, run)
            with given.out.open("a") as stream:
                stream.writelines(json.dumps(asdict(kill)) + "\n" for kill in run.kills)
        say(load())
    took = time.monotonic() - began
    print("| n | killed | study | at, s | round | back after, s | what came of it |")
    print("|---|---|---|---|---|---|---|")
    for kill in kills:
        masked = " (masked)" if kill.masked else ""
        print(
            f"| {kill.number} | {kill.part} {kill.site} | {kill.study}{masked} | {kill.at_s:.1f} | {kill.round} "
            f"| {kill.recovery_s:.1f} | {kill.came} |"
        )
    print(
        f"{len(kills)} kills over {len(runs)} studies in {took:.0f} s; wrong: {'; '.join(wrong) or 'nothing'}"
    )
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
