"""The way to the hub: what the agent shows, whom it trusts, which way it goes, and what it says when that fails."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import ActivateNodeRequest, ActivateNodeResponse
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest, SendNodeHeartbeatResponse
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from pixcell_core.errors import BadInputError
from site_client.agent.hub_client import LinkWatch, hub_client, require_kit, tls_context, watched_fleet_client
from site_client.agent.link_record import LinkRecorder, read_link
from site_client.agent.link_trouble import (
    LINK_TROUBLES,
    REASON_HEADER,
    LinkTrouble,
    trouble_of,
    trouble_of_answer,
)
from site_client.agent.proxy import Proxy, choose_way_out, parse_proxy
from site_client.agent.proxy_setting import set_proxy, show_proxy
from site_client.approvals.site_folder import SiteFolder, SiteIdentity
from tests.site_client.agent.peers import (
    DAY,
    Answer,
    Authority,
    ConnectProxy,
    TlsServer,
    install_kit,
    make_site,
    unused_port,
)

HERE = ("127.0.0.1",)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("pki") / "ours")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("pki") / "theirs", "another consortium")


@pytest.fixture
def site(tmp_path: Path, authority: Authority) -> SiteFolder:
    return make_site(tmp_path, authority)


@pytest.fixture
def serve() -> Iterator[Callable[..., Any]]:
    """Starts servers and proxies and closes them."""
    started: list[Any] = []

    def start(kind: type[Any], *arguments: Any, **settings: Any) -> Any:
        started.append(kind(*arguments, **settings))
        return started[-1]

    yield start
    for one in started:
        one.close()


def hub_answer(path: str, body: bytes) -> Answer:
    """A hub that lets everybody in."""
    if path.endswith("activate-node"):
        return Answer(body=ActivateNodeResponse(node_id=7).SerializeToString())
    return Answer(body=SendNodeHeartbeatResponse(success=True).SerializeToString())


def good_hub(serve: Callable[..., Any], authority: Authority, **settings: Any) -> TlsServer:
    made: TlsServer = serve(
        TlsServer, authority.issue("hub", hosts=HERE), authority.ca, hub_answer, **settings
    )
    return made


def fleet(site: SiteFolder, address: str, proxy: Proxy | None = None, said: list[str] | None = None) -> Any:
    """The SuperNode's own client as our agent builds it."""
    words = said if said is not None else []
    site.agent.mkdir(exist_ok=True)
    watch = LinkWatch(site, proxy, LinkRecorder(site.agent, 1), words.append)
    key = ec.generate_private_key(ec.SECP384R1())
    return watched_fleet_client(watch).from_server_address(
        address,
        False,
        site.hub_ca.read_bytes(),
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperNode"),
            NodeAuthHttpInterceptor(key, key.public_key()),
        ],
    )


def activate(site: SiteFolder, address: str, proxy: Proxy | None = None) -> str:
    """Try to join; the code of the trouble that was recorded, or `ok`."""
    said: list[str] = []
    (site.agent / "link.json").unlink(missing_ok=True)
    with fleet(site, address, proxy, said) as client:
        try:
            client.ActivateNode(ActivateNodeRequest(public_key=b"k", heartbeat_interval=10))
        except Exception:
            link = read_link(site.agent)
            assert link is not None and link.failures == 1
            assert said == [f"[{link.trouble}] {' '.join(LINK_TROUBLES[link.trouble])}"]
            return link.trouble
    assert said == []
    return "ok"


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


# ---- whom the agent trusts


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


# ---- what the hub says of our certificate


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


# ---- the kit before anything is tried


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


# ---- the proxy


def test_everything_goes_through_the_proxy_that_was_set(
    site: SiteFolder, authority: Authority, serve: Callable[..., Any]
) -> None:
    hub, proxy = good_hub(serve, authority), serve(ConnectProxy)
    assert activate(site, hub.address, parse_proxy(proxy.url)) == "ok"
    assert proxy.asked == [f"CONNECT {hub.address} HTTP/1.1"] and hub.peers == ["east"]


def test_the_environment_moves_nothing_once_the_way_is_chosen(
    site: SiteFolder, authority: Authority, serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, detour = good_hub(serve, authority), serve(ConnectProxy)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "HTTP_PROXY"):
        monkeypatch.setenv(name, detour.url)
    monkeypatch.setenv("NO_PROXY", "")
    assert activate(site, hub.address) == "ok" and detour.asked == []
    # The mutant: Flower's own client follows the environment.
    with httpx.Client(verify=tls_context(site)) as plain:
        plain.post(f"https://{hub.address}/v1/fleet/x")
    assert detour.asked == [f"CONNECT {hub.address} HTTP/1.1"]


