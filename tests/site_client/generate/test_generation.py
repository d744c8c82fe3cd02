"""A run of generation: reproducible, resumable, bound to its study, and silent about patients."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from pixcell_core.contracts.artifacts import base_digest
from pixcell_core.contracts.canonical import file_digest
from pixcell_core.contracts.study import AdapterSettings, ConditioningPolicy, PatientVotes, Study
from pixcell_core.errors import BadInputError, PixcellError, RefusedError
from pixcell_core.models import PixCellTransformer2DModel
from pixcell_core.training.adapters import adapter_state, attach_lora
from pixcell_core.trust.tile_png import pixel_digest
from site_client.generate import commands
from site_client.generate.request import GenerationRequest
from site_client.generate.session import run_generation
from tests.any_study import any_study

from .conftest import PATIENTS, fill_store, tiny_base

Ask = Callable[..., GenerationRequest]
VOTED = ConditioningPolicy(
    mode="private", votes=PatientVotes(noise_multiplier=4.0, candidates_digest="sha256:" + "0" * 64)
)
ADAPTER = AdapterSettings(rank=2, targets=("attn1.to_q", "attn1.to_v", "attn2.to_v"), seed=7)


def silent(count: int) -> None:
    """Nobody watches."""


def tiles_of(folder: Path) -> dict[str, np.ndarray]:
    return {p.name: np.asarray(Image.open(p)) for p in sorted(folder.glob("surrogate-*.png"))}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray], tolerance: int = 0) -> bool:
    return one.keys() == other.keys() and all(
        np.abs(one[k].astype(int) - other[k].astype(int)).max() <= tolerance for k in one
    )


def refusal(request: GenerationRequest) -> PixcellError:
    with pytest.raises(PixcellError) as refused:
        run_generation(request, silent)
    return refused.value


def write_study(path: Path, base: Path, **changes: Any) -> Study:
    settings: dict[str, Any] = {
        "id": "tiny",
        "base_digest": base_digest(base),
        "code_digest": "sha256:" + "0" * 64,
        "adapter": ADAPTER,
        "rounds": 1,
        "steps_per_round": 1,
        "noise_multiplier": 4.0,
        "max_grad_norm": 0.1,
        "epsilon_cap": 20.0,
        "expected_patients": 5,
        "sites": ("east",),
        "quorum": 1,
    }
    study = any_study(**settings | changes)
    path.write_bytes(study.to_bytes())
    return study


def write_adapter(path: Path, base: Path, scale: float) -> Path:
    model = PixCellTransformer2DModel.from_pretrained(str(base), low_cpu_mem_usage=False)
    attach_lora(model, kind="ffa-lora", rank=ADAPTER.rank, seed=ADAPTER.seed, targets=ADAPTER.targets)
    generator = torch.Generator().manual_seed(0)
    state = {k: torch.randn(v.shape, generator=generator) * scale for k, v in adapter_state(model).items()}
    save_file(state, path)
    return path


def test_a_run_writes_tiles_a_public_and_a_private_record(ask: Ask, site: Path) -> None:
    request = ask()
    counted: list[int] = []
    record = run_generation(request, counted.append)
    drawn = tiles_of(request.out)
    assert list(drawn) == [f"surrogate-{i:06d}.png" for i in range(1, 7)]
    assert all(tile.shape == (64, 64, 3) and tile.dtype == np.uint8 for tile in drawn.values())
    assert len({tile.tobytes() for tile in drawn.values()}) == 6
    assert sum(counted) == 6
    assert (record.conditioning_policy, record.tile_size, record.study_digest) == ("blend", 64, None)
    assert request.base and record.base_digest == base_digest(request.base)

    public = (request.out / "generation.json").read_text()
    assert json.loads(public) == record.model_dump()
    assert record.pixel_digests == {name: pixel_digest(tile) for name, tile in drawn.items()}
    leaving = b"".join(p.read_bytes() for p in request.out.rglob("*") if p.is_file())
    for name in (*PATIENTS, *(p[-4:] for p in PATIENTS), "hidden-tile", "hidden-slide", "secret"):
        assert name not in public and name.encode() not in leaving
    assert str(record.model_dump()).find("seed") < 0, "a seed would let anybody draw the conditions again"

    private = site / "private"
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    behind = json.loads((private / "conditions-surrogates.json").read_text())
    assert behind.keys() == drawn.keys()
    assert all((b["policy"], len(b["sources"])) == ("blend", 3) for b in behind.values())
    assert (site / "sheet-surrogates.png").exists()
    for path in request.out.glob("*.png"):
        assert Image.open(path).info == {}, "pixels only"


def test_a_private_folder_that_stands_open_is_closed(ask: Ask, site: Path) -> None:
    (site / "private").mkdir(mode=0o755)
    (site / "private").chmod(0o755)
    run_generation(ask(count=1), silent)
    assert stat.S_IMODE((site / "private").stat().st_mode) == 0o700


def test_a_tile_does_not_depend_on_its_batch_or_on_how_many_are_drawn(ask: Ask, tmp_path: Path) -> None:
    """Up to one grey level: another batch size lets the matrix library sum in another order."""
    drawn = {}
    for size in (1, 4, 6):
        run_generation(ask(out=tmp_path / f"batch-{size}", batch_size=size), silent)
        drawn[size] = tiles_of(tmp_path / f"batch-{size}")
    assert same(drawn[1], drawn[4], 1) and same(drawn[1], drawn[6], 1)
    run_generation(ask(out=tmp_path / "again", batch_size=4), silent)
    assert same(drawn[4], tiles_of(tmp_path / "again"))
    run_generation(ask(out=tmp_path / "seed", seed=12), silent)
    assert not same(drawn[4], tiles_of(tmp_path / "seed"), 8)


class Killed(BaseException):
    """What a test does to a run."""


@pytest.mark.parametrize("seed", [11, None])
def test_a_killed_run_resumes_and_ends_as_if_it_had_not_been(
    ask: Ask, tmp_path: Path, site: Path, seed: int | None
) -> None:
    def kill(count: int) -> None:
        if count:
            raise Killed

    with pytest.raises(Killed):
        run_generation(ask(seed=seed, batch_size=2), kill)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "surrogates").glob("*.png")}
    assert len(before) == 2
    (tmp_path / "surrogates" / "surrogate-000003.partial").write_bytes(b"half a tile")
    counted: list[int] = []
    run_generation(ask(seed=seed, batch_size=2), counted.append)
    assert counted == [2, 2, 2]
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "surrogates").glob("*.png")}
    assert len(after) == 6 and all(after[name] == stamp for name, stamp in before.items())
    assert not list((tmp_path / "surrogates").glob("*.partial"))
    kept = json.loads((site / "private" / "generation-surrogates.json").read_text())["seed"]
    assert seed is None or kept == seed
    run_generation(ask(out=tmp_path / "whole", seed=kept, batch_size=2), silent)
    assert same(tiles_of(tmp_path / "surrogates"), tiles_of(tmp_path / "whole"))
    one, other = (
        json.loads((site / "private" / f"conditions-{n}.json").read_text()) for n in ("surrogates", "whole")
    )
    assert one == other


def test_other_settings_model_or_features_never_mix_into_one_folder(
    ask: Ask, tmp_path: Path, site: Path
) -> None:
    run_generation(ask(count=2), silent)
    before = tiles_of(tmp_path / "surrogates")
    other = tiny_base(tmp_path / "other", seed=2)
    for changes in (
        {"count": 3},
        {"count": 2, "policy": "own"},
        {"count": 2, "blend_k": 4},
        {"count": 2, "guidance_scale": 1.0},
        {"count": 2, "num_inference_steps": 3},
        {"count": 2, "seed": 12},
        {"count": 2, "base": other},
    ):
        assert refusal(ask(**changes)).code == "surrogates-differ", changes
    run_generation(ask(count=2, policy="blend", blend_k=3, batch_size=1), silent)  # the same, said in full
    fill_store(site / "features" / "train", (*PATIENTS, "secret-patient-fay"))
    error = refusal(ask(count=2))
    assert isinstance(error, BadInputError) and error.code == "surrogates-differ", (
        "other tiles stand behind them now"
    )
    assert same(before, tiles_of(tmp_path / "surrogates"))


def test_a_second_folder_of_the_same_name_cannot_take_over_the_private_record(
    ask: Ask, tmp_path: Path, site: Path
) -> None:
    run_generation(ask(count=1), silent)
    record = (site / "private" / "conditions-surrogates.json").read_bytes()
    error = refusal(ask(count=1, seed=None, out=tmp_path / "elsewhere" / "surrogates"))
    assert error.code == "surrogates-name-taken"
    assert (site / "private" / "conditions-surrogates.json").read_bytes() == record


def test_policies_at_a_site(ask: Ask, tmp_path: Path, site: Path) -> None:
    record = run_generation(ask(count=1, policy="own"), silent)
    assert (
        record.conditioning_policy == "own" and "No differential-privacy claim" in record.conditioning_promise
    )
    (behind,) = json.loads((site / "private" / "conditions-surrogates.json").read_text()).values()
    assert behind["policy"] == "own" and len(behind["sources"]) == 1
    for k in (0, 1, 2):
        assert refusal(ask(out=tmp_path / "k", blend_k=k)).code == "blend-too-small", k
    assert refusal(ask(out=tmp_path / "k", blend_k=6)).code == "too-few-patients"
    assert refusal(ask(out=tmp_path / "k", policy="dream")).code == "unknown-policy"
    assert not (tmp_path / "k").exists()


def test_the_studys_policy_model_and_tile_size_are_enforced(ask: Ask, tmp_path: Path) -> None:
    base, path = ask().base, tmp_path / "study.json"
    assert base
    study = write_study(path, base, conditioning=ConditioningPolicy(mode="blend", k=4))
    record = run_generation(ask(count=1, study=path), silent)
    assert (record.conditioning_policy, record.study_digest) == ("blend", study.digest)
    assert "4 different patients" in record.conditioning_promise
    elsewhere = tmp_path / "elsewhere"
    for changes in ({"policy": "own"}, {"blend_k": 3}, {"blend_k": 0}, {"policy": "own", "blend_k": 4}):
        error = refusal(ask(count=1, study=path, out=elsewhere, **changes))
        assert isinstance(error, RefusedError) and error.code == "policy-not-approved", changes
    other = tiny_base(tmp_path / "other", seed=2)
    assert refusal(ask(count=1, study=path, out=elsewhere, base=other)).code == "base-mismatch"
    write_study(path, base, tile_size=128)
    assert refusal(ask(count=1, study=path, out=elsewhere)).code == "tile-size-differs"
    write_study(path, base, conditioning=VOTED)
    assert refusal(ask(count=1, study=path, out=elsewhere)).code == "candidates-missing", (
        "never a weaker one instead"
    )
    for policy in ("own", "blend"):
        assert refusal(ask(count=1, study=path, out=elsewhere, policy=policy)).code == "policy-not-approved"
    assert not elsewhere.exists()


def test_the_adapter_is_the_studys_and_changes_the_tiles(ask: Ask, tmp_path: Path) -> None:
    base, path = ask().base, tmp_path / "study.json"
    assert base
    write_study(path, base)
    drawn = {}
    for name, scale in (("zero", 0.0), ("strong", 3.0)):
        adapter = write_adapter(tmp_path / f"{name}.safetensors", base, scale)
        record = run_generation(ask(count=2, study=path, adapter=adapter, out=tmp_path / name), silent)
        assert record.adapter_digest == file_digest(adapter)
        drawn[name] = tiles_of(tmp_path / name)
    run_generation(ask(count=2, out=tmp_path / "plain"), silent)
    assert same(drawn["zero"], tiles_of(tmp_path / "plain"), 1), "a zero adapter is the base"
    assert not same(drawn["zero"], drawn["strong"], 8)

    out = tmp_path / "refused"
    assert refusal(ask(adapter=tmp_path / "zero.safetensors", out=out)).code == "adapter-without-study"
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    for name in ("torn", "nowhere"):
        error = refusal(ask(study=path, adapter=tmp_path / f"{name}.safetensors", out=out))
        assert isinstance(error, BadInputError) and error.code == "adapter-unreadable"
    write_study(path, base, adapter=AdapterSettings(rank=3, targets=ADAPTER.targets, seed=7))
    assert refusal(ask(study=path, adapter=tmp_path / "zero.safetensors", out=out)).code == "adapter-mismatch"
    assert not out.exists()


def test_what_does_not_fit_is_an_input_error(ask: Ask, tmp_path: Path, site: Path) -> None:
    out = tmp_path / "refused"
    for base in (tmp_path / "nowhere", tmp_path):
        assert refusal(ask(base=base, out=out)).code == "weights-missing"
    assert refusal(ask(base=None, out=out)).code == "features-do-not-fit", (
        "the starter expects its own encoder"
    )
    assert refusal(ask(site_dir=tmp_path / "no-site", out=out)).code == "no-feature-store"


def test_the_command_refuses_and_answers_by_contract(ask: Ask, tmp_path: Path) -> None:
    root = typer.Typer()
    commands.register(root)
    request = ask()
    given = [
        "--site-dir",
        request.site_dir,
        "--out",
        request.out,
        "--base",
        request.base,
        "--count",
        2,
        "--steps",
        1,
    ]

    def call(*more: object) -> Any:
        arguments = ["site", "generate", *given, *more, "--format", "json", "--threads", 1]
        return CliRunner().invoke(root, [str(a) for a in arguments])

    refused = call("--blend-k", 2)
    assert refused.exit_code == 1 and json.loads(refused.stdout)["code"] == "blend-too-small"
    done = call()
    assert done.exit_code == 0, done.output
    body = json.loads(done.stdout)
    assert (body["status"], body["data"]["tiles"]) == ("ok", 2)
    assert not any(p in done.output for p in PATIENTS)
    assert call("--policy", "own").exit_code == 4
