"""What a release is: how its tiles were made, and the sealed manifest that names each by digest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from pixcell_core.contracts.canonical import Digest, Document, Moment
from pixcell_core.contracts.seen_text import Line as Line
from pixcell_core.contracts.seen_text import Prose as Prose
from pixcell_core.contracts.seen_text import TileLabel as TileLabel
from pixcell_core.contracts.study import SiteName
from pixcell_core.trust.merkle import merkle_root

MAX_TILES = 50_000
"""Most tiles in one release, so that its signed list stays within one envelope."""

SourceType = Literal["http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"]
TRAINED_ALGORITHMIC_MEDIA: SourceType = (
    "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
)
"""IPTC digital source type of media made by a trained model (also used by C2PA)."""

DEFAULT_LICENCE = (
    "No licence is granted by this manifest alone. Ask the releasing site for the terms of these tiles."
)
DEFAULT_USAGE = (
    "Synthetic tiles for research and education on methods. Not for diagnosis, and not for attempts to "
    "identify persons. The verdict's expiry date binds: ask for a new audit after it."
)

TileFormat = Literal["png", "jpg"]
TileName = Annotated[str, StringConstraints(pattern=r"^\d{5}\.(png|jpg)$")]


class PrivacyStatement(Document):
    """What a differential-privacy guarantee says, and what it does not. Never an epsilon without its unit.

    `epsilon` at `delta` bounds what the mechanism reveals about one `unit`, by the accountant named.
    """

    schema_version: Literal["pixcell.privacy-statement/v1"] = "pixcell.privacy-statement/v1"
    epsilon: Annotated[float, Field(gt=0)]
    delta: Annotated[float, Field(gt=0, lt=1)]
    unit: Literal["patient"] = "patient"
    mechanism: Line
    accountant: Line
    covers: Annotated[tuple[Prose, ...], Field(min_length=1, max_length=32)]
    does_not_cover: Annotated[tuple[Prose, ...], Field(min_length=1, max_length=32)]

    def __str__(self) -> str:
        return f"epsilon {self.epsilon:.3g} per {self.unit} at delta {self.delta:.1g} ({self.accountant})"


class Conditioning(Document):
    """Which private embeddings steered the tiles: the policy's name, and what it promises in words."""

    policy: Line
    promise: Prose


class Generator(Document):
    """The weights that made the tiles, and how they were asked."""

    base_digest: Digest
    adapter_digest: Digest | None
    conditioning: Conditioning
    guidance_scale: Annotated[float, Field(ge=0, le=100)]
    num_inference_steps: Annotated[int, Field(ge=1, le=10_000)]


class GenerationRecord(Document):
    """Written by the generator beside its tiles as ``generation.json``; read when a release is drafted.

    ``tile_size`` is in pixels, ``labels`` goes from file name to label, ``pixel_digests`` from file name to the digest
    of the decoded pixels (`pixel_digest`); records of earlier versions lack them. It holds no privacy statement: that
    comes from the site's ledger, never from the generator's own account.
    """

    tiles: Annotated[int, Field(ge=1, le=MAX_TILES)]
    tile_size: Annotated[int, Field(ge=1, le=16_384)]
    conditioning_policy: Line
    conditioning_promise: Prose
    guidance_scale: Annotated[float, Field(ge=0, le=100)]
    num_inference_steps: Annotated[int, Field(ge=1, le=10_000)]
    base_digest: Digest
    adapter_digest: Digest | None
    study_digest: Digest | None
    labels: dict[str, TileLabel | None]
    pixel_digests: dict[str, Digest] | None = None

    def generator(self) -> Generator:
        """What the manifest says about the making of the tiles."""
        return Generator(
            base_digest=self.base_digest,
            adapter_digest=self.adapter_digest,
            conditioning=Conditioning(policy=self.conditioning_policy, promise=self.conditioning_promise),
            guidance_scale=self.guidance_scale,
            num_inference_steps=self.num_inference_steps,
        )


class ReleasedTile(Document):
    """One surrogate tile: the digest of the file that ships, and of its decoded pixels."""

    name: TileName
    file_digest: Digest
    pixel_digest: Digest
    label: TileLabel | None = None


