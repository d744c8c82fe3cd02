"""The blinded queue: nothing in it tells pairs from decoys, decisions are signed, and a confirmed copy is FAIL."""

from __future__ import annotations

import json
import shutil
import stat
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image, ImageDraw, ImageFont
from pydantic import ValidationError
from typer.testing import CliRunner

from pixcell_core.contracts import canonical_bytes
from pixcell_core.errors import PixcellError, RefusedError
from pixcell_core.trust.dsse import sign_envelope
from pixcell_core.trust.keys import SigningKey
from privacy_audit import commands, review_candidates, review_queue
from privacy_audit.deciding import decide
from privacy_audit.disclosure import NAME as DISCLOSURE
from privacy_audit.evidence_parts import HumanEvidence
from privacy_audit.policy import load_policy
from privacy_audit.report import AuditReport
from privacy_audit.result import Status
from privacy_audit.review_queue import (
    DECISIONS_TYPE,
    KEY,
    QUEUE,
    Call,
    Decision,
    QueueItem,
    ReviewDecisions,
    ReviewError,
    ReviewKey,
    load_queue,
    read_decisions,
    sign_decisions,
)
from privacy_audit.run import write_decided
from privacy_audit.verify import verify_audit
from tests.privacy_audit.conftest import Audited, World, audit

POLICY = load_policy("core")
REVIEWER = SigningKey.generate()


def key_of(out: Path) -> ReviewKey:
    return ReviewKey.model_validate_json((out / KEY).read_text())


def calls(out: Path, *, pairs: Call = "different", decoys: Call = "different") -> dict[str, Call]:
    return {item.id: pairs if item.kind == "pair" else decoys for item in key_of(out).items}


@pytest.fixture
def out(honest: Audited, tmp_path: Path) -> Path:
    return Path(shutil.copytree(honest.out, tmp_path / "out", ignore=shutil.ignore_patterns("cache")))


def test_the_queue_mixes_nearest_pairs_with_as_many_decoys(honest: Audited, world: World) -> None:
    kinds = Counter(item.kind for item in key_of(honest.out).items)
    assert (
        kinds["pair"] == 40 and kinds["decoy"] == 50
    )  # the release has 40 tiles, the queue takes 50 at most
    scores = [item.score for item in key_of(honest.out).items if item.kind == "pair"]
    assert max(scores) == pytest.approx(
        max(
            float(test.details["released_maximum"] or 0)
            for test in honest.report.tests
            if test.name == "near copies"
        ),
        abs=1e-6,
    )
    assert all(item.training_tile.startswith("tpatient-") for item in key_of(honest.out).items)


def test_nothing_in_the_queue_says_which_is_which(honest: Audited) -> None:
    text = (honest.out / QUEUE).read_text()
    body = json.loads(text)
    assert set(body["items"][0]) == {"id", "asks", "left", "right"}
    assert "patient-" not in text and "decoy" not in text and "score" not in text
    order = [item.kind for item in key_of(honest.out).items]
    assert order != sorted(order) and order != sorted(order, reverse=True)
    for name in (QUEUE, KEY):
        assert stat.S_IMODE((honest.out / name).stat().st_mode) == 0o600


def test_a_repeated_audit_asks_about_the_same_items(honest: Audited, world: World, tmp_path: Path) -> None:
    shutil.copytree(honest.out / "site", tmp_path / "site")
    audit(world, world.honest, tmp_path)
    assert load_queue(tmp_path) == load_queue(honest.out)


def test_a_confirmed_copy_turns_the_verdict_to_fail(out: Path) -> None:
    decided = calls(out)
    first = next(item.id for item in key_of(out).items if item.kind == "pair")
    decided[first] = "same field"
    envelope = sign_decisions(load_queue(out), decided, REVIEWER)
    decided = decide(out, envelope, REVIEWER.verify_key, datetime.now(UTC))
    assert decided.report.verdict is Status.FAIL
    write_decided(out, decided)
    checked = verify_audit(out)
    assert checked.verified and checked.complete and checked.verdict == "FAIL"
    page = (out / "site" / "report.html").read_text()  # the site's own page must not go on saying REVIEW
    assert "<title>FAIL" in page and "SITE ONLY" in page
    pairs, joined = page.count('class="tiles"'), page.count('class="matches"')
    assert pairs == 40 and joined > 0, "places that match are joined by lines here too"
    assert page.count("data:image/png") == 2 * (pairs + joined)


