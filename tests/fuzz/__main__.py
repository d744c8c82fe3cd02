"""`python -m tests.fuzz --seconds N [--target NAME …] [--corpus DIR]`: every target in a process of its own.

Needs atheris (pip install 'pixcell[fuzz]'). A finding is kept under `--findings` with its trace; the exit code is 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

SECONDS_PER_INPUT, MEGABYTES = 20, 2048
# Of the wall clock, which is what libFuzzer counts: a busy machine stretches a few milliseconds of work.
_DONE = re.compile(r"stat::number_of_executed_units:\s*(\d+)")
_SHAPE = re.compile(r"cov: (\d+) ft: (\d+)")


def main() -> int:
    """Run what was asked for; returns how many targets had a finding, at most 1."""
    from tests.fuzz.names import NAMES

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--target", action="append", choices=NAMES, help="only this one (repeatable)")
    parser.add_argument(
        "--corpus", type=Path, help="keep inputs that reached new code here, and begin from them"
    )
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    parser.add_argument("--child", choices=NAMES, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not installed. It is optional: pip install 'pixcell[fuzz]'", file=sys.stderr)
        return 4
    corpus = asked.corpus or Path(tempfile.mkdtemp(prefix="pixcell-corpus-"))
    if asked.child:
        fuzz_here(asked.child, asked.seconds, corpus, asked.findings)
        return 0
    asked.findings.mkdir(parents=True, exist_ok=True)
    shared = Path("/dev/shm")
    place = shared if os.access(shared, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="pixcell-fuzz-", dir=place) as room:
        results = [
            _in_child(name, asked.seconds, corpus, asked.findings, Path(room))
            for name in asked.target or NAMES
        ]
    return 0 if all(results) else 1


def _in_child(name: str, seconds: int, corpus: Path, findings: Path, room: Path) -> bool:
    """Fuzz one target in a process of its own and say how it went; True where nothing was found."""
    from tests.fuzz.names import ROOM

    more = ("--child", name, "--seconds", str(seconds), "--corpus", str(corpus), "--findings", str(findings))
    ended = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *more],
        capture_output=True, text=True, errors="replace", check=False, env={**os.environ, ROOM: str(room)},
    )  # fmt: skip
    said = ended.stdout + ended.stderr
    runs, shape = _DONE.search(said), _SHAPE.findall(said)
    reached = f", {shape[-1][0]} edges, {shape[-1][1]} features" if shape else ""
    clean = ended.returncode == 0
    outcome = "nothing found" if clean else "FINDING"
    print(f"{name}: {runs.group(1) if runs else '?'} runs{reached}: {outcome}", flush=True)
    if not clean:
        (findings / f"{name}.log").write_text(said)
    return clean


def fuzz_here(name: str, seconds: int, corpus: Path, findings: Path) -> None:
    """Fuzz one target in this process until the time is up or something is found."""
    import atheris

    with atheris.instrument_imports(include=["pixcell_core", "privacy_audit"]):
        from tests.fuzz import targets

    place = corpus / name
    place.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(targets.TARGETS[name].seeds()):
        (place / f"seed-{number}").write_bytes(seed)
    limits = (
        *(f"-max_total_time={seconds}", f"-timeout={SECONDS_PER_INPUT}", f"-rss_limit_mb={MEGABYTES}"),
        *(
            f"-max_len={targets.TARGETS[name].max_bytes}",
            f"-artifact_prefix={findings}/{name}-",
            "-print_final_stats=1",
        ),
    )
    atheris.Setup([sys.argv[0], *limits, str(place)], lambda data: targets.attempt(name, data) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
