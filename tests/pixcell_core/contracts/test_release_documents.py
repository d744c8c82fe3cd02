"""Manifest and verdict: what they must add up to, and that a verdict is about exactly one manifest."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import ValidationError

from pixcell_core.contracts.canonical import DocumentError, parse_document
from pixcell_core.contracts.release import (
    Conditioning,
    Generator,
    PrivacyStatement,
    ReleasedTile,
    ReleaseManifest,
    tile_name,
    tiles_root,
)
from pixcell_core.contracts.verdict import Auditor, Subject, Verdict, VerdictException, VerdictPredicate
from pixcell_core.trust.merkle import merkle_root

NOW = datetime(2026, 3, 1, tzinfo=UTC)


def sha(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


GENERATOR = Generator(
    base_digest=sha("base"),
    adapter_digest=sha("adapter"),
    conditioning=Conditioning(policy="blend", promise="the mean of 3 patients"),
    guidance_scale=2.0,
    num_inference_steps=20,
)
PRIVACY = PrivacyStatement(
    epsilon=7.5,
    delta=1e-5,
    mechanism="DP-SGD",
    accountant="PLD",
    covers=("the adapter",),
    does_not_cover=("the conditions",),
)


def manifest(**changes: Any) -> ReleaseManifest:
    tiles = tuple(
        ReleasedTile(name=tile_name(n), file_digest=sha(f"file {n}"), pixel_digest=sha(f"pixels {n}"))
        for n in range(1, 4)
    )
    values: dict[str, Any] = {
        "site": "north",
        "site_key_id": sha("key"),
        "study_digest": sha("study"),
        "generator": GENERATOR,
        "privacy": PRIVACY,
        "ledger_head": sha("ledger"),
        "created_at": NOW,
        "width": 128,
        "height": 128,
        "tile_count": 3,
        "tiles_root": tiles_root(tile.file_digest for tile in tiles),
        "tiles": tiles,
        "sample_sheet_digest": sha("sheet"),
        "readme_digest": sha("readme"),
        "licence": "none",
        "usage": "research",
    }
    return ReleaseManifest(**(values | changes))


def predicate(about: ReleaseManifest, **changes: Any) -> VerdictPredicate:
    values: dict[str, Any] = {
        "verdict": "PASS",
        "audience": "agreement",
        "site": about.site,
        "manifest_digest": about.digest,
        "tile_count": about.tile_count,
        "tiles_root": about.tiles_root,
        "study_digest": about.study_digest,
        "base_digest": about.generator.base_digest,
        "adapter_digest": about.generator.adapter_digest,
        "conditioning": about.generator.conditioning,
        "privacy": about.privacy,
        "ledger_head": about.ledger_head,
        "auditor": Auditor(name="audit", version="1", policy_digest=sha("policy")),
        "audit_report_digest": sha("report"),
        "audit_page_digest": sha("page"),
        "proven_kinds": ("exact copy",),
        "issued_at": NOW,
        "expires_at": NOW + timedelta(days=30),
    }
    return VerdictPredicate(**(values | changes))


def verdict(about: ReleaseManifest, **changes: Any) -> Verdict:
    subjects = tuple(Subject.of(tile.name, tile.file_digest) for tile in about.tiles)
    return Verdict(subject=changes.pop("subject", subjects), predicate=predicate(about, **changes))


def test_documents_survive_their_bytes() -> None:
    about = manifest()
    assert parse_document(ReleaseManifest, about.to_bytes()) == about
    signed = verdict(about)
    again = parse_document(Verdict, signed.to_bytes())
    assert again == signed
    assert again.digest == signed.digest
    assert b'"_type":"https://in-toto.io/Statement/v1"' in signed.to_bytes()


def test_the_root_is_over_sorted_raw_digests() -> None:
    digests = [sha(str(n)) for n in range(9)]
    raw = sorted(bytes.fromhex(d[7:]) for d in digests)
    assert tiles_root(digests) == tiles_root(reversed(digests)) == "sha256:" + merkle_root(raw).hex()
    assert tiles_root(digests) != tiles_root([*digests, digests[0]]), "a repeated tile counts"


@pytest.mark.parametrize(
    "changes",
    [
        {"tile_count": 2},
        {"tiles_root": sha("other")},
        {"tiles": manifest().tiles[::-1]},
        {"tiles": manifest().tiles[:2]},
        {"tiles": ()},
        {"synthetic": False},
        {"site": "North Hospital"},
        {"created_at": datetime(2026, 3, 1)},
        {"width": 0},
    ],
)
def test_manifests_that_do_not_add_up(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        manifest(**changes)


@pytest.mark.parametrize(
    "name", ["patient-7.png", "1.png", "00001.PNG", "../00001.png", "00001.gif", "tiles/00001.png"]
)
def test_tile_names_hold_a_number_and_nothing_else(name: str) -> None:
    with pytest.raises(ValidationError):
        ReleasedTile(name=name, file_digest=sha("a"), pixel_digest=sha("b"))


@pytest.mark.parametrize(
    "changes",
    [
        {"epsilon": 0},
        {"epsilon": float("inf")},
        {"delta": 0},
        {"delta": 1},
        {"unit": "tile"},
        {"covers": ()},
        {"does_not_cover": ()},
    ],
)
def test_an_epsilon_never_stands_alone(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PrivacyStatement.model_validate(PRIVACY.model_dump() | changes)


def test_the_text_of_a_statement_names_its_unit_and_delta() -> None:
    assert str(PRIVACY) == "epsilon 7.5 per patient at delta 1e-05 (PLD)"


@pytest.mark.parametrize(
    "hidden", ["\x00", "\x1b[2J", "\x9b", "\u202e", "\u200b", "\u2066", "\ufeff", "\x7f"]
)
def test_signed_texts_hold_nothing_unseen(hidden: str) -> None:
    with pytest.raises(ValidationError):
        VerdictException(reason=f"fine{hidden}", approver="release board")
    with pytest.raises(ValidationError):
        VerdictException(reason="fine", approver=f"release{hidden} board")
    with pytest.raises(ValidationError):
        ReleasedTile(name="00001.png", file_digest=sha("a"), pixel_digest=sha("b"), label=f"tumour{hidden}")
    assert VerdictException(reason="in two\nlines: größer, 10 µm", approver="Zoë – board").approver


@pytest.mark.parametrize("label", ["", "a/b", "a\\b", "a\nb", "x" * 81])
def test_labels_are_words(label: str) -> None:
    with pytest.raises(ValidationError):
        ReleasedTile(name="00001.png", file_digest=sha("a"), pixel_digest=sha("b"), label=label)


def test_which_verdicts_permit() -> None:
    about = manifest()
    stated = VerdictException(reason="small cohort", approver="release board")
    assert verdict(about).predicate.permits_release
    assert verdict(about, verdict="REVIEW", exception=stated).predicate.permits_release
    for status in ("REVIEW", "FAIL", "INVALID"):
        assert not verdict(about, verdict=status).predicate.permits_release
    for status in ("PASS", "FAIL", "INVALID"):
        with pytest.raises(ValidationError, match="only REVIEW"):
            verdict(about, verdict=status, exception=stated)
    with pytest.raises(ValidationError):
        VerdictException(reason="", approver="x")
    with pytest.raises(ValidationError):
        verdict(about, expires_at=NOW)


def test_a_verdict_is_about_one_manifest() -> None:
    about = manifest()
    signed = verdict(about)
    assert signed.difference_from(about) is None
    others = {
        "another site": {"site": "south"},
        "another study": {"study_digest": None},
        "another base": {"generator": GENERATOR.model_copy(update={"base_digest": sha("x")})},
        "another adapter": {"generator": GENERATOR.model_copy(update={"adapter_digest": None})},
        "another conditioning": {
            "generator": GENERATOR.model_copy(
                update={"conditioning": Conditioning(policy="own", promise="x")}
            )
        },
        "another privacy": {"privacy": None},
        "another state of the ledger": {"ledger_head": sha("x")},
        "another manifest": {"usage": "anything"},
    }
    for words, changes in others.items():
        difference = signed.difference_from(manifest(**changes))
        assert difference is not None and words in difference
    fewer = about.tiles[:2]
    short = manifest(tiles=fewer, tile_count=2, tiles_root=tiles_root(t.file_digest for t in fewer))
    assert "00003.png" in str(signed.difference_from(short))
    swapped = (
        *about.tiles[:2],
        about.tiles[2].model_copy(update={"file_digest": sha("other")}),
    )
    changed = manifest(tiles=swapped, tiles_root=tiles_root(t.file_digest for t in swapped))
    assert "00003.png" in str(signed.difference_from(changed))


def test_a_verdict_adds_up() -> None:
    about = manifest()
    subjects = verdict(about).subject
    for changes in (
        {"subject": subjects[:2]},
        {"subject": (*subjects[:2], subjects[1])},
        {"tile_count": 4},
        {"tiles_root": sha("x")},
    ):
        with pytest.raises(ValidationError):
            verdict(about, **changes)


def test_a_foreign_statement_is_not_a_verdict() -> None:
    data = verdict(manifest()).to_bytes()
    for ours, other in (
        (b"https://in-toto.io/Statement/v1", b"https://in-toto.io/Statement/v9"),
        (b"urn:pixcell:predicate:release-verdict:v1", b"https://slsa.dev/provenance/v1"),
    ):
        with pytest.raises(DocumentError):
            parse_document(Verdict, data.replace(ours, other))
