"""Which log an act goes into: the signer's own and the site's around the files, and none that is another's."""

from __future__ import annotations

from pathlib import Path

import pytest

from pixcell_core.errors import PixcellError
from pixcell_core.trust.keys import SigningKey
from pixcell_core.trust.log import EventLog, read_entries, verify_log
from pixcell_core.trust.party_log import append_to_each, log_of_site_around, newest_of, own_log


def key_at(path: Path) -> SigningKey:
    path.parent.mkdir(parents=True, exist_ok=True)
    key = SigningKey.generate()
    key.save(path)
    return key


def code_of(act: object, *arguments: object) -> str:
    with pytest.raises(PixcellError) as refused:
        act(*arguments)  # type: ignore[operator]
    assert refused.value.hint
    return refused.value.code


def enrolled(root: Path) -> tuple[Path, SigningKey]:
    """A party's folder as enrolment leaves it: keys, and a log of the release key."""
    key_at(root / "keys" / "approval")
    release = key_at(root / "keys" / "release")
    EventLog(root / "log", release).append("site.enrolled", {})
    return root / "keys" / "approval", release


def test_a_key_alone_has_its_log_beside_it(tmp_path: Path) -> None:
    key = key_at(tmp_path / "auditor.key")
    own_log(tmp_path / "auditor.key").append("test.event", {})
    report = verify_log(tmp_path / "auditor.key.log", trusted_keys=[key.verify_key])
    assert report.entries == 1
    own_log(tmp_path / "auditor.key", tmp_path / "elsewhere").append("test.event", {})
    assert verify_log(tmp_path / "elsewhere", trusted_keys=[key.verify_key]).entries == 1


def test_an_enrolled_party_goes_on_with_its_log(tmp_path: Path) -> None:
    approval, release = enrolled(tmp_path / "auditor")
    for folder in (None, tmp_path / "auditor" / "log"):
        own_log(approval, folder).append("test.event", {})
    own_log(tmp_path / "auditor" / "keys" / "release").append("test.event", {})
    report = verify_log(tmp_path / "auditor" / "log", trusted_keys=[release.verify_key])
    assert report.entries == 4


def test_the_log_of_another_and_a_place_that_cannot_be_are_refused(tmp_path: Path) -> None:
    key_at(tmp_path / "mine")
    EventLog(tmp_path / "theirs", SigningKey.generate()).append("test.event", {})
    assert code_of(own_log, tmp_path / "mine", tmp_path / "theirs") == "log-of-another-key"
    (tmp_path / "file").write_text("")
    assert code_of(own_log, tmp_path / "mine", tmp_path / "file" / "log") == "log-not-openable"


def test_files_in_a_site_folder_belong_to_its_log(tmp_path: Path) -> None:
    _, release = enrolled(tmp_path / "site")
    inside = tmp_path / "site" / "releases" / "one"
    inside.mkdir(parents=True)
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    assert log_of_site_around([outside]) is None
    link = outside / "link"
    link.symlink_to(inside)
    for found in (log_of_site_around([outside, inside]), log_of_site_around([link])):
        assert found is not None and found.folder == tmp_path / "site" / "log"
        found.append("test.event", {})
    assert verify_log(tmp_path / "site" / "log", trusted_keys=[release.verify_key]).entries == 3
    EventLog(tmp_path / "coordinator" / "log", SigningKey.generate()).append("test.event", {})
    assert log_of_site_around([tmp_path / "coordinator" / "x"]) is None, "its log is not written by audits"
    (tmp_path / "site" / "keys" / "release").unlink()
    assert code_of(log_of_site_around, [inside]) == "site-log-closed"


def test_one_event_goes_into_each_log_once(tmp_path: Path) -> None:
    key_at(tmp_path / "a")
    first, again = own_log(tmp_path / "a"), own_log(tmp_path / "a")
    key_at(tmp_path / "b")
    assert len(append_to_each([first, again, None, own_log(tmp_path / "b")], "test.event", {"n": 1})) == 2
    assert [entry.data for entry in read_entries(first.folder)] == [{"n": 1}]
    first.append("test.event", {"n": 2})
    found = newest_of(first.folder, "test.event", n=1)
    assert found is not None and found.index == 0
    assert newest_of(first.folder, "test.other") is None
