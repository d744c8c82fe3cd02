"""The page stands alone and keeps its order; the commands keep the contract."""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from privacy_audit import commands
from privacy_audit.evidence import Evidence, EvidenceError
from privacy_audit.plain_words import answer, sentence
from privacy_audit.render import legend, number, render_page
from privacy_audit.result import Status, histogram
from tests.privacy_audit.conftest import Audited, TextureEye, World

ORDER = (
    "Claims",
    "Differential privacy",
    "Membership",
    "Near copies",
    "Attribution",
    "Utility",
    "Coverage and failures",
    "Provenance",
    "Signatures, and how to verify offline",
)


class Page(HTMLParser):
    """Collects tags, headings and anything that would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "br", "rect", "line", "polyline"):
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "action") or name.startswith("on"):
                self.loads.append(str(value))
        if tag in ("script", "link", "iframe", "object"):
            self.loads.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def test_the_page_loads_nothing_runs_nothing_and_keeps_its_order(dishonest: Audited) -> None:
    page = Page()
    page.feed((dishonest.out / "report.html").read_text())
    assert page.loads == [] and page.open == []
    assert tuple(page.headings) == ORDER


def test_every_claim_has_direction_threshold_value_and_verdict(dishonest: Audited) -> None:
    text = (dishonest.out / "report.html").read_text()
    words = html.unescape(text)
    claims = [test for test in dishonest.report.tests if test.section != "context"]
    for test in dishonest.report.tests:
        assert test.direction in ("lower is safer", "higher is safer")
        assert test.threshold is not None or not test.gating
        assert test.why and test.cannot_show and test.statistic
        assert test.name.removeprefix("context: ") in text
        assert sentence(test.name) and (sentence(test.name) in words or test.section == "context")
        if test.section != "context":
            assert answer(test) in words
    # A word for each outcome, in the table of claims and on the test's own card: no colour speaks alone.
    for status in Status:
        decided = [test for test in claims if test.tested and test.gating and test.status is status]
        shown = len(re.findall(rf'<span class="status {status}">{status}</span>', text))
        assert shown == 2 * len(decided)
    assert text.count(">not tested</span>") == 2 * len([test for test in claims if not test.tested])
    informed = [test for test in claims if test.tested and not test.gating]
    assert informed and text.count(">for information</span>") == 2 * len(informed)
    assert "≤ –" not in text and "≥ –" not in text, "a missing threshold is said in words"


@pytest.mark.parametrize("status", list(Status))
def test_an_outcome_is_said_without_numbers(dishonest: Audited, status: Status) -> None:
    test = next(test for test in dishonest.report.tests if test.gating and test.tested)
    said = answer(test.model_copy(update={"status": status}))
    assert said and not re.search(r"\d", said)
    assert ("must not leave" in said) == (status is Status.FAIL)
    assert ("in order" in said and "not in order" not in said) == (status is Status.PASS)
    unasked = answer(test.model_copy(update={"status": status, "tested": False}))
    assert unasked.startswith("Nobody knows") and "named person" in unasked
    assert "does not rest" in answer(test.model_copy(update={"status": status, "gating": False}))


def test_each_planted_kind_has_its_row_with_a_word(dishonest: Audited) -> None:
    text = html.unescape((dishonest.out / "report.html").read_text())
    planted = dishonest.report.test("self-test: planted copies")
    assert planted and len(planted.detections) > 10
    table = text[text.index("self-test: planted copies</h3>") :]
    table = table[table.index('<table class="planted">') : table.index("</table>")]
    for item in planted.detections:
        row = next(row for row in table.split("<tr>") if f"<td>{item.words}</td>" in row)
        word = "reported only" if item.gate is None else "proven" if item.met else "not proven"
        assert f">{word}<" in row and f"{item.found}/{item.planted}" in row


def test_a_drawing_names_its_axis_and_every_mark(dishonest: Audited) -> None:
    drawn = [test for test in dishonest.report.tests if test.histogram is not None]
    assert drawn
    for test in drawn:
        assert test.histogram is not None
        words = legend(test)
        assert test.histogram.axis in words and test.histogram.null_name in words
        assert test.histogram.observed_name in words and "threshold" in words
    copies = dishonest.report.test("near copies")
    assert copies is not None and "red strokes: flagged tiles" in legend(copies)


def test_the_statement_of_privacy_shows_what_the_ledger_and_the_canaries_gave(dishonest: Audited) -> None:
    (test,) = dishonest.report.section("differential privacy")
    details = {"unit": "patient", "claimed_epsilon": 7.5, "recomputed_epsilon": 7.25, "delta": 1e-5}
    given = test.model_copy(update={"tested": True, "details": details})
    tests = tuple(given if one is test else one for one in dishonest.report.tests)
    page = render_page(dishonest.report.model_copy(update={"tests": tests}))
    for name, value in (
        ("Unit of protection", "patient"),
        ("Epsilon the ledger claims", "7.5"),
        ("Epsilon its charges add up to", "7.25"),
        ("Delta", "1e-05"),
        ("Canaries that tried the mechanism", "not given"),
    ):
        assert f"<tr><td>{name}</td><td>{value}</td></tr>" in page
        assert name not in (dishonest.out / "report.html").read_text(), "nothing was given in that run"


def test_the_json_has_the_names_other_programs_rely_on(dishonest: Audited) -> None:
    body = json.loads((dishonest.out / "report.json").read_text())
    assert body["verdict"] == "FAIL"
    assert set(body["flagged"][0]) >= {"synthetic", "nearest", "score", "p_value"}
    wanted = {"name", "statistic", "value", "interval", "threshold", "direction", "status"}
    assert all(set(test) >= wanted for test in body["tests"])
    digests = body["subjects"]["synthetic"]["sorted_sha256"]
    assert digests == sorted(digests) and len(digests) == 40


def test_names_of_tiles_cannot_write_into_the_page(dishonest: Audited) -> None:
    flag = dishonest.report.flagged[0].model_copy(update={"synthetic": "<script>alert(1)</script>"})
    page = render_page(dishonest.report.model_copy(update={"flagged": (flag,)}))
    assert "<script" not in page and "&lt;script" in page


def test_an_audit_that_proved_nothing_says_so(dishonest: Audited) -> None:
    page = render_page(dishonest.report.model_copy(update={"proven_kinds": ()}))
    assert "none of the planted controls was found often enough" in page


def test_drawings_carry_shares_and_no_counts(dishonest: Audited) -> None:
    for test in dishonest.report.tests:
        if test.histogram is not None:
            assert sum(test.histogram.null) == pytest.approx(1, abs=1e-3)
            assert sum(test.histogram.observed) == pytest.approx(1, abs=1e-3)


def test_a_constant_null_can_be_drawn() -> None:
    import numpy as np

    same = np.full(5, 0.5)
    drawn = histogram(same, same, axis="x", null_name="a", observed_name="b", threshold=0.5)
    assert drawn is not None and drawn.edges[0] < drawn.edges[-1]


@pytest.mark.parametrize(
    ("value", "words"),
    [(None, "–"), (0.0, "0"), (1440, "1 440"), (0.00329, "0.00329"), ("fewer than 10", "fewer than 10")],
)
def test_numbers_are_written_for_people(value: float | str | None, words: str) -> None:
    assert number(value).replace("\u2009", " ") == words


def test_evidence_survives_the_disk_and_refuses_damage(dishonest: Audited, tmp_path: Path) -> None:
    path = dishonest.out / "site" / "evidence.npz"
    again = Evidence.load(path).to_bytes()
    assert again == path.read_bytes()
    (tmp_path / "cut.npz").write_bytes(again[:-200])
    with pytest.raises(EvidenceError):
        Evidence.load(tmp_path / "cut.npz")
    with pytest.raises(EvidenceError):
        Evidence.load(tmp_path / "absent.npz")


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Iterator[typer.Typer]:
    monkeypatch.setattr("privacy_audit.run.SecondEye", lambda side, device: TextureEye(device))
    root = typer.Typer()
    root.callback()(lambda: None)
    commands.register(root)
    yield root
    os.environ.pop("PIXCELL_EXIT", None)


def call(cli: typer.Typer, *arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["audit", *map(str, arguments)])


def test_run_refuses_a_leaking_release_with_one_envelope(
    cli: typer.Typer, world: World, tmp_path: Path
) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(_quick_policy())
    result = call(
        cli, "run", "--train", world.train, "--holdout", world.holdout, "--synthetic", world.dishonest,
        "--out", tmp_path / "out", "--policy", policy, "--seed", "1", "--format", "json",
    )  # fmt: skip
    assert result.exit_code == 1, result.output
    body = json.loads(result.stdout)
    assert body["status"] == "ok" and body["data"]["verdict"] == "FAIL"
    assert {f["synthetic"] for f in body["data"]["flagged"] if f["kind"] != "near copy"} == world.planted


def _quick_policy() -> str:
    import yaml

    from tests.privacy_audit.conftest import small_policy

    return yaml.safe_dump(small_policy().model_dump(mode="json"))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"--train": "nowhere"}, "no-folder"),
        ({"--policy": "absent.yaml"}, "policy-missing"),
        ({"--holdout": "TRAIN"}, "same-folder"),
        ({"--out": "INSIDE"}, "out-inside-tiles"),
    ],
)
def test_bad_input_exits_4_with_a_code_and_a_hint(
    cli: typer.Typer, world: World, tmp_path: Path, change: dict[str, str], code: str
) -> None:
    words = {"TRAIN": str(world.train), "INSIDE": str(world.honest / "out")}
    options = {
        "--train": str(world.train), "--holdout": str(world.holdout), "--synthetic": str(world.honest),
        "--out": str(tmp_path / "out"), "--policy": "rehearsal",
    } | {key: words.get(value, value) for key, value in change.items()}  # fmt: skip
    result = call(cli, "run", *(part for pair in options.items() for part in pair), "--format", "json")
    assert result.exit_code == 4
    body = json.loads(result.stdout)
    assert body["status"] == "error" and body["code"] == code and body["hint"]


def test_report_writes_the_same_page_again(cli: typer.Typer, dishonest: Audited) -> None:
    page = dishonest.out / "report.html"
    before = page.read_bytes()
    page.unlink()
    assert call(cli, "report", dishonest.out).exit_code == 1  # the verdict is FAIL
    assert page.read_bytes() == before


def test_verify_exits_0_when_all_agrees_and_4_without_a_report(
    cli: typer.Typer, dishonest: Audited, tmp_path: Path
) -> None:
    found = call(cli, "verify", dishonest.out, "--format", "json")
    assert found.exit_code == 0 and json.loads(found.stdout)["data"]["verified"] is True
    assert call(cli, "verify", tmp_path).exit_code == 4


def test_policy_show_prints_values_with_their_sources(cli: typer.Typer) -> None:
    result = call(cli, "policy", "show")
    assert result.exit_code == 0
    assert re.search(r"planted_per_kind: 60 +# ", result.stdout) and "sha256:" in result.stdout
