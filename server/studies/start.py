"""The adapter a study starts from, with the names, shapes and values that the base model gives it at every site.

The coordinator loads no model: the shapes stand in the header of the base model's weight file, B starts at zero and A,
where it is trained, comes from the study's seed. Sites compare names and shapes with their own model and refuse what
does not fit.
"""

from __future__ import annotations

from pathlib import Path

from pixcell_core.contracts.spool import Arrays
from pixcell_core.contracts.study import AdapterSettings
from pixcell_core.errors import BadInputError
from pixcell_core.private.adapter_size import condition_tokens, linear_layers


def start_adapter(base: Path, adapter: AdapterSettings) -> Arrays:
    """What the adapter trains, float32, for every linear layer it reaches; see `training.adapters.start_state`.

    Raises `BadInputError` where the folder holds no weights or no module has one of the target names.
    """
    from pixcell_core.training.adapters import require_no_silent_layers, start_state

    layers = {name: shape for name, shape in linear_layers(base).items() if _is_target(name, adapter.targets)}
    if not layers:
        raise BadInputError(
            f"No linear layer of {base.name} is called {', '.join(adapter.targets)}.",
            hint="Correct the adapter's targets.",
            code="no-adapter-target",
        )
    require_no_silent_layers(layers, condition_tokens(base))
    start = start_state(layers, kind=adapter.kind, rank=adapter.rank, seed=adapter.seed)
    return {name: value.numpy() for name, value in start.items()}


def _is_target(module: str, targets: tuple[str, ...]) -> bool:
    return any(module == target or module.endswith(f".{target}") for target in targets)
