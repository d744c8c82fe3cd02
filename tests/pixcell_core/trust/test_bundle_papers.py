"""The papers of a bundle: the datasheet says what was signed, and the metadata has what RO-Crate 1.1 requires."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from pixcell_core.contracts.release import Conditioning, ReleaseManifest
from pixcell_core.contracts.verdict import Verdict, VerdictException
from pixcell_core.trust.datasheet import datasheet
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
