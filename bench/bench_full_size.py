"""Sampling at the published size (608,072,960 parameters, random weights): images a second and share of the matrix rate.

On CUDA it runs 256 px in batches and 1024 px singly, in bfloat16, against the stock PixArt class in the plain loop; it
writes `bench/results/<device>.json`. Without CUDA it walks the same code at a toy size and writes nothing.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_sampling import GUIDANCE, sample
from diffusers import PixArtTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from pixcell_core.models import PixCellTransformer2DModel
from pixcell_core.models.devices import choose_device, place, sampling_dtype

STEPS = 20
STAGES = {256: {"sample_size": 32, "interpolation_scale": 0.5, "caption_num_tokens": 1},
          1024: {"sample_size": 128, "interpolation_scale": 2.0, "caption_num_tokens": 16}}  # fmt: skip
TOY = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "cross_attention_dim": 16}


def waited(device: torch.device) -> float:
    """The time, once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(act: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """Best of `repeats` after one call to warm up."""
    act()
    best = float("inf")
    for _ in range(repeats):
        start = waited(device)
        act()
        best = min(best, waited(device) - start)
    return best


def matrix_rate(device: torch.device, side: int) -> float:
    """Measured operations a second of one large matrix product in the sampling precision."""
    a = torch.randn(side, side, device=device, dtype=sampling_dtype(device))
    return 2 * side**3 * 8 / seconds(lambda: [a @ a for _ in range(8)], device)


def measure(
    stage: int, batch: int, device: torch.device, size: dict[str, Any], compiled: bool
) -> dict[str, Any]:
    """Figures of one stage: ours, the stock class, operations, peak memory."""
    config = {**size, **STAGES[stage]}
    stock_config = {k: v for k, v in config.items() if k != "caption_num_tokens"}
    with torch.device(device):
        ours = PixCellTransformer2DModel(**config)
        stock = PixArtTransformer2DModel(
            **{"out_channels": 32, "in_channels": 16, "num_attention_heads": 16, "attention_head_dim": 72,
               "num_layers": 28, "cross_attention_dim": 1152, "caption_channels": 1536, **stock_config},
            use_additional_conditions=False)  # fmt: skip
    stock.load_state_dict(ours.state_dict(), strict=False)
    ours, stock = place(ours, device, compiled=compiled), place(stock, device)
    side, tokens = int(config["sample_size"]), int(config["caption_num_tokens"])
    dtype = sampling_dtype(device)
    noise = torch.randn(batch, 16, side, side, device=device, dtype=dtype)
    condition = torch.randn(batch, tokens, 1536, device=device, dtype=dtype)
    both = torch.cat([ours.unconditional(batch).to(condition), condition])
    with FlopCounterMode(display=False) as counter:
        sample(stock, noise, both, prepared=False, steps=STEPS)
    fast = seconds(lambda: sample(ours, noise, both, prepared=True, steps=STEPS), device)
    plain = seconds(lambda: sample(stock, noise, both, prepared=False, steps=STEPS), device)
    return {
        "px": stage, "batch": batch, "compiled": compiled, "steps": STEPS, "guidance_scale": GUIDANCE,
        "parameters": sum(p.numel() for p in ours.parameters()),
        "images_per_second": batch / fast, "stock_images_per_second": batch / plain, "ratio": plain / fast,
        "operations_of_the_plain_loop": counter.get_total_flops(), "seconds": fast,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }  # fmt: skip


def main() -> None:
    """Measure both stages and print one line each."""
    device = choose_device("auto")
    full = device.type == "cuda"
    compiled = full and "--compile" in sys.argv
    torch.manual_seed(0)
    rate = matrix_rate(device, 8192 if full else 256)
    name = torch.cuda.get_device_name(device) if full else "no CUDA device: toy size, figures mean nothing"
    print(f"{name}; one matrix product: {rate / 1e12:.2f} T operations/s")
    found = []
    for stage, batch in ((256, 32), (1024, 1)) if full else ((256, 2), (1024, 1)):
        figures = measure(stage, batch, device, {} if full else TOY, compiled)
        share = figures["operations_of_the_plain_loop"] / figures["seconds"] / rate
        found.append({**figures, "share_of_matrix_rate": share})
        print(
            f"{stage} px, batch {batch}: {figures['images_per_second']:.2f} images/s, "
            f"{figures['ratio']:.2f}x the stock loop, {share:.0%} of the matrix rate by the plain loop's operations"
        )
    if full:
        out = Path(__file__).parent / "results" / f"{name.replace(' ', '-').lower()}.json"
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps({"device": name, "matrix_rate": rate, "stages": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
