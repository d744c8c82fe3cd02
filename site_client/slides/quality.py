"""How good a tile is: share of tissue, sharpness at one fixed scale, share of pen ink."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from site_client.slides.tissue import optical_density

#: Sharpness is comparable between slides only at one scale; finer tiles are averaged to it, coarser
#: ones kept.
FOCUS_MPP = 1.0
#: A tile with more ink, or less focus (grey levels squared: sharp tissue has hundreds, a defocused scan a few),
#: is not used.
MAX_INK = 0.2
MIN_FOCUS = 10.0


@dataclass(frozen=True)
class TileQuality:
    """Measures of one tile."""

    #: Share of the tile's area inside the slide's tissue mask, 0..1.
    tissue: float
    #: Variance of the Laplacian of the grey image at `FOCUS_MPP`, grey levels squared; low is blurred.
    focus: float
    #: Share of pixels with the colour of marker ink, 0..1.
    ink: float


def focus_measure(rgb: npt.NDArray[np.uint8], mpp: float) -> float:
    """Variance of the Laplacian (Pech-Pacheco et al., ICPR 2000) of the luma at `FOCUS_MPP`."""
    grey = Image.fromarray(rgb).convert("L")
    if mpp < FOCUS_MPP:
        size = (max(3, round(grey.width * mpp / FOCUS_MPP)), max(3, round(grey.height * mpp / FOCUS_MPP)))
        grey = grey.resize(size, Image.Resampling.BOX)
    return float(ndimage.laplace(np.asarray(grey, dtype=np.float32)).var())


def ink_fraction(rgb: npt.NDArray[np.uint8]) -> float:
    """Share of pixels that no mixture of haematoxylin and eosin explains.

    Both dyes absorb green at least as much as blue, and haematoxylin absorbs red and green about equally.
    Green ink passes green (its density lies below red's and blue's); blue ink absorbs red above green and
    hardly any blue; black ink absorbs all three alike and strongly; red ink absorbs blue like green and
    passes red.
    """
    density = optical_density(rgb)
    red, green, blue = density[..., 0], density[..., 1], density[..., 2]
    # Channel by channel: a reduction over an axis of three is ten times slower.
    mean = (red + green + blue) / 3
    low = np.minimum(np.minimum(red, green), blue)
    high = np.maximum(np.maximum(red, green), blue)
    is_green = (mean > 0.15) & (green < 0.8 * np.minimum(red, blue))
    is_blue = (red > 0.35) & ((red > 1.6 * green) | ((red > 1.3 * green) & (blue < 0.3 * red)))
    is_black = (mean > 1.0) & (low > 0.8 * high)
    is_red = (green > 0.6) & (blue > 0.9 * green) & (red < 0.3 * green)
    return float((is_green | is_blue | is_black | is_red).mean())
