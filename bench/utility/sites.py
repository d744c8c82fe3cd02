"""Patients of drawn sites, encoded once: latents and embeddings for training, pixels and labels for looking.

The sites are immunostained (Ki67), with dyes and scanners of their own, in tiles of 64 px at 0.5 um/px: a stain and a
size that the shipped base model has not seen. Unseen H&E laboratories would be no test: the base knows them already,
and its held-out loss does not move (0.0 % after 60 steps without any privacy).
Legend: n patients, m tiles of one patient, h latent pixels (8), d embedding width (256).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pixcell_core.procedural import TissueClass, patient_look, render_field, render_ihc, site_look
from pixcell_core.starter import load_autoencoder, load_encoder

SIDE = 64
TILES = 8
BLOCK = 20
"""Patients are drawn, encoded and kept in blocks of so many."""

PUBLIC_SITES = (88001, 88002, 88003)
"""Where every setting was chosen."""
PRIVATE_SITES = (77001, 77002, 77003)
"""What is reported."""
HELD_OUT = 100_000
"""Patient numbers from here on are held out: no seed ever trains on them."""


@dataclass(frozen=True)
class SitePatients:
    """Encoded tiles of n patients of one site.

    `latents` float32 (n, m, 16, h, h), scaled means; `embeddings` float32 (n, m, 1, d); `pixels` uint8
    (n, m, 64, 64, 3); `labels` (n, m), codes of `TissueClass`.
    """

    latents: torch.Tensor
    embeddings: torch.Tensor
    pixels: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.latents)

    def chosen(self, rows: Sequence[int]) -> SitePatients:
        """The patients at `rows`."""
        at = torch.as_tensor(list(rows), dtype=torch.long)
        return SitePatients(self.latents[at], self.embeddings[at], self.pixels[at], self.labels[at])

    @classmethod
    def joined(cls, parts: Sequence[SitePatients]) -> SitePatients:
        """All patients of several parts, one after another."""
        return cls(
            torch.cat([p.latents for p in parts]),
            torch.cat([p.embeddings for p in parts]),
            torch.cat([p.pixels for p in parts]),
            torch.cat([p.labels for p in parts]),
        )


class PatientBatches:
    """The patients of one site as the private engine asks for them: k tiles of one patient, without replacement."""

    def __init__(self, site: SitePatients) -> None:
        self._site = site
        self._names = [str(i) for i in range(len(site))]

    @property
    def patients(self) -> Sequence[str]:
        """Each patient once."""
        return self._names

    def rows(self, patient: str, k: int, rng: torch.Generator) -> tuple[torch.Tensor, ...]:
        """At most k tiles of a patient: latents (k, 16, h, h) and embeddings (k, 1, d)."""
        latents, embeddings = self._site.latents[int(patient)], self._site.embeddings[int(patient)]
        tiles = torch.randperm(len(latents), generator=rng)[:k]
        return latents[tiles], embeddings[tiles]


def patients_of(site: int, start: int, stop: int, cache: Path) -> SitePatients:
    """Patients `start` to `stop` of a drawn site, from the cache where they were drawn before.

    Args:
        site: seed of the site's dyes and scanner.
        start, stop: numbers of the patients; a patient number means the same patient in every run.
        cache: folder of encoded blocks; it can be removed at any time.
    """
    first, last = start // BLOCK, -(-stop // BLOCK)
    parts = [_block(site, block, cache) for block in range(first, last)]
    offset = start - first * BLOCK
    return SitePatients.joined(parts).chosen(range(offset, offset + stop - start))


def _block(site: int, block: int, cache: Path) -> SitePatients:
    kept = cache / f"site-{site}-{block}.pt"
    if not kept.exists():
        cache.mkdir(parents=True, exist_ok=True)
        drawn = [_draw(site, block * BLOCK + i) for i in range(BLOCK)]
        part = encoded(np.stack([p for p, _ in drawn]), np.stack([c for _, c in drawn]))
        partial = kept.with_suffix(".partial")
        torch.save(
            vars(part) | {"latents": part.latents.half(), "embeddings": part.embeddings.half()}, partial
        )
        partial.replace(kept)
    found = torch.load(kept, weights_only=True)
    return SitePatients(
        found["latents"].float(), found["embeddings"].float(), found["pixels"], found["labels"]
    )


def _draw(site_seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (m, 64, 64, 3) and labels (m,) of one patient: two fields led by two classes, four tiles of each."""
    site, patient = site_look(site_seed), patient_look(site_seed, number)
    classes = list(TissueClass)
    pixels, labels = [], []
    for turn in range(2):
        lead = classes[(number + turn * (1 + number // 4 % 3)) % 4]
        field = render_field(
            128, 128, site=site, patient=patient, tissue=lead, seed=2 * number + turn, coverage=1.0
        )
        stained = render_ihc(field, seed=turn)
        for y in (0, SIDE):
            for x in (0, SIDE):
                pixels.append(stained[y : y + SIDE, x : x + SIDE])
                labels.append(
                    np.bincount(field.labels[y : y + SIDE, x : x + SIDE].ravel(), minlength=5).argmax()
                )
    return np.stack(pixels), np.array(labels)


@torch.inference_mode()
def encoded(pixels: np.ndarray, labels: np.ndarray) -> SitePatients:
    """Encode uint8 pixels (n, m, H, H, 3) with the shipped autoencoder and encoder; labels (n, m) go along."""
    autoencoder, encoder = load_autoencoder(), load_encoder()
    shift, scale = float(autoencoder.config["shift_factor"]), float(autoencoder.config["scaling_factor"])
    latents, embeddings = [], []
    for tiles in torch.from_numpy(np.ascontiguousarray(pixels)):
        images = tiles.permute(0, 3, 1, 2)
        mean = autoencoder.encode(images.float() / 127.5 - 1.0).latent_dist.mean
        latents.append((mean - shift) * scale)
        embeddings.append(encoder.encode(images))
    return SitePatients(
        torch.stack(latents).clone(),
        torch.stack(embeddings).clone(),
        torch.from_numpy(np.ascontiguousarray(pixels)),
        torch.from_numpy(labels.astype(np.int64)),
    )
