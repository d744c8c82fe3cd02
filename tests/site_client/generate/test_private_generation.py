"""`pixcell site generate` with private conditions: what leaves, what is refused, and what a resumed run costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from pixcell_core.contracts.canonical import load_document
from pixcell_core.contracts.release import GenerationRecord
from pixcell_core.errors import PixcellError
from pixcell_core.private.noise import UnsafeFixedKeySource
from pixcell_core.training.feature_store import FeatureStoreWriter
from site_client.approvals.book import ApprovalBook
from site_client.generate import commands
from site_client.generate.candidates import PublicCandidates
from site_client.generate.request import GenerationRequest
from site_client.generate.session import run_generation
from site_client.release.draft import seal_draft
from site_client.release.workspace import ReleaseWorkspace

from .conftest import LABELS, PATIENTS, WIDTH, fill_store
from .test_generation import Killed, silent, tiles_of
from .voting_site import VotingSite, bank_of, voting_site

Ask = Callable[..., GenerationRequest]


@pytest.fixture
def place(site: Path, ask: Ask) -> VotingSite:
    base = ask().base
    assert base is not None
    made = voting_site(site, base)
    made.study()
    return made


def wish(place: VotingSite, ask: Ask, **changes: Any) -> GenerationRequest:
    return ask(**{"study": place.study_file, "candidates": place.candidates, "count": 3, **changes})


def refusal(request: GenerationRequest) -> PixcellError:
    with pytest.raises(PixcellError) as refused:
        run_generation(request, silent)
    assert refused.value.hint
    return refused.value


def test_a_private_run_names_its_policy_and_leaves_nothing_of_a_patient(
    place: VotingSite, ask: Ask, site: Path
) -> None:
    request = wish(place, ask)
    record = run_generation(request, silent)
    assert record.conditioning_policy == "private" and record.study_digest == place.study().digest
    assert "votes of this site's training patients" in record.conditioning_promise
    assert set(record.labels.values()) == {"stroma"}, "the other label is not among the public ones"
    public = load_document(GenerationRecord, request.out / "generation.json")
    assert public.generator().conditioning.policy == "private"
    assert list(tiles_of(request.out)) == list(record.labels)
    behind = json.loads((site / "private" / "conditions-surrogates.json").read_text())
    assert behind == {name: {"policy": "private", "sources": []} for name in record.labels}, (
        "no private tile stands behind any of them"
    )
    leaving = b"".join(p.read_bytes() for p in request.out.rglob("*") if p.is_file())
    for name in (*PATIENTS, *(p[-4:] for p in PATIENTS), "hidden-tile", "hidden-slide", "secret", LABELS[1]):
        assert name.encode() not in leaving
    assert place.steps_charged() == 2


def test_a_release_of_private_tiles_states_one_number_and_every_tile_its_policy(
    place: VotingSite, ask: Ask, site: Path
) -> None:
    from datetime import UTC, datetime

    request = wish(place, ask)
    run_generation(request, silent)
    release = seal_draft(ReleaseWorkspace(site), request.out, now=datetime.now(UTC))
    manifest = release.manifest()
    assert manifest.generator.conditioning.policy == "private" and manifest.tile_count == 3
    assert {tile.label for tile in manifest.tiles} == {"stroma"}
    assert manifest.privacy is not None and "patients' votes" in manifest.privacy.mechanism
    assert any("these tiles" in line for line in manifest.privacy.covers)


def test_a_resumed_run_and_a_second_folder_ask_nobody_again(
    place: VotingSite, ask: Ask, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def kill(count: int) -> None:
        if count:
            raise Killed

    with pytest.raises(Killed):
        run_generation(wish(place, ask, batch_size=1), kill)
    assert place.steps_charged() == 2 and len(tiles_of(tmp_path / "surrogates")) == 1
    assert "used again" not in capsys.readouterr().err
    run_generation(wish(place, ask, batch_size=1), silent)
    assert "no patient is asked and nothing is charged" in capsys.readouterr().err
    run_generation(wish(place, ask, out=tmp_path / "more", count=5, seed=None), silent)
    assert place.steps_charged() == 2 and len(tiles_of(tmp_path / "more")) == 5


def test_tiles_depend_on_patients_through_the_noisy_votes_alone(
    ask: Ask, tmp_path: Path, place: VotingSite
) -> None:
    """The same noise, and one more patient whose tiles count in no bin: every byte that leaves is the same."""
    files: list[dict[str, bytes]] = []
    study = place.study()
    more = (*PATIENTS, "secret-patient-fay")
    for name, extra in (("without", None), ("with", "tumour"), ("counted", "stroma")):
        site = tmp_path / name / "site"
        fill_store(site / "features" / "train")
        if extra:
            fill_store_again(site / "features" / "train", more[-1], extra)
        twin = voting_site(site, place.base)
        ApprovalBook(twin.folder).decide(study, "approve")
        out = tmp_path / name / "surrogates"
        request = wish(place, ask, site_dir=site, out=out)
        run_generation(request, silent, noise_source=UnsafeFixedKeySource)
        files.append({p.name: p.read_bytes() for p in sorted(out.iterdir())})
        assert twin.steps_charged() == 2
    assert files[0] == files[1]
    assert votes_differ(tmp_path), "a patient who counts moves the histogram"


def fill_store_again(folder: Path, patient: str, label: str) -> None:
    writer = FeatureStoreWriter(folder, {"part": "train", "tile_size": 64, "mpp": 1.0})
    rows = [{"tile": f"hidden-{i}", "slide": "hidden", "label": label} for i in range(4)]
    vectors = torch.randn(4, 1, WIDTH, generator=torch.Generator().manual_seed(77))
    writer.add(patient, rows, pixels=torch.zeros(4, 3, 64, 64, dtype=torch.uint8), embeddings=vectors)
    writer.close()


def votes_differ(root: Path) -> bool:
    kept = [next((root / name / "site" / "private" / "votes").iterdir()) for name in ("without", "counted")]
    return kept[0].read_bytes() != kept[1].read_bytes()


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"candidates": None}, "candidates-missing"),
        ({"candidates": "OTHER"}, "candidates-differ"),
        ({"candidates": "NOWHERE"}, "candidates-unreadable"),
        ({"candidates": "OWN FEATURES"}, "candidates-are-private"),
        ({"policy": "blend"}, "policy-not-approved"),
        ({"policy": "own"}, "policy-not-approved"),
        ({"policy": "Private"}, "unknown-policy"),
        ({"study": None, "policy": "private"}, "private-needs-study"),
        ({"study": None}, "candidates-not-used"),
        ({"study": None, "policy": "own"}, "candidates-not-used"),
        ({"variation": "dream"}, "unknown-variation"),
    ],
)
def test_nothing_is_charged_or_drawn_where_private_conditions_cannot_be_had(
    place: VotingSite, ask: Ask, tmp_path: Path, changes: dict[str, Any], code: str
) -> None:
    """And no weaker policy is taken instead."""
    PublicCandidates.of(bank_of(seed=8), "other").write(tmp_path / "other.safetensors")
    places = {
        "OTHER": tmp_path / "other.safetensors",
        "NOWHERE": tmp_path / "nowhere.safetensors",
        "OWN FEATURES": place.folder.train_features,
    }
    given = {k: places.get(v, v) if isinstance(v, str) else v for k, v in changes.items()}
    assert refusal(wish(place, ask, **given)).code == code
    assert not (tmp_path / "surrogates").exists() and not place.folder.ledger.exists()


def test_candidates_of_another_width_or_number_are_refused(place: VotingSite, ask: Ask) -> None:
    for bank, code in ((bank_of(width=9), "features-do-not-fit"), (bank_of(7), "too-few-candidates")):
        place.bank = bank
        PublicCandidates.of(bank, "bank").write(place.candidates)
        place.study()
        assert refusal(wish(place, ask)).code == code
    assert not place.folder.ledger.exists()


def test_an_unapproved_study_and_a_full_budget_are_refused(
    place: VotingSite, ask: Ask, tmp_path: Path
) -> None:
    place.study(approve=False, title="not approved")
    assert refusal(wish(place, ask)).code == "not-approved"
    place.study(epsilon_cap=0.2)
    assert refusal(wish(place, ask)).code in {"budget-exceeded", "study-budget-exceeded"}
    assert place.steps_charged() == 0 and not (tmp_path / "surrogates").exists()


def test_a_folder_of_other_tiles_refuses_before_the_patients_are_asked(place: VotingSite, ask: Ask) -> None:
    run_generation(ask(count=3), silent)
    assert refusal(wish(place, ask)).code == "surrogates-differ"
    assert not place.folder.ledger.exists()


def test_tiles_of_lost_votes_never_mix_with_those_of_new_ones(place: VotingSite, ask: Ask) -> None:
    run_generation(wish(place, ask), silent)
    for kept in (place.folder.root / "private" / "votes").iterdir():
        kept.unlink()
    assert refusal(wish(place, ask)).code == "surrogates-differ", "and no second charge is made first"
    assert place.steps_charged() == 2


def test_no_winner_is_said_aloud_and_in_the_record(
    place: VotingSite, ask: Ask, capsys: pytest.CaptureFixture[str]
) -> None:
    place.study(votes={"threshold": 60.0})
    record = run_generation(wish(place, ask), silent)
    assert "uniform over candidates and labels" in record.conditioning_promise
    assert "no bin of the noisy histograms passed" in capsys.readouterr().err


def test_the_public_model_makes_variations(place: VotingSite, ask: Ask, tmp_path: Path) -> None:
    """Variations drawn and encoded again by public weights; another variation is another question."""
    encoder = SmallEncoder()
    study = place.study()
    from pixcell_core.diffusion import PixCellPipeline, default_scheduler
    from pixcell_core.models import PixCellTransformer2DModel
    from pixcell_core.private.condition_search import public_seed, replayed
    from pixcell_core.private.noise import SystemNoiseSource
    from pixcell_core.starter import load_autoencoder
    from pixcell_core.starter.weights import load_folder
    from site_client.generate.private_votes import PatientVote
    from site_client.generate.variations import ModelVariation

    model = load_folder(PixCellTransformer2DModel, place.base)
    vary = ModelVariation(
        PixCellPipeline(load_autoencoder(), model, default_scheduler()),
        encoder,
        encoder_name="small",
        latent_size=(8, 8),
        num_inference_steps=2,
        guidance_scale=1.0,
        batch_size=3,
    )
    parents = place.bank[:4]
    made = vary(parents, 0, np.random.default_rng(1))
    assert made.shape == parents.shape and torch.isfinite(made).all()
    assert torch.equal(made, vary(parents, 0, np.random.default_rng(1)))
    assert not torch.equal(made, vary(parents, 0, np.random.default_rng(2)))
    assert encoder.seen == {(3, 64, 64)}
    voted = PatientVote(place.folder, study, place.bank, vary, SystemNoiseSource()).result()
    again = replayed(voted, place.bank, vary, seed=public_seed(study.digest))
    assert again.digest == voted.digest
    place.ask(study)
    assert place.steps_charged() == 4
    encoder.width = 5
    with pytest.raises(PixcellError) as refused:
        vary(parents, 0, np.random.default_rng(1))
    assert refused.value.code == "features-do-not-fit"


class SmallEncoder:
    """Tiles to mean colours of a grid: uint8 (k, 3, H, W) to (k, 1, width)."""

    def __init__(self) -> None:
        self.seen: set[tuple[int, ...]] = set()
        self.width = WIDTH

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        assert pixels.dtype == torch.uint8
        self.seen.add(tuple(pixels.shape[1:]))
        return torch.nn.functional.adaptive_avg_pool1d(pixels.float().flatten(2), 4).flatten(1)[
            :, None, : self.width
        ]


def test_a_run_may_vary_by_the_public_model_whose_encoder_is_checked_first(
    place: VotingSite, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = wish(place, ask, variation="model", num_inference_steps=1)
    assert refusal(request).code == "features-do-not-fit", (
        "the starter's encoder is wider than these candidates"
    )
    assert not place.folder.ledger.exists()

    class Fitting:
        name, embedding_dim, encode = "fitting", WIDTH, staticmethod(SmallEncoder())

    monkeypatch.setattr("pixcell_core.encoders.registry.load_tile_encoder", lambda *_, **__: Fitting())
    run_generation(request, silent)
    assert place.steps_charged() == 2
    run_generation(request, silent)
    assert place.steps_charged() == 2, "kept like any other answer"


def test_the_command_asks_votes_and_answers_by_contract(place: VotingSite, ask: Ask, tmp_path: Path) -> None:
    root = typer.Typer()
    commands.register(root)
    given = ["--site-dir", place.folder.root, "--out", tmp_path / "drawn", "--base", place.base, "--count", 2]
    given += ["--steps", 1, "--study", place.study_file, "--policy", "private", "--format", "json"]

    def call(*more: object) -> Any:
        return CliRunner().invoke(root, ["site", "generate", *map(str, given), *map(str, more)])

    missing = call()
    assert missing.exit_code == 4 and json.loads(missing.stdout)["code"] == "candidates-missing"
    done = call("--candidates", place.candidates)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["data"]["conditioning_policy"] == "private"
    assert not any(p in done.output for p in (*PATIENTS, LABELS[1]))
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 2
    assert Image.open(tmp_path / "drawn" / "surrogate-000001.png").info == {}
