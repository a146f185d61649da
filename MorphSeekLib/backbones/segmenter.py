"""A network that moves nothing: it learns which label each voxel of one image belongs to, for the fit to compare.

A U-Net (Ronneberger et al. 2015; Isensee et al., nnU-Net, 2021) from one image to a probability for each label. What it
finds in the two images of a pair is what :class:`MorphSeekLib.registration.fit.Fit` brings together where the model's
card says so (``Card.compare``); a few labeled cases and minutes suffice to train it
(:mod:`MorphSeekLib.training.segmentation`).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbone import Backbone, register
from .memory import Conv3d


@dataclass(frozen=True)
class SegmenterSettings:
    """The network.

    Attributes:
        features: background and labels.
        width: channels at the finest resolution; twice as many at each of the ``depth`` coarser ones.
        block: edge of the cubes of voxels whose values are channels of the finest resolution, both in the image and in
            the scores: with 2, nothing is computed voxel by voxel, and many labels take a third of the time (after the
            sub-pixel convolution of Shi et al., CVPR 2016).
    """

    features: int = 2
    width: int = 12
    depth: int = 3
    block: int = 1

    def __post_init__(self) -> None:
        if self.features < 2:
            raise ValueError("features must be at least 2: the background and a label")
        if min(self.width, self.depth, self.block) < 1:
            raise ValueError("width, depth and block must be at least 1")


@register("segmenter", SegmenterSettings)
class Segmenter(Backbone):
    """Learned features without a field: what :meth:`decode` returns is zero everywhere."""

    moves = False

    def __init__(self, settings: SegmenterSettings) -> None:
        super().__init__(settings)
        widths = [settings.width * 2**level for level in range(settings.depth + 1)]
        self.top_channels, self.learned_features = 1, settings.features
        self.block, self.multiple_of = settings.block, settings.block * 2**settings.depth
        first = [settings.block**3, *widths]
        self.down = nn.ModuleList(_two(before, after) for before, after in zip(first, widths, strict=False))
        self.up = nn.ModuleList(_two(below + own, own) for own, below in pairwise(widths))
        self.out = nn.Conv3d(widths[0], settings.features * settings.block**3, 1)

    def scores(self, image: Tensor) -> Tensor:
        """Return a score for each feature (logits), (batch, features, i, j, k), of images (batch, 1, i, j, k)."""
        x, skips = _as_channels(image, self.block), []
        for level, block in enumerate(self.down):
            x = block(F.avg_pool3d(x, 2) if level else x)
            skips.append(x)
        for level in reversed(range(len(self.up))):
            convolution, *others = self.up[level].children()
            assert isinstance(convolution, Conv3d)
            x = nn.Sequential(*others)(_joined(convolution, x, skips[level]))
        return _as_voxels(self.out(x), self.block)

    def image_features(self, image: Tensor) -> list[Tensor]:
        """Return the probability of each feature, float32, (batch, features, i, j, k).

        In blocks of voxels it depends on where these begin, so that it is then the mean of that with all voxels moved
        on by one: of two abdomens in CT 0.745 of the labels are found by it (Dice), and 0.731 without.
        """
        probabilities = self.scores(image).float().softmax(dim=1)
        if self.block == 1:
            return [probabilities]
        beside = self.scores(image.roll((1, 1, 1), (2, 3, 4))).float().softmax(dim=1)
        return [(probabilities + beside.roll((-1, -1, -1), (2, 3, 4))) / 2]

    def encode_with(self, moving: Tensor, fixed_features: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Return the probabilities of moving and fixed, and an empty top."""
        top = moving.new_zeros(moving.shape[0], 1, *(n // self.multiple_of for n in moving.shape[2:]))
        return [*self.image_features(moving), *fixed_features], top

    def encode(self, moving: Tensor, fixed: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the same as :meth:`encode_with`."""
        return self.encode_with(moving, self.image_features(fixed))

    def decode(self, skips: list[Tensor], top: Tensor) -> Tensor:
        """Return no motion."""
        return skips[0].new_zeros(top.shape[0], 3, *skips[0].shape[2:])

    def learned(self, skips: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the probabilities."""
        return skips[0], skips[1]


def _two(before: int, after: int) -> nn.Sequential:
    """Two convolutions with their norms."""
    layers: list[nn.Module] = []
    for channels in (before, after):
        layers += [
            Conv3d(channels, after, 3, padding=1, bias=False),
            nn.InstanceNorm3d(after, affine=True),
            nn.LeakyReLU(0.01),
        ]
    return nn.Sequential(*layers)


def _joined(convolution: Conv3d, below: Tensor, own: Tensor) -> Tensor:
    """Convolve what comes from below, each voxel doubled along every axis, with a level's own channels after it.

    To double voxels and convolve by 3x3x3 is to convolve transposed by 4x4x4 with a stride of two, which takes 8
    products for each voxel and not 27. Two cases of 48x64x48 voxels are learned from in three quarters of the time in
    float32 on a CPU; elsewhere it was not measured, and a single image is slower so.
    """
    device, weight = below.device.type, convolution.weight
    if len(below) == 1 or device != "cpu" or below.dtype != torch.float32 or torch.is_autocast_enabled(device):
        joined: Tensor = convolution(torch.cat([_doubled(below), own], dim=1))
        return joined
    count = below.shape[1]
    pairs = weight.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
    spread = torch.einsum("abijk,xi,yj,zk->baxyz", weight[:, :count], pairs, pairs, pairs)
    doubled = F.conv_transpose3d(below, spread, stride=2, padding=1)
    return doubled + F.conv3d(own, weight[:, count:], padding=1)


def _as_channels(image: Tensor, block: int) -> Tensor:
    """Make the voxels of each cube of so many along an edge channels, (n, c * block^3, i/block, j/block, k/block)."""
    if block == 1:
        return image
    n, c, *size = image.shape
    i, j, k = (length // block for length in size)
    cubes = image.view(n, c, i, block, j, block, k, block).permute(0, 1, 3, 5, 7, 2, 4, 6)
    return cubes.reshape(n, c * block**3, i, j, k)


def _as_voxels(channels: Tensor, block: int) -> Tensor:
    """Return what :func:`_as_channels` took."""
    if block == 1:
        return channels
    n, c, i, j, k = channels.shape
    cubes = channels.view(n, c // block**3, block, block, block, i, j, k).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return cubes.reshape(n, c // block**3, i * block, j * block, k * block)


def _doubled(image: Tensor) -> Tensor:
    """Give the eight voxels of each block its value."""
    return image.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)
