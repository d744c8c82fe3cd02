"""Writes the model cards from the measured figures; a card states nothing that was not measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LICENCES = """| source | licence | use |
|---|---|---|
| Camelyon16 tiles (4 slides) | CC0 1.0 | training; slides tumor_064 and tumor_073 held out |
| Osteosarcoma tiles (TCIA) | CC BY 3.0 | training; patients P9 and Case-4 held out |
| ORION colorectal tiles | MIT | training; patient C05 held out |
| CRC-VAL-HE-7K tiles | CC BY 4.0 | training |
| oral OSCC tiles | CC0 1.0 | training |
| CMU-1-Small-Region slide (OpenSlide test data) | CC0 1.0 | training |
| HER2ST slides, patient C | CC BY 4.0 | training |
| HER2ST slide, patient B | CC BY 4.0 | held out |
| TCGA-CR-7395 slide | TCGA open access | held out |
| procedural tiles | ours, Apache-2.0 | training |
"""

PURPOSE = {
    "autoencoder": "Latent autoencoder, f8, 16 channels, images in [-1, 1]; calls as diffusers' autoencoders.",
    "encoder": "Tile encoder (residual ConvNet, self-supervised), one token of 256 numbers per tile.",
    "transformer": "PixCell transformer of reduced width and depth: 8 blocks, width 192, 128-px tiles (16×16 latents). "
    "Learned with the published loss, its noise error weighted by min(1 / alphas_cumprod, 200) after the first 1,600 steps.",
}

LIMITS = """## What it is not for

It is a starter: small enough to ship and to train on two CPU cores. It shows the road and gives tests real weights.
It was trained on few slides; it is no diagnostic device and no substitute for the published PixCell weights, which
users bring themselves. The encoder saw the training groups' pixels without labels.
"""


def _psnr(figures: dict[str, Any]) -> str:
    found = figures.get("psnr_db")
    if not found:
        return "Not measured: no real tiles were at hand.\n"
    names = list(found)
    lines = ["| held-out slide or patient | " + " | ".join(f"{n} (dB)" for n in names) + " |"]
    lines.append("|---|" + "---|" * len(names))
    lines += [f"| {g} | " + " | ".join(f"{found[n][g]:.2f}" for n in names) + " |" for g in found[names[0]]]
    return (
        "PSNR on real tiles held out by slide or patient, centre crops of at most 256 px.\n\n"
        + "\n".join(lines)
        + "\n"
    )


def _probes(figures: dict[str, Any]) -> str:
    table = figures.get("probes")
    if not table:
        return "Not measured: no real tiles were at hand.\n"
    lines = ["| set | tiles | groups | features | k-NN | linear |", "|---|---|---|---|---|---|"]
    for source, scores in sorted(table.items()):
        for name, score in scores.items():
            lines.append(
                f"| {source} | {score['tiles']} | {score['groups']} | {name} | {score['knn']:.2f} | {score['linear']:.2f} |"
            )
    note = (
        "Balanced accuracy with whole slides or patients held out (where groups equals tiles the set has no patient "
        "identifiers and tiles are held out). The encoder's training saw some of these tiles, never their labels.\n\n"
    )
    return note + "\n".join(lines) + "\n"


def write_cards(out: Path, figures: dict[str, Any]) -> None:
    """Write `README.md` into each model folder."""
    quality = {
        "autoencoder": _psnr(figures),
        "encoder": _probes(figures),
        "transformer": figures.get("transformer", "Look at the sample sheet in the project's README.\n"),
    }
    total = sum(figures["bytes"].values()) / 1e6
    for name, purpose in PURPOSE.items():
        steps = figures.get("steps", {}).get(name)
        trained = f"Trained for {steps} steps by `pixcell model train-starter`.\n" if steps else ""
        text = (
            f"# Starter {name}\n\n{purpose}\n\n"
            f"{figures['parameters'][name]:,} parameters, {figures['bytes'][name] / 1e6:.1f} MB in fp16 safetensors "
            f"(all starter weights: {total:.1f} MB). "
            "Licence of the weights: CC BY 4.0, with attribution to the sources below.\n"
            f"{trained}\n## Data\n\n{LICENCES}\n## Measured\n\n{quality[name]}\n{LIMITS}"
        )
        (out / name / "README.md").write_text(text)
