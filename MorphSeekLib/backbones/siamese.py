"""What the siamese networks share: NICE-Trans (Meng et al., 2023) and CorrMLP (Meng et al., 2024).

Both read each image alone into a pyramid of features and decode from coarse to fine: a level doubles the field, warps
the moving image's features by it, compares them with the fixed image's, and adds what is left to the field. Since the
fixed image's pyramid does not depend on the moving image, it can be made once for all steps.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..protocol.errors import MorphSeekError
from ..space import fields
from .backbone import Backbone, start_near_zero
from .memory import run


class Pyramid(nn.ModuleList):
    """Features of one image at 1, 1/2, 1/4, ..., of ``width``, 2 ``width``, 4 ``width``, ... channels."""

    def __init__(self, width: int, levels: int, recompute: bool = False) -> None:
        widths = [width * 2**level for level in range(levels)]
        super().__init__(conv_block(a, b) for a, b in zip([1, *widths], widths, strict=False))
        self.recompute = recompute

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return (batch, 1, i, j, k) to (batch, channels, ...), fine to coarse."""
        coarsest = 2 ** (len(self) - 1)
        if image.shape[2:].numel() <= coarsest**3:  # InstanceNorm has nothing to compare a single voxel with
            raise MorphSeekError(f"This network needs images of more than {coarsest} voxels along one axis at least.")
        features: list[Tensor] = []
        for block in self:
            features.append(run(block, F.avg_pool3d(features[-1], 2) if features else image, save=self.recompute))
        return features


class Siamese(Backbone):
    """A network whose ``pyramid`` reads each image alone; a subclass says how the coarsest features are ``fused``."""

    pyramid: Pyramid

    @abstractmethod
    def fused(self, coarsest: Tensor) -> Tensor:
        """Return the top feature, from the coarsest ones of both images, (batch, fixed and moving channels, ...)."""

    def image_features(self, image: Tensor) -> list[Tensor]:
        """Return what the encoder finds in one image, (batch, 1, i, j, k): features from fine to coarse."""
        return self.pyramid(image)

    def encode(self, moving: Tensor, fixed: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the skips from fine to coarse, (batch, fixed and moving channels, ...), and the top feature."""
        # as one batch, which makes small convolutions up to twice as fast
        both = self.image_features(torch.cat([fixed, moving]))
        return self._joined([level.unflatten(0, (2, -1)).transpose(0, 1).flatten(1, 2) for level in both])

    def encode_with(self, moving: Tensor, fixed_features: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Return what :meth:`encode` does, from the features of the fixed image."""
        both = zip(fixed_features, self.image_features(moving), strict=True)
        return self._joined([torch.cat(level, dim=1) for level in both])

    def _joined(self, levels: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        *skips, coarsest = levels
        return skips, self.fused(coarsest)


def conv_block(inputs: int, outputs: int) -> nn.Sequential:
    """Make two convolutions of 3x3x3, each with LeakyReLU 0.2 and InstanceNorm without weights."""
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv3d(channels, outputs, 3, 1, 1), nn.LeakyReLU(0.2, inplace=True), nn.InstanceNorm3d(outputs)]
    return nn.Sequential(*layers)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (batch, channels, i, j, k)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Expansion(nn.Sequential):
    """Twice the resolution, half the channels: transposed convolution and LayerNorm."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.ConvTranspose3d(width, width // 2, 2, 2), ChannelNorm(width // 2))


class FlowHead(nn.Conv3d):
    """Features to a field, (batch, 3, i, j, k) voxels, float32 or better; near zero before training."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 3, 3, 1, 1)
        start_near_zero(self)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would round the field to a hundredth of itself
            return super().forward(x.to(self.weight.dtype))


def double(field: Tensor, official: bool) -> Tensor:
    """Return the field on twice the voxels along each axis.

    Args:
        field: (batch, 3, i, j, k), voxels.
        official: times 2, as the official codes do. They interpolate from corner to corner, where n voxels become 2 n
            and the same motion is (2 n - 1) / (n - 1) times as many: theirs is 14 % short at n = 4. False: exact.
    """
    shape = [2 * n for n in field.shape[2:]]
    if official:
        return 2 * F.interpolate(field, size=shape, mode="trilinear", align_corners=True)
    return fields.resize(field, shape)


def rename(state: dict[str, Tensor], names: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Return the weights with every old part of their names replaced, in order; index tables and grids are left out."""
    renamed = {}
    for name, value in state.items():
        if name.endswith(("relative_position_index", "grid")):
            continue
        for old, new in names:
            name = name.replace(old, new)
        renamed[name] = value
    return renamed


def shared_names(levels: int) -> list[tuple[str, str]]:
    """Return parts of the official names, which count levels from 1, and ours, for a decoder's number of levels."""
    names = [("up_conv.", "0."), ("reg_head.", "")]
    for level in range(levels):
        names += [(f"upsample_{level + 1}.norm.", f"expand.{level}.1."), (f"upsample_{level + 1}.", f"expand.{level}.")]
        names += [(f"reghead_{level + 1}.", f"flow.{level}.")]
    return [*names, ("Conv_1.", "0."), ("Conv_2.", "3."), ("Decoder.", "")]
