"""How many numbers an adapter trains, read off the header of the base model's weights without loading them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pixcell_core.contracts.canonical import parse_json, read_bounded
from pixcell_core.errors import BadInputError, RefusedError

PLANNED_TARGETS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_v", "attn2.to_out.0")
"""What is adapted where nothing is said; the same as `training.adapters.DEFAULT_TARGETS`, which needs torch."""

SILENT_WITH_ONE_TOKEN = ("attn2.to_q", "attn2.to_k")


@dataclass(frozen=True)
class AdapterSize:
    """An adapter in numbers.

    Attributes:
        kind: `ffa-lora` trains B alone, `lora` A and B.
        rank: r.
        layers: linear layers adapted.
        parameters: d, trained numbers; each carries the noise.
        bytes: of one update, float32.
    """

    kind: Literal["ffa-lora", "lora"]
    rank: int
    layers: int
    parameters: int

    @property
    def bytes(self) -> int:
        """Size of one update."""
        return 4 * self.parameters


def adapter_size(
    base: Path,
    *,
    kind: Literal["ffa-lora", "lora"] = "ffa-lora",
    rank: int = 4,
    targets: Sequence[str] = PLANNED_TARGETS,
) -> AdapterSize:
    """Count what an adapter of `base` trains.

    Args:
        base: folder of a transformer: config.json and safetensors.
        kind: `ffa-lora` (rank x outputs for each layer) or `lora` (rank x (inputs + outputs)).
        rank: r, at least 1.
        targets: endings of the names of the layers to adapt.

    Raises:
        BadInputError: no such folder or weights, or an unknown kind or rank.
        RefusedError: a target names no layer, or only layers that cannot learn with one condition token.
    """
    if kind not in ("ffa-lora", "lora") or rank < 1:
        raise BadInputError(
            f"An adapter of kind {kind} and rank {rank} is not known.",
            hint="Kinds are ffa-lora and lora; the rank is at least 1.",
            code="adapter-setting",
        )
    if not base.is_dir():
        raise BadInputError(
            f"There is no folder {base}.",
            hint="Give the folder of a transformer with its config.json and .safetensors file.",
            code="no-such-folder",
        )
    shapes = linear_layers(base)
    chosen = _chosen(shapes, targets, tokens=condition_tokens(base))
    trained = sum(outputs + (inputs if kind == "lora" else 0) for outputs, inputs in chosen.values())
    return AdapterSize(kind=kind, rank=rank, layers=len(chosen), parameters=rank * trained)


def linear_layers(base: Path) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of every two-dimensional weight, by the name of its module; only headers are read.

    Raises:
        BadInputError: the folder holds no weights (`weights-missing`), or a file cannot be read (`weights-damaged`).
    """
    from safetensors import SafetensorError, safe_open

    paths = sorted(base.glob("*.safetensors"))
    if not paths:
        raise BadInputError(
            f"{base} holds no .safetensors file.",
            hint="Give the folder of a transformer with its config.json and .safetensors file.",
            code="weights-missing",
        )
    found: dict[str, tuple[int, int]] = {}
    for path in paths:
        try:
            with safe_open(path, framework="numpy") as handle:
                for key in handle.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                    shape = handle.get_slice(key).get_shape()
                    if key.endswith(".weight") and len(shape) == 2:
                        found[key.removesuffix(".weight")] = (int(shape[0]), int(shape[1]))
        except (SafetensorError, OSError) as error:
            raise BadInputError(
                f"{path.name} is not a readable safetensors file.",
                hint="Copy or download the file again, and compare its size with the published one.",
                code="weights-damaged",
            ) from error
    return found


def _chosen(
    shapes: Mapping[str, tuple[int, int]], targets: Sequence[str], tokens: int
) -> dict[str, tuple[int, int]]:
    chosen: dict[str, tuple[int, int]] = {}
    for target in targets:
        hit = {n: s for n, s in shapes.items() if n == target or n.endswith(f".{target}")}
        if not hit:
            raise RefusedError(
                f"The model has no linear layer called {target}.",
                hint="Correct --targets; they are endings of the model's own module names.",
                code="unknown-adapter-target",
            )
        if tokens == 1 and any(n.endswith(SILENT_WITH_ONE_TOKEN) for n in hit):
            raise RefusedError(
                f"{target} cannot learn: with one condition token the attention weight is always 1, so these layers "
                "have zero gradient and would carry privacy noise alone.",
                hint="Leave it out of --targets, or spell the others out (attn1.to_q, attn1.to_k).",
                code="silent-adapter-target",
            )
        chosen |= hit
    return chosen


def condition_tokens(base: Path) -> int:
    """How many condition tokens the base reads; more than one where its configuration does not say."""
    path = base / "config.json"
    config = parse_json(read_bounded(path), name=path.name) if path.is_file() else {}
    return int(config.get("caption_num_tokens", 2)) if isinstance(config, dict) else 2