class FilteredFrom(Document):
    """The release this one is the rest of: which tiles an audit looked at before some were withheld."""

    manifest_digest: Digest
    audit_report_digest: Digest
    withheld: Annotated[int, Field(ge=1, le=MAX_TILES)]
    of: Annotated[int, Field(ge=2, le=MAX_TILES)]

    def __str__(self) -> str:
        return f"filtered: {self.withheld} of {self.of} tiles were withheld after a first audit"


class ReleaseManifest(Document):
    """A sealed draft: exactly these tiles, made in exactly this way. Its digest is what an auditor signs.

    Sizes are in pixels. ``tiles_root`` is the RFC 6962 root over the
    raw file digests in ascending order. ``site_key_id`` is the one key that may export it.
    """

    schema_version: Literal["pixcell.release-manifest/v1"] = "pixcell.release-manifest/v1"
    synthetic: Literal[True] = True
    digital_source_type: SourceType = TRAINED_ALGORITHMIC_MEDIA
    site: SiteName
    site_key_id: Digest
    study_digest: Digest | None
    generator: Generator
    privacy: PrivacyStatement | None
    ledger_head: Digest | None
    created_at: Moment
    width: Annotated[int, Field(ge=1, le=16_384)]
    height: Annotated[int, Field(ge=1, le=16_384)]
    tile_count: Annotated[int, Field(ge=1, le=MAX_TILES)]
    tiles_root: Digest
    tiles: Annotated[tuple[ReleasedTile, ...], Field(min_length=1, max_length=MAX_TILES)]
    filtered: FilteredFrom | None = None
    sample_sheet_digest: Digest
    readme_digest: Digest
    licence: Prose
    usage: Prose
    # Written only where one was given, so that manifests sealed before there was one keep their digest.
    contact: Annotated[Line | None, Field(exclude_if=lambda given: given is None)] = None

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if self.tile_count != len(self.tiles):
            raise ValueError("tile_count is not the number of tiles listed")
        if self.filtered is not None and self.filtered.of != self.tile_count + self.filtered.withheld:
            raise ValueError("the tiles and the withheld ones do not add up to the first release")
        if [tile.name for tile in self.tiles] != [
            tile_name(number, self.tile_format) for number in range(1, len(self.tiles) + 1)
        ]:
            raise ValueError("the tiles are not numbered 1 to tile_count in order, all in one format")
        if tiles_root(tile.file_digest for tile in self.tiles) != self.tiles_root:
            raise ValueError("tiles_root is not the root over the tiles listed")
        return self

    @property
    def tile_format(self) -> TileFormat:
        """The one format of the tiles."""
        return "jpg" if self.tiles[0].name.endswith(".jpg") else "png"


class BundleFile(Document):
    """One file of a bundle by its path inside it."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,199}$")]
    file_digest: Digest


class BundleListing(Document):
    """Every other file of an exported bundle, signed by the exporting site."""

    schema_version: Literal["pixcell.bundle/v1"] = "pixcell.bundle/v1"
    site: SiteName
    manifest_digest: Digest
    exported_at: Moment
    log_size: Annotated[int, Field(ge=0)]
    log_root: Digest | None
    files: Annotated[tuple[BundleFile, ...], Field(min_length=1, max_length=3 * MAX_TILES + 64)]

    @model_validator(mode="after")
    def _once_each(self) -> Self:
        if len({entry.name for entry in self.files}) != len(self.files):
            raise ValueError("one file stands twice in the list")
        return self


def tile_name(number: int, form: TileFormat = "png") -> str:
    """File name of tile ``number`` (from 1) of a release: a number and nothing else."""
    return f"{number:05d}.{form}"


def tiles_root(digests: Iterable[str]) -> str:
    """``sha256:<hex>`` RFC 6962 root over the raw 32-byte digests in ascending order; repeats count."""
    raw = sorted(bytes.fromhex(text.removeprefix("sha256:")) for text in digests)
    return "sha256:" + merkle_root(raw).hex()
