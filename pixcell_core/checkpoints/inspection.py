"""Says what a weights file or folder is, what it describes, and what keeps it from being used."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from pixcell_core.checkpoints.folders import (
    GEOMETRY,
    build_empty,
    compare_shapes,
    known_configuration,
    read_json,
    transformer_configuration,
)
from pixcell_core.checkpoints.foreign import from_original, is_original
from pixcell_core.checkpoints.lora import (
    DIFFUSERS_WEIGHTS,
    PEFT_CONFIG,
    LoraAdapter,
    adapter_from_state,
    load_lora,
)
from pixcell_core.checkpoints.original import (
    AVERAGE,
    HEAD_DIM,
    TABLE_TOLERANCE,
    OriginalFile,
    infer_configuration,
    open_original,
)
from pixcell_core.checkpoints.tensor_files import folder_entries, read_tensors
from pixcell_core.errors import BadInputError

if TYPE_CHECKING:
    import torch

NULL = "caption_projection.uncond_embedding"
TABLE = "y_pos_embed.y_pos_embed"
#: In the file, never trained: not counted as parameters.
BUFFERS = (NULL, TABLE)
PIXELS_PER_LATENT = 8


class CheckpointInfo(BaseModel):
    """What a file or folder of weights is; `problems` is empty when it can be used as it stands."""

    model_config = ConfigDict(extra="forbid")

    path: str
    kind: str
    parameters: int
    dtypes: list[str]
    digest: str
    stage: int | None = None
    condition_tokens: int | None = None
    null_embedding_norm: float | None = None
    config: dict[str, Any] = {}
    ignored_config_keys: list[str] = []
    problems: list[str] = []
    notes: list[str] = []

    @property
    def usable(self) -> bool:
        """Whether nothing keeps it from being loaded."""
        return not self.problems

    def __str__(self) -> str:
        rows = [
            ("kind", self.kind),
            ("parameters", f"{self.parameters:,} ({', '.join(self.dtypes)})"),
            ("stage", f"{self.stage} px" if self.stage else ""),
            ("condition tokens", str(self.condition_tokens or "")),
            (
                "null embedding",
                f"mean norm {self.null_embedding_norm:.4f}" if self.null_embedding_norm else "",
            ),
            ("digest", self.digest),
            *((key, str(value)) for key, value in sorted(self.config.items())),
            ("ignored keys", ", ".join(self.ignored_config_keys)),
            *(("note", note) for note in self.notes),
            *(("PROBLEM", problem) for problem in self.problems),
            ("usable", "yes" if self.usable else "no"),
        ]
        return "\n".join(f"{name:<27}{value}" for name, value in rows if value)


def content_digest(path: Path) -> str:
    """sha256 of a file, or over the names and bytes of a folder's JSON and safetensors files, read in pieces."""
    if path.is_file():
        with path.open("rb") as stream:
            return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"
    total = hashlib.sha256()
    for part in sorted([*path.glob("*.json"), *path.glob("*.safetensors")]):
        with part.open("rb") as stream:
            total.update(part.name.encode() + b"\0" + hashlib.file_digest(stream, "sha256").digest())
    return f"sha256:{total.hexdigest()}"


def _kinds(tensors: Iterable[torch.Tensor]) -> list[str]:
    return sorted({str(t.dtype).removeprefix("torch.") for t in tensors})


def _null_norm(tensors: Mapping[str, torch.Tensor]) -> float | None:
    """Mean length of the null condition's tokens; near 1 in published files (variance 1 / channels)."""
    null = tensors.get(NULL)
    return None if null is None else float(null.float().norm(dim=-1).mean())


def _parameters(shapes: Mapping[str, torch.Tensor]) -> int:
    return sum(t.numel() for name, t in shapes.items() if name not in BUFFERS)


def _geometry(config: Mapping[str, Any]) -> dict[str, Any]:
    size, tokens = config.get("sample_size"), config.get("caption_num_tokens")
    return {
        "stage": size * PIXELS_PER_LATENT if isinstance(size, int) else None,
        "condition_tokens": tokens if isinstance(tokens, int) else None,
    }


def _examine(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], origin: str
) -> tuple[list[str], list[str]]:
    """What keeps these tensors from being the configured transformer, and what is worth knowing about them."""
    import torch

    from pixcell_core.models import PixCellTransformer2DModel

    notes: list[str] = []
    try:
        expected = build_empty(PixCellTransformer2DModel, config, origin).state_dict()
        compare_shapes(
            {name: tuple(t.shape) for name, t in expected.items()},
            {name: tuple(t.shape) for name, t in tensors.items()},
            origin,
        )
    except BadInputError as error:
        return [error.message], notes
    broken = sorted(k for k, t in tensors.items() if not torch.isfinite(t).all())
    problems = [f"{len(broken)} tensors hold NaN or infinity, e.g. {broken[0]}"] if broken else []
    laid = expected.get(TABLE)
    if laid is not None and not laid.is_meta:
        apart = float((tensors[TABLE].float() - laid.float()).abs().max())
        if apart > TABLE_TOLERANCE:
            notes.append(
                f"the condition table in the file differs from the stage's own by up to {apart:.2g}; "
                "the file's is used, as the weights learned it"
            )
    return problems, notes