def test_what_one_reader_saw_no_other_reading_undoes(out: Path) -> None:
    """A second key that says that all is well would otherwise turn a confirmed copy into PASS."""
    seen = calls(out)
    seen[next(item.id for item in key_of(out).items if item.kind == "pair")] = "same field"
    first = sign_decisions(load_queue(out), seen, REVIEWER)
    write_decided(out, decide(out, first, REVIEWER.verify_key, datetime.now(UTC)))
    for key in (SigningKey.generate(), REVIEWER):
        clean = sign_decisions(load_queue(out), calls(out), key)
        with pytest.raises(RefusedError) as refused:
            decide(out, clean, key.verify_key, datetime.now(UTC))
        assert refused.value.code == "reading-stands"


def test_only_the_same_reader_finishes_a_reading(out: Path) -> None:
    some = dict(list(calls(out).items())[:4])
    begun = decide(
        out, sign_decisions(load_queue(out), some, REVIEWER), REVIEWER.verify_key, datetime.now(UTC)
    )
    assert _reading(begun.report) is Status.REVIEW
    write_decided(out, begun)
    stranger = SigningKey.generate()
    with pytest.raises(RefusedError):
        decide(
            out, sign_decisions(load_queue(out), calls(out), stranger), stranger.verify_key, datetime.now(UTC)
        )
    whole = sign_decisions(load_queue(out), calls(out), REVIEWER)
    assert _reading(decide(out, whole, REVIEWER.verify_key, datetime.now(UTC)).report) is Status.PASS


def _reading(report: AuditReport) -> Status:
    test = report.test(review_queue.NAME)
    assert test is not None
    return test.status


def test_a_clean_reading_passes_and_leaves_the_other_tests_as_they_were(out: Path, honest: Audited) -> None:
    envelope = sign_decisions(load_queue(out), calls(out), REVIEWER)
    report = decide(out, envelope, REVIEWER.verify_key, datetime.now(UTC)).report
    test = report.test(review_queue.NAME)
    assert test is not None and test.status is Status.PASS and test.tested
    others = [t for t in report.tests if t.name != review_queue.NAME]
    assert others == [t for t in honest.report.tests if t.name != review_queue.NAME]


@pytest.fixture(scope="module")
def marked(world: World, tmp_path_factory: pytest.TempPathFactory) -> Audited:
    """The honest release with a line of letters on three of its tiles."""
    folder = Path(shutil.copytree(world.honest, tmp_path_factory.mktemp("marked") / "release"))
    for name in ("s002.png", "s011.png", "s030.png"):
        image = Image.open(folder / name)
        ImageDraw.Draw(image).text((2, 20), "A7K9X2", fill=(0, 0, 0), font=ImageFont.load_default(size=16))
        image.save(folder / name)
    return Audited(folder.parent / "out", audit(world, folder, folder.parent / "out"))


def test_hits_of_the_detectors_stand_in_the_queue_among_clean_tiles(marked: Audited) -> None:
    test = marked.report.test(DISCLOSURE)
    assert test is not None and (test.status, test.value) == (Status.REVIEW, 3.0)
    behind = {item.id: item for item in key_of(marked.out).items}
    queue = load_queue(marked.out)
    kinds = [behind[item.id].kind for item in queue.items]
    assert Counter(kinds)["mark"] == Counter(kinds)["clean"] == 3
    first = min(place for place, kind in enumerate(kinds) if kind in ("mark", "clean"))
    assert all(item.asks == ("field" if place < first else "mark") for place, item in enumerate(queue.items))
    for item in queue.items[first:]:
        assert item.right is None and behind[item.id].training_tile == ""
        assert behind[item.id].left.startswith("s0" if behind[item.id].kind == "mark" else "hpatient-")
    assert {one.left for one in behind.values() if one.kind == "mark"} == {"s002.png", "s011.png", "s030.png"}
    assert all(
        (one.score > 1.0) == (one.kind == "mark") for one in behind.values() if one.kind in ("mark", "clean")
    )


