"""LapIRN: the Laplacian pyramid of Mok and Chung (MICCAI 2020), displacement and diffeomorphic.

Three networks of one form work on images of a quarter, a half and the whole of the size. Each sees the moving image as
the coarser levels have warped it, the fixed image and the field so far, starts from the coarser network's embedding,
and adds its share to the field. The coarsest level sees the pair alone: its feature after the residual blocks is the
top feature, and decoding is the rest of the pyramid.

Inside, as in the official code, a field holds for each axis the share of the image's half size, so that a level hands
it on unchanged; what :meth:`LapIRN.decode` returns is in voxels. Between levels it is interpolated as images are (half
a voxel's convention, not first center to last center): the next level sees the image warped by what it gets, so this
is part of the network and no error. The official training goes level by level; here all levels train together.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..space import fields
from .backbone import Backbone, register, start_near_zero
from .memory import channels_last

SLOPE = 0.2


@dataclass(frozen=True)
class LapIRNSettings:
    """Widths and variants; the defaults are the official ones.

    Attributes:
        width: channels of every convolution (four times the official start_channel).
        blocks: residual blocks of each level.
        range_flow: what a level can add to the field at most, in half sizes of the image.
        diffeomorphic: the levels' fields are velocities, integrated at every level; the displacement is returned.
        squarings: for ``diffeomorphic``.
    """

    width: int = 28
    blocks: int = 5
    range_flow: float = 0.4
    diffeomorphic: bool = False
    squarings: int = 7

    def __post_init__(self) -> None:
        if min(self.width, self.blocks, self.squarings) < 1:
            raise ValueError("width, blocks and squarings must be at least 1")
        if self.range_flow <= 0:
            raise ValueError(f"range_flow is {self.range_flow}; it must be above 0")


DISPLACEMENT = LapIRNSettings()
DIFFEOMORPHIC = LapIRNSettings(diffeomorphic=True)


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv3d:
    """Make a 3x3x3 convolution without bias."""
    return nn.Conv3d(inputs, outputs, 3, stride, 1, bias=False)


class ResidualBlock(nn.Module):
    """Activation before each of two convolutions, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(width, width), conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.leaky_relu_(self.conv1(F.leaky_relu(x, SLOPE)), SLOPE))


class Level(nn.Module):
    """One network of the pyramid, in three parts that encoder and decoder divide between them."""

    def __init__(self, inputs: int, settings: LapIRNSettings) -> None:
        super().__init__()
        width = settings.width
        self.enter = nn.Sequential(conv(inputs, width), nn.LeakyReLU(SLOPE, inplace=True), conv(width, width))
        self.down = conv(width, width, stride=2)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(settings.blocks))
        self.up = nn.ConvTranspose3d(width, width, 2, 2, bias=False)
        self.join, self.out = conv(2 * width, width), conv(width, 3)
        start_near_zero(self.out)
        self.range_flow = settings.range_flow

    def deepen(self, feature: Tensor, embedding: Tensor | None = None) -> Tensor:
        """Halve the size, add the coarser level's embedding, and apply the residual blocks."""
        x = self.down(feature)
        x = x if embedding is None else x + embedding
        for block in self.blocks:
            x = F.leaky_relu_(block(x), SLOPE)
        return x

    def flow(self, deep: Tensor, feature: Tensor) -> Tensor:
        """Return what this level adds to the field; float32 or better.

        join(cat(up(deep), feature)), but up and join's first half, with nothing between them, are one transposed
        convolution: eight products where there were 27, and nothing of twice the width at the full size.
        """
        first, second = self.join.weight.chunk(2, dim=1)
        with torch.autocast(deep.device.type, enabled=False):
            both = F.conv3d(self.up.weight, first, padding=2)
        x = F.conv_transpose3d(deep, both, stride=2, padding=1) + F.conv3d(feature, second, padding=1)
        x = F.leaky_relu_(x, SLOPE)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would round the field to a hundredth of itself
            return F.softsign(self.out(x.to(self.out.weight.dtype))) * self.range_flow


@register("lapirn", LapIRNSettings)
class LapIRN(Backbone):
    """See the module's docstring. Input sizes must be divisible by ``multiple_of``."""

    multiple_of = 8

    def __init__(self, settings: LapIRNSettings) -> None:
        super().__init__(settings)
        self.top_channels = settings.width
        self.levels = nn.ModuleList(Level(inputs, settings) for inputs in (2, 5, 5))
        channels_last(self)

    def encode(self, moving: Tensor, fixed: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the skips, the pair itself and the coarsest level's feature before its stride, and the top feature."""
        pair = torch.cat([moving, fixed], dim=1)
        coarsest, *_ = self._levels()
        feature = coarsest.enter(halve(halve(pair)))
        return [pair, feature], coarsest.deepen(feature)

    def decode(self, skips: list[Tensor], top: Tensor) -> Tensor:
        """Return the field, (batch, 3, i, j, k), float32 or better, in voxels of the full grid."""
        (pair, feature), deep = skips, top
        levels = self._levels()
        flow = levels[0].flow(deep, feature.to(deep.dtype))
        for coarse, fine, images in zip(levels, levels[1:], (halve(pair), pair), strict=False):
            displacement = double(self.displacement(flow) / half_sizes(flow))
            flow = double(flow)
            moving, fixed = images.expand(len(flow), -1, -1, -1, -1).to(flow.dtype).split(1, dim=1)
            warped = fields.warp(moving, displacement * half_sizes(flow), padding="border")
            feature = fine.enter(torch.cat([warped, fixed, flow], dim=1))
            deep = fine.deepen(feature, coarse.up(deep))
            flow = flow + fine.flow(deep, feature)
        return self.displacement(flow)

    def _levels(self) -> list[Level]:
        """Return the levels from coarse to fine, with their type."""
        return [cast(Level, level) for level in self.levels]

    def displacement(self, flow: Tensor) -> Tensor:
        """Return a level's field (half sizes, last axis first) as the displacement in voxels of its grid, in axis
        order."""
        field = flow.flip(1) * half_sizes(flow)
        return fields.integrate(field, self.settings.squarings, "border") if self.settings.diffeomorphic else field


def half_sizes(field: Tensor) -> Tensor:
    """Return (1, 3, 1, 1, 1): half the distance from first to last voxel along each axis of a field, voxels."""
    return fields.per_axis([(n - 1) / 2 for n in field.shape[2:]], field)


def double(field: Tensor) -> Tensor:
    """Return the same values on twice as many voxels along each axis."""
    return F.interpolate(field, scale_factor=2, mode="trilinear", align_corners=False)


def halve(images: Tensor) -> Tensor:
    """Halve images: the mean of the 3x3x3 voxels around every other voxel, of those inside the image."""
    return F.avg_pool3d(images, 3, stride=2, padding=1, count_include_pad=False)


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the official third level's weights as ours: it holds the second as model_lvl2, and that holds the first.

    Keys of no known part keep their names, so that loading reports them.
    """
    parts = {
        "model_lvl2.model_lvl1.": "levels.0.",
        "model_lvl2.": "levels.1.",
        "input_encoder_lvl1": "enter",
        "down_conv": "down",
        "output_lvl1.0": "join",
        "output_lvl1.2": "out",
    }
    renamed = {}
    for name, value in state.items():
        ours = name if name.startswith("model_lvl2.") else f"levels.2.{name}"
        for old, new in parts.items():
            ours = ours.replace(old, new)
        # blocks and their activations take turns there
        ours = re.sub(r"resblock_group_lvl1\.(\d+)", lambda number: f"blocks.{int(number[1]) // 2}", ours)
        renamed[ours] = value
    return renamed
