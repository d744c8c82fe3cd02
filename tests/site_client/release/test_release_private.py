"""Releases whose conditions are private: one number for model and conditions, or a refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pixcell_core.errors import PixcellError, RefusedError
from pixcell_core.private.accounting import GaussianEvent, epsilon
from pixcell_core.trust.bundle import verify_bundle
from pixcell_core.trust.bundle_files import open_bundle
from site_client.ledger.ledger import RoundCharge
from site_client.ledger.site import open_site_ledger
from site_client.ledger.view import BudgetCap
from site_client.release.export import export_release

if TYPE_CHECKING:
    from tests.site_client.release.conftest import Room

CODE = "sha256:" + "c0de" * 16
STUDY, OTHER = "sha256:" + "3" * 64, "sha256:" + "4" * 64
TRAINING, VOTES = GaussianEvent(1.0, 20.0, 3), GaussianEvent(1.0, 8.0, 2)


def charge(room: Room, event: GaussianEvent, purpose: str, study: str = STUDY) -> None:
    with open_site_ledger(room.workspace.site_dir, site="north", cap=BudgetCap(8.0, 1e-5)) as ledger:
        asked = RoundCharge(
            study, 0, event.sample_rate, event.noise_multiplier, event.steps, 1.0, CODE, purpose
        )
        with ledger.reserve(asked) as steps:
            for index in range(event.steps):
                steps(index)


def say_private(room: Room, **changes: Any) -> None:
    """The record of surrogates drawn from private conditions."""
    path = room.source / "generation.json"
    promise = "Conditions and labels come from votes of this site's training patients."
    record = json.loads(path.read_text()) | {
        "conditioning_policy": "private",
        "conditioning_promise": promise,
        **changes,
    }
    path.write_text(json.dumps(record))


def test_one_epsilon_covers_model_and_conditions_and_says_what_is_left(room: Room, tmp_path: Path) -> None:
    charge(room, TRAINING, "training")
    charge(room, VOTES, "conditions")
    say_private(room)
    manifest = room.draft().manifest()
    statement = manifest.privacy
    assert statement is not None
    assert manifest.generator.conditioning.policy == "private"
    both = epsilon([TRAINING, VOTES], 1e-5).value
    apart = [epsilon([event], 1e-5).value for event in (TRAINING, VOTES)]
    assert statement.epsilon == pytest.approx(both, rel=1e-9) and max(apart) < both < sum(apart)
    assert (statement.unit, statement.delta) == ("patient", 1e-5)
    assert "DP-SGD and patients' votes" in statement.mechanism
    covered = " ".join(statement.covers)
    assert (
        "weights" in covered and "conditions and labels of these tiles" in covered and "one number" in covered
    )
    left = " ".join(statement.does_not_cover)
    for said in ("own and blend", "statistics released without noise", "also at another site", "other sites"):
        assert said in left
    assert "conditions and labels of these tiles" not in left
    room.signed()
    out = export_release(room.workspace, tmp_path / "out", now=room.now).path
    words = " ".join((out / "README.txt").read_text().split())
    assert "conditioning private" in words and f"epsilon {both:.3g} per patient at delta 1e-05" in words
    with open_bundle(out) as files:
        report = verify_bundle(files, trusted_keys=None, now=room.now)
    assert report.privacy == statement, "whoever verifies the bundle reads the same number"


def test_conditions_without_weights_of_this_site_are_votes_alone(room: Room) -> None:
    charge(room, VOTES, "conditions")
    say_private(room, adapter_digest=None)
    statement = room.draft().manifest().privacy
    assert statement is not None and statement.mechanism.startswith("patients' votes with")
    assert statement.epsilon == pytest.approx(epsilon([VOTES], 1e-5).value, rel=1e-9)


@pytest.mark.parametrize("paid", ["nothing", "training", "another study"])
def test_a_private_policy_that_this_study_never_paid_for_is_refused(room: Room, paid: str) -> None:
    """Never drafted with a weaker statement instead."""
    if paid != "nothing":
        charge(room, TRAINING, "training")
    if paid == "another study":
        charge(room, VOTES, "conditions", OTHER)
    say_private(room)
    error = _refusal(room)
    assert error.code == "conditions-not-charged" and error.hint
    assert not room.workspace.all_releases()


def test_private_tiles_of_no_study_are_refused(room: Room) -> None:
    charge(room, VOTES, "conditions")
    say_private(room, study_digest=None)
    assert _refusal(room).code == "conditions-not-charged"


def test_charged_votes_do_not_lend_their_cover_to_blended_tiles(room: Room) -> None:
    charge(room, TRAINING, "training")
    charge(room, VOTES, "conditions")
    statement = room.draft().manifest().privacy
    assert statement is not None
    assert statement.epsilon == pytest.approx(epsilon([TRAINING, VOTES], 1e-5).value, rel=1e-9)
    assert any("these tiles (policy blend)" in line for line in statement.does_not_cover)


def test_a_label_the_votes_did_not_give_does_not_leave_under_their_promise(room: Room) -> None:
    charge(room, VOTES, "conditions")
    say_private(room)
    assert room.draft().manifest().tile_count == 6
    (room.source / "tiles.csv").write_text("file,label\nsurrogate-000001.png,secret-diagnosis\n")
    assert _refusal(room).code == "labels-not-voted"


@pytest.mark.parametrize("policy", ["own", "blend", "private"])
def test_every_tile_of_a_release_has_a_policy_or_there_is_no_release(room: Room, policy: str) -> None:
    """A tile from elsewhere in the folder would leave under a policy that did not make it."""
    charge(room, VOTES, "conditions")
    say_private(room, conditioning_policy=policy)
    assert room.draft().manifest().generator.conditioning.policy == policy
    (room.source / "surrogate-000007.png").write_bytes((room.source / "surrogate-000001.png").read_bytes())
    assert _refusal(room).code == "tile-not-in-record"


def _refusal(room: Room) -> PixcellError:
    with pytest.raises(RefusedError) as refused:
        room.draft()
    return refused.value
