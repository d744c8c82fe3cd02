"""The link to the hub: what the agent shows, whom it trusts, and what it says when the hub says no."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import pytest
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest, SendNodeHeartbeatResponse

from pixcell_core.errors import BadInputError
from site_client.agent.hub_client import hub_client, require_kit, tls_context
from site_client.agent.link_record import read_link
from site_client.agent.link_trouble import (
    LINK_TROUBLES,
    REASON_HEADER,
    LinkTrouble,
    trouble_of,
    trouble_of_answer,
)
from site_client.approvals.site_folder import SiteFolder
from tests.site_client.agent.joining import HERE, activate, fleet, good_hub, hub_answer
from tests.site_client.agent.peers import (
    DAY,
    Answer,
    Authority,
    TlsServer,
    install_kit,
    unused_port,
)


def test_the_site_shows_its_certificate_and_a_heartbeat_counts_when_the_hub_accepts_it(
    site: SiteFolder, authority: Authority, serve: Callable[..., Any]
) -> None:
    hub = good_hub(serve, authority)
    with fleet(site, hub.address) as client:
        assert client.ActivateNode(ActivateNodeRequest()).node_id == 7
        before = read_link(site.agent)
        assert before is not None and before.accepted_at is None and before.heartbeats == 0
        client.SendNodeHeartbeat(SendNodeHeartbeatRequest())
    after = read_link(site.agent)
    assert after is not None and after.heartbeats == 1
    assert 0.0 <= (after.age_s(datetime.now(UTC)) or -1.0) < 5.0
    assert hub.peers == ["east", "east"]


def test_a_heartbeat_the_hub_does_not_accept_does_not_count(
    site: SiteFolder, authority: Authority, serve: Callable[..., Any]
) -> None:
    refusing = serve(
        TlsServer,
        authority.issue("hub", hosts=HERE),
        authority.ca,
        lambda path, body: Answer(body=SendNodeHeartbeatResponse(success=False).SerializeToString()),
    )
    with fleet(site, refusing.address) as client:
        client.SendNodeHeartbeat(SendNodeHeartbeatRequest())
    link = read_link(site.agent)
    assert link is not None and link.accepted_at is None


def test_a_certificate_of_another_authority_is_interception_and_nothing_is_sent(
    site: SiteFolder, stranger: Authority, serve: Callable[..., Any]
) -> None:
    hub = serve(TlsServer, stranger.issue("hub", hosts=HERE), None, hub_answer)
    assert activate(site, hub.address) == "foreign-certificate"
    assert hub.asked == []


def test_the_systems_trust_store_and_the_environment_do_not_count(
    site: SiteFolder, stranger: Authority, serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = serve(TlsServer, stranger.issue("hub", hosts=HERE), None, hub_answer)
    monkeypatch.setenv("SSL_CERT_FILE", str(stranger.ca))
    monkeypatch.setenv("SSL_CERT_DIR", str(stranger.folder))
    assert activate(site, hub.address) == "foreign-certificate"
    # The mutant: a context that reads the environment, as httpx builds by default, would have let it pass.
    lax = ssl.create_default_context()
    assert httpx.post(f"https://{hub.address}/v1/fleet/x", verify=lax, trust_env=False).status_code == 200


@pytest.mark.parametrize(
    ("validity", "code"),
    [
        ({"ends": -timedelta(hours=1)}, "hub-certificate-expired"),
        ({"begins": DAY}, "hub-certificate-not-yet-valid"),
    ],
)
def test_a_hub_certificate_out_of_its_time_names_the_clock(
    site: SiteFolder,
    authority: Authority,
    serve: Callable[..., Any],
    validity: dict[str, timedelta],
    code: str,
) -> None:
    hub = serve(TlsServer, authority.issue("hub", hosts=HERE, **validity), authority.ca, hub_answer)
    assert activate(site, hub.address) == code
    assert "clock" in LinkTrouble(code).reason and hub.asked == []


def test_a_certificate_for_another_name_is_told_from_interception(
    site: SiteFolder, authority: Authority, serve: Callable[..., Any]
) -> None:
    hub = serve(TlsServer, authority.issue("hub", hosts=("hub.example.org",)), authority.ca, hub_answer)
    assert activate(site, hub.address) == "hub-name-mismatch"


def test_tls_is_1_2_or_newer_and_one_authority_is_trusted(site: SiteFolder, authority: Authority) -> None:
    context = tls_context(site)
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert context.check_hostname and context.verify_mode is ssl.CERT_REQUIRED
    assert [int(ca["serialNumber"], 16) for ca in context.get_ca_certs()] == [
        authority.certificate.serial_number
    ]


def test_a_revoked_kit_is_told_as_such(
    site: SiteFolder, authority: Authority, serve: Callable[..., Any]
) -> None:
    crl = authority.revoke(site.tls_certificate)
    hub = good_hub(serve, authority, crl=crl)
    assert activate(site, hub.address) == "kit-revoked"
    assert hub.asked == []


def test_a_kit_the_hub_finds_expired_is_told_as_such(
    site: SiteFolder, authority: Authority, serve: Callable[..., Any]
) -> None:
    install_kit(site, authority, ends=-timedelta(hours=1))
    assert activate(site, good_hub(serve, authority).address) == "kit-expired"


def test_a_kit_of_another_consortium_is_told_as_such(
    site: SiteFolder, authority: Authority, stranger: Authority, serve: Callable[..., Any]
) -> None:
    install_kit(site, stranger)
    assert activate(site, good_hub(serve, authority).address) == "kit-of-another-consortium"


def test_a_hub_whose_door_says_no_to_the_kit(
    site: SiteFolder, authority: Authority, serve: Callable[..., Any]
) -> None:
    hub = serve(
        TlsServer, authority.issue("hub", hosts=HERE), authority.ca, lambda p, b: Answer(403, "text/plain")
    )
    assert activate(site, hub.address) == "kit-refused"


@pytest.mark.parametrize(
    ("status", "reason", "code"),
    [
        (403, "certificate-revoked", "kit-revoked"),
        (403, "certificate-expired", "kit-expired"),
        (403, "certificate-not-yet-valid", "clock-wrong"),
        (403, "node-key-of-another", "kit-refused"),
        (401, "no-node-key", "kit-refused"),
        (429, "too-many-requests", "hub-failing"),
        (403, "a reason of tomorrow", "kit-refused"),
    ],
)
def test_the_reason_that_the_hubs_door_gives_is_passed_on(
    site: SiteFolder, authority: Authority, serve: Callable[..., Any], status: int, reason: str, code: str
) -> None:
    no = Answer(status, "text/plain", headers={REASON_HEADER: reason})
    hub = serve(TlsServer, authority.issue("hub", hosts=HERE), authority.ca, lambda p, b: no)
    assert activate(site, hub.address) == code


def test_without_a_kit_the_agent_says_which_command_installs_one(site: SiteFolder) -> None:
    site.tls_certificate.unlink()
    with pytest.raises(BadInputError) as missing:
        require_kit(site)
    assert missing.value.code == "no-kit" and "pixcell site install-kit" in missing.value.hint


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda s, a: s.tls_key.chmod(0o640), "key-file-exposed"),
        (lambda s, a: s.tls_certificate.write_bytes(b"nonsense"), "bad-kit"),
        (lambda s, a: s.tls_certificate.write_bytes(a.issue("east")[0].read_bytes()), "bad-kit"),
        (lambda s, a: install_kit(s, a, ends=-timedelta(hours=1)), "kit-expired"),
        (lambda s, a: install_kit(s, a, begins=DAY), "kit-not-yet-valid"),
    ],
)
def test_an_unusable_kit_is_one_clear_error(
    site: SiteFolder, authority: Authority, spoil: Callable[[SiteFolder, Authority], object], code: str
) -> None:
    require_kit(site)
    spoil(site, authority)
    with pytest.raises(BadInputError) as refused:
        require_kit(site)
    assert refused.value.code == code


@pytest.mark.parametrize(
    "answer",
    [
        Answer(200, "text/html", b"<html>welcome</html>"),
        Answer(404, "text/html"),
        Answer(302, "text/html", headers={"location": "https://elsewhere.invalid/"}),
        Answer(405, "text/plain"),
    ],
)
def test_another_service_at_the_address_is_not_taken_for_a_hub(
    site: SiteFolder, authority: Authority, serve: Callable[..., Any], answer: Answer
) -> None:
    other = serve(TlsServer, authority.issue("hub", hosts=HERE), authority.ca, lambda p, b: answer)
    assert activate(site, other.address) == "not-the-hub"
    assert len(other.asked) == 1


def test_plain_http_at_the_address_is_not_taken_for_a_hub(
    site: SiteFolder, serve: Callable[..., Any]
) -> None:
    plain = serve(TlsServer, None, None, hub_answer)
    assert activate(site, plain.address) == "not-the-hub"
    assert plain.asked == []


@pytest.mark.parametrize("greets", [False, True])
def test_a_peer_that_hangs_up_is_not_called_another_service(
    site: SiteFolder, authority: Authority, greets: bool
) -> None:
    """As a hub that restarts does: before the handshake, or right after it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue("hub", hosts=HERE))
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            plain, _ = listener.accept()
            with plain:
                if greets:
                    with context.wrap_socket(plain, server_side=True) as stream:
                        stream.recv(65_536)

        thread = threading.Thread(target=hang_up)
        thread.start()
        assert activate(site, f"127.0.0.1:{listener.getsockname()[1]}") == "hub-hung-up"
        thread.join()


