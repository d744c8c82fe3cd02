"""The papers of a bundle: the datasheet says what was signed, and the metadata has what RO-Crate 1.1 requires."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixcell_core.contracts.audit_facts import AuditFacts
from pixcell_core.contracts.release import Conditioning, ReleaseManifest
from pixcell_core.contracts.verdict import Verdict, VerdictException
from pixcell_core.trust.datasheet import datasheet
from pixcell_core.trust.full_datasheet import full_datasheet
from pixcell_core.trust.plain_page import plain_page
from pixcell_core.trust.quorum import NamedSignature
from pixcell_core.trust.ro_crate import ro_crate
from tests.pixcell_core.contracts.test_release_documents import GENERATOR, PRIVACY, manifest, sha, verdict

WHEN = datetime(2026, 3, 2, tzinfo=UTC)
SIGNATURES = (
    NamedSignature(sha("auditor"), "auditor", "first auditor"),
    NamedSignature(sha("site"), "site", ""),
)
NAMES = ["README.txt", "manifest.json", "verdict.dsse.json", "bundle.dsse.json", "datasheet.md"]
NAMES += ["audit/report.html", "audit/report.json", "sample-sheet.png", f"keys/{'0' * 64}.pub"]


def sheet(made: ReleaseManifest, judged: Verdict) -> str:
    return datasheet(made, judged, SIGNATURES, WHEN).decode()


def test_the_datasheet_says_what_was_signed() -> None:
    made = manifest()
    words = sheet(made, verdict(made))
    for said in (
        f"Epsilon {PRIVACY.epsilon:.3g} per patient at delta 1e-05",
        "This number covers:",
        "It does **not** cover:",
        "the conditions",
        made.tiles_root,
        GENERATOR.base_digest,
        "verdict **PASS**",
        "first auditor",
        "Not for diagnosis",
        "## Licence and use",
        "## Limits",
        "pixcell release verify",
    ):
        assert said in words, said
    assert words == sheet(made, verdict(made))


def test_without_a_guarantee_no_epsilon_is_named() -> None:
    made = manifest(privacy=None)
    words = sheet(made, verdict(made))
    assert "No differential privacy is claimed" in words and "Epsilon" not in words


def test_an_exception_is_named_with_its_reason() -> None:
    made = manifest()
    exception = VerdictException(reason="twelve patients only", approver="release board")
    words = sheet(made, verdict(made, verdict="REVIEW", exception=exception))
    assert "verdict **REVIEW**" in words and "release board" in words and "twelve patients only" in words


@given(st.text(alphabet="#*_[]()<>`|&\\\n\t ab-", min_size=1, max_size=60))
@settings(max_examples=200, deadline=None)
def test_words_of_others_are_no_mark_up(text: str) -> None:
    """A promise cannot forge a heading, a link, a tag or a line of the datasheet."""
    promise = text.replace("\t", " ") + "."
    made = manifest(
        generator=GENERATOR.model_copy(update={"conditioning": Conditioning(policy="own", promise=promise)})
    )
    plain = manifest()
    lines = sheet(made, verdict(made)).splitlines()
    assert len(lines) == len(sheet(plain, verdict(plain)).splitlines())
    line = next(line for line in lines if line.startswith("- conditions: policy own. "))
    rest = line.removeprefix("- conditions: policy own. ")
    for mark in "#*_[]<>`|&":
        assert rest.count(mark) == rest.count(f"\\{mark}")


def facts(**changes: Any) -> AuditFacts:
    """What the papers repeat of a report, as the audit writes it."""
    test = {
        "name": "exact copies",
        "claim": "No tile is a copy.",
        "status": "PASS",
        "cannot_show": "Other kinds.",
    }
    power = {"words": "turned copies", "planted": 60, "found": 58, "lower": 0.906}
    tests = [
        test,
        {**test, "name": "self-test", "claim": "Planted copies are found.", "detections": [power]},
        {**test, "name": "context only", "gating": False},
        {**test, "name": "membership by weights", "tested": False},
    ]
    body: dict[str, Any] = {
        "summary": "These tiles may be put before the signer.",
        "subjects": {
            "train": {"tiles": "200 to 499", "patients": "50 to 99", "root": "sha256:0"},
            "holdout": {"tiles": "100 to 199", "patients": "20 to 49"},
        },
        "tests": tests,
        "not_tested": ["membership by weights: no weights were given."],
        "seed": 7,
    }
    return AuditFacts.model_validate(body | changes)


def full(made: ReleaseManifest, judged: Verdict | None = None, **changes: Any) -> str:
    return full_datasheet(made, judged or verdict(made), SIGNATURES, WHEN, facts(**changes)).decode()


ASKED = {
    "what it is": ("Every image here is synthetic", "Merkle root"),
    "from how many patients, in bands": ("50 to 99 patients", "20 to 49 further patients", "bands"),
    "how it was made": (GENERATOR.base_digest, "conditions: policy", "sampling steps"),
    "what is promised": ("Epsilon", "per patient", "It does **not** cover:"),
    "what was tested": ("exact copies: **PASS**. No tile is a copy.", "verdict **PASS**"),
    "with what power": ("turned copies: 58 of 60 found, sensitivity at least 0.91",),
    "what was not tested": ("membership by weights: no weights were given.", "Other kinds."),
    "until when": ("holds from", "until"),
    "how it is taken back, and by whom": (
        "withdraw it at any time",
        "--withdrawals LIST",
        "privacy@north.example",
    ),
    "licence": ("## Licence",),
    "intended use": ("## Intended use", "written agreement"),
    "forbidden use": (
        "## Forbidden use",
        "Diagnosis, treatment",
        "link tiles to a person",
        "after a withdrawal",
    ),
    "who answers": ("first auditor", "Signed by:"),
    "limits": ("rare findings",),
    "how to check": ("pixcell release verify BUNDLE --trust",),
}


@pytest.mark.parametrize("question", ASKED)
def test_the_full_datasheet_answers_what_is_asked(question: str) -> None:
    words = full(manifest(contact="privacy@north.example"))
    for said in ASKED[question]:
        assert said in words, said


def test_what_counts_for_nothing_is_not_told_as_tested() -> None:
    words = full(manifest())
    tested = words[words.index("## What was tested") : words.index("## What was not tested")]
    assert "context only" not in tested and "membership by weights" not in tested
    bare = full(manifest(), tests=[], not_tested=[])
    assert (
        "the report gives no numbers of planted copies" in bare and "names nothing that was left out" in bare
    )
    assert "the releasing site, north" in full(manifest()).replace("\\", "")
    exception = VerdictException(reason="twelve patients only", approver="release board")
    made = manifest()
    judged = verdict(made, verdict="REVIEW", exception=exception)
    assert "release board answers for it" in full(made, judged) and "twelve patients only" in full(
        made, judged
    )


def test_a_contact_is_part_of_the_seal_and_its_absence_changes_no_digest() -> None:
    with_one, without = manifest(contact="privacy@north.example"), manifest()
    assert b"contact" not in without.to_bytes() and b"privacy@north.example" in with_one.to_bytes()
    assert with_one.digest != without.digest
    assert ReleaseManifest.model_validate_json(without.to_bytes()) == without


HOSTILE = st.text(alphabet="#*_[]()<>`|&\\\n\t\u202e\u200b\x07 -ab", min_size=1, max_size=80)


@given(HOSTILE)
@settings(max_examples=200, deadline=None)
def test_a_reports_words_are_no_mark_up_in_sheet_and_page(text: str) -> None:
    """Neither a heading, nor a line, nor a tag, nor a character that cannot be seen comes out of a report."""
    made = manifest()
    sheet = full(made, summary=text, not_tested=[text])
    plain = full(made, summary="a", not_tested=["a"])
    assert len(sheet.splitlines()) == len(plain.splitlines())
    assert not any(mark in sheet for mark in "\u202e\u200b\x07")
    page = Tags()
    page.feed(plain_page(sheet))
    ours = Tags()
    ours.feed(plain_page(plain))
    assert page.tags == ours.tags and page.loads == []
    wanted = " ".join(re.sub("[\u202e\u200b\x07]", "", " ".join(text.split())).split())
    assert wanted in " ".join(page.text.split())


class Tags(HTMLParser):
    """Tags, text, and whatever would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [
            name for name, _ in attrs if name in ("src", "href", "action") or name.startswith("on")
        ]
        self.loads += [tag] * (tag in ("script", "link", "iframe", "object", "img"))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_says_what_the_markdown_says() -> None:
    sheet = full(manifest(contact="a_b*c@north.example"))
    page = Tags()
    page.feed(plain_page(sheet))
    text = " ".join(page.text.split())
    assert "a_b*c@north.example" in text and "**" not in text and "\\" not in text and "`" not in text
    assert page.tags.count("h2") == sheet.count("\n## ") and page.tags.count("h1") == 1
    assert page.tags.count("li") == len([line for line in sheet.splitlines() if line.startswith("- ")])
    assert "default-src 'none'" in plain_page(sheet)


