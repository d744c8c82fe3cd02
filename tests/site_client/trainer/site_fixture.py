"""One enrolled site with a tiny random base model and a small feature store: everything a trainer needs."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID

from pixcell_core.contracts.artifacts import base_digest, installed_code_digest
from pixcell_core.contracts.round import TensorPlace
from pixcell_core.contracts.spool import Arrays
from pixcell_core.contracts.study import AdapterSettings, Study
from pixcell_core.models import PixCellTransformer2DModel
from pixcell_core.training.adapters import adapter_state, attach_lora
from pixcell_core.training.feature_store import FeatureStoreWriter
from site_client.approvals.enrolment import enrol
from site_client.approvals.site_folder import SiteFolder
from tests.any_study import any_study

torch.set_num_threads(1)

TARGETS = ("attn1.to_q", "attn1.to_v", "attn2.to_v")
TINY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 16,
    "out_channels": 32,
    "num_layers": 1,
    "cross_attention_dim": 32,
    "sample_size": 8,
    "patch_size": 2,
    "caption_channels": 8,
    "caption_num_tokens": 1,
}


def make_base(folder: Path) -> Path:
    """A tiny random transformer on disk."""
    torch.manual_seed(0)
    PixCellTransformer2DModel.from_config(TINY).save_pretrained(folder)
    return folder


def make_features(folder: Path, site: str, patients: int = 5, tiles: int = 3) -> None:
    """A feature store of random latents and embeddings, whose patients have names that must never leave."""
    writer = FeatureStoreWriter(folder, {"tile_size": 64, "mpp": 1.0})
    for number in range(patients):
        rows: list[dict[str, Any]] = [
            {
                "tile": f"{site}-{number}-{t}",
                "slide": f"slide-{number}",
                "label": "stroma",
                "x": 0,
                "y": 0,
                "level": 0,
                "mpp": 1.0,
                "tissue": 1.0,
                "focus": 1.0,
                "ink": 0.0,
            }
            for t in range(tiles)
        ]
        writer.add(
            f"secret-patient-{site}-{number}",
            rows,
            pixels=torch.zeros(tiles, 3, 64, 64, dtype=torch.uint8),
            latents=torch.rand(tiles, 32, 8, 8),
            embeddings=torch.randn(tiles, 1, 8),
        )
    writer.close()


def make_ca(path: Path) -> Path:
    """A certificate authority that signs nothing."""
    key = Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "nobody")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, None)
    )
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return path


def make_study(base: Path, sites: tuple[str, ...] = ("east",), **changes: Any) -> Study:
    """A study the tiny base can train."""
    settings: dict[str, Any] = {
        "id": "tiny",
        "base_digest": base_digest(base),
        "code_digest": installed_code_digest(),
        "adapter": AdapterSettings(rank=2, targets=TARGETS, seed=7),
        "rounds": 2,
        "noise_multiplier": 4.0,
        "max_grad_norm": 0.1,
        "epsilon_cap": 20.0,
        "expected_patients": 5,
        "sites": sites,
        "quorum": 1,
        "round_timeout_s": 20.0,
        "reply_grid_s": 0.0,
    }
    return any_study(**settings | changes)


def start_of(base: Path, study: Study) -> Arrays:
    """The zero adapter, by the model's own account of its names and shapes."""
    model = PixCellTransformer2DModel.from_pretrained(str(base), low_cpu_mem_usage=False)
    adapter = study.adapter
    attach_lora(model, kind=adapter.kind, rank=adapter.rank, seed=adapter.seed, targets=adapter.targets)
    return {name: value.numpy() for name, value in adapter_state(model).items()}


def layout_of(arrays: Arrays) -> tuple[TensorPlace, ...]:
    """The layout by which the hub announces an adapter."""
    return tuple(TensorPlace(name=name, shape=arrays[name].shape) for name in sorted(arrays))


@dataclass
class TinySite:
    """An enrolled site."""

    folder: SiteFolder
    base: Path


def make_site(root: Path, name: str, base: Path, ca: Path, patients: int = 5) -> TinySite:
    """Enrol a site and give it features."""
    folder = SiteFolder(root / f"site-{name}")
    enrol(folder, name, "127.0.0.1:1", ca)
    make_features(folder.train_features, name, patients)
    return TinySite(folder, base)
