"""Decoding 1024 px in overlapping pieces against decoding it whole: largest difference, peak memory, CPU time."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from paired import compare, show

from pixcell_core.diffusion.decoding import DecodeTiling, decode_latents, decode_tiled, plain_latents
from pixcell_core.starter import load_autoencoder

LATENT = 128


def _starter() -> Any:
    return load_autoencoder()


def _sd3_like() -> Any:
    """SD3's decoder with an eighth of its channels and weights at random: group norms and attention see everything."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=2,
        latent_channels=16,
        norm_num_groups=8,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


BUILD = {"starter": _starter, "SD3-like, eighth width": _sd3_like}


def _latents() -> torch.Tensor:
    return torch.randn(1, 16, LATENT, LATENT, generator=torch.Generator().manual_seed(0))


def _decode(vae: Any, whole: bool) -> torch.Tensor:
    with torch.inference_mode():
        if whole:
            return vae.decode(plain_latents(vae, _latents())).sample.clamp(-1, 1)
        return decode_latents(vae, _latents())


def _peak(name: str, whole: bool, answer: Any) -> None:
    """Peak resident memory of a decode over that of a tiny one, MiB, in a process of its own."""
    torch.set_num_threads(1)
    vae = BUILD[name]()
    with torch.inference_mode():
        decode_tiled(vae, _latents()[..., :8, :8], DecodeTiling(core=8, feather=0, halo=0))
    before = _status("VmRSS")
    _decode(vae, whole)
    answer.put((_status("VmHWM") - before) / 1024)


def _status(field: str) -> int:
    """A line of this process' memory account, KiB. (getrusage's peak would include that of the parent.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _peak_of(name: str, whole: bool) -> float:
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=_peak, args=(name, whole, answer))
    process.start()
    found: float = answer.get()
    process.join()
    return found


def main() -> None:
    """Print differences and ratios."""
    torch.set_num_threads(1)
    for name, build in BUILD.items():
        vae = build()
        whole, pieces = _decode(vae, True), _decode(vae, False)
        apart = (whole - pieces).abs()
        print(
            f"decode of 1024 px, {name}: largest difference {float(apart.max()):.2e}, "
            f"mean {float(apart.mean()):.2e} (images in [-1, 1])"
        )
        ours, theirs = _peak_of(name, False), _peak_of(name, True)
        print(
            f"  peak memory in pieces: {ours / theirs:.2f} x the whole decode ({ours:.0f} against {theirs:.0f} MiB)"
        )
        repeats = 3 if name == "starter" else 1
        found = compare(lambda v=vae: _decode(v, False), lambda v=vae: _decode(v, True), repeats=repeats)
        show("  time in pieces", "the whole decode", found)


if __name__ == "__main__":
    main()
