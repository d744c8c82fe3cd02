"""Studies of the coordinator: settings in, one document out, and an adapter the sites' model agrees with."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pixcell_core.contracts.canonical import digest
from pixcell_core.contracts.enrolment import EnrolmentRequest
from pixcell_core.contracts.study import AdapterSettings
from pixcell_core.errors import BadInputError, PixcellError, RefusedError
from server.enrolment.pki import initialise
from server.enrolment.sites import SiteBook
from server.layout import ServerLayout
from server.registry.opening import open_registry
from server.studies.book import StudyBook, make_study, read_settings
from server.studies.start import start_adapter
from tests.server.consortium import make_node_key
from tests.server.consortium import make_study as a_study
from tests.server.enrolled import PASSPHRASE
from tests.site_client.trainer.site_fixture import TARGETS, make_base, start_of
from tests.site_client.trainer.site_fixture import make_study as tiny_study


def settings(**changes: Any) -> dict[str, Any]:
    """Settings as they come from a YAML file."""
    now = datetime.now(UTC)
    return (
        a_study().model_dump(mode="json", exclude={"schema_version"})
        | {
            "created_at": now,
            "expires_at": now + timedelta(days=1),
        }
        | changes
    )


def test_an_unknown_setting_names_the_nearest_known_one() -> None:
    with pytest.raises(BadInputError, match="no setting 'noise_multiplyer'") as error:
        make_study(settings(noise_multiplyer=1.0))
    assert "noise_multiplier" in error.value.hint


@pytest.mark.parametrize(
    "change", [{"quorum": 9}, {"rounds": "many"}, {"reply_grid_s": 4.0}, {"delta": 0.5}, {"sites": ["East"]}]
)
def test_an_impossible_study_is_one_error_and_nothing_is_written(change: dict[str, Any]) -> None:
    with pytest.raises(BadInputError, match="not possible") as error:
        make_study(settings(**change))
    assert error.value.exit_code == 4


@pytest.mark.parametrize(
    "name", ["early_stopping", "patience", "report_loss", "report_gradient_norms", "aggregation_weights"]
)
def test_settings_that_would_carry_something_past_the_noise_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(RefusedError, match=f"cannot have '{name}'") as refused:
        make_study(settings(**{name: True}))
    assert refused.value.code == "setting-leaks"


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "\x00", "just words"])
def test_a_settings_file_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(BadInputError):
        read_settings(path)


def test_a_study_is_never_replaced(tmp_path: Path) -> None:
    book, study = StudyBook(open_registry(tmp_path)), a_study()
    book.add(study)
    book.add(study)
    with pytest.raises(RefusedError, match="already called"):
        book.add(study.model_copy(update={"rounds": 7}))
    assert book.get(study.id) == study
    with pytest.raises(BadInputError, match="no study other"):
        book.get("other")


@pytest.mark.parametrize("kind", ["ffa-lora", "lora"])
def test_the_start_adapter_is_the_one_the_sites_model_has(tmp_path: Path, kind: str) -> None:
    base = make_base(tmp_path / "base")
    settings = AdapterSettings.model_validate({"kind": kind, "rank": 2, "targets": TARGETS, "seed": 7})
    study = tiny_study(base, adapter=settings)
    ours, theirs = start_adapter(base, study.adapter), start_of(base, study)
    assert ours.keys() == theirs.keys() and any("lora_A" in name for name in ours) == (kind == "lora")
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert all(bool(value.any()) == ("lora_A" in name) for name, value in ours.items())


def test_targets_that_cannot_learn_are_refused_before_a_site_is_asked(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    with pytest.raises(RefusedError, match="privacy noise alone") as refused:
        start_adapter(base, AdapterSettings(targets=("attn1.to_q", "attn2.to_k")))
    assert refused.value.code == "silent-adapter-target"


def test_targets_that_name_no_layer_are_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    with pytest.raises(BadInputError, match="No linear layer"):
        start_adapter(base, AdapterSettings(targets=("to_nowhere",)))
    with pytest.raises(BadInputError, match=r"no \.safetensors"):
        start_adapter(tmp_path, AdapterSettings(targets=TARGETS))


def request_of(site: str, **changes: str) -> EnrolmentRequest:
    """An enrolment request with fresh keys."""
    from pixcell_core.trust.keys import SigningKey

    values = {"node_key": make_node_key(), "approval_key": SigningKey.generate().verify_key.to_pem().decode()}
    return EnrolmentRequest(site=site, created_at=datetime.now(UTC), **(values | changes))


def test_sites_are_enrolled_once_and_share_no_key(tmp_path: Path) -> None:
    layout = ServerLayout(tmp_path / "server")
    initialise(layout, ["127.0.0.1"], PASSPHRASE)
    book, east = SiteBook(layout.registry()), request_of("east")

    def add(request: EnrolmentRequest) -> None:
        path = tmp_path / "request.json"
        path.write_bytes(request.to_bytes())
        book.add(path)

    add(east)
    add(east)
    for bad, code in (
        (request_of("east"), "site-exists"),
        (request_of("west", node_key=east.node_key), "shared-identity"),
        (request_of("west", approval_key=east.approval_key), "shared-identity"),
    ):
        with pytest.raises(RefusedError) as refused:
            add(bad)
        assert refused.value.code == code
    for text in ("", "{}", '{"schema_version": "enrolment-request/v1"}', "[" * 100_000):
        (tmp_path / "request.json").write_text(text)
        with pytest.raises(PixcellError) as unreadable:
            book.add(tmp_path / "request.json")
        assert unreadable.value.exit_code == 4
    assert book.names() == ["east"]


def test_a_consortium_is_made_once_and_its_secrets_are_private(tmp_path: Path) -> None:
    layout = ServerLayout(tmp_path / "server")
    with pytest.raises(BadInputError, match="not a coordinator's folder"):
        layout.check()
    initialise(layout, ["hub.example.org", "127.0.0.1"], PASSPHRASE)
    before = digest((layout.pki / "ca.crt").read_bytes())
    with pytest.raises(RefusedError, match="already holds"):
        initialise(layout, ["127.0.0.1"], PASSPHRASE)
    assert digest((layout.pki / "ca.crt").read_bytes()) == before
    for private in (layout.pki / "ca.key", layout.pki / "server.key", layout.secrets / "executor.secret"):
        assert private.stat().st_mode & 0o777 == 0o600
    assert layout.root.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("host", ["", "a b", "https://hub", "hub:9"])
def test_a_host_that_is_none_is_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(BadInputError, match="neither a host name"):
        initialise(ServerLayout(tmp_path / "server"), [host], PASSPHRASE)
    assert not (tmp_path / "server" / "pki" / "ca.crt").exists()
