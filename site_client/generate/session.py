"""One run of generation at a site: load, choose conditions, draw, record."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pixcell_core.cli.contract import emit_note
from pixcell_core.contracts.canonical import digest, file_digest, load_document
from pixcell_core.contracts.study import PatientVotes, Study
from pixcell_core.diffusion import PixCellPipeline, default_scheduler
from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.models import PixCellTransformer2DModel
from pixcell_core.private.condition_search import Variation
from pixcell_core.private.noise import NoiseSource, SystemNoiseSource
from pixcell_core.starter import STARTER, load_autoencoder
from pixcell_core.starter.weights import load_folder, weights_digest
from pixcell_core.training.adapters import attach_lora, load_adapter_state
from pixcell_core.training.feature_store import FeatureStore
from pixcell_core.trust.tile_png import pixel_digest
from site_client.approvals.site_folder import SiteFolder
from site_client.generate.candidates import PublicCandidates, candidates_of_study
from site_client.generate.conditions import (
    ConditionPolicy,
    PrivateConditions,
    TileEmbeddings,
    pool_policy,
)
from site_client.generate.private_votes import PatientVote
from site_client.generate.request import GenerationRequest, SettledPolicy, settled_policy
from site_client.generate.surrogate_folder import SurrogateFolder
from site_client.generate.surrogates import (
    GenerationRecord,
    contact_sheet,
    draw_surrogates,
    file_name,
    write_record,
)
from site_client.generate.variations import ModelVariation, variation_named


def run_generation(
    request: GenerationRequest,
    on_tiles: Callable[[int], None],
    *,
    noise_source: Callable[[], NoiseSource] = SystemNoiseSource,
) -> GenerationRecord:
    """Draw the surrogates a request asks for and write their public and private records.

    The public record goes beside the tiles; which private tiles stand behind which surrogate stays in
    `SITE_DIR/private/` for the site's own audit. `noise_source` makes the noise of private conditions; tests alone
    give another.
    """
    if request.threads:
        torch.set_num_threads(request.threads)
    study = load_document(Study, request.study) if request.study else None
    store = FeatureStore.open(request.site_dir / "features" / "train")
    tile_size = int(store.meta["tile_size"])
    if study is not None and tile_size != study.tile_size:
        raise RefusedError(
            f"This site's features are of {tile_size} px, the study's tiles of {study.tile_size} px.",
            hint="Extract features at the study's tile size.",
            code="tile-size-differs",
        )
    named = settled_policy(request, study)
    model, base_digest = _load_model(request, study)
    adapter_digest = file_digest(request.adapter) if request.adapter else None
    asked: dict[str, Any] = {
        "count": request.count,
        "policy": [named.name, named.k],
        "guidance_scale": request.guidance_scale,
        "num_inference_steps": request.num_inference_steps,
        "tile_size": tile_size,
        "base": base_digest,
        "adapter": adapter_digest,
        "study": study.digest if study else None,
    }
    folder = SurrogateFolder(request.site_dir, request.out)
    latent_size = (tile_size // 8, tile_size // 8)
    if study is not None and (votes := study.conditioning.votes) is not None:
        policy: ConditionPolicy = _private_policy(
            request, study, votes, model, folder, asked, latent_size, noise_source
        )
    else:
        policy = _pool_policy(named, store, model, asked)
    seed = folder.settle(asked, request.seed)
    conditions = policy.draw(request.count, np.random.default_rng(seed))
    pipeline = PixCellPipeline(load_autoencoder(), model, default_scheduler()).to(request.device)
    draw_surrogates(
        pipeline,
        conditions,
        request.out,
        seed=seed,
        guidance_scale=request.guidance_scale,
        num_inference_steps=request.num_inference_steps,
        latent_size=latent_size,
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
        study_digest=study.digest if study else None,
        labels={name: c.label for name, c in zip(names, conditions, strict=True)},
        pixel_digests={name: pixel_digest(np.asarray(Image.open(request.out / name))) for name in names},
    )
    write_record(request.out / "generation.json", record.model_dump())
    behind = {
        name: {"policy": policy.name, "sources": list(c.sources)}
        for name, c in zip(names, conditions, strict=True)
    }
    write_record(folder.private / f"conditions-{request.out.name}.json", behind)
    shown = [np.asarray(Image.open(request.out / name)) for name in names[:48]]
    contact_sheet(shown).save(request.site_dir / f"sheet-{request.out.name}.png")
    return record


def _load_model(request: GenerationRequest, study: Study | None) -> tuple[PixCellTransformer2DModel, str]:
    folder = _base_folder(request)
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
        attach_lora(
            model, kind=adapter.kind, rank=adapter.rank, seed=adapter.seed, targets=tuple(adapter.targets)
        )
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


def _base_folder(request: GenerationRequest) -> Path:
    return request.base or STARTER / "transformer"


def _check_fit(model: PixCellTransformer2DModel, shape: tuple[int, ...], whose: str) -> None:
    wanted = (int(model.config["caption_num_tokens"]), int(model.config["caption_channels"]))
    if shape != wanted:
        raise BadInputError(
            f"The model expects {wanted[0]} token(s) of {wanted[1]} numbers, {whose} have {shape[0]} of {shape[1]}.",
            hint="Extract the features with the encoder this model was trained with.",
            code="features-do-not-fit",
        )


def _pool_policy(
    named: SettledPolicy, store: FeatureStore, model: PixCellTransformer2DModel, asked: dict[str, Any]
) -> ConditionPolicy:
    """A policy that looks at private tiles; `asked` learns which tiles there are."""
    pool = TileEmbeddings.from_store(store)
    _check_fit(model, tuple(pool.vectors.shape[1:]), "this site's features")
    asked["pool"] = digest({"settings": store.meta, "tiles": list(pool.tiles)})
    return pool_policy(named.name, named.k, pool)


def _private_policy(
    request: GenerationRequest,
    study: Study,
    votes: PatientVotes,
    model: PixCellTransformer2DModel,
    folder: SurrogateFolder,
    asked: dict[str, Any],
    latent_size: tuple[int, int],
    noise_source: Callable[[], NoiseSource],
) -> ConditionPolicy:
    """Private conditions: everything public is checked first, then the patients are asked or a result is used again."""
    site = SiteFolder(request.site_dir)
    candidates = candidates_of_study(
        request.candidates,
        wanted_digest=votes.candidates_digest,
        wanted_count=votes.candidates,
        private_folder=site.root / "features",
    )
    _check_fit(model, tuple(candidates.embeddings.shape[1:]), "the candidates")
    vary = _variation(request, candidates, latent_size)
    vote = PatientVote(site, study, candidates.embeddings, vary, noise_source())
    stored = vote.stored()
    asked["votes"] = stored.digest if stored else None
    # A folder that refuses to go on must do so before the patients are asked, not after.
    folder.check(asked, request.seed)
    voted = vote.result()
    asked["votes"] = voted.digest
    if stored is not None:
        emit_note(
            "note: the votes of an earlier run are used again; no patient is asked and nothing is charged."
        )
    if voted.winners.uniform:
        emit_note(
            "note: no bin of the noisy histograms passed the threshold; conditions are uniform over the candidates."
        )
    return PrivateConditions(voted)


def _variation(
    request: GenerationRequest, candidates: PublicCandidates, latent_size: tuple[int, int]
) -> Variation:
    def by_model() -> Variation:
        from pixcell_core.encoders.registry import load_tile_encoder

        public = load_folder(PixCellTransformer2DModel, _base_folder(request))
        pipeline = PixCellPipeline(load_autoencoder(), public, default_scheduler()).to(request.device)
        encoder = load_tile_encoder(request.encoder, device=request.device, tile_size=8 * latent_size[0])
        # Met here, before the patients are asked, and not when the first variation is made.
        if candidates.embeddings.shape[1:] != (1, encoder.embedding_dim):
            raise BadInputError(
                f"The encoder {encoder.name} gives 1 token of {encoder.embedding_dim} numbers per tile, the candidates "
                f"have {tuple(candidates.embeddings.shape[1:])}. Nothing was charged.",
                hint="Give --encoder the one that made the candidates, or take --variation interpolation.",
                code="features-do-not-fit",
            )
        return ModelVariation(
            pipeline,
            encoder.encode,
            encoder_name=encoder.name,
            latent_size=latent_size,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            batch_size=request.batch_size,
        )

    return variation_named(request.variation, candidates.embeddings, by_model)
