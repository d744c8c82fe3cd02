"""Safetensors files of a model folder, judged by their headers before a byte of a tensor is read.

A file is mapped, not read: a tensor of the wanted type costs no memory of its own until it is written to, and a file
may be replaced (not overwritten) while a model made from it lives.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixcell_core.errors import BadInputError

if TYPE_CHECKING:
    import torch

#: No header of a real model comes near; a larger length is no safetensors file.
MOST_HEADER_BYTES = 100_000_000
#: Tensors read through one mapping, so that the pages of those already converted leave the memory.
MAPPED_AT_ONCE = 32


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file as its header describes it; `kind` is safetensors' own word (F32, F16, BF16 ...)."""

    path: Path
    shape: tuple[int, ...]
    kind: str

    @property
    def numbers(self) -> int:
        """How many numbers it holds."""
        return prod(self.shape)


def _damaged(path: Path, why: str, code: str = "weights-damaged") -> BadInputError:
    hint = "Copy or download the file again, and compare its size with the published one."
    return BadInputError(f"{path.name} {why}.", hint=hint, code=code)


def read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Tensors and metadata a safetensors file promises.

    Raises:
        BadInputError: no such file, no safetensors file, or one that ends before its last tensor.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if len(start) == 8 and length <= MOST_HEADER_BYTES and size < 8 + length:
                raise _damaged(path, f"ends inside its header: {size} bytes", "weights-truncated")
            if len(start) < 8 or length > MOST_HEADER_BYTES:
                raise _damaged(path, "is no safetensors file")
            header: dict[str, Any] = json.loads(stream.read(length))
        metadata = {str(k): str(v) for k, v in header.pop("__metadata__", {}).items()}
        entries = {n: TensorEntry(path, tuple(e["shape"]), str(e["dtype"])) for n, e in header.items()}
        promised = 8 + length + max((int(e["data_offsets"][1]) for e in header.values()), default=0)
    except OSError as error:
        raise _damaged(path, "cannot be opened", "weights-missing") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise _damaged(path, "is no safetensors file") from error
    if size < promised:
        raise _damaged(path, f"holds {size} of the {promised} bytes its header promises", "weights-truncated")
    if size > promised:
        raise _damaged(path, f"holds {size} bytes, {size - promised} more than its header promises")
    return entries, metadata


def _by_index(index: Path) -> dict[str, TensorEntry]:
    """Tensors of a folder cut into shards, by its index file."""
    try:
        weight_map = {str(k): str(v) for k, v in json.loads(index.read_text())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(index, "is no index of shards (a JSON object with a weight_map)") from error
    entries: dict[str, TensorEntry] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise _damaged(index, f"points outside its folder: {shard}")
        if not (index.parent / shard).is_file():
            raise BadInputError(
                f"The shard {shard} named by {index.name} is not in the folder.",
                hint="Download the missing file beside the others.",
                code="weights-missing",
            )
        held = read_header(index.parent / shard)[0]
        promised = {name for name, file in weight_map.items() if file == shard}
        if odd := promised ^ held.keys():
            raise _damaged(index, f"and {shard} disagree about {len(odd)} tensors, e.g. {min(odd)}")
        entries |= held
    return entries


def folder_entries(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of a model folder: one safetensors file, or shards with an index.

    Raises:
        BadInputError: no file, several without an index, a missing shard, a damaged file.
    """
    indices, files = sorted(folder.glob("*.safetensors.index.json")), sorted(folder.glob("*.safetensors"))
    if len(indices) == 1:
        return _by_index(indices[0])
    usual = folder / "diffusion_pytorch_model.safetensors"
    if usual in files:
        files = [usual]
    if len(files) == 1:
        return read_header(files[0])[0]
    if files:
        raise BadInputError(
            f"{folder} holds {len(files)} safetensors files and no index that joins them.",
            hint="Keep one file, or add the *.safetensors.index.json it was published with.",
            code="weights-missing",
        )
    pickles = sorted(p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")))
    raise BadInputError(
        f"{folder} holds no .safetensors file" + (f", only {pickles[0]}." if pickles else "."),
        hint="Model folders are read from safetensors alone; pickled ones go through `pixcell model convert`."
        if pickles
        else "Download diffusion_pytorch_model.safetensors beside config.json.",
        code="weights-missing",
    )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise _damaged(path, "cannot be read") from error


def read_tensors(
    entries: dict[str, TensorEntry], dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """The tensors themselves; mapped where their type stays, converted floating-point ones where `dtype` differs.

    Raises:
        BadInputError: a file cannot be read.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted({entry.path for entry in entries.values()}):
        names = [name for name, entry in entries.items() if entry.path == path]
        for first in range(0, len(names), MAPPED_AT_ONCE):
            with _opened(path) as handle:
                for name in names[first : first + MAPPED_AT_ONCE]:
                    tensor = handle.get_tensor(name)
                    tensors[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
                    del tensor
    return tensors