def graph(**changes: Any) -> dict[str, dict[str, Any]]:
    made = manifest(**changes)
    data = ro_crate(made, verdict(made), NAMES, WHEN)
    crate = json.loads(data)
    assert crate["@context"] == "https://w3id.org/ro/crate/1.1/context"
    entities = crate["@graph"]
    assert len({entity["@id"] for entity in entities}) == len(entities), "each entity once"
    return {entity["@id"]: entity for entity in entities}


def test_the_required_parts_of_ro_crate_1_1() -> None:
    """RO-Crate 1.1: descriptor and root entity ("Root Data Entity"), data entities, flat references."""
    entities = graph()
    descriptor = entities["ro-crate-metadata.json"]
    assert descriptor["@type"] == "CreativeWork"
    assert descriptor["about"] == {"@id": "./"}
    assert descriptor["conformsTo"] == {"@id": "https://w3id.org/ro/crate/1.1"}
    root = entities["./"]
    assert root["@type"] == "Dataset"
    for required in ("name", "description", "datePublished", "license"):
        assert root[required], required
    assert datetime.fromisoformat(root["datePublished"]) == WHEN
    assert entities[root["license"]["@id"]]["description"]
    parts = {part["@id"] for part in root["hasPart"]}
    assert parts == {*NAMES, "tiles/"}
    for part in parts:
        kind = "Dataset" if part.endswith("/") else "File"
        assert entities[part]["@type"] == kind and entities[part]["name"]


def references(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [value["@id"]] if set(value) == {"@id"} else ["nested"]
    return [found for item in value for found in references(item)] if isinstance(value, list) else []


def test_every_reference_leads_somewhere_and_nothing_is_nested() -> None:
    entities = graph(generator=GENERATOR.model_copy(update={"adapter_digest": None}))
    for entity in entities.values():
        for key, value in entity.items():
            if key.startswith("@") or key == "conformsTo":
                continue
            for target in references(value):
                assert target in entities, (key, target)
    models = [entity for name, entity in entities.items() if name.startswith("#model-")]
    assert [model["identifier"] for model in models] == [GENERATOR.base_digest]
    assert entities["#making"]["result"] == {"@id": "tiles/"}
    assert "trainedAlgorithmicMedia" in entities["tiles/"]["additionalType"]


def test_dicom_is_a_folder_of_its_own() -> None:
    made = manifest()
    crate = json.loads(ro_crate(made, verdict(made), [*NAMES, "dicom/00001.dcm", "tiles/00001.png"], WHEN))
    ids = {entity["@id"] for entity in crate["@graph"]}
    assert {"dicom/", "tiles/"} <= ids and "dicom/00001.dcm" not in ids
