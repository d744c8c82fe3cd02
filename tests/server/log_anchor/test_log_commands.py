"""The whole way by the command line: a site's log is proven, offered, anchored, and the receipt checked offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pixcell_core.cli import main
from pixcell_core.trust.keys import SigningKey
from pixcell_core.trust.log import EventLog, read_entries
from site_client.approvals.act_log import note_act
from site_client.approvals.site_folder import SiteFolder
from tests.server.enrolled import Enrolment, make_enrolment


class Desk:
    """A site and its coordinator, each typing commands."""

    def __init__(self, made: Enrolment) -> None:
        self.made, self.root = made, made.root
        self.site: SiteFolder = made.party("north")
        self.log = self.site.root / "log"
        self.coordinator = made.layout.root / "log"

    def run(self, *arguments: object, expect: int = 0) -> dict[str, Any]:
        result = CliRunner().invoke(main.build(), [*map(str, arguments), "--format", "json"])
        assert result.exit_code == expect, result.output
        body: dict[str, Any] = json.loads(result.stdout)
        return dict(body["data"]) if expect == 0 else body

    def offer(self, *more: object) -> Path:
        out = self.root / "offer.json"
        self.run(
            "log",
            "offer",
            self.log,
            "--party",
            "north",
            "--sign-with",
            self.site.approval_key,
            "--out",
            out,
            *more,
        )
        return out


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(make_enrolment(tmp_path))


def test_an_enrolled_site_has_a_log_that_says_so(desk: Desk) -> None:
    assert [entry.kind for entry in read_entries(desk.log)] == ["site.enrolled", "site.kit-installed"]
    shown = desk.run("log", "verify", desk.log)
    assert shown["entries"] == 2


def test_offer_anchor_accept_twice_and_check_everything_offline(desk: Desk) -> None:
    receipt, key = desk.root / "receipt.json", desk.coordinator / "log.pub"
    anchored = desk.run("log", "anchor", desk.offer(), "--dir", desk.made.layout.root, "--out", receipt)
    assert (anchored["party"], anchored["tree_size"], anchored["again"]) == ("north", 2, False)
    assert desk.run("log", "accept", receipt, "--log", desk.log, expect=4)["code"] == "no-coordinator-key"
    accepted = desk.run("log", "accept", receipt, "--log", desk.log, "--key", key)
    assert (accepted["anchored_size"], accepted["grown_since_last"]) == (2, False)
    desk.run("log", "head", desk.coordinator, "--out", desk.root / "head1")
    note_act(desk.site, "approval.decided", {"study": "sha256:" + "0" * 64})
    desk.run("log", "anchor", desk.offer(), "--dir", desk.made.layout.root, "--out", receipt)
    accepted = desk.run("log", "accept", receipt, "--log", desk.log)
    assert (accepted["anchored_size"], accepted["grown_since_last"]) == (3, True)
    # Anyone with the coordinator's key checks the receipt; with the log's key, proofs about the log.
    assert "anchored" in desk.run("log", "verify-proof", receipt, "--key", key)["about"]
    desk.run("log", "verify-proof", receipt, "--key", desk.log / "log.pub", expect=1)
    desk.run("log", "verify-proof", receipt, "--key", key, "--head", desk.root / "head1", expect=1)
    proof, head = desk.root / "proof.json", desk.root / "head"
    desk.run("log", "head", desk.log, "--out", head)
    assert desk.run("log", "prove", desk.log, 1, "--out", proof)["hashes"] == 2
    found = desk.run("log", "verify-proof", proof, "--key", desk.log / "log.pub", "--head", head)
    assert (found["tree_size"], found["head_compared"]) == (3, True)
    proof.write_bytes(proof.read_bytes().replace(b"site.kit-installed", b"site.kit-unstalled"))
    assert (
        desk.run("log", "verify-proof", proof, "--key", desk.log / "log.pub", expect=1)["code"]
        == "log-proof-refused"
    )
    older = ("verify-proof", proof, "--key", key, "--older", desk.root / "head1")
    desk.run("log", "prove", desk.coordinator, "--since", 3, "--out", proof)
    assert desk.run("log", *older)["about"] == "the log only grew since it had 3 events"
    desk.run("log", "prove", desk.coordinator, "--since", 2, "--out", proof)
    refused = desk.run("log", *older, expect=1)
    assert refused["code"] == "log-proof-refused", "the proof begins at another head than the one held"
    heads = desk.run("log", "anchors", "--dir", desk.made.layout.root)["heads"]
    assert [(one["party"], one["tree_size"]) for one in heads] == [("north", 3)]
    assert desk.run("log", "acts", "--dir", desk.made.layout.root)["missing"] == []
    assert (
        desk.run("log", "verify", desk.coordinator, "--key", key, "--receipt", receipt)[
            "earlier_heads_checked"
        ]
        == 1
    )


def test_a_site_log_that_was_rewritten_meets_its_own_receipt_and_the_coordinator(desk: Desk) -> None:
    receipt, key = desk.root / "receipt.json", desk.coordinator / "log.pub"
    desk.run("log", "anchor", desk.offer(), "--dir", desk.made.layout.root, "--out", receipt)
    desk.run("log", "accept", receipt, "--log", desk.log, "--key", key)
    kept = read_entries(desk.log)
    (desk.log / "log.jsonl").unlink()
    log = EventLog(desk.log, SigningKey.load(desk.site.keys / "release"))
    log.append(kept[0].kind, {**kept[0].data, "site": "south"})
    log.append(kept[1].kind, kept[1].data)
    assert desk.run("log", "verify", desk.log, expect=1)["code"] == "log-broken"
    refused = desk.run("log", "anchor", desk.offer(), "--dir", desk.made.layout.root, expect=1)
    assert refused["code"] == "log-forked"
    (desk.log / "anchor.json").unlink()
    assert desk.run("log", "verify", desk.log)["entries"] == 2, "without any head held it looks whole"
    assert (
        desk.run("log", "anchor", desk.offer(), "--dir", desk.made.layout.root, expect=1)["code"]
        == "log-forked"
    )


def test_what_makes_no_sense_is_said(desk: Desk) -> None:
    out = desk.root / "proof"
    for arguments in (
        ("prove", desk.log, "--out", out),
        ("prove", desk.log, 0, "--since", 1, "--out", out),
        ("prove", desk.log, 2, "--out", out),
        ("prove", desk.log, "--since", 3, "--out", out),
        ("prove", desk.root, 0, "--out", out),
        ("anchor", desk.root / "nothing", "--dir", desk.made.layout.root),
        ("anchors", "--dir", desk.root),
    ):
        assert desk.run("log", *arguments, expect=4)["hint"], arguments
    desk.run("log", "prove", desk.log, 0, "--out", out)
    older = ("verify-proof", out, "--key", desk.log / "log.pub", "--older", out)
    desk.run("log", *older, expect=4 if not out.exists() else 1)
    assert desk.run("log", "verify-proof", desk.log / "log.jsonl", "--key", desk.log / "log.pub", expect=4)[
        "hint"
    ]
    SigningKey.generate().save(desk.root / "other")
    SigningKey.load(desk.root / "other").verify_key.save(desk.root / "other.pub")
    receipt = desk.root / "receipt.json"
    desk.run("log", "anchor", desk.offer(), "--dir", desk.made.layout.root, "--out", receipt)
    desk.run("log", "accept", receipt, "--log", desk.log, "--key", desk.coordinator / "log.pub")
    changed = desk.run(
        "log", "accept", receipt, "--log", desk.log, "--key", desk.root / "other.pub", expect=1
    )
    assert changed["code"] == "coordinator-key-changed"