def test_only_the_worst_hits_are_shown_and_each_has_its_decoy() -> None:
    rng = np.random.default_rng(0)
    names, digests = tuple(map(str, range(90))), ("d",) * 90
    hits = review_candidates.singles("mark", names, digests, np.arange(90), rng.uniform(1, 5, 90))
    clean = review_candidates.singles("clean", names, digests, np.arange(90), rng.uniform(0, 1, 90))
    chosen = review_candidates.choose_marks(hits, clean, POLICY.review, rng)
    for kind, group in (("mark", hits), ("clean", clean)):
        shown = sorted(one.score for one in chosen if one.kind == kind)
        assert shown == sorted(one.score for one in group)[-POLICY.review.marks :]
    assert not review_candidates.choose_marks([], clean, POLICY.review, rng)


@pytest.mark.parametrize(
    ("call", "status"), [("marked", Status.FAIL), ("clean", Status.PASS), ("unsure", Status.REVIEW)]
)
def test_a_signed_reading_of_the_hits_decides_them(
    marked: Audited, tmp_path: Path, call: Call, status: Status
) -> None:
    out = Path(shutil.copytree(marked.out, tmp_path / "out", ignore=shutil.ignore_patterns("cache")))
    said: dict[str, Call] = {"pair": "different", "decoy": "different", "mark": call, "clean": "clean"}
    decisions = {item.id: said[item.kind] for item in key_of(out).items}
    decided = decide(
        out, sign_decisions(load_queue(out), decisions, REVIEWER), REVIEWER.verify_key, datetime.now(UTC)
    )
    test = decided.report.test(DISCLOSURE)
    assert test is not None and test.status is status and test.details["read"] == 3
    if status is Status.FAIL:
        assert decided.report.verdict is Status.FAIL and DISCLOSURE in decided.report.summary
    write_decided(out, decided)
    checked = verify_audit(out)
    assert checked.verified and checked.complete


def test_an_answer_to_the_other_question_is_refused(marked: Audited) -> None:
    queue = load_queue(marked.out)
    single = next(item.id for item in queue.items if item.asks == "mark")
    with pytest.raises(ReviewError) as refused:
        sign_decisions(queue, {single: "same field"}, REVIEWER)
    assert refused.value.code == "call-of-another-question"
    forged = ReviewDecisions(
        queue=key_of(marked.out).queue, decisions=(Decision(id=single, call="different"),)
    )
    with pytest.raises(ReviewError) as counted:
        read_decisions(
            marked.out,
            sign_envelope(DECISIONS_TYPE, canonical_bytes(forged), [REVIEWER]),
            REVIEWER.verify_key,
        )
    assert counted.value.code == "call-of-another-question"
    with pytest.raises(ValidationError):
        QueueItem(id=single, asks="mark", left=queue.items[0].left, right=queue.items[0].left)


def human(pair_same: int = 0, decoy_same: int = 0, unsure: int = 0, left: int = 0) -> HumanEvidence:
    return HumanEvidence("sha256:0", "sha256:1", pair_same, unsure, 50, decoy_same, 0, 50, left)


@pytest.mark.parametrize(
    ("evidence", "status"),
    [
        (human(), Status.PASS),
        (human(pair_same=1), Status.FAIL),
        (human(pair_same=12, decoy_same=1), Status.FAIL),
        (
            human(pair_same=2, decoy_same=2),
            Status.REVIEW,
        ),  # a reader who also confirms decoys confirms nothing
        (human(decoy_same=3), Status.REVIEW),
        (human(unsure=1), Status.REVIEW),
        (human(left=5), Status.REVIEW),
        (human(pair_same=1, left=5), Status.FAIL),
    ],
)
def test_status_by_what_was_called(evidence: HumanEvidence, status: Status) -> None:
    assert review_queue.result(evidence, POLICY).status is status


def test_unread_is_not_tested() -> None:
    found = review_queue.result(None, POLICY)
    assert not found.tested and not found.gating
    assert review_queue.result(None, POLICY.model_copy(update={"required": ("human",)})).gating


