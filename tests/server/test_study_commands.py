"""`pixcell study create`: flags make the study that sites approve; nothing is written where one is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from server.enrolment.pki import initialise
from server.enrolment.sites import SiteBook
from server.layout import ServerLayout
from server.studies.book import StudyBook
from server.studies.commands import register
from tests.server.enrolled import PASSPHRASE
from tests.server.test_studies import request_of
from tests.site_client.trainer.site_fixture import TARGETS, make_base

DIGEST = "sha256:" + "c" * 64
SETTINGS = (
    "--rounds 2 --steps 2 --sigma 4 --clip 0.001 --delta 1e-5 --epsilon-cap 8 --learning-rate 2000 "
    "--expected-patients 50 --tiles-per-patient 2 --tile-size 64 --mpp 1.0"
)
VOTES = f"--conditioning private --votes-noise 6 --votes-iterations 3 --candidates-digest {DIGEST}"
OTHERS = "--adapter lora --rank 2 --sample-rate 0.5 --ema-decay 0.9"


class Desk:
    """A coordinator's folder with two enrolled sites, and the command."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.base = folder / "server", make_base(folder / "base")
        initialise(ServerLayout(self.folder), ["127.0.0.1"], PASSPHRASE)
        for site in ("east", "west"):
            (folder / f"{site}.json").write_bytes(request_of(site).to_bytes())
            SiteBook(ServerLayout(self.folder).registry()).add(folder / f"{site}.json")

    def create(self, name: str, *more: str) -> tuple[int, dict[str, Any]]:
        """Exit code and envelope of `study create`."""
        root = typer.Typer()
        root.callback()(lambda: None)
        register(root)
        given = ["study", "create", "--dir", str(self.folder), "--id", name, "--base", str(self.base)]
        result = CliRunner().invoke(
            root, [*given, *SETTINGS.split(), "--targets", ",".join(TARGETS), *more, "--format", "json"]
        )
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
    ],
)
def test_what_cannot_be_promised_is_refused_and_nothing_is_written(desk: Desk, flags: str, code: str) -> None:
    exit_code, body = desk.create("never", *flags.split())
    assert exit_code in (1, 4) and body["code"] == code
    layout = ServerLayout(desk.folder)
    assert "never" not in StudyBook(layout.registry()).ids() and not layout.run("never").exists()
