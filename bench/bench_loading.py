"""Memory of loading a published-size transformer, as a multiple of its file: ours, and diffusers' usual way beside it.

Each way runs in a process of its own. The libraries are loaded first, the kernel's high-water mark is reset, the model
is loaded and every weight touched (a mapped file costs memory only then); the mark's rise over the start is the cost.
Random half-precision weights stand for the published ones: 608,072,960 parameters, a file of 1.2 GB.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = {"sample_size": 32, "interpolation_scale": 0.5, "caption_num_tokens": 1}
LIMIT = 1.3
ORIGINAL = "pixcell_256.ckpt"


def write_checkpoint(folder: Path) -> Path:
    """A folder laid out like the published 256 px transformer, weights random, half precision."""
    import torch
    from safetensors.torch import save_file

    from pixcell_core.checkpoints.foreign import to_original
    from pixcell_core.models import PixCellTransformer2DModel

    with torch.device("meta"):
        model = PixCellTransformer2DModel(**CONFIG)
    draw = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(tensor.shape, generator=draw, dtype=torch.float32).mul_(0.02).half()
        for name, tensor in model.state_dict().items()
    }
    folder.mkdir()
    save_file(state, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    original = to_original(state, sample_size=32, patch_size=2, interpolation_scale=0.5)
    torch.save({"state_dict": original}, folder / ORIGINAL)
    config = {"_class_name": "PixCellTransformer2DModel", "only_cross_attention": False, **model.config}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def memory(mark: str) -> int:
    """A line of this process's memory account, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{mark}:"):
            return int(line.split()[1]) * 1024
    return 0


def measure(way: str, folder: Path) -> None:
    """Load in this process and print the rise of the high-water mark, bytes, and the seconds."""
    import torch

    from pixcell_core.checkpoints import load_original, load_transformer_folder
    from pixcell_core.models import PixCellTransformer2DModel

    PixCellTransformer2DModel(
        num_layers=1, num_attention_heads=1, attention_head_dim=8, cross_attention_dim=8
    )
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to what is resident now
    start, clock = memory("VmRSS"), time.perf_counter()
    if way == "diffusers":
        model = PixCellTransformer2DModel.from_pretrained(str(folder), low_cpu_mem_usage=False)
    elif way == "original":
        model = load_original(folder / ORIGINAL)
    else:
        model = load_transformer_folder(folder, dtype=torch.float32 if way == "float32" else None)
    spent = time.perf_counter() - clock
    for tensor in model.state_dict().values():
        tensor.max()
    print(json.dumps({"peak": memory("VmHWM") - start, "seconds": spent}))


def main() -> None:
    """Print the ratios; fail where the limit is broken."""
    if not Path("/proc/self/clear_refs").exists():
        print("loading: not measured, this system keeps no resettable high-water mark (Linux does)")
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "transformer"
        # A process of its own writes it, so that its memory is no part of any measurement.
        subprocess.run([sys.executable, __file__, "write", str(folder)], check=True)
        size = (folder / "diffusion_pytorch_model.safetensors").stat().st_size
        ratios = {}
        for way, words in (
            ("ours", "weights as in the file"),
            ("float32", "weights converted to float32, twice the file"),
            ("original", "the same from an original .ckpt"),
            ("diffusers", "from_pretrained(low_cpu_mem_usage=False), for comparison"),
        ):
            done = subprocess.run(
                [sys.executable, __file__, way, str(folder)], check=True, capture_output=True, text=True
            )
            found = json.loads(done.stdout.splitlines()[-1])
            ratios[way] = found["peak"] / size
            print(
                f"loading 608,072,960 parameters, {words}: {ratios[way]:.2f} x the file's {size / 1e9:.2f} GB, "
                f"{found['seconds']:.1f} s"
            )
    for way in ("ours", "original"):
        if ratios[way] > LIMIT:
            sys.exit(f"loading ({way}) costs {ratios[way]:.2f} x the file, allowed are {LIMIT}")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        act, target = sys.argv[1], Path(sys.argv[2])
        if act == "write":
            write_checkpoint(target)
        else:
            measure(act, target)
    else:
        main()
