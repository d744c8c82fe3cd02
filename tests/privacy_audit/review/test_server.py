"""The page over real HTTP: every route, and everything that must be turned away at the door."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from pixcell_core.errors import BadInputError, TimedOutError
from pixcell_core.trust.dsse import Envelope
from pixcell_core.trust.keys import SigningKey
from privacy_audit.review.door import MAX_BODY_BYTES
from privacy_audit.review.serving import serve_review
from privacy_audit.review.session import DECISIONS, ReviewSession
from privacy_audit.review_queue import KEY, QUEUE, read_decisions
from tests.privacy_audit.review.queue_folder import kinds_of, make_queue, served

REVIEWER = SigningKey.generate()
JSON = {"content-type": "application/json"}


@pytest.fixture
def session(tmp_path: Path) -> Iterator[ReviewSession]:
    made = ReviewSession(make_queue(tmp_path / "out"), "Dr. A", REVIEWER)
    yield made
    made.close()


def raw(address: str, request: str) -> str:
    """What the server answers to bytes no client would send; the address stands for {host} and {path}."""
    parts = urlsplit(address)
    assert parts.hostname and parts.port
    text = request.replace("{host}", parts.netloc).replace("{path}", parts.path).replace("\n", "\r\n")
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as link:
        link.sendall(text.encode())
        data = b""
        while block := link.recv(65_536):
            data += block
    return data.decode("latin-1")


def status_of(answer: str) -> int:
    return int(answer.split(" ", 2)[1])


def finish(client: httpx.Client, session: ReviewSession) -> None:
    for item in session.queue.items:
        if item.id not in session.calls:
            client.post("call", json={"id": item.id, "call": "different"})
    assert client.post("sign", json={"sign": "all"}).status_code == 200


def test_every_route_from_the_page_to_the_signature(session: ReviewSession) -> None:
    with served(session) as (address, ended), httpx.Client(base_url=address, timeout=10) as client:
        page = client.get("")
        assert page.status_code == 200 and "Dr. A" in page.text and session.queue.questions.field in page.text
        for name, kind in (
            ("review.css", "text/css"),
            ("review.js", "text/javascript"),
            ("review.svg", "image/svg"),
        ):
            found = client.get(name)
            assert found.status_code == 200 and found.headers["content-type"].startswith(kind)
        state = client.get("state").json()
        assert state == {
            "items": [i.id for i in session.queue.items],
            "asks": {i.id: "field" for i in session.queue.items},
            "calls": {},
            "result": None,
        }
        first = session.queue.items[0]
        for side in ("left", "right"):
            tile = client.get(f"tile/{first.id}/{side}.png")
            assert tile.headers["content-type"] == "image/png" and tile.content[1:4] == b"PNG"
        answer = client.post("call", json={"id": first.id, "call": "same field"})
        assert answer.json() == {"decided": 1, "open": 7}
        unfinished = client.post("sign", json={"sign": "all"})
        assert (unfinished.status_code, unfinished.json()["code"]) == (409, "review-unfinished")
        finish(client, session)
        late = client.post("call", json={"id": first.id, "call": "different"})
        assert (late.status_code, late.json()["code"]) == (409, "review-signed")
        result = client.get("state").json()["result"]
        assert result["decoys"]["different"] + result["decoys"]["same"] == 4
    assert ended == []
    found = read_decisions(session.out, Envelope.load(session.out / DECISIONS), REVIEWER.verify_key).human
    assert found.pair_same + found.decoy_same == 1


def test_no_answer_before_the_signature_tells_a_pair_from_a_decoy(session: ReviewSession) -> None:
    kinds = kinds_of(session.out)
    with served(session) as (address, _), httpx.Client(base_url=address, timeout=10) as client:
        shapes: dict[str, set[str]] = {"pair": set(), "decoy": set()}
        for item in session.queue.items:
            answer = client.post("call", json={"id": item.id, "call": "unsure"})
            shapes[kinds[item.id]].add(",".join(sorted(answer.json())))
            tile = client.get(f"tile/{item.id}/left.png")
            shapes[kinds[item.id]].add(",".join(sorted(n for n in tile.headers if n != "date")))
        assert shapes["pair"] == shapes["decoy"]
        everything = client.get("").text + client.get("state").text + client.get("review.js").text
        for word in ("patient-", '"kind"', "score", "training"):
            assert word not in everything
        finish(client, session)


def test_headers_stand_on_every_answer(session: ReviewSession) -> None:
    with served(session) as (address, _), httpx.Client(base_url=address, timeout=10) as client:
        item = session.queue.items[0].id
        for answer in (
            client.get(""),
            client.get(f"tile/{item}/left.png"),
            client.get("nothing"),
            client.get("", headers={"host": "evil.example"}),
            client.post("call", content=b"x", headers=JSON),
        ):
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
            assert "frame-ancestors 'none'" in policy
            assert answer.headers["cache-control"] == "no-store"
            assert answer.headers["referrer-policy"] == "no-referrer"
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["cross-origin-resource-policy"] == "same-origin"
            assert "server" not in answer.headers and "set-cookie" not in answer.headers
            assert "access-control-allow-origin" not in answer.headers
        page = client.get("").text
        assert (
            "http://" not in page
            and "https://" not in page
            and "<style" not in page
            and "onclick" not in page
        )
        finish(client, session)


def test_who_does_not_know_the_token_or_comes_by_another_name_is_turned_away(session: ReviewSession) -> None:
    with served(session) as (address, _), httpx.Client(base_url=address, timeout=10) as client:
        root = f"http://{urlsplit(address).netloc}"
        token = urlsplit(address).path.strip("/")
        wrong = [f"{root}/", f"{root}/{'x' * 32}/", f"{root}/{token[:-1]}/", f"{root}/{token.swapcase()}/"]
        wrong += [f"{root}/{token}", f"{root}/x/{token}/", f"{root}/docs", f"{root}/openapi.json"]
        answers = [client.get(url) for url in wrong]
        assert {answer.status_code for answer in answers} == {404}
        assert len({answer.content for answer in answers}) == 1, "a wrong token and a wrong path look alike"
        port = urlsplit(address).port
        hosts = [
            "evil.example",
            f"evil.example:{port}",
            "127.0.0.1",
            f"127.0.0.1:{int(port or 0) + 1}",
            "",
            "[::1]",
        ]
        for host in hosts:
            assert client.get("", headers={"host": host}).status_code == 421, host
        assert client.get("", headers={"host": f"localhost:{port}"}).status_code == 200
        twice = raw(address, "GET {path} HTTP/1.1\nConnection: close\nHost: {host}\nHost: evil.example\n\n")
        assert status_of(twice) in (400, 421)
        assert status_of(raw(address, "GET {path} HTTP/1.1\nConnection: close\n\n")) in (400, 421)
        absolute = raw(
            address, "GET http://evil.example{path} HTTP/1.1\nConnection: close\nHost: evil.example\n\n"
        )
        assert status_of(absolute) in (400, 404, 421)
        for site in ("cross-site", "same-site"):
            assert client.get("state", headers={"sec-fetch-site": site}).status_code == 403
        for origin in ("http://evil.example", "null", f"https://127.0.0.1:{port}"):
            item = session.queue.items[0].id
            answer = client.post("call", json={"id": item, "call": "same field"}, headers={"origin": origin})
            assert answer.status_code == 403
        assert session.calls == {}
        finish(client, session)


def test_nothing_but_the_queue_is_served(session: ReviewSession) -> None:
    secret = (session.out / KEY).read_text()
    item = session.queue.items[0].id
    with served(session) as (address, _), httpx.Client(base_url=address, timeout=10) as client:
        for path in (
            f"tile/{'0' * 16}/left.png",
            f"tile/{item}/key.png",
            f"tile/{item}/left.jpg",
            f"tile/{item}/../left.png",
            f"tile/{item}/left.png/",
            "tile/../../site/review-key.json",
            "tile/..%2f..%2fsite%2freview-key.json/left.png",
            "tile/%2e%2e/%2e%2e/site/review-key.json",
            "../site/review-key.json",
            "review.html.j2",
            "..%2freview.html.j2",
            "site/review-key.json",
            "//etc/passwd",
            "%00",
        ):
            answer = raw(address, f"GET {{path}}{path} HTTP/1.1\nConnection: close\nHost: {{host}}\n\n")
            assert status_of(answer) in (400, 404), (path, answer[:200])
            assert secret[:40] not in answer and '"kind"' not in answer
        for method in ("PUT", "DELETE", "PATCH", "OPTIONS"):
            assert client.request(method, "call", json={}).status_code == 405
        assert client.get("call").status_code == 405
        assert client.post("", json={}).status_code == 405
        finish(client, session)


def test_bodies_are_small_named_in_length_and_calls(session: ReviewSession) -> None:
    item = session.queue.items[0].id
    with served(session) as (address, _), httpx.Client(base_url=address, timeout=10) as client:
        big = json.dumps({"id": item, "call": "same field", "x": "y" * MAX_BODY_BYTES})
        assert client.post("call", content=big, headers=JSON).status_code == 413
        lying = raw(
            address,
            "POST {path}call HTTP/1.1\nConnection: close\nHost: {host}\nContent-Type: application/json\n"
            "Content-Length: 99999999999\n\n{}",
        )
        assert status_of(lying) == 413
        chunked = client.post("call", content=iter([b"{", b"}"]), headers=JSON)
        assert chunked.status_code == 411
        plain = client.post("call", content=b'{"id":"x"}', headers={"content-type": "text/plain"})
        assert plain.status_code == 415
        form = client.post("call", data={"id": item, "call": "same field"})
        assert form.status_code == 415
        for body in (
            b"",
            b"[]",
            b"not json",
            b'{"id": 5, "call": "same field"}',
            json.dumps({"id": item, "call": "copy"}).encode(),
            json.dumps({"id": item, "call": "same field", "user": "me"}).encode(),
            json.dumps({"id": "../../etc", "call": "same field"}).encode(),
        ):
            answer = client.post("call", content=body, headers=JSON)
            assert answer.status_code == 422 and item not in answer.text, body
        stranger = client.post("call", json={"id": "0" * 16, "call": "different"})
        assert (stranger.status_code, stranger.json()["code"]) == (404, "no-such-item")
        assert client.post("sign", json={}).status_code == 422
        assert session.calls == {} and session.signed is None
        finish(client, session)


def test_it_listens_on_loopback_alone_and_refuses_a_taken_port(session: ReviewSession) -> None:
    with served(session) as (address, _), httpx.Client(base_url=address, timeout=10) as client:
        port = urlsplit(address).port
        assert port
        for other in {
            found[4][0] for found in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
        }:
            if not str(other).startswith("127."):
                with pytest.raises(OSError):
                    socket.create_connection((str(other), port), timeout=2).close()
        with pytest.raises(BadInputError) as refused:
            serve_review(session, port=port)
        assert refused.value.code == "port-unusable"
        finish(client, session)


def test_left_alone_it_ends_and_keeps_the_calls(session: ReviewSession) -> None:
    began = time.monotonic()
    with served(session, idle_s=0.8) as (address, ended):
        httpx.post(f"{address}call", json={"id": session.queue.items[0].id, "call": "unsure"})
    assert time.monotonic() - began < 15
    assert isinstance(ended[0], TimedOutError) and len(session.calls) == 1
    assert not (session.out / DECISIONS).exists()


def test_a_picture_that_is_no_png_never_reaches_a_browser(session: ReviewSession) -> None:
    broken = session.queue.items[0].model_copy(update={"left": "data:image/png;base64,PHN2Zz4="})
    session.queue = session.queue.model_copy(update={"items": (broken, *session.queue.items[1:])})
    with pytest.raises(BadInputError) as refused:
        serve_review(session)
    assert refused.value.code == "bad-review-queue"
    assert (session.out / QUEUE).is_file()
