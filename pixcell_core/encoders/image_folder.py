"""Reads folders of images as uint8 RGB, in the order of their names, and refuses what is not 8-bit colour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pixcell_core.errors import BadInputError

ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
# A mode of another depth would be clipped or scaled by a conversion without a word.
_MODES = {"RGB", "RGBA", "L", "P", "CMYK", "YCbCr"}


def list_images(folder: Path) -> list[Path]:
    """The images of a folder by name, sub-folders left out.

    Raises:
        BadInputError: no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise BadInputError(
            f"There is no folder {folder}.", hint="Give a folder of images.", code="no-such-folder"
        )
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in ENDINGS and not p.name.startswith("."))
    if not found:
        raise BadInputError(
            f"{folder} holds no image; expected files ending {', '.join(ENDINGS)}.",
            hint="Give the folder the images lie in; sub-folders are not searched.",
            code="no-images",
        )
    return found


def read_image(path: Path) -> torch.Tensor:
    """One image as uint8 (3, H, W); transparency is dropped, grey becomes three equal channels.

    Raises:
        BadInputError: a file that cannot be decoded whole, or one that is not 8 bits per channel.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in _MODES:
                raise BadInputError(
                    f"{path.name} has pixels of mode {image.mode}, expected 8-bit RGB.",
                    hint="Convert it to an 8-bit RGB image first.",
                    code="image-type",
                )
            pixels = np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadInputError(
            f"{path.name} cannot be read as an image ({type(error).__name__}).",
            hint="The file is truncated, damaged or too large: take it out of the folder or copy it again.",
            code="image-damaged",
        ) from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def read_equal_images(paths: list[Path], size: tuple[int, int] | None = None) -> torch.Tensor:
    """Images as uint8 (B, 3, H, W); all must have `size` (H, W), or that of the first.

    Raises:
        BadInputError: an image of another size, or one that cannot be read.
    """
    images = [read_image(path) for path in paths]
    height, width = size or (images[0].shape[1], images[0].shape[2])
    for path, image in zip(paths, images, strict=True):
        if tuple(image.shape[1:]) != (height, width):
            raise BadInputError(
                f"{path.name} has {image.shape[1]} x {image.shape[2]} px (height x width), "
                f"expected {height} x {width} like the first image.",
                hint="Keep images of different sizes in different folders.",
                code="image-size",
            )
    return torch.stack(images)
