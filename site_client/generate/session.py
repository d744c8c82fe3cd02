"""One run of generation at a site: load, choose conditions, draw, record."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pixcell_core.contracts.canonical import digest, file_digest
from pixcell_core.contracts.study import Study
from pixcell_core.diffusion import PixCellPipeline, default_scheduler
from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.models import PixCellTransformer2DModel
from pixcell_core.starter import STARTER, load_autoencoder
from pixcell_core.starter.weights import load_folder, weights_digest
from pixcell_core.training.adapters import attach_ffa_lora, load_adapter_state
from pixcell_core.training.feature_store import FeatureStore
from site_client.generate.conditions import SMALLEST_BLEND, TileEmbeddings, policy_named
from site_client.generate.surrogates import (
    GenerationRecord,
    contact_sheet,
    draw_surrogates,
    file_name,
    write_record,
)


@dataclass(frozen=True)
class GenerationRequest:
    """Everything `pixcell site generate` was asked."""

    site_dir: Path
    out: Path
    count: int
    adapter: Path | None
    base: Path | None
    study: Path | None
    policy: str | None
    blend_k: int | None
    guidance_scale: float
    num_inference_steps: int
    batch_size: int
    seed: int | None
    device: str
    threads: int


def _load_study(path: Path) -> tuple[Study, str]:
    from pixcell_core.contracts.canonical import load_document

    study = load_document(Study, path)
    return study, study.digest


def _load_model(request: GenerationRequest, study: Study | None) -> tuple[PixCellTransformer2DModel, str]:
    folder = request.base or STARTER / "transformer"
    model = load_folder(PixCellTransformer2DModel, folder)
    found = weights_digest(folder)
    if study is not None and study.base_digest != found:
        raise RefusedError(
            "This base model is not the one the study was approved with.",
            hint="Give the base folder whose digest stands in the study (`pixcell study show`).",
            code="base-mismatch",
        )
    if request.adapter is not None:
        if study is None:
            raise BadInputError(
                "An adapter needs the study it was trained under.",
                hint="Add --study STUDY.json.",
                code="adapter-without-study",
            )
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        adapter = study.adapter
        attach_ffa_lora(model, rank=adapter.rank, seed=adapter.seed, targets=tuple(adapter.targets))
        try:
            state = load_file(request.adapter)
        except (OSError, SafetensorError) as error:
            raise BadInputError(
                f"{request.adapter.name} is no adapter that can be read.",
                hint="Take the adapter again from the study's run folder (a .safetensors file).",
                code="adapter-unreadable",
            ) from error
        load_adapter_state(model, state)
    return model, found


def _check_fit(model: PixCellTransformer2DModel, pool: TileEmbeddings) -> None:
    wanted = (int(model.config["caption_num_tokens"]), int(model.config["caption_channels"]))
    if tuple(pool.vectors.shape[1:]) != wanted:
        raise BadInputError(
            f"The model expects {wanted[0]} token(s) of {wanted[1]} numbers, this site's features have "
            f"{pool.vectors.shape[1]} of {pool.vectors.shape[2]}.",
            hint="Extract the features with the encoder this model was trained with.",
            code="features-do-not-fit",
        )


def run_generation(request: GenerationRequest, on_tiles: Callable[[int], None]) -> GenerationRecord:
    """Draw the surrogates a request asks for and write their public and private records.

    The public record goes beside the tiles; which private tiles stand behind which surrogate stays in
    `SITE_DIR/private/` for the site's own audit.
    """
    if request.threads:
        torch.set_num_threads(request.threads)
    study, study_digest = _load_study(request.study) if request.study else (None, None)
    store = FeatureStore.open(request.site_dir / "features" / "train")
    tile_size = int(store.meta["tile_size"])
    if study is not None and tile_size != study.tile_size:
        raise RefusedError(
            f"This site's features are of {tile_size} px, the study's tiles of {study.tile_size} px.",
            hint="Extract features at the study's tile size.",
            code="tile-size-differs",
        )
    named = _settled_policy(request, study)
    policy = policy_named(*named)
    pool = TileEmbeddings.from_store(store)
    model, base_digest = _load_model(request, study)
    _check_fit(model, pool)
    adapter_digest = file_digest(request.adapter) if request.adapter else None
    seed = _settled_seed(
        request,
        {
            "count": request.count,
            "policy": list(named),
            "guidance_scale": request.guidance_scale,
            "num_inference_steps": request.num_inference_steps,
            "tile_size": tile_size,
            "base": base_digest,
            "adapter": adapter_digest,
            "study": study_digest,
            "pool": digest({"settings": store.meta, "tiles": list(pool.tiles)}),
        },
    )
    conditions = policy.draw(pool, request.count, np.random.default_rng(seed))
    pipeline = PixCellPipeline(load_autoencoder(), model, default_scheduler()).to(request.device)
    draw_surrogates(
        pipeline,
        conditions,
        request.out,
        seed=seed,
        guidance_scale=request.guidance_scale,
        num_inference_steps=request.num_inference_steps,
        latent_size=(tile_size // 8, tile_size // 8),
        batch_size=request.batch_size,
        on_tiles=on_tiles,
    )
    names = [file_name(i + 1) for i in range(request.count)]
    record = GenerationRecord(
        tiles=request.count,
        tile_size=tile_size,
        conditioning_policy=policy.name,
        conditioning_promise=policy.promise,
        guidance_scale=request.guidance_scale,
        num_inference_steps=request.num_inference_steps,
        base_digest=base_digest,
        adapter_digest=adapter_digest,
        study_digest=study_digest,
        labels={name: c.label for name, c in zip(names, conditions, strict=True)},
    )
    write_record(request.out / "generation.json", record.model_dump())
    private = _private_folder(request.site_dir)
    behind = {name: list(c.sources) for name, c in zip(names, conditions, strict=True)}
    write_record(private / f"conditions-{request.out.name}.json", behind)
    shown = [np.asarray(Image.open(request.out / name)) for name in names[:48]]
    contact_sheet(shown).save(request.site_dir / f"sheet-{request.out.name}.png")
    return record


def _settled_policy(request: GenerationRequest, study: Study | None) -> tuple[str, int]:
    """The conditioning policy: the study's where there is one, and never another than the approved one."""
    if study is None:
        return request.policy or "blend", SMALLEST_BLEND if request.blend_k is None else request.blend_k
    settled = (study.conditioning.mode, study.conditioning.k)
    wanted_k = settled[1] if request.blend_k is None else request.blend_k
    if (request.policy or settled[0], wanted_k) != settled:
        raise RefusedError(
            f"The study was approved with the conditioning policy {settled[0]} (k = {settled[1]}).",
            hint="Leave out --policy and --blend-k, or approve a study with another policy.",
            code="policy-not-approved",
        )
    return settled


