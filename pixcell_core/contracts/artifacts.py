"""Digests of what a study names but does not contain: a folder of weights, and the code that is installed here."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from pixcell_core.contracts.canonical import digest, file_digest
from pixcell_core.errors import BadInputError

TRAINING_CODE = (
    "pixcell_core/contracts/artifacts.py",
    "pixcell_core/contracts/spool.py",
    "pixcell_core/contracts/study.py",
    "pixcell_core/diffusion/loss.py",
    "pixcell_core/diffusion/schedule.py",
    "pixcell_core/models/positions.py",
    "pixcell_core/models/transformer.py",
    "pixcell_core/private",
    "pixcell_core/training/adapters.py",
    "pixcell_core/training/feature_store.py",
    "site_client/generate",
    "site_client/ledger",
    "site_client/trainer",
)
"""Source files and folders that decide what a training round or a patients' vote computes and what it costs."""

AUDITING_CODE = (
    "privacy_audit",
    "pixcell_core/contracts",
    "pixcell_core/diffusion/schedule.py",
    "pixcell_core/encoders",
    "pixcell_core/models",
    "pixcell_core/private",
    "pixcell_core/training/feature_store.py",
    "pixcell_core/trust",
)
"""Source files and folders, with the policies and pages beside them, that decide what an audit measures and says."""

_SOURCES = (".py", ".yaml", ".html", ".css")


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
    return code_digest(TRAINING_CODE)


def code_digest(entries: tuple[str, ...]) -> str:
    """`sha256:<hex>` over names and bytes of installed source files and folders, given as `package/path`.

    Raises `BadInputError` where a package is not installed.
    """
    listing: dict[str, str] = {}
    for entry in entries:
        package, _, rest = entry.partition("/")
        place = _package_folder(package) / rest
        sources = [place]
        if place.is_dir():
            sources = sorted(path for path in place.rglob("*") if path.suffix in _SOURCES and path.is_file())
        for source in sources:
            listing[f"{package}/{source.relative_to(_package_folder(package)).as_posix()}"] = file_digest(
                source
            )
    return digest(listing)


def _package_folder(package: str) -> Path:
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise BadInputError(
            f"The package {package} is not installed here, so the study's code digest cannot be computed.",
            hint="Install the full distribution, or give the digest that the sites read out to you.",
            code="code-not-installed",
        )
    return Path(found.submodule_search_locations[0])