def test_nobody_there_and_no_such_name(site: SiteFolder) -> None:
    assert activate(site, f"127.0.0.1:{unused_port()}") == "hub-unreachable"
    assert activate(site, "no-such-hub.invalid:443") == "hub-name-unknown"


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (Answer(412, "application/json", b'{"code": 2004, "detail": "x"}'), "not-let-in"),
        (Answer(401, "application/json", b'{"detail": "x"}'), "not-let-in"),
        (
            Answer(
                401,
                "application/json",
                b"{}",
                {"date": format_datetime(datetime.now(UTC) + timedelta(days=2), usegmt=True)},
            ),
            "clock-wrong",
        ),
        (Answer(503, "text/plain"), "hub-failing"),
        (Answer(429, "text/plain"), "hub-failing"),
    ],
)
def test_a_hub_that_does_not_let_us_in_is_explained(
    site: SiteFolder, authority: Authority, serve: Callable[..., Any], answer: Answer, code: str
) -> None:
    hub = serve(TlsServer, authority.issue("hub", hosts=HERE), authority.ca, lambda p, b: answer)
    assert activate(site, hub.address) == code


def test_another_release_at_the_hub_is_named_before_flower_ends_the_process() -> None:
    request = httpx.Request("POST", "https://hub/v1/fleet/activate-node")
    answer = httpx.Response(412, json={"code": 1001, "detail": "x"}, request=request)
    trouble = trouble_of_answer(answer)
    assert trouble is not None and trouble.code == "versions-differ"


def test_an_ended_run_is_no_trouble_of_the_link(
    site: SiteFolder, authority: Authority, serve: Callable[..., Any]
) -> None:
    ended = Answer(403, "application/json", b'{"code": 3001, "detail": "run stopped"}')
    hub = serve(TlsServer, authority.issue("hub", hosts=HERE), authority.ca, lambda p, b: ended)
    with fleet(site, hub.address) as client, pytest.raises(httpx.HTTPStatusError):
        client.ActivateNode(ActivateNodeRequest())
    link = read_link(site.agent)
    assert link is not None and link.trouble == ""


def test_a_hub_that_never_answers_ends_in_time(site: SiteFolder, serve: Callable[..., Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute, hub_client(site, None, timeout_s=0.3) as client:
        with pytest.raises(httpx.HTTPError) as late:
            client.post(f"https://127.0.0.1:{mute.getsockname()[1]}/")
        assert trouble_of(late.value).code == "hub-slow"


def test_every_trouble_has_a_sentence_and_a_remedy() -> None:
    for code, (reason, remedy) in LINK_TROUBLES.items():
        assert len(reason) > 10 and len(remedy) > 3 and reason.endswith("."), code
    assert trouble_of(RuntimeError("?")).code == "link-failed"
