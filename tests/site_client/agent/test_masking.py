"""The agent's masking: what is on disk and when, what is refused, and that a plain update never leaves by mistake."""

from __future__ import annotations

import json
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from secrets import token_hex
from typing import Any

import numpy as np
import pytest

from pixcell_core.contracts.canonical import parse_document
from pixcell_core.contracts.masking import (
    KeysReply,
    KeysRequest,
    RoundAttempt,
    SharesReply,
    SurvivorsReply,
    UnmaskReply,
)
from pixcell_core.contracts.round import TensorPlace, TrainRequest
from pixcell_core.contracts.spool import Arrays
from pixcell_core.errors import RefusedError
from pixcell_core.masking.hub import HubAttempt
from pixcell_core.masking.keys import MaskingRefusedError
from pixcell_core.masking.roster import Roster
from pixcell_core.trust.durable import WriteFailedError
from site_client.agent import masking as agent_masking
from site_client.agent.masking import SiteMasking, load_state
from site_client.approvals.book import ApprovalBook
from site_client.approvals.site_folder import SiteFolder
from tests.pixcell_core.masking.parties import BOUND, INPUT
from tests.server.masked_consortium import NAME, MaskedConsortium, make_masked_consortium


@pytest.fixture
def consortium(tmp_path: Path) -> Iterator[MaskedConsortium]:
    """Three sites that approved a masked study."""
    made = make_masked_consortium(tmp_path, count=3, threshold=2, size=30)
    yield made
    made.grid.close()


def hub_of(c: MaskedConsortium, number: int = 1) -> HubAttempt:
    """An honest hub, without a network."""
    attempt = RoundAttempt(study_digest=c.study.digest, round=number, input_digest=INPUT, nonce=token_hex(32))
    return HubAttempt(Roster.of(c.study), attempt, c.size)


def share(c: MaskedConsortium, hub: HubAttempt) -> None:
    """The first two exchanges."""
    for site in c.sites:
        hub.take_keys(site, c.masking(site).keys(hub.keys_request()))
    for site in c.sites:
        hub.take_shares(site, c.masking(site).shares(hub.shares_request()))


def round_of(c: MaskedConsortium, hub: HubAttempt, site: str, **changes: Any) -> TrainRequest:
    """The round as a site gets it."""
    request = TrainRequest(
        study_digest=c.study.digest,
        round=hub.attempt.round,
        input_digest=INPUT,
        layout=(TensorPlace(name=NAME, shape=(c.size,)),),
        masking=hub.masked_request(site),
    )
    return request.model_copy(update=changes)


def update(c: MaskedConsortium, value: float = 0.1) -> Arrays:
    """An update of one value."""
    return {NAME: np.full(c.size, value, np.float32)}


def mask_all(c: MaskedConsortium, hub: HubAttempt) -> None:
    """The third exchange."""
    for site in c.sites:
        request = round_of(c, hub, site)
        assert c.masking(site).accept(c.study, request)
        hub.take_masked(site, c.masking(site).mask(c.study, request, update(c)))


def file_of(folder: SiteFolder) -> Path:
    """The kept state of the one study."""
    (path,) = folder.masking.glob("*.json")
    return path


def refusal(act: Callable[[], object]) -> str:
    """The code with which the agent says no."""
    with pytest.raises(MaskingRefusedError) as found:
        act()
    assert found.value.hint
    return found.value.code


def test_a_hub_that_leaves_the_masking_out_gets_nothing(consortium: MaskedConsortium) -> None:
    c, hub = consortium, hub_of(consortium)
    share(c, hub)
    plain = round_of(c, hub, "s000", masking=None)
    assert refusal(lambda: c.masking("s000").accept(c.study, plain)) == "masking-missing"


def test_a_study_without_masking_is_trained_plainly_and_never_masked(consortium: MaskedConsortium) -> None:
    c, hub = consortium, hub_of(consortium)
    share(c, hub)
    open_study = c.study.model_copy(
        update={"aggregation": c.study.aggregation.model_copy(update={"masking": None})}
    )
    ApprovalBook(c.sites["s000"]).decide(open_study, "approve")
    masking = SiteMasking(c.sites["s000"], lambda digest: open_study)
    assert masking.accept(open_study, round_of(c, hub, "s000", masking=None)) is False
    assert refusal(lambda: masking.accept(open_study, round_of(c, hub, "s000"))) == "not-masked"
    assert masking.keys(hub.keys_request()).code == "not-masked"


