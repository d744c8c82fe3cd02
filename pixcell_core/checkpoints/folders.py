"""Loads published model folders: one model (`config.json` beside safetensors), or a whole pipeline.

A model is built on the meta device and given the file's own tensors, so that loading costs the file and little more.
Configurations are read with patience (published ones carry keys no class knows), tensors with none: a name missing,
left over or of another shape is an error. Fixed tables that no file holds are laid by the model itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from pixcell_core.checkpoints.naming import a_few
from pixcell_core.checkpoints.tensor_files import folder_entries, read_tensors
from pixcell_core.errors import BadInputError

if TYPE_CHECKING:
    from diffusers.models.modeling_utils import ModelMixin

    from pixcell_core.diffusion import PixCellPipeline
    from pixcell_core.models import PixCellTransformer2DModel

ModelT = TypeVar("ModelT", bound="ModelMixin")

#: What a transformer's tensors cannot tell; a configuration without one of these would be filled with a guess.
GEOMETRY = ("num_attention_heads", "attention_head_dim", "sample_size", "interpolation_scale")
#: Beyond these a configuration is a mistake, and even a model without numbers would fill the memory with its tables.
LARGEST = {
    "attention_head_dim": 1024,
    "caption_num_tokens": 4096,
    "num_attention_heads": 512,
    "num_layers": 512,
    "sample_size": 1024,
}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder.

    Raises:
        BadInputError: no such file, or no JSON object in it.
    """
    if not path.is_file():
        raise BadInputError(
            f"There is no {path.name} in {path.parent}.",
            hint="Give the folder of a published model: config.json beside its safetensors file.",
            code="weights-missing",
        )
    try:
        found = json.loads(path.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise BadInputError(
            f"{path} is no JSON that can be read.", hint="Copy the file again.", code="weights-damaged"
        ) from error
    if not isinstance(found, dict):
        raise BadInputError(
            f"{path} holds a {type(found).__name__}, not a JSON object.",
            hint="Copy the file again.",
            code="weights-damaged",
        )
    return found


def known_configuration(kind: type[ModelMixin], config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a configuration that the class takes; the others are dead and decide nothing."""
    import inspect

    return {k: v for k, v in config.items() if k in inspect.signature(kind.__init__).parameters}


def build_empty(kind: type[ModelT], config: Mapping[str, Any], origin: str) -> ModelT:
    """A model on the meta device: names and shapes, no numbers but its fixed tables.

    Raises:
        BadInputError: the configuration does not describe such a model.
    """
    try:
        with torch.device("meta"):
            return kind(**known_configuration(kind, config))
    except Exception as error:
        # The blocks' own library answers a setting it does not know with whatever it stumbles over first.
        raise BadInputError(
            f"{origin} describes no {kind.__name__}: {error}",
            hint="Use the config.json that was published with these weights.",
            code="bad-configuration",
        ) from error


def compare_shapes(
    expected: Mapping[str, tuple[int, ...]], met: Mapping[str, tuple[int, ...]], origin: str
) -> None:
    """Refuse names missing or left over, and shapes that differ from the configuration's.

    Raises:
        BadInputError: with the first names, the shape met and the shape expected.
    """
    if missing := expected.keys() - met.keys():
        raise BadInputError(
            f"{origin} lacks {len(missing)} of {len(expected)} tensors: {a_few(missing)}.",
            hint="The file is incomplete, or its configuration is of another model; take both again.",
            code="checkpoint-missing-keys",
        )
    if extra := met.keys() - expected.keys():
        raise BadInputError(
            f"{origin} holds {len(extra)} tensors the configured model does not have: {a_few(extra)}.",
            hint="The configuration is of another model, or the file holds more than weights (an adapter?).",
            code="checkpoint-extra-keys",
        )
    odd = [name for name in expected if expected[name] != met[name]]
    if odd:
        raise BadInputError(
            f"{origin}: {odd[0]} has shape {met[odd[0]]}, expected {expected[odd[0]]}"
            + (f"; {len(odd) - 1} more differ." if len(odd) > 1 else "."),
            hint="Weights and configuration are of different models or stages; take both from one place.",
            code="checkpoint-wrong-shape",
        )


def _lay_tables(model: ModelMixin, kind: type[ModelMixin], config: Mapping[str, Any]) -> None:
    """Replace fixed tables left on the meta device (no file holds them) by those of a model without blocks."""
    absent = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if not absent:
        return
    laid = dict(kind(**{**known_configuration(kind, config), "num_layers": 0}).named_buffers())
    for name in absent:
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, laid[name])


def fill(
    model: ModelT, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], origin: str
) -> ModelT:
    """Give an empty model its tensors, without a copy; parameters stay parameters, buffers buffers.

    Raises:
        BadInputError: names or shapes differ from the model's.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    compare_shapes(expected, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, origin)
    model.load_state_dict(dict(tensors), strict=True, assign=True)
    _lay_tables(model, type(model), config)
    return model.eval()


def load_model_folder(kind: type[ModelT], folder: Path, *, dtype: torch.dtype | None = None) -> ModelT:
    """Any diffusers-style model folder, strictly, in evaluation mode.

    Args:
        kind: the class the folder must be of.
        folder: holds config.json and one safetensors file, or shards with their index.
        dtype: type of the floating-point weights; the file's own when absent.

    Raises:
        BadInputError: missing, damaged, truncated files; a configuration of another class; tensors that do not fit.
    """
    config = read_json(folder / "config.json")
    named = str(config.get("_class_name", kind.__name__))
    if named != kind.__name__:
        raise BadInputError(
            f"{folder} holds a {named}, expected a {kind.__name__}.",
            hint="Give the folder of the right model (in a pipeline: transformer/ or vae/).",
            code="weights-of-another-model",
        )
    model = build_empty(kind, config, f"{folder.name}/config.json")
    entries = folder_entries(folder)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    # Judged by the headers first: a wrong file is refused before gigabytes of it are read.
    compare_shapes(expected, {name: entry.shape for name, entry in entries.items()}, str(folder))
    return fill(model, read_tensors(entries, dtype), config, str(folder))


def transformer_configuration(folder: Path) -> dict[str, Any]:
    """The configuration of a transformer folder, with everything its tensors cannot tell.

    Raises:
        BadInputError: the geometry is missing, or the model needs conditions PixCell does not have.
    """
    config = read_json(folder / "config.json")
    if absent := [key for key in GEOMETRY if key not in config]:
        raise BadInputError(
            f"{folder.name}/config.json does not say {', '.join(absent)}.",
            hint="Use the config.json that was published with these weights.",
            code="bad-configuration",
        )
    for key, largest in LARGEST.items():
        met = config.get(key, 1)
        if not isinstance(met, int) or isinstance(met, bool) or not 1 <= met <= largest:
            raise BadInputError(
                f"{folder.name}/config.json says {key} is {met!r}, expected a whole number from 1 to {largest}.",
                hint="Use the config.json that was published with these weights.",
                code="bad-configuration",
            )
    if config.get("use_additional_conditions"):
        raise BadInputError(
            "config.json asks for use_additional_conditions, which PixCell does not have.",
            hint="The weights are of a text-to-image model; give a PixCell transformer.",
            code="bad-configuration",
        )
    return config


def transformer_folder(folder: Path) -> Path:
    """The transformer's own folder: the given one, or `transformer/` of a whole pipeline."""
    if (folder / "model_index.json").is_file():
        return folder / "transformer"
    return folder


def load_transformer_folder(folder: Path, *, dtype: torch.dtype | None = None) -> PixCellTransformer2DModel:
    """A published transformer, from its own folder or from a whole pipeline's.

    Args:
        folder: holds config.json, or model_index.json with transformer/ beside it.
        dtype: type of the weights; the file's own when absent.

    Raises:
        BadInputError: as `load_model_folder`, or a configuration without its geometry.
    """
    from pixcell_core.models import PixCellTransformer2DModel

    place = transformer_folder(folder)
    transformer_configuration(place)
    return load_model_folder(PixCellTransformer2DModel, place, dtype=dtype)


def declared_class(folder: Path, *expected: str, hint: str) -> tuple[str, dict[str, Any]]:
    """The class that a folder's `config.json` names, and its content.

    Raises:
        BadInputError: the class is none of those expected (`weights-of-another-model`).
    """
    config = read_json(folder / "config.json")
    met = str(config.get("_class_name") or config.get("model_type") or "no name")
    if met not in expected:
        wanted = expected[0] if len(expected) == 1 else f"one of {', '.join(expected)}"
        raise BadInputError(
            f"{folder} holds a model of class {met}, expected {wanted}.",
            hint=hint,
            code="weights-of-another-model",
        )
    return met, config


def load_autoencoder_folder(folder: Path, *, dtype: torch.dtype | None = None) -> ModelMixin:
    """An autoencoder brought by the user: AutoencoderKL (SD3 / SD3.5), AutoencoderTiny, or the starter's.

    Raises:
        BadInputError: as `load_model_folder`, an unknown class, or a scale or shift the file does not say.
    """
    from diffusers import AutoencoderKL, AutoencoderTiny

    from pixcell_core.models import TileAutoencoder

    known: tuple[Any, ...] = (AutoencoderKL, AutoencoderTiny, TileAutoencoder)
    kinds: dict[str, type[ModelMixin]] = {kind.__name__: kind for kind in known}
    named, config = declared_class(folder, *kinds, hint="Give the folder of a 16-channel autoencoder.")
    silent = [key for key in ("scaling_factor", "shift_factor") if config.get(key) is None]
    if named == "AutoencoderKL" and silent:
        raise BadInputError(
            f"{folder}/config.json does not say {' or '.join(silent)}; without it every tile comes out wrong.",
            hint="SD3's and SD3.5's autoencoder has scaling_factor 1.5305 and shift_factor 0.0609.",
            code="bad-configuration",
        )
    return load_model_folder(kinds[named], folder, dtype=dtype)


def load_scheduler_folder(folder: Path) -> Any:
    """A scheduler by its `scheduler_config.json`, one of diffusers' own.

    Raises:
        BadInputError: an unknown scheduler, or settings it does not take.
    """
    from diffusers import SchedulerMixin, schedulers

    config = read_json(folder / "scheduler_config.json")
    named = str(config.get("_class_name", "no class"))
    kind = getattr(schedulers, named, None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise BadInputError(
            f"{folder.name}/scheduler_config.json names {named}, which is no scheduler of diffusers.",
            hint="Published PixCell uses DPMSolverMultistepScheduler; DDIMScheduler and "
            "EulerDiscreteScheduler work too.",
            code="unknown-scheduler",
        )
    try:
        # A configured scheduler is the class's own; from_config is typed for the mixin alone.
        return kind.from_config(config)  # type: ignore[attr-defined]
    except Exception as error:
        # Schedulers answer a setting they do not know with any kind of error.
        raise BadInputError(
            f"{folder.name}/scheduler_config.json is not for {named}: {error}",
            hint="Use the file published with the weights.",
            code="bad-configuration",
        ) from error


def load_pipeline(
    folder: Path, *, vae: Path | ModelMixin | None = None, dtype: torch.dtype | None = None
) -> PixCellPipeline:
    """A whole pipeline folder: model_index.json beside transformer/, scheduler/ and, where published, vae/.

    Args:
        folder: the pipeline's folder.
        vae: an autoencoder or its own folder, for pipelines published without one.
        dtype: type of the weights; the files' own when absent.

    Raises:
        BadInputError: a part is missing or cannot be used; the message names it.
    """
    from pixcell_core.diffusion import PixCellPipeline

    read_json(folder / "model_index.json")
    autoencoder = folder / "vae" if vae is None else vae
    if isinstance(autoencoder, Path) and not autoencoder.is_dir():
        raise BadInputError(
            f"The pipeline {folder} has no vae/ and none was given.",
            hint="Give the folder of SD3's or SD3.5's autoencoder; its licence forbids shipping it along.",
            code="weights-missing",
        )
    return PixCellPipeline(
        vae=load_autoencoder_folder(autoencoder, dtype=dtype)
        if isinstance(autoencoder, Path)
        else autoencoder,
        transformer=load_transformer_folder(folder, dtype=dtype),
        scheduler=load_scheduler_folder(folder / "scheduler"),
    )