def _model_folder(folder: Path) -> CheckpointInfo:
    from pixcell_core.models import PixCellTransformer2DModel

    config = read_json(folder / "config.json")
    tensors = read_tensors(folder_entries(folder))
    named = str(config.get("_class_name", "PixCellTransformer2DModel"))
    common: dict[str, Any] = {
        "path": str(folder),
        "parameters": _parameters(tensors),
        "dtypes": _kinds(tensors.values()),
        "digest": content_digest(folder),
    }
    if named != "PixCellTransformer2DModel":
        plain = {k: v for k, v in config.items() if not k.startswith("_")}
        return CheckpointInfo(kind=f"model folder ({named})", config=plain, **common)
    known = known_configuration(PixCellTransformer2DModel, config)
    dead = sorted(k for k in config if k not in known and not k.startswith("_"))
    try:
        transformer_configuration(folder)
        problems, notes = _examine(config, tensors, folder.name)
    except BadInputError as error:
        problems, notes = [error.message], []
    return CheckpointInfo(
        kind="transformer folder (Diffusers form)",
        null_embedding_norm=_null_norm(tensors),
        config=known,
        ignored_config_keys=dead,
        problems=problems,
        notes=notes,
        **_geometry(known),
        **common,
    )


def _pipeline(folder: Path) -> CheckpointInfo:
    found = _model_folder(folder / "transformer")
    parts = {"scheduler": "scheduler/scheduler_config.json", "vae": "vae/config.json"}
    missing = [part for part, place in parts.items() if not (folder / place).is_file()]
    problems = [*found.problems]
    if "scheduler" in missing:
        problems.append("The pipeline has no scheduler/scheduler_config.json.")
    notes = [*found.notes]
    if "vae" in missing:
        notes.append("no vae/: bring the autoencoder yourself (SD3 or SD3.5)")
    return found.model_copy(
        update={"path": str(folder), "kind": "pipeline folder", "problems": problems, "notes": notes}
    )


def _adapter(path: Path, adapter: LoraAdapter, kind: str) -> CheckpointInfo:
    ranks, scales = sorted(set(adapter.ranks.values())), sorted(set(adapter.scale.values()))
    endings = sorted({".".join(layer.split(".")[2:]) or layer for layer in adapter.layers})
    return CheckpointInfo(
        path=str(path),
        kind=kind,
        parameters=adapter.parameters,
        dtypes=_kinds([*adapter.down.values(), *adapter.up.values()]),
        digest=content_digest(path),
        config={"layers": len(adapter.layers), "ranks": ranks, "scales": scales, "targets": endings},
    )


def _two_nulls(opened: OriginalFile) -> list[str]:
    """A note where the average was given a null embedding of its own, which its training never dropped to."""
    name = "y_embedder.y_embedding"
    held = [state[name] for state in opened.states.values() if name in state]
    if len(held) == 2 and (held[0].shape != held[1].shape or bool((held[0] != held[1]).any())):
        return ["the average carries another null embedding than the plain weights were trained with"]
    return []


def _original_file(path: Path, head_dim: int) -> CheckpointInfo:
    opened = open_original(path)
    state = opened.choose()
    if any(".lora_A." in name or ".lora.down." in name for name in state):
        whole = any(".base_layer." in name for name in state)
        kind = "LoRA (whole adapted state dict)" if whole else "LoRA file"
        found = (
            load_lora(path) if path.suffix == ".safetensors" else adapter_from_state(state, origin=path.name)
        )
        return _adapter(path, found, kind)
    training = opened.epoch is not None or AVERAGE in opened.states or bool(opened.others)
    notes = [f"epoch {opened.epoch}, step {opened.step}"] if opened.epoch is not None else []
    notes += [f"holds {', '.join([*opened.states, *opened.others])}"] if training else []
    tensors: dict[str, torch.Tensor] = dict(state)
    config: dict[str, Any] = {}
    problems: list[str] = []
    kind = "tensors in Diffusers names, without a configuration"
    if is_original(state):
        kind = f"{'training' if training else 'original'} checkpoint (original form)"
        if training and AVERAGE in opened.states:
            notes.append("the moving average is described; --no-ema takes the plain weights")
            notes += _two_nulls(opened)
        try:
            tensors = from_original(state)
            config = infer_configuration(state, head_dim=head_dim)
            problems, more = _examine(config, tensors, path.name)
            notes += more
        except BadInputError as error:
            problems = [error.message]
    else:
        problems.append(f"no {', '.join(GEOMETRY)}: put it beside the config.json it was published with")
    return CheckpointInfo(
        path=str(path),
        kind=kind,
        parameters=_parameters(tensors),
        dtypes=_kinds(tensors.values()),
        digest=content_digest(path),
        null_embedding_norm=_null_norm(tensors),
        config=config,
        problems=problems,
        notes=notes,
        **_geometry(config),
    )


def inspect_checkpoint(path: Path, *, head_dim: int = HEAD_DIM) -> CheckpointInfo:
    """Describe a file or folder of weights.

    Args:
        path: a model folder, a pipeline folder, an adapter's folder, or a .safetensors, .ckpt, .pth file.
        head_dim: width of an attention head, which original checkpoints do not say.

    Raises:
        BadInputError: nothing there, nothing known, or a file too damaged to describe.
    """
    if path.is_file():
        return _original_file(path, head_dim)
    if (path / "model_index.json").is_file():
        return _pipeline(path)
    if (path / PEFT_CONFIG).is_file():
        return _adapter(path, load_lora(path), "LoRA folder (peft form)")
    if (path / DIFFUSERS_WEIGHTS).is_file():
        return _adapter(path, load_lora(path), "LoRA folder (diffusers form)")
    if (path / "config.json").is_file():
        return _model_folder(path)
    if not path.exists():
        raise BadInputError(f"There is no {path}.", hint="Check the path.", code="weights-missing")
    raise BadInputError(
        f"{path} holds no weights: no config.json, model_index.json or {PEFT_CONFIG}.",
        hint="Give a published folder, or the path of one checkpoint file.",
        code="weights-missing",
    )