def test_a_coordinate_is_clipped_to_the_studys_bound(consortium: MaskedConsortium) -> None:
    c, hub = consortium, hub_of(consortium)
    share(c, hub)
    for site, value in zip(c.sites, (9.0, 0.01, 0.02), strict=True):
        request = round_of(c, hub, site)
        c.masking(site).accept(c.study, request)
        hub.take_masked(site, c.masking(site).mask(c.study, request, update(c, value)))
    for site in hub.alive:
        hub.take_signature(site, c.masking(site).survivors(hub.survivors_request()))
    for site in hub.alive:
        hub.take_reveal(site, c.masking(site).unmask(hub.unmask_request()))
    assert np.allclose(hub.open().total, BOUND + 0.03, atol=1e-6)


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({NAME: np.full(30, np.nan, np.float32)}, "not-finite"),
        ({NAME: np.full(30, 1e30, np.float32)}, "norm-bound"),
        ({NAME: np.zeros(29, np.float32)}, "tensor-shape"),
        ({"other": np.zeros(30, np.float32)}, "tensor-shape"),
    ],
)
def test_an_update_the_hub_could_not_screen_is_screened_here(
    consortium: MaskedConsortium, changed: Arrays, code: str
) -> None:
    c, hub = consortium, hub_of(consortium)
    share(c, hub)
    request = round_of(c, hub, "s000")
    c.masking("s000").accept(c.study, request)
    assert refusal(lambda: c.masking("s000").mask(c.study, request, changed)) == code


def test_without_an_approval_no_keys_and_the_reason_is_public(consortium: MaskedConsortium) -> None:
    c, hub = consortium, hub_of(consortium)
    share(c, hub)
    ApprovalBook(c.sites["s000"]).decide(c.study, "revoke")
    reply = c.masking("s000").keys(hub_of(c).keys_request())
    assert (reply.code, reply.reason, reply.keys) == (
        "approval-withdrawn",
        "this site withdrew its approval",
        None,
    )
    assert c.masking("s000").shares(hub.shares_request()).code == "approval-withdrawn"


def test_a_withdrawal_takes_effect_at_the_next_round(consortium: MaskedConsortium) -> None:
    c, hub = consortium, hub_of(consortium)
    share(c, hub)
    mask_all(c, hub)
    ApprovalBook(c.sites["s000"]).decide(c.study, "revoke")
    for site in hub.alive:
        hub.take_signature(site, c.masking(site).survivors(hub.survivors_request()))
    assert c.masking("s000").unmask(hub.unmask_request()).code == "ok"
    assert c.masking("s000").keys(hub_of(c, 2).keys_request()).code == "approval-withdrawn"


def test_an_unknown_study_and_a_failure_at_the_site_tell_nothing_private(
    consortium: MaskedConsortium, tmp_path: Path
) -> None:
    c, hub = consortium, hub_of(consortium)

    def unknown(digest: str) -> Any:
        raise RefusedError("a round of a study this site was not asked about", hint="", code="unknown-study")

    reply = SiteMasking(c.sites["s000"], unknown).keys(hub.keys_request())
    assert reply.code == "unknown-study" and "not asked" in reply.reason
    c.sites["s000"].approval_key.chmod(0o644)
    reply = c.masking("s000").keys(hub.keys_request())
    assert reply.code == "key-file-exposed" and str(tmp_path) not in reply.reason


def test_the_state_is_the_owners_alone_and_its_predecessor_is_overwritten(
    consortium: MaskedConsortium,
) -> None:
    c, hub = consortium, hub_of(consortium)
    folder = c.sites["s000"]
    hub.take_keys("s000", c.masking("s000").keys(hub.keys_request()))
    path = file_of(folder)
    assert path.stat().st_mode & 0o777 == 0o600 and folder.masking.stat().st_mode & 0o777 == 0o700
    secret = json.loads(path.read_bytes())["mask_private"].encode()
    with path.open("rb") as before:
        c.masking("s000").keys(hub_of(c).keys_request())
        left = before.read()
    assert left == bytes(len(left)) and len(left) > 500
    assert all(secret not in file.read_bytes() for file in folder.masking.iterdir())


@pytest.mark.parametrize("fault", ["cut", "edited", "open to others", "a link"])
def test_a_state_that_cannot_be_trusted_is_never_begun_anew(consortium: MaskedConsortium, fault: str) -> None:
    c = consortium
    c.masking("s000").keys(hub_of(c).keys_request())
    path = file_of(c.sites["s000"])
    data = path.read_bytes()
    if fault == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif fault == "edited":
        path.write_bytes(data.replace(b'"stage":"keys"', b'"stage":"key5"'))
    elif fault == "open to others":
        path.chmod(0o640)
    else:
        path.rename(path.with_suffix(".away"))
        path.symlink_to(path.with_suffix(".away"))
    assert refusal(lambda: load_state(path)) == "masking-state-broken"
    reply = c.masking("s000").keys(hub_of(c).keys_request())
    assert (reply.code, reply.keys) == ("masking-state-broken", None)