def _private_folder(site_dir: Path) -> Path:
    """Where the site keeps what must never leave; closed to other accounts, whoever made it."""
    private = site_dir / "private"
    private.mkdir(mode=0o700, exist_ok=True)
    private.chmod(0o700)
    return private


def _settled_seed(request: GenerationRequest, asked: dict[str, Any]) -> int:
    """The seed of this folder of surrogates: asked for, or drawn once and kept for a resumed run.

    A run may go on only where everything that decides a tile, `asked`, is as it was: otherwise tiles of two models
    would stand under one record, or the private record would name the wrong tiles behind a surrogate.
    """
    path = _private_folder(request.site_dir) / f"generation-{request.out.name}.json"
    place = str(request.out.resolve())
    if path.exists():
        before = {"place": place, "asked": None, **json.loads(path.read_text())}
        if before["place"] != place and any(Path(before["place"]).glob("surrogate-*.png")):
            raise BadInputError(
                f"This site already drew surrogates into another folder called {request.out.name}.",
                hint="Give this folder a name of its own: the site's private record is kept by that name.",
                code="surrogates-name-taken",
            )
        same_seed = request.seed is None or request.seed == before["seed"]
        if before["asked"] == asked and before["place"] == place and same_seed:
            return int(before["seed"])
        if any(request.out.glob("surrogate-*.png")):
            raise BadInputError(
                f"{request.out.name} already holds surrogates drawn with other settings.",
                hint="Draw into another folder, or remove this one.",
                code="surrogates-differ",
            )
    seed = request.seed if request.seed is not None else secrets.randbits(62)
    write_record(path, {"asked": asked, "place": place, "seed": seed})
    return seed
