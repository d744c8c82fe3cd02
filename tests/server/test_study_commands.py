"""`pixcell study create`: flags make the study that sites approve; nothing is written where one is refused."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from pixcell_core.contracts.canonical import digest, load_document
from pixcell_core.contracts.study import Approval, Study
from pixcell_core.private.accounting import epsilon
from pixcell_core.private.study_charges import planned_events
from pixcell_core.trust.keys import SigningKey
from server.enrolment.pki import initialise
from server.enrolment.sites import SiteBook
from server.hub.bundle import build_bundle
from server.layout import START_ADAPTER, ServerLayout
from server.rounds.approvals_seen import ApprovalsSeen
from server.studies.book import StudyBook
from server.studies.commands import register
from server.studies.invitation import letter
from server.studies.overview import StudyShown, plan_of
from tests.server.enrolled import PASSPHRASE
from tests.server.test_studies import request_of
from tests.site_client.trainer.site_fixture import TARGETS, make_base

SITES = ("east", "north", "west")
DIGEST = "sha256:" + "c" * 64
KEYS = {site: SigningKey.generate() for site in SITES}
SETTINGS = (
    "--rounds 2 --steps 2 --sigma 4 --clip 0.001 --delta 1e-5 --epsilon-cap 8 --learning-rate 2000 "
    "--expected-patients 50 --tiles-per-patient 2 --tile-size 64 --mpp 1.0"
)
VOTES = f"--conditioning private --votes-noise 6 --votes-iterations 3 --candidates-digest {DIGEST}"
OTHERS = "--adapter lora --rank 2 --sample-rate 0.5 --ema-decay 0.9"


class Desk:
    """A coordinator's folder with three enrolled sites, and the command."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.base = folder / "server", make_base(folder / "base")
        initialise(ServerLayout(self.folder), ["127.0.0.1"], PASSPHRASE)
        for site in SITES:
            request = request_of(site, approval_key=KEYS[site].verify_key.to_pem().decode())
            (folder / f"{site}.json").write_bytes(request.to_bytes())
            SiteBook(ServerLayout(self.folder).registry()).add(folder / f"{site}.json")

    def create(self, name: str, *more: str) -> tuple[int, dict[str, Any]]:
        """Exit code and envelope of `study create`."""
        given = ["create", "--id", name, "--base", str(self.base), *SETTINGS.split()]
        return self.call(*given, "--targets", ",".join(TARGETS), *more)

    def call(self, *words: str) -> tuple[int, dict[str, Any]]:
        """Exit code and envelope of `study ...`."""
        root = typer.Typer()
        root.callback()(lambda: None)
        register(root)
        given = ["study", *words, "--dir", str(self.folder), "--format", "json"]
        result = CliRunner().invoke(root, given)
        return result.exit_code, json.loads(result.stdout)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(tmp_path_factory.mktemp("desk"))


def test_private_conditions_and_plain_lora_by_flags(desk: Desk) -> None:
    code, body = desk.create("one", *VOTES.split(), *OTHERS.split(), "--labels", "tumour, stroma")
    assert code == 0, body
    study = body["data"]["study"]
    assert study["conditioning"]["votes"] == {
        "noise_multiplier": 6.0,
        "iterations": 3,
        "candidates": 128,
        "threshold": 2.0,
        "labels": ["tumour", "stroma"],
        "candidates_digest": DIGEST,
    }
    assert (study["adapter"]["kind"], study["adapter"]["rank"]) == ("lora", 2)
    assert (study["sample_rate"], study["ema_decay"]) == (0.5, 0.9)


