"""The doctor's checks of the network: once where all is well, and once where what it looks for is wrong."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from pixcell_core.trust.dsse import sign_envelope
from pixcell_core.trust.keys import SigningKey
from site_client.agent.proxy import WayOut, parse_proxy
from site_client.doctor import network_checks
from site_client.doctor.question import Question
from site_client.doctor.visit import visit
from tests.site_client.agent.peers import (
    DAY,
    Answer,
    Authority,
    ConnectProxy,
    TlsServer,
    install_kit,
    unused_port,
)
from tests.site_client.doctor.conftest import HEALTHY
from tests.site_client.doctor.findings import HERE, result, statuses


def test_a_site_that_reaches_its_hub_has_nothing_to_do(asked: Question, hub: TlsServer) -> None:
    report = visit(asked, checks=network_checks.NETWORK_CHECKS)
    assert {c.name: c.status for c in report.checks} == {
        "kit": "ok",
        "kit-version": "skip",
        "authority": "ok",
        "proxy": "ok",
        "dns": "ok",
        "tcp": "ok",
        "tls": "ok",
        "hub": "ok",
        "clock": "ok",
        "firewall": "skip",
    }
    assert hub.asked == ["/health"] and hub.peers == ["east"], "one question to the hub for all checks"


@pytest.mark.parametrize(
    ("ends", "status"), [(29 * DAY, "warn"), (31 * DAY, "ok"), (-timedelta(hours=1), "fail")]
)
def test_the_kit_is_warned_of_thirty_days_ahead(
    asked: Question, authority: Authority, ends: timedelta, status: str
) -> None:
    install_kit(asked.folder, authority, ends=ends)
    finding = result(network_checks.check_kit, asked)
    assert finding.status == status
    assert ("install-kit" in finding.remedy) == (status != "ok")


def test_no_kit_is_a_failure_with_the_command(asked: Question) -> None:
    asked.folder.tls_key.unlink()
    finding = result(network_checks.check_kit, asked)
    assert finding.status == "fail" and "pixcell site install-kit" in finding.remedy


def test_the_kits_version_is_read_where_it_is_written(asked: Question) -> None:
    signed = sign_envelope("application/vnd.pixcell.kit+json", b'{"version":3}', [SigningKey.generate()])
    asked.folder.kit.write_bytes(signed.to_bytes())
    assert "version 3" in result(network_checks.check_kit_version, asked).found


def test_the_hubs_certificate_is_warned_of_thirty_days_ahead(
    asked: Question, authority: Authority, serve: Callable[..., Any]
) -> None:
    soon = serve(
        TlsServer, authority.issue("hub", hosts=HERE, ends=20 * DAY), authority.ca, lambda p, b: HEALTHY
    )
    finding = result(network_checks.check_certificate, replace(asked, hub=soon.address))
    assert (finding.status == "warn" and "19 days" in finding.found) or "20 days" in finding.found


def test_interception_is_told_with_the_name_of_who_does_it(
    asked: Question, stranger: Authority, serve: Callable[..., Any]
) -> None:
    proxy = serve(ConnectProxy, intercept=stranger.issue("hub", hosts=HERE))
    through = replace(asked, way_out=WayOut(parse_proxy(proxy.url), "command line"))
    finding = result(network_checks.check_certificate, through)
    assert finding.status == "fail" and "CN=Hospital TLS inspection" in finding.found
    assert statuses(through, network_checks.check_hub, network_checks.check_clock) == ["fail", "skip"]
    assert proxy.opened == b""


@pytest.mark.parametrize(
    ("settings", "code"),
    [({"refuse": 403}, "proxy-refused"), ({"credentials": "u:p"}, "proxy-needs-credentials")],
)
def test_a_proxy_that_says_no_is_the_hubs_failure_and_named(
    asked: Question, serve: Callable[..., Any], settings: dict[str, Any], code: str
) -> None:
    proxy = serve(ConnectProxy, **settings)
    through = replace(asked, way_out=WayOut(parse_proxy(proxy.url), "command line"))
    assert f"[{code}]" in result(network_checks.check_hub, through).found
    assert statuses(through, network_checks.check_port, network_checks.check_certificate) == ["ok", "skip"]


def test_an_exposed_credentials_file_is_found(asked: Question, tmp_path: Path) -> None:
    secret = tmp_path / "proxy.txt"
    secret.write_text("u:p")
    secret.chmod(0o644)
    proxy = parse_proxy("http://127.0.0.1:1", secret)
    finding = result(network_checks.check_proxy, replace(asked, way_out=WayOut(proxy, "command line")))
    assert finding.status == "fail" and "key-file-exposed" in finding.found


def test_nobody_at_the_address(asked: Question) -> None:
    nobody = replace(asked, hub=f"127.0.0.1:{unused_port()}")
    found = {c.name: c.status for c in visit(nobody, checks=network_checks.NETWORK_CHECKS).checks}
    assert (found["dns"], found["tcp"], found["tls"], found["hub"], found["clock"]) == (
        "ok",
        "fail",
        "skip",
        "fail",
        "skip",
    )


def test_no_such_name(asked: Question) -> None:
    nowhere = replace(asked, hub="no-such-hub.invalid:443")
    assert statuses(nowhere, network_checks.check_name, network_checks.check_port) == ["fail", "skip"]


@pytest.mark.parametrize(
    ("off_s", "status"), [(0, "ok"), (60, "warn"), (-60, "warn"), (600, "fail"), (-600, "fail")]
)
def test_the_clock_is_compared_with_the_hubs(
    asked: Question, authority: Authority, serve: Callable[..., Any], off_s: int, status: str
) -> None:
    def answer(path: str, body: bytes) -> Answer:
        there = datetime.now(UTC) + timedelta(seconds=off_s)
        return Answer(200, "application/json", b"{}", {"date": format_datetime(there, usegmt=True)})

    wrong = serve(TlsServer, authority.issue("hub", hosts=HERE), authority.ca, answer)
    finding = result(network_checks.check_clock, replace(asked, hub=wrong.address))
    assert finding.status == status
    assert ("behind" if off_s > 0 else "s") in finding.found


def test_a_hub_without_a_date_is_not_called_right(
    asked: Question, authority: Authority, serve: Callable[..., Any]
) -> None:
    silent = serve(
        TlsServer,
        authority.issue("hub", hosts=HERE),
        authority.ca,
        lambda p, b: Answer(200, "application/json", b"{}", {"date": "soon"}),
    )
    assert result(network_checks.check_clock, replace(asked, hub=silent.address)).status == "skip"


def test_another_host_is_contacted_only_when_named(asked: Question) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(0.2)
        place = f"127.0.0.1:{other.getsockname()[1]}"
        assert result(network_checks.check_other_host, asked).status == "skip"
        with pytest.raises(TimeoutError):
            other.accept()
        assert result(network_checks.check_other_host, replace(asked, other_host=place)).status == "warn"
        other.accept()[0].close()
    assert result(network_checks.check_other_host, replace(asked, other_host=place)).status == "ok"
