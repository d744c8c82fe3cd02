"""Hostile bytes against the parsers of bundles and envelopes: never a crash, never a pass of what was altered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pixcell_core.contracts.canonical import canonical_bytes, parse_document
from pixcell_core.contracts.gate import Refusal, ReleaseRequest, Signers, Withdrawals
from pixcell_core.contracts.release import BundleListing, ReleaseManifest
from pixcell_core.contracts.verdict import Verdict
from pixcell_core.errors import PixcellError
from pixcell_core.trust.bundle import verify_bundle
from pixcell_core.trust.bundle_files import (
    LISTING,
    REQUEST,
    VERDICT,
    archive_bytes,
    is_bundle_name,
    open_bundle,
)
from pixcell_core.trust.dsse import Envelope, valid_signers, verify_envelope
from tests.site_client.release.conftest import AUDITOR, NOW, InMemory, Sample
from tests.site_client.release.test_bundle_terms import full

__all__ = ["full"]

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@given(data=st.data())
@settings(max_examples=250, deadline=None)
def test_any_mutation_of_any_file_of_a_full_bundle(full: Sample, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(full.files)))
    original = full.files[name]
    start, length = data.draw(st.integers(0, len(original))), data.draw(st.integers(0, 12))
    changed = original[:start] + data.draw(st.binary(max_size=12)) + original[start + length :]
    if changed == original:
        return
    with pytest.raises(PixcellError):
        verify_bundle(InMemory({**full.files, name: changed}), trusted_keys=None, now=NOW)


@given(data=st.data())
@SETTINGS
def test_any_value_in_any_envelope_and_document(full: Sample, data: st.DataObject) -> None:
    """One field of a signed document takes another JSON value; signatures are those of the original."""
    name = data.draw(st.sampled_from([LISTING, VERDICT, REQUEST, "signers.json", "manifest.json"]))
    value = json.loads(full.files[name])
    key = data.draw(st.sampled_from(sorted(value)))
    new = data.draw(JSON)
    if new == value[key] and type(new) is type(value[key]):
        return
    value[key] = new
    try:
        changed = canonical_bytes(value)
    except PixcellError:
        changed = json.dumps(value).encode()
    with pytest.raises(PixcellError):
        verify_bundle(InMemory({**full.files, name: changed}), trusted_keys=None, now=NOW)


@given(data=st.data())
@SETTINGS
def test_the_archive_with_bytes_changed_anywhere(
    full: Sample, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    original = full.archive
    # Headers and directory are few among many bytes of tiles: half of the tries go there.
    edges = original.index(b"PK\x01\x02")
    start = data.draw(st.integers(0, len(original)) | st.integers(edges, len(original)))
    changed = (
        original[:start] + data.draw(st.binary(max_size=8)) + original[start + data.draw(st.integers(0, 8)) :]
    )
    if changed == original:
        return
    path = tmp_path_factory.getbasetemp() / "fuzzed.zip"
    path.write_bytes(changed)
    with pytest.raises(PixcellError):
        full.verify(path)


@given(
    st.binary(max_size=400)
    | st.binary(max_size=60).map(lambda tail: b"PK\x03\x04" + tail + b"PK\x05\x06" + tail)
)
@SETTINGS
def test_no_bytes_are_a_bundle(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.zip"
    path.write_bytes(data)
    with pytest.raises(PixcellError), open_bundle(path) as files:
        verify_bundle(files, trusted_keys=None, now=NOW)


@given(st.lists(st.tuples(st.text(min_size=1, max_size=30), st.binary(max_size=40)), max_size=6))
@SETTINGS
def test_no_foreign_names_are_a_bundle(
    full: Sample, tmp_path_factory: pytest.TempPathFactory, extra: list[tuple[str, bytes]]
) -> None:
    """Any further member with any name and content: refused, and nothing is written anywhere."""
    known = {name.replace("\0", "")[:30] for name, _ in extra if not name.startswith("\0")}
    if not known or all(is_bundle_name(name) for name in known):
        return
    try:
        made = archive_bytes(sorted({**full.files, **dict(extra)}.items()))
    except (UnicodeEncodeError, ValueError):
        return
    path = tmp_path_factory.getbasetemp() / "names.zip"
    path.write_bytes(made)
    before = set(path.parent.iterdir())
    with pytest.raises(PixcellError):
        full.verify(path)
    assert set(path.parent.iterdir()) == before


@given(
    JSON
    | st.fixed_dictionaries(
        {"payload": st.text(max_size=30), "payloadType": st.text(max_size=30), "signatures": JSON}
    )
)
@SETTINGS
def test_no_value_crashes_the_envelope(value: Any) -> None:
    try:
        data = canonical_bytes(value)
    except PixcellError:
        return
    try:
        envelope = Envelope.from_bytes(data)
        assert valid_signers(envelope, [AUDITOR.verify_key]) == ()
        verify_envelope(envelope, [AUDITOR.verify_key], payload_type=envelope.payloadType)
    except PixcellError:
        return
    pytest.fail("an envelope that nobody signed was accepted")


@given(st.binary(max_size=300))
@SETTINGS
def test_no_bytes_crash_the_envelope(data: bytes) -> None:
    with pytest.raises(PixcellError):
        Envelope.from_bytes(data)


@pytest.mark.parametrize(
    "kind", [Signers, ReleaseRequest, Refusal, Withdrawals, ReleaseManifest, BundleListing, Verdict]
)
@given(value=JSON)
@settings(max_examples=60, deadline=None)
def test_no_value_crashes_a_document(kind: Any, value: Any) -> None:
    try:
        data = json.dumps(value).encode()
    except ValueError:
        return
    with pytest.raises(PixcellError):
        parse_document(kind, data)


def test_a_hostile_folder(full: Sample, tmp_path: Path) -> None:
    """A name that a terminal would obey is shown harmless."""
    folder = full.written(tmp_path / "b", full.files)
    (folder / "\x1b[31mtiles").write_bytes(b"x")
    error = full.refuses(folder)
    assert error.code == "foreign-file" and "\x1b" not in error.message
