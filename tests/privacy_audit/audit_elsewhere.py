"""One audit on the second device, in a process of its own.

    python -m tests.privacy_audit.audit_elsewhere TRAIN HOLDOUT SYNTHETIC OUT SEED

Prints which operations ran there, how far the examiner's eye differs between the devices, and whether a tensor left
behind is refused.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from privacy_audit.eye import SecondEye
from privacy_audit.geometry import FINE_SIDE, Shifts, spectra
from privacy_audit.run import AuditRequest, run_audit
from tests.privacy_audit.conftest import TextureEye, small_policy
from tests.second_device import FAR, MixedDevicesError, done


def main() -> None:
    """Run it."""
    train, holdout, synthetic, out = (Path(word) for word in sys.argv[1:5])
    run_audit(AuditRequest(train, holdout, synthetic, out, small_policy(), int(sys.argv[5])), TextureEye(FAR))
    print(json.dumps({"done": done, "eye": _eye_differs(), "refused": _left_behind()}))


def _eye_differs() -> float:
    pixels = torch.randint(0, 256, (3, 3, 96, 96), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    return float((SecondEye(64, FAR).embed(pixels) - SecondEye(64).embed(pixels)).abs().max())


def _left_behind() -> str:
    try:
        spectra(torch.rand(2, FINE_SIDE, FINE_SIDE).to(FAR), Shifts.of(FINE_SIDE, 0.5), moving=False)
    except MixedDevicesError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    main()
