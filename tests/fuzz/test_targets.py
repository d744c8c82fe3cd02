"""The fuzzing targets themselves, without a fuzzer: seeds are read, and plain mutations of them are refused by name."""

from __future__ import annotations

import resource
import subprocess
import sys
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.names import NAMES
from tests.fuzz.targets import TARGETS, attempt


def test_every_target_has_its_name_and_its_seeds() -> None:
    assert set(NAMES) == set(TARGETS)


@pytest.mark.parametrize("name", NAMES)
def test_seeds_are_read(name: str) -> None:
    """One at least is a whole, true document, so that a fuzzer begins behind the first check."""
    assert any([attempt(name, seed) for seed in TARGETS[name].seeds()])


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutants_are_refused_by_name_or_read(name: str, data: st.DataObject) -> None:
    seed = data.draw(st.sampled_from(TARGETS[name].seeds()))
    start, length = data.draw(st.integers(0, len(seed))), data.draw(st.integers(0, 12))
    mutant = seed[:start] + data.draw(st.binary(max_size=12)) + seed[start + length :]
    # An undeclared exception leaves `attempt`; and the same bytes are judged alike however often they come.
    assert attempt(name, mutant) is attempt(name, mutant)


DEEP = 200_000
BOMBS = {
    "json": b"[" * DEEP,
    "documents": b"\0" + b'{"a":' * DEEP,
    "envelope": b'{"payload":' * DEEP,
    "policy": b"a: " + b"[" * DEEP,
    "log": b'{"entry":' * DEEP + b"\n",
    "proof": b'{"entry":{"data":' * DEEP,
    "ledger-line": b"[" * DEEP,
    "ledger-export": b'{"lines":[' * DEEP,
    "public-key": b"-----BEGIN PUBLIC KEY-----\n" + b"A" * DEEP,
    "tile-png": b"\x89PNG\r\n\x1a\n" + b"\xff\xff\xff\xffIHDR" * 1000,
    "tile-jpeg": b"\xff\xd8" + b"\xff\xe1\xff\xff" * 50_000,
    "archive": b"PK\x01\x02" * 50_000 + b"PK\x05\x06" + b"\xff" * 18,
}


@pytest.mark.parametrize("name", sorted(BOMBS))
def test_depth_and_size_cost_little(name: str) -> None:
    before, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert not attempt(name, BOMBS[name])
    assert time.process_time() - before < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300_000, "kilobytes"


def test_a_policy_of_aliases_is_not_unfolded() -> None:
    """Each line of aliases doubles: thirty of them would be a thousand million entries."""
    lines = [b"a0: &a0 [x, x]"] + [b"a%d: &a%d [*a%d, *a%d]" % (n, n, n - 1, n - 1) for n in range(1, 30)]
    before, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert not attempt("policy", b"\n".join(lines))
    for place in (b"name: &x ", b"schema_version: &x ", b"required: &x "):
        assert not attempt("policy", b"\n".join(lines) + b"\n" + place.replace(b"&x ", b"*a29"))
    assert time.process_time() - before < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300_000, "kilobytes"


def test_without_its_extra_the_runner_says_what_to_install() -> None:
    # Hidden where it is installed, so that this runs everywhere.
    script = "import runpy, sys; sys.modules['atheris'] = None; runpy.run_module('tests.fuzz', run_name='__main__')"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == 4 and "pixcell[fuzz]" in ended.stderr
