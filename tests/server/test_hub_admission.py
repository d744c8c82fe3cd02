"""The rules of the public door, each against a table; and mutants of the rules, which the table must catch."""

from __future__ import annotations

import ast
import json
import re
from base64 import b64encode
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from pixcell_core.trust.certificates import PartyCertificate, public_key_digest
from server.hub import admission as rules
from server.hub import gate, listener
from server.hub.admission import PEER, Admission, Bucket, Limits, Refusal
from server.hub.event_log import KEPT_FILES, MAX_KINDS, WINDOW_S, EventLog

NOW = datetime(2030, 1, 1, tzinfo=UTC)
KEYS = {name: ec.generate_private_key(ec.SECP384R1()).public_key() for name in ("east", "west")}


class Revoked:
    """A fixed set of serial numbers."""

    def __init__(self, *serials: str) -> None:
        self.serials = serials

    def is_revoked(self, serial: str) -> bool:
        return serial in self.serials


def certificate(**changes: Any) -> PartyCertificate:
    """The certificate of east."""
    values: dict[str, Any] = {
        "party": "east",
        "role": "site",
        "serial": "1",
        "not_before": NOW - timedelta(days=1),
        "not_after": NOW + timedelta(days=1),
        "node_key": public_key_digest(KEYS["east"]),
    }
    return PartyCertificate(**(values | changes))


def header_of(name: str, curve: Any = None) -> tuple[bytes, bytes]:
    """Flower's header with a public key."""
    key = KEYS[name] if curve is None else ec.generate_private_key(curve).public_key()
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return b"flwr-public-key", b64encode(pem)


def scope(peer: PartyCertificate | None, *headers: tuple[bytes, bytes]) -> dict[str, Any]:
    """A request."""
    return {PEER: peer, "headers": list(headers), "type": "http"}


EAST, WEST = header_of("east"), header_of("west")
TABLE: dict[str, tuple[dict[str, Any], str | None, str | None]] = {
    "honest": (scope(certificate(), EAST), "pull-messages", None),
    "honest again": (scope(certificate(), EAST), "push-object", None),
    "health of a site": (scope(certificate()), None, None),
    "health of an auditor": (scope(certificate(role="auditor", node_key=None)), None, None),
    "nobody": (scope(None, EAST), None, "not-a-party"),
    "revoked": (scope(certificate(serial="bad"), EAST), "pull-messages", "certificate-revoked"),
    "revoked, health": (scope(certificate(serial="bad")), None, "certificate-revoked"),
    "expired this second": (scope(certificate(not_after=NOW), EAST), "get-run", "certificate-expired"),
    "not yet valid": (
        scope(certificate(not_before=NOW + timedelta(seconds=1)), EAST),
        "get-run",
        "certificate-not-yet-valid",
    ),
    "auditor": (scope(certificate(role="auditor"), EAST), "get-run", "role-may-not"),
    "coordinator": (scope(certificate(role="coordinator"), EAST), "get-run", "role-may-not"),
    "no node key": (scope(certificate()), "get-run", "no-node-key"),
    "two node keys": (scope(certificate(), EAST, EAST), "get-run", "no-node-key"),
    "long node key": (scope(certificate(), (EAST[0], b"A" * 2000)), "get-run", "no-node-key"),
    "another's node key": (scope(certificate(), WEST), "get-run", "node-key-of-another"),
    "another's node key again": (scope(certificate(), WEST), "get-run", "node-key-of-another"),
    "a certificate without one": (
        scope(certificate(node_key=None), EAST),
        "get-run",
        "node-key-of-another",
    ),
    "not base64": (scope(certificate(), (EAST[0], b"%%%")), "get-run", "node-key-of-another"),
    "not a key": (scope(certificate(), (EAST[0], b"AAAA")), "get-run", "node-key-of-another"),
    "another curve": (
        scope(certificate(), header_of("east", ec.SECP256R1())),
        "get-run",
        "node-key-of-another",
    ),
    "upper-case header name": (
        scope(certificate(), (b"Flwr-Public-Key", WEST[1])),
        "get-run",
        "node-key-of-another",
    ),
}