def test_blending_is_the_default_and_its_k_a_flag(desk: Desk) -> None:
    assert desk.create("two")[1]["data"]["study"]["conditioning"] == {"mode": "blend", "k": 3, "votes": None}
    assert desk.create("three", "--blend-k", "5")[1]["data"]["study"]["conditioning"]["k"] == 5


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        ("--conditioning private", "impossible-study"),
        (f"--votes-noise 3 --candidates-digest {DIGEST}", "impossible-study"),
        ("--conditioning secret", "impossible-study"),
        ("--blend-k 2", "impossible-study"),
        ("--sample-rate 0", "impossible-study"),
        ("--sample-rate 1.5", "impossible-study"),
        ("--delta 0.1", "impossible-study"),
        ("--epsilon-cap 0", "impossible-study"),
        ("--adapter full", "impossible-study"),
        ("--targets attn2.to_q", "silent-adapter-target"),
        ("--rule best", "impossible-study"),
        ("--trim 0.4", "impossible-study"),
        ("--rule trimmed-mean", "impossible-study"),
        ("--rule trimmed-mean --trim 0.5", "impossible-study"),
        ("--rule trimmed-mean --trim 0.3", "impossible-study"),
        ("--rule median --quorum 2", "impossible-study"),
        ("--proximal-mu -1", "impossible-study"),
        ("--proximal-mu 0.001", "impossible-study"),
        ("--server-optimizer sgdm", "impossible-study"),
        ("--server-learning-rate 0", "impossible-study"),
        ("--straggler-rule never", "impossible-study"),
        ("--straggler-grace 0", "impossible-study"),
        ("--masking", "no-coordinate-bound"),
        ("--masking --coordinate-bound 1 --rule median", "impossible-study"),
        ("--masking --coordinate-bound 1 --threshold 4", "impossible-study"),
        ("--masking --coordinate-bound 1 --threshold 1", "impossible-study"),
        ("--masking --coordinate-bound 1 --sites east,west", "impossible-study"),
        ("--threshold 2", "needs-masking"),
        ("--sites east,nowhere", "unknown-site"),
    ],
)
def test_what_cannot_be_promised_is_refused_and_nothing_is_written(desk: Desk, flags: str, code: str) -> None:
    exit_code, body = desk.create("never", *flags.split())
    assert exit_code in (1, 4) and body["code"] == code
    layout = ServerLayout(desk.folder)
    assert "never" not in StudyBook(layout.registry()).ids() and not layout.run("never").exists()


def test_aggregation_stragglers_and_the_app_by_flags(desk: Desk) -> None:
    flags = "--rule trimmed-mean --trim 0.34 --proximal-mu 0.0001 --server-optimizer adam --straggler-grace 9"
    code, body = desk.create("robust", *flags.split(), "--server-learning-rate", "0.01")
    assert code == 0, body
    study = body["data"]["study"]
    assert study["aggregation"] == {
        "rule": "trimmed-mean",
        "trim": 0.34,
        "proximal_mu": 0.0001,
        "server_optimizer": "adam",
        "server_learning_rate": 0.01,
        "masking": None,
    }
    assert (study["straggler_rule"], study["straggler_grace_s"]) == ("grace", 9.0)
    assert study["app_digest"] == digest(build_bundle())


def test_masking_takes_the_keys_of_the_enrolled_sites(desk: Desk) -> None:
    code, body = desk.create("masked", "--masking", "--coordinate-bound", "0.5")
    assert code == 0, body
    masking = body["data"]["study"]["aggregation"]["masking"]
    book = SiteBook(ServerLayout(desk.folder).registry())
    assert (masking["threshold"], masking["coordinate_bound"]) == (2, 0.5)
    assert masking["identities"] == [
        {"site": site, "approval_key": book.get(site).approval_key} for site in SITES
    ]