@pytest.mark.parametrize("stage", ["keys", "shares", "mask", "survivors", "unmask"])
def test_no_answer_leaves_before_its_state_is_on_disk(
    consortium: MaskedConsortium, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk at any stage: a refusal, the state of before, and the site drops out or is asked again."""
    c, hub = consortium, hub_of(consortium)
    site = c.masking("s000")
    if stage == "shares":
        for name in c.sites:
            hub.take_keys(name, c.masking(name).keys(hub.keys_request()))
    elif stage != "keys":
        share(c, hub)
    if stage in ("survivors", "unmask"):
        mask_all(c, hub)
    if stage == "mask":
        site.accept(c.study, round_of(c, hub, "s000"))
    if stage == "unmask":
        for name in hub.alive:
            hub.take_signature(name, c.masking(name).survivors(hub.survivors_request()))
    before = load_state(next(iter(c.sites["s000"].masking.glob("*.json")), Path("/nowhere")))

    def full(*_: object, **__: object) -> None:
        raise WriteFailedError("Cannot write: no space left on device.", hint="Make room.")

    monkeypatch.setattr(agent_masking, "write_whole", full)
    if stage == "mask":
        with pytest.raises(WriteFailedError):
            site.mask(c.study, round_of(c, hub, "s000"), update(c))
    else:
        asked = {
            "keys": lambda: site.keys(hub.keys_request()),
            "shares": lambda: site.shares(hub.shares_request()),
            "survivors": lambda: site.survivors(hub.survivors_request()),
            "unmask": lambda: site.unmask(hub.unmask_request()),
        }
        reply: Any = asked[stage]()
        assert reply.code == "write-failed"
        filled = ("keys", "sealed", "signature", "seeds")
        assert not any(getattr(reply, name, None) for name in filled)
    monkeypatch.undo()
    assert load_state(next(iter(c.sites["s000"].masking.glob("*.json")), Path("/nowhere"))) == before


def test_a_site_that_died_after_it_wiped_its_secrets_masks_no_second_time(
    consortium: MaskedConsortium,
) -> None:
    c, hub = consortium, hub_of(consortium)
    share(c, hub)
    request = round_of(c, hub, "s000")
    c.masking("s000").accept(c.study, request)
    c.masking("s000").accept(c.study, request)
    c.masking("s000").mask(c.study, request, update(c))
    assert refusal(lambda: c.masking("s000").accept(c.study, request)) == "out-of-order"
    assert refusal(lambda: c.masking("s000").mask(c.study, request, update(c, 0.0))) == "out-of-order"


def test_two_processes_answer_one_after_the_other(consortium: MaskedConsortium) -> None:
    c = consortium
    order: list[str] = []
    inside, go_on = threading.Event(), threading.Event()
    first, second = c.masking("s000"), c.masking("s000")

    def slow() -> None:
        with first._site(c.study):
            inside.set()
            go_on.wait(5)
            order.append("first")

    def quick() -> None:
        second.keys(hub_of(c).keys_request())
        order.append("second")

    threads = [threading.Thread(target=slow), threading.Thread(target=quick)]
    threads[0].start()
    inside.wait(5)
    threads[1].start()
    threads[1].join(0.1)
    assert threads[1].is_alive()
    go_on.set()
    for thread in threads:
        thread.join(5)
    assert order == ["first", "second"]


def test_every_message_may_meet_a_new_process(consortium: MaskedConsortium) -> None:
    """As at a site: each answer is made in a forked child, and only the disk goes from one to the next."""
    c, hub = consortium, hub_of(consortium)
    context = multiprocessing.get_context("fork")

    def child(act: Callable[[], bytes]) -> bytes:
        here, there = context.Pipe()
        process = context.Process(target=lambda: there.send_bytes(act()))
        process.start()
        answer = here.recv_bytes()
        process.join()
        return answer

    def masked(site: str) -> bytes:
        request = round_of(c, hub, site)
        c.masking(site).accept(c.study, request)
        return c.masking(site).mask(c.study, request, update(c)).tobytes()

    for site in c.sites:
        data = child(lambda site=site: c.masking(site).keys(KeysRequest(attempt=hub.attempt)).to_bytes())
        hub.take_keys(site, parse_document(KeysReply, data))
    for site in c.sites:
        data = child(lambda site=site: c.masking(site).shares(hub.shares_request()).to_bytes())
        hub.take_shares(site, parse_document(SharesReply, data))
    for site in c.sites:
        hub.take_masked(site, np.frombuffer(child(lambda site=site: masked(site)), "<u4"))
    for site in c.sites:
        data = child(lambda site=site: c.masking(site).survivors(hub.survivors_request()).to_bytes())
        hub.take_signature(site, parse_document(SurvivorsReply, data))
    for site in c.sites:
        data = child(lambda site=site: c.masking(site).unmask(hub.unmask_request()).to_bytes())
        hub.take_reveal(site, parse_document(UnmaskReply, data))
    assert np.allclose(hub.open().total, 0.3, atol=1e-6)