def wrong_answers(door: Admission) -> set[str]:
    """Names of the table's rows that a door answers otherwise."""
    found = set()
    for name, (request, route, reason) in TABLE.items():
        refusal = door.judge(request, route)
        if (refusal.reason if refusal else None) != reason:
            found.add(name)
    return found


def door(cls: type[Admission] = Admission, **limits: Any) -> Admission:
    """A door at a fixed moment."""
    ticks = iter(range(10_000))
    return cls(Revoked("bad"), Limits(**limits), clock=lambda: NOW, ticks=lambda: float(next(ticks)))


def test_each_rule_answers_as_the_table_says() -> None:
    assert wrong_answers(door()) == set()


class ForgetsRevocation(Admission):
    def judge(self, scope: Any, route: Any) -> Refusal | None:
        self._revocations = Revoked()
        return super().judge(scope, route)


class StopsTheClock(Admission):
    def judge(self, scope: Any, route: Any) -> Refusal | None:
        self._clock = lambda: NOW - timedelta(hours=1)
        return super().judge(scope, route)


class TakesAnyKey(Admission):
    def _judge_node_key(self, scope: Any, peer: Any) -> Refusal | None:
        return None


class RemembersWrongly(Admission):
    """Trusts a header once it was right for somebody: the digest of another site's header passes for this one."""

    def _judge_node_key(self, scope: Any, peer: Any) -> Refusal | None:
        known = [v for n, v in scope["headers"] if v in self._node_keys or v == WEST[1]]
        return None if known else super()._judge_node_key(scope, peer)


@pytest.mark.parametrize(
    ("mutant", "caught_by"),
    [
        (ForgetsRevocation, {"revoked", "revoked, health"}),
        (StopsTheClock, {"expired this second"}),
        (TakesAnyKey, {"no node key", "another's node key", "not a key"}),
        (RemembersWrongly, {"another's node key"}),
    ],
)
def test_a_door_without_a_rule_is_caught(mutant: type[Admission], caught_by: set[str]) -> None:
    assert caught_by <= wrong_answers(door(mutant))


def test_a_role_that_is_not_looked_at_is_caught() -> None:
    asked = scope(certificate(role="auditor"), EAST)
    assert door().judge(asked, "get-run") is not None
    assert door().judge(scope(certificate(), EAST), "get-run") is None, "only the role differs"


@settings(max_examples=100, deadline=None)
@given(
    rate=st.floats(0.5, 100),
    burst=st.integers(1, 50),
    pauses=st.lists(st.floats(0, 2), min_size=1, max_size=200),
)
def test_a_bucket_never_gives_more_than_burst_and_rate_allow(
    rate: float, burst: int, pauses: list[float]
) -> None:
    bucket, now, passed = Bucket(rate, burst), 0.0, 0
    for pause in pauses:
        now += pause
        wait = bucket.take(now)
        passed += wait == 0.0
        assert passed <= burst + rate * now + 1e-6
        if wait > 0:
            assert wait <= 1 / rate + 1e-9
            now += wait + 1e-9
            assert bucket.take(now) == 0.0, "whoever waits as long as told is served"
            passed += 1


def test_parties_do_not_share_a_bucket_and_objects_have_their_own() -> None:
    still = Admission(Revoked(), Limits(call_burst=2, object_burst=3), clock=lambda: NOW, ticks=lambda: 0.0)
    east, west = scope(certificate(), EAST), scope(certificate(party="west"), EAST)
    reasons = [still.judge(east, "get-run") for _ in range(3)]
    assert [r.reason if r else None for r in reasons] == [None, None, "too-many-requests"]
    assert reasons[2] is not None and reasons[2].status == 429 and reasons[2].retry_after_s >= 1
    assert [still.judge(east, "push-object") is None for _ in range(4)] == [True, True, True, False]
    assert still.judge(west, "get-run") is None