def test_decisions_that_cannot_be_counted_are_refused(out: Path, dishonest: Audited) -> None:
    queue = load_queue(out)
    good = calls(out)
    with pytest.raises(ReviewError):
        sign_decisions(queue, {**good, "0" * 16: "different"}, REVIEWER)
    signed = sign_decisions(queue, good, REVIEWER)
    with pytest.raises(PixcellError) as stranger:  # another key
        read_decisions(out, signed, SigningKey.generate().verify_key)
    assert stranger.value.code == "signature-refused"
    with pytest.raises(ReviewError) as other:  # another queue
        read_decisions(dishonest.out, signed, REVIEWER.verify_key)
    assert other.value.code == "review-of-another-queue"
    first = next(iter(good))
    twice = ReviewDecisions(
        queue=key_of(out).queue,
        decisions=(Decision(id=first, call="different"), Decision(id=first, call="same field")),
    )
    envelope = sign_envelope(DECISIONS_TYPE, canonical_bytes(twice), [REVIEWER])
    with pytest.raises(ReviewError):
        read_decisions(out, envelope, REVIEWER.verify_key)
    purpose = sign_envelope("application/other", canonical_bytes(twice), [REVIEWER])
    with pytest.raises(PixcellError) as wrong:
        read_decisions(out, purpose, REVIEWER.verify_key)
    assert wrong.value.code == "wrong-payload-type"


def test_a_queue_or_evidence_that_was_changed_is_refused(out: Path) -> None:
    signed = sign_decisions(load_queue(out), calls(out), REVIEWER)
    body = json.loads((out / QUEUE).read_text())
    body["items"] = body["items"][1:]
    (out / QUEUE).write_text(json.dumps(body))
    with pytest.raises(ReviewError):
        read_decisions(out, signed, REVIEWER.verify_key)
    evidence = out / "site" / "evidence.npz"
    evidence.write_bytes(evidence.read_bytes()[:-1] + b"0")
    with pytest.raises(PixcellError):
        decide(out, signed, REVIEWER.verify_key, datetime.now(UTC))


def test_decoys_are_the_likeliest_innocent_pairs(honest: Audited) -> None:
    """The mutant: decoys drawn at random would look like nothing and give the pairs away."""
    rng = np.random.default_rng(0)
    many = review_candidates.pairs(
        "decoy", tuple(map(str, range(200))), ("d",) * 200, np.zeros(200, dtype=np.int64), rng.random(200), ("t",), ("d",)
    )  # fmt: skip
    few = POLICY.review.model_copy(update={"decoys": 10, "pairs": 10})
    chosen = review_candidates.choose([], many, few, rng)
    assert sorted(one.score for one in chosen) == sorted(one.score for one in many)[-10:]


def test_the_command_counts_decisions_in_and_refuses_a_stranger(out: Path, tmp_path: Path) -> None:
    root = typer.Typer()
    root.callback()(lambda: None)
    commands.register(root)
    (tmp_path / "decisions").write_bytes(sign_decisions(load_queue(out), calls(out), REVIEWER).to_bytes())
    REVIEWER.verify_key.save(tmp_path / "reviewer.pub")
    SigningKey.generate().verify_key.save(tmp_path / "stranger.pub")
    arguments = ["audit", "decide", str(out), "--decisions", str(tmp_path / "decisions"), "--format", "json"]
    before = (out / "report.json").read_bytes()
    refused = CliRunner().invoke(root, [*arguments, "--trust", str(tmp_path / "stranger.pub")])
    assert refused.exit_code == 1 and json.loads(refused.stdout)["code"] == "signature-refused"
    assert (out / "report.json").read_bytes() == before
    taken = CliRunner().invoke(root, [*arguments, "--trust", str(tmp_path / "reviewer.pub")])
    assert taken.exit_code == 0, taken.output
    tests = {test["name"]: test for test in json.loads(taken.stdout)["data"]["tests"]}
    assert tests[review_queue.NAME]["status"] == "PASS" and tests[review_queue.NAME]["tested"]