def test_credentials_come_from_a_private_file(
    site: SiteFolder, authority: Authority, serve: Callable[..., Any], tmp_path: Path
) -> None:
    hub, proxy = good_hub(serve, authority), serve(ConnectProxy, credentials="east:s3cret")
    assert activate(site, hub.address, parse_proxy(proxy.url)) == "proxy-needs-credentials"
    secret = tmp_path / "proxy.txt"
    secret.touch(mode=0o600)
    secret.write_text("east:s3cret\n")
    assert activate(site, hub.address, parse_proxy(proxy.url, secret)) == "ok"
    secret.write_text("east:wrong\n")
    assert activate(site, hub.address, parse_proxy(proxy.url, secret)) == "proxy-needs-credentials"
    secret.chmod(0o644)
    with pytest.raises(BadInputError) as exposed:
        parse_proxy(proxy.url, secret).credentials()
    assert exposed.value.code == "key-file-exposed"


@pytest.mark.parametrize(
    ("status", "code"), [(403, "proxy-refused"), (405, "proxy-refused"), (502, "proxy-cannot-reach-hub")]
)
def test_a_proxy_that_opens_no_tunnel_is_named(
    site: SiteFolder, authority: Authority, serve: Callable[..., Any], status: int, code: str
) -> None:
    hub, proxy = good_hub(serve, authority), serve(ConnectProxy, refuse=status)
    assert activate(site, hub.address, parse_proxy(proxy.url)) == code
    assert hub.asked == []


def test_a_proxy_that_opens_tls_sees_nothing(
    site: SiteFolder, authority: Authority, stranger: Authority, serve: Callable[..., Any]
) -> None:
    hub = good_hub(serve, authority)
    proxy = serve(ConnectProxy, intercept=stranger.issue("hub", hosts=HERE))
    assert activate(site, hub.address, parse_proxy(proxy.url)) == "foreign-certificate"
    assert proxy.opened == b"" and hub.asked == []


def test_a_proxy_that_is_not_there(site: SiteFolder) -> None:
    nobody = parse_proxy(f"http://127.0.0.1:{unused_port()}")
    assert activate(site, "127.0.0.1:9", nobody) == "proxy-unreachable"
    assert activate(site, "127.0.0.1:9", parse_proxy("http://no-such-host.invalid:1")) == "proxy-name-unknown"


@pytest.mark.parametrize(
    ("given", "setting", "environment", "proxy", "source"),
    [
        (None, None, {}, None, "none"),
        (None, None, {"HTTPS_PROXY": "http://p:3128"}, "http://p:3128", "environment"),
        (None, None, {"https_proxy": "p:3128"}, "http://p:3128", "environment"),
        (None, None, {"HTTPS_PROXY": "http://p:1", "NO_PROXY": "example.org"}, None, "none"),
        (None, None, {"HTTPS_PROXY": "http://p:1", "NO_PROXY": "x,.example.org"}, None, "none"),
        (None, None, {"HTTPS_PROXY": "http://p:1", "NO_PROXY": "*"}, None, "none"),
        (None, None, {"HTTPS_PROXY": "http://p:1", "NO_PROXY": "ample.org"}, "http://p:1", "environment"),
        (None, "http://s:2", {"HTTPS_PROXY": "http://p:1"}, "http://s:2", "site.json"),
        (None, "direct", {"HTTPS_PROXY": "http://p:1"}, None, "site.json"),
        ("http://c:3", "http://s:2", {"HTTPS_PROXY": "http://p:1"}, "http://c:3", "command line"),
        ("direct", "http://s:2", {}, None, "command line"),
    ],
)
def test_the_way_out_is_chosen_once_and_says_who_chose(
    given: str | None, setting: str | None, environment: dict[str, str], proxy: str | None, source: str
) -> None:
    identity = SiteIdentity(site="east", hub="hub.example.org:9443", proxy=setting)
    out = choose_way_out(identity, given, environment=environment)
    assert (out.proxy.url if out.proxy else None, out.source) == (proxy, source)


@pytest.mark.parametrize(
    ("address", "code"),
    [
        ("http://user:pw@p:1", "proxy-credentials-in-address"),
        ("https://p:1", "bad-proxy"),
        ("socks5://p:1", "bad-proxy"),
        ("http://", "bad-proxy"),
        ("http://p:port", "bad-proxy"),
        ("http://p:1/path", "bad-proxy"),
    ],
)
def test_an_unusable_proxy_is_one_clear_error(address: str, code: str) -> None:
    with pytest.raises(BadInputError) as refused:
        parse_proxy(address)
    assert refused.value.code == code and "pw" not in str(refused.value)


def test_the_proxy_is_a_setting_of_the_site(site: SiteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    monkeypatch.delenv("https_proxy", raising=False)
    assert set_proxy(site, "http://p:3128").proxy == "http://p:3128"
    assert site.identity().proxy == "http://p:3128" and show_proxy(site).source == "site.json"
    assert set_proxy(site, "direct").proxy is None and site.identity().proxy == "direct"
    assert set_proxy(site, "unset").source == "none" and site.identity().proxy is None


# ---- what else answers, or does not


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
                {"date": format_datetime(datetime.now(UTC) + timedelta(minutes=10), usegmt=True)},
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
