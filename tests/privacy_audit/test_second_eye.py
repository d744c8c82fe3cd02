"""EfficientNet-Lite0: the padding, the folding, the published figures on real tiles where those are at hand."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pixcell_core.errors import BadInputError
from pixcell_core.models.efficientnet_lite import EfficientNetLite, SameConv2d
from privacy_audit.eye import SecondEye


@pytest.fixture(scope="module")
def net() -> EfficientNetLite:
    return EfficientNetLite.from_package()


@pytest.mark.parametrize("side", [7, 8])
def test_strided_convolutions_pad_on_the_right_and_bottom(side: int) -> None:
    conv = SameConv2d(1, 1, 3, stride=2)
    torch.nn.init.ones_(conv.weight)
    image = torch.arange(side * side, dtype=torch.float32).reshape(1, 1, side, side)
    out = conv(image)
    size = -(-side // 2)
    total = max((size - 1) * 2 + 3 - side, 0)
    before = total // 2
    padded = np.zeros((side + total, side + total))
    padded[before : before + side, before : before + side] = image[0, 0].numpy()
    oracle = [[padded[2 * i : 2 * i + 3, 2 * j : 2 * j + 3].sum() for j in range(size)] for i in range(size)]
    assert out.shape[-1] == size and np.allclose(out[0, 0].detach().numpy(), oracle)


def test_the_network_has_its_published_size_and_gives_probabilities(net: EfficientNetLite) -> None:
    assert sum(p.numel() for p in net.parameters()) == 4_652_008
    logits = net(torch.zeros(2, 3, 64, 64))
    assert logits.shape == (2, 1000) and torch.isfinite(logits).all()


def test_embedding_is_means_then_spreads_of_the_maps(net: EfficientNetLite) -> None:
    pixels = torch.randint(
        0, 255, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    vectors = net.embed(pixels)
    assert vectors.shape == (2, net.embedding_dim) == (2, 2864)
    first = net.feature_maps((pixels.float() - 127) / 128)[0]
    assert torch.allclose(vectors[:, :40], first.mean(dim=(2, 3)), atol=1e-4)
    assert torch.allclose(vectors[:, 40:80], first.flatten(2).std(dim=2, correction=0), atol=1e-4)


def test_folding_changes_nothing_but_the_time(net: EfficientNetLite) -> None:
    pixels = torch.randint(
        0, 255, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    assert torch.allclose(
        EfficientNetLite.from_package().fold_batch_norms().embed(pixels), net.embed(pixels), atol=1e-3
    )


def test_wrong_input_and_missing_weights_are_said(net: EfficientNetLite, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="uint8"):
        net.embed(torch.zeros(1, 3, 64, 64))
    with pytest.raises(BadInputError, match="not at"):
        EfficientNetLite.from_package(tmp_path / "absent.pth")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(BadInputError, match="does not hold"):
        EfficientNetLite.from_package(tmp_path / "other.pth")


def test_the_eye_reduces_by_area(net: EfficientNetLite) -> None:
    eye = SecondEye(64)
    small = torch.randint(
        0, 255, (1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(2)
    )
    large = small.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert torch.allclose(eye.embed(small), eye.embed(large), atol=1e-3)


@pytest.mark.parametrize(("folder", "least"), [("crc_val_he_7k", 0.65), ("camelyon16_40x", 0.65)])
def test_nearest_neighbours_reach_the_published_figures(
    net: EfficientNetLite, shared_data: Path, folder: str, least: float
) -> None:
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.model_selection import GroupKFold, StratifiedKFold, cross_val_predict
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    files = sorted((shared_data / "tiles" / folder).glob("*/*"))
    images = [
        np.asarray(Image.open(f).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)) for f in files
    ]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    vectors = torch.cat([net.embed(block) for block in pixels.split(16)]).numpy()
    labels = np.array([f.parent.name for f in files])
    slides = [re.match(r"(.*?\d+)", f.name).group(1) for f in files]  # type: ignore[union-attr]
    by_slide = folder.startswith("camelyon")
    folds = GroupKFold(len(set(slides))) if by_slide else StratifiedKFold(5, shuffle=True, random_state=0)
    model = make_pipeline(StandardScaler(), KNeighborsClassifier(5, metric="cosine"))
    found = cross_val_predict(model, vectors, labels, cv=folds, groups=slides if by_slide else None)
    assert balanced_accuracy_score(labels, found) >= least  # published: .70 and .73
