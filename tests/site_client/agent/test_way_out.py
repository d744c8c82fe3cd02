"""The way to the hub through a proxy: chosen once, seen by nobody, and named when it fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from pixcell_core.errors import BadInputError
from site_client.agent.hub_client import tls_context
from site_client.agent.proxy import choose_way_out, parse_proxy
from site_client.agent.proxy_setting import set_proxy, show_proxy
from site_client.approvals.site_folder import SiteFolder, SiteIdentity
from tests.site_client.agent.joining import HERE, activate, good_hub
from tests.site_client.agent.peers import (
    Authority,
    ConnectProxy,
    unused_port,
)


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
