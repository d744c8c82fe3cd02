"""Cryptographic Gaussian noise: CPU seconds per million numbers, and against torch's own generator."""

from __future__ import annotations

import torch
from paired import compare, show

from pixcell_core.private.noise import SystemNoiseSource, gaussian_like

MILLION = 1_000_000


def main() -> None:
    """Print the cost of the noise of one step for a million trained parameters, and for an adapter of 50 thousand."""
    torch.set_num_threads(1)
    source = SystemNoiseSource()
    for count in (50_000, MILLION, 4 * MILLION):
        like = torch.zeros(count, dtype=torch.float64)
        found = compare(
            lambda: gaussian_like(source, like, 1.0),  # noqa: B023 - called at once
            lambda: torch.randn_like(like),  # noqa: B023 - called at once
        )
        show(f"noise for {count} parameters", "torch.randn, which is no source for privacy", found)
        print(f"  {found.ours / count * MILLION:.3f} CPU-s per million parameters (goal: at most 0.3)")


if __name__ == "__main__":
    main()