def test_flags_win_over_the_settings_file_in_the_aggregation_too(desk: Desk, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("aggregation:\n  rule: median\n  server_learning_rate: 0.5\n")
    study = desk.create("by-file", "--settings", str(path), "--server-learning-rate", "0.25")[1]["data"][
        "study"
    ]
    assert (study["aggregation"]["rule"], study["aggregation"]["server_learning_rate"]) == ("median", 0.25)


def test_a_taken_name_leaves_the_start_of_the_study_that_has_it(desk: Desk) -> None:
    assert desk.create("taken", "--rank", "2")[0] == 0
    start = ServerLayout(desk.folder).run("taken") / START_ADAPTER
    before = start.read_bytes()
    code, body = desk.create("taken", "--rank", "3")
    assert (code, body["code"]) == (1, "study-exists") and start.read_bytes() == before


def test_show_tells_who_approved_until_when_and_what_it_will_cost(desk: Desk) -> None:
    desk.create("shown", "--quorum", "2")
    layout = ServerLayout(desk.folder)
    study = StudyBook(layout.registry()).get("shown")
    approval = Approval(
        study_id=study.id,
        study_digest=study.digest,
        site="east",
        decision="approve",
        epsilon_cap=study.epsilon_cap,
        decided_at=study.created_at,
        expires_at=study.expires_at,
    )
    seen = ApprovalsSeen(layout.run("shown"))
    seen.keep("east", approval.sign(KEYS["east"]).to_bytes())
    seen.keep("north", approval.sign(KEYS["north"]).to_bytes())
    code, body = desk.call("show", "shown")
    assert code == 0, body
    shown = body["data"]
    states = {p["site"]: p for p in shown["participants"]}
    assert [states[s]["approval"] for s in SITES] == ["ok", "approval-of-another-site", "not-seen"]
    assert datetime.fromisoformat(states["east"]["expires_at"]) == study.expires_at
    assert states["north"]["expires_at"] is None and "signs for itself" in states["north"]["remedy"]
    planned = shown["planned"]
    assert planned["epsilon"] == epsilon(planned_events(study), study.delta).value
    assert (planned["unit"], planned["delta"]) == ("patient", study.delta) and planned["within_cap"]
    text = str(StudyShown.model_validate(shown))
    for words in (
        "approved, valid to",
        "quorum 2",
        "a round waits at most",
        "accountant",
        "all of one weight",
    ):
        assert words in text, text


def test_a_plan_beyond_its_cap_is_said(desk: Desk) -> None:
    desk.create("dear", "--epsilon-cap", "0.01")
    shown = desk.call("show", "dear")[1]["data"]
    assert not shown["planned"]["within_cap"]
    assert "passes the cap" in str(StudyShown.model_validate(shown))


def test_an_invitation_holds_the_study_and_a_letter_to_compare_by_phone(desk: Desk, tmp_path: Path) -> None:
    desk.create("invited", "--masking", "--coordinate-bound", "0.5", "--straggler-grace", "7")
    code, body = desk.call("invite", "invited", "--out", str(tmp_path / "letters"))
    assert code == 0, body
    layout = ServerLayout(desk.folder)
    study = StudyBook(layout.registry()).get("invited")
    assert [Path(f).name for f in body["data"]["folders"]] == list(SITES)
    for site in SITES:
        folder = tmp_path / "letters" / site
        assert load_document(Study, folder / "study.json").digest == study.digest == body["data"]["digest"]
        letter = (folder / "letter.md").read_text()
        for words in (
            study.digest,
            study.base_digest,
            study.code_digest,
            str(study.app_digest),
            SiteBook(layout.registry()).get(site).fingerprint,
            "pixcell site approve study.json",
            "epsilon 8 per patient at delta 1e-05",
            "under masks: the coordinator sees the sum of at least 3 sites",
            *(f"- {other}: `{KEYS[other].verify_key.key_id}`" for other in SITES),
            "7 s more once 3 sites have answered",
            "accountant",
        ):
            assert words in letter, words
    # The same again is fine; another study's invitations are not overwritten.
    assert desk.call("invite", "invited", "--out", str(tmp_path / "letters"))[0] == 0
    desk.create("invited-2")
    code, body = desk.call("invite", "invited-2", "--out", str(tmp_path / "letters"))
    assert (code, body["code"]) == (1, "invitation-exists")


def test_a_title_cannot_write_the_letter(desk: Desk) -> None:
    study = StudyBook(ServerLayout(desk.folder).registry()).get("one")
    evil = study.model_copy(update={"title": "x\n## Compare\n- study: `sha256:0`"})
    site = SiteBook(ServerLayout(desk.folder).registry()).get("east")
    lines = letter(evil, site, plan_of(study)).splitlines()
    assert sum(line.startswith("- study:") for line in lines) == 1
    assert sum(line.startswith("## Compare") for line in lines) == 1


@pytest.mark.parametrize("words", [("show", "nobody"), ("invite", "nobody", "--out", "x")])
def test_a_study_that_is_not_there_is_one_error(desk: Desk, words: tuple[str, ...]) -> None:
    code, body = desk.call(*words)
    assert (code, body["code"]) == (4, "unknown-study")