def test_places_are_given_back() -> None:
    small = Admission(Revoked(), Limits(in_flight=2, connections_per_party=1))
    assert [small.begin("east") is None for _ in range(3)] == [True, True, False]
    small.end("east")
    assert small.begin("east") is None and small.begin("west") is None
    assert small.connect("east") and not small.connect("east")
    small.disconnect("east")
    assert small.connect("east")


def test_remembered_keys_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(door()._node_keys) == 0
    one = door()
    for _ in range(3):
        wrong_answers(one)
    assert set(one._node_keys) == {EAST[1]}, "only right answers are remembered"
    assert rules.MAX_NODE_KEY_HEADER == 1024


NOT_REASONS = {
    "content-length",
    "retry-after",
    "pixcell-refusal",
    "bad-server-certificate",
    "flwr-public-key",
}


def test_every_reason_stands_in_the_documentation() -> None:
    """A new reason without its line in `docs/enrolment.md` fails here, and so does a line without its reason."""
    used: set[str] = set()
    for module in (rules, gate, listener):
        tree = ast.parse(Path(str(module.__file__)).read_text())
        words = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        used |= {word for word in words if re.fullmatch(r"[a-z]+(-[a-z]+)+", word)}
    used -= NOT_REASONS | {path.rsplit("/", 1)[-1] for path in gate.FLEET_ROUTES | gate.RUNTIME_ROUTES}
    page = (Path(gate.__file__).parents[2] / "docs" / "enrolment.md").read_text()
    table = page.split("## Reasons of the event log")[1].split("## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    told = {word for row in rows for word in re.findall(r"`([a-z-]+)`", row)}
    assert used == told


# --- the log ----------------------------------------------------------------------------------------------------------


def lines(path: Path) -> list[dict[str, Any]]:
    """The log."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_refusals_that_are_alike_are_one_line_and_a_number(tmp_path: Path) -> None:
    clock = [0.0]
    log = EventLog(tmp_path / "events", ticks=lambda: clock[0])
    for _ in range(10_000):
        log.refuse("too-many-requests", party="busy")
    log.refuse("role-may-not", party="auditor", method="get-run")
    log.tick()
    assert len(lines(tmp_path / "events")) == 2
    clock[0] = WINDOW_S
    log.tick()
    log.tick()
    found = lines(tmp_path / "events")
    assert len(found) == 3 and found[2]["repeats"] == 9_999 and found[2]["party"] == "busy"
    log.refuse("too-many-requests", party="busy")
    assert len(lines(tmp_path / "events")) == 4, "a new window tells its first at once"


def test_ever_new_kinds_of_refusal_do_not_flood_the_log(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events")
    for number in range(5_000):
        log.refuse("nothing-here", party=f"party-{number}")
    log.tick(final=True)
    found = lines(tmp_path / "events")
    assert len(found) == MAX_KINDS + 2
    assert found[-1] | {"at": ""} == {
        "at": "",
        "event": "refused",
        "reason": "others",
        "party": "",
        "method": "",
        "repeats": 5_000 - MAX_KINDS - 1,
    }


def test_a_full_log_is_put_aside_and_the_oldest_goes(tmp_path: Path) -> None:
    path = tmp_path / "events"
    log = EventLog(path, max_bytes=2_000)
    for number in range(1_000):
        log.say("hub-started", port=number)
    files = sorted(tmp_path.iterdir())
    assert len(files) == KEPT_FILES + 1 and all(file.stat().st_size <= 2_000 for file in files)
    assert lines(path)[-1]["port"] == 999
    assert lines(tmp_path / "events.1")[-1]["port"] == lines(path)[0]["port"] - 1
    again = EventLog(path, max_bytes=2_000)
    again.say("hub-stopped")
    assert lines(path)[-1]["event"] == "hub-stopped"
