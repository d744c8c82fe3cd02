"""PSNR and SSIM against torchmetrics and closed forms; the sheet's order; image folders."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.image import structural_similarity_index_measure

from pixcell_core.encoders import reconstruction
from pixcell_core.encoders.image_folder import list_images, read_equal_images, read_image
from pixcell_core.encoders.reconstruction import peak_signal_to_noise, side_by_side, structural_similarity
from pixcell_core.errors import BadInputError


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(0, 256, (2, 3, 40, 48), dtype=torch.uint8, generator=generator)
    noise = torch.randint(-30, 31, first.shape, generator=generator)
    return first, (first.int() + noise).clamp(0, 255).to(torch.uint8)


def test_ssim_is_torchmetrics_and_a_wrong_window_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = pair()
    _, everywhere = structural_similarity_index_measure(
        first.double(), second.double(), data_range=255.0, reduction="none", return_full_image=True
    )
    # The library reflects the image at its edges; the mean here is over windows wholly inside it.
    expected = everywhere[..., 5:-5, 5:-5].flatten(1).mean(dim=1)
    assert torch.allclose(structural_similarity(first, second), expected, atol=1e-9)
    assert torch.allclose(structural_similarity(first, first), torch.ones(2, dtype=torch.float64))
    monkeypatch.setattr(reconstruction, "_DEVIATION", 3.0)
    assert not torch.allclose(structural_similarity(first, second), expected, atol=1e-3)


def test_psnr_has_its_closed_form() -> None:
    first = torch.full((1, 3, 16, 16), 100, dtype=torch.uint8)
    assert math.isclose(float(peak_signal_to_noise(first, first + 5)), 20 * math.log10(255 / 5))
    # Unsigned bytes would wrap around here.
    assert math.isclose(float(peak_signal_to_noise(first + 5, first)), 20 * math.log10(255 / 5))
    assert torch.isinf(peak_signal_to_noise(first, first)).all()


def test_the_sheet_has_originals_left_and_reconstructions_right() -> None:
    first = torch.stack([torch.full((3, 12, 12), v, dtype=torch.uint8) for v in (10, 20)])
    sheet = side_by_side(first, first + 100, gap=2)
    assert sheet.shape == (3, 32, 32)
    assert [int(sheet[0, y, x]) for y in (8, 24) for x in (8, 24)] == [10, 110, 20, 120]
    assert int(sheet[0, 0, 0]) == 255


def test_other_types_and_sizes_are_refused() -> None:
    first, second = pair()
    with pytest.raises(BadInputError, match="float32"):
        peak_signal_to_noise(first, second.float())
    with pytest.raises(BadInputError, match=r"\[1, 3, 40, 48\]"):
        structural_similarity(first, second[:1])
    with pytest.raises(BadInputError, match="at least 11"):
        structural_similarity(first[..., :8, :8], second[..., :8, :8])


def test_image_folders_are_read_by_name_and_oddities_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="holds no image"):
        list_images(tmp_path)
    colours = np.zeros((8, 8, 3), dtype=np.uint8)
    colours[0, 1] = (1, 2, 3)
    Image.fromarray(colours).save(tmp_path / "b.png")
    Image.fromarray(colours[..., 0]).save(tmp_path / "a.tif")
    assert [p.name for p in list_images(tmp_path)] == ["a.tif", "b.png"]
    images = read_equal_images(list_images(tmp_path))
    assert images.shape == (2, 3, 8, 8) and images[1, :, 0, 1].tolist() == [1, 2, 3]
    Image.fromarray(np.zeros((4, 8, 3), dtype=np.uint8)).save(tmp_path / "c.png")
    with pytest.raises(BadInputError, match=r"c\.png has 4 x 8 px .* expected 8 x 8"):
        read_equal_images(list_images(tmp_path))
    Image.fromarray(np.zeros((4, 8), dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(BadInputError, match="mode I;16, expected 8-bit RGB") as deep:
        read_image(tmp_path / "deep.png")
    assert deep.value.code == "image-type"
    noisy = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noisy).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:400])
    with pytest.raises(BadInputError, match=r"cut\.png cannot be read") as cut:
        read_image(tmp_path / "cut.png")
    assert cut.value.code == "image-damaged"
