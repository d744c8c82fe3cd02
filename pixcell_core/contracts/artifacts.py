"""Digests of what a study names but does not contain: a folder of weights, and the code that is installed here."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from pixcell_core.contracts.canonical import digest, file_digest
from pixcell_core.errors import BadInputError

TRAINING_CODE = (
    "pixcell_core.models",
    "pixcell_core.diffusion",
    "pixcell_core.training",
    "pixcell_core.private",
    "pixcell_core.contracts",
    "site_client.trainer",
    "site_client.ledger",
)
"""Packages whose source decides what a training round computes and what it costs."""


def base_digest(folder: Path) -> str:
    """`sha256:<hex>` over names and bytes of a saved transformer's configuration and weights.

    Raises `BadInputError` where there are none.
    """
    from pixcell_core.starter.weights import weights_digest

    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise BadInputError(
            f"{folder} holds no model (config.json beside a .safetensors file).",
            hint="Give the folder of a saved transformer.",
            code="no-weights",
        )
    return weights_digest(folder)


@lru_cache(maxsize=1)
def installed_code_digest() -> str:
    """`sha256:<hex>` of the installed training code, the same on every machine with the same release.

    A package that is not installed here (a coordinator need not have `site_client`) is an input error: a study can
    be written only where its code can be read.
    """
    listing: dict[str, str] = {}
    for package in TRAINING_CODE:
        found = find_spec(package)
        if found is None or not found.submodule_search_locations:
            raise BadInputError(
                f"The package {package} is not installed here, so the study's code digest cannot be computed.",
                hint="Install the full distribution, or give the digest that the sites read out to you.",
                code="code-not-installed",
            )
        for place in found.submodule_search_locations:
            for source in sorted(Path(place).rglob("*.py")):
                listing[f"{package}/{source.relative_to(place).as_posix()}"] = file_digest(source)
    return digest(listing)
