"""The count read off a weight header equals what an adapter really trains."""

from __future__ import annotations

import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Literal

import pytest

from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.private.adapter_size import PLANNED_TARGETS, SILENT_WITH_ONE_TOKEN, adapter_size
from pixcell_core.starter import load_transformer
from pixcell_core.training import adapters

BASE = Path(str(files("pixcell_core.starter") / "weights" / "transformer"))


@pytest.mark.parametrize("kind", ("ffa-lora", "lora"))
@pytest.mark.parametrize(("rank", "targets"), [(4, PLANNED_TARGETS), (1, ("attn2.to_v", "ff.net.2"))])
def test_the_count_is_what_an_adapter_trains(
    kind: Literal["ffa-lora", "lora"], rank: int, targets: tuple[str, ...]
) -> None:
    model = load_transformer()
    adapters.attach_lora(model, kind=kind, rank=rank, seed=0, targets=targets)
    trained = [p for p in model.parameters() if p.requires_grad]
    size = adapter_size(BASE, kind=kind, rank=rank, targets=targets)
    assert size.parameters == sum(p.numel() for p in trained)
    assert size.bytes == 4 * size.parameters
    assert size.layers == len(trained) // (2 if kind == "lora" else 1)


def test_the_planned_targets_are_those_that_are_trained() -> None:
    assert PLANNED_TARGETS == adapters.DEFAULT_TARGETS
    assert SILENT_WITH_ONE_TOKEN == adapters.SILENT_WITH_ONE_TOKEN


@pytest.mark.parametrize("target", ("attn2.to_q", "to_k"))
def test_layers_that_cannot_learn_are_refused(target: str) -> None:
    with pytest.raises(RefusedError, match="one condition token"):
        adapter_size(BASE, targets=("attn1.to_v", target))


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="no linear layer called nowhere"):
        adapter_size(BASE, targets=("nowhere",))
    with pytest.raises(BadInputError, match="no folder"):
        adapter_size(tmp_path / "absent")
    with pytest.raises(BadInputError, match=r"no \.safetensors"):
        adapter_size(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(BadInputError, match=r"model.safetensors is not a readable"):
        adapter_size(tmp_path)
    with pytest.raises(BadInputError, match="rank 0"):
        adapter_size(BASE, rank=0)
    with pytest.raises(BadInputError, match="kind full"):
        adapter_size(BASE, kind="full")  # type: ignore[arg-type]


def test_planning_needs_no_torch() -> None:
    code = (
        "import sys; from pathlib import Path; from pixcell_core.private import planning, adapter_size as a\n"
        "a.adapter_size(Path(sys.argv[1])); assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(BASE)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
