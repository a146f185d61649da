"""VoxelMorph: the strided U-Net of Balakrishnan et al. (2019) in the form the TransMorph repository compares with.

Four (or more) stride-2 convolutions down; on the way up a convolution, nearest-neighbor upsampling and the skip of
that resolution, the last skip being the raw pair of images; then convolutions at the output's resolution and a flow
head. The defaults are "vxm-2"; ``VXM1`` and the others are widths alone.

Four settings are ours: ``norm = "instance"``, which learns far faster from scratch; ``flow_stride = 2``, which stops
at half resolution and doubles the field exactly, for a third of the time; and ``forces``, which hands the network,
beside the images, the direction in which a small step would make their structure more alike, at several scales.
Structure is MIND-SSC, so the direction holds for any pair of contrasts; the network learns how far to trust it. The
forces enter a second time before the last convolutions, which are then not normalized: how strong a force is says how
far there is to go, and InstanceNorm would wipe that out, so that steps would never grow smaller. ``features`` adds
class-like features that a small U-Net, one for both images, learns with the rest, and forces of the same kind between
them: with labels to learn from it finds what tells structures apart, where MIND-SSC knows edges alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..measures.similarity import box_sum, descriptor_differences, mind_ssc
from ..space import fields
from .backbone import Backbone, register, start_near_zero
from .memory import Conv3d


@dataclass(frozen=True)
class VoxelMorphSettings:
    """Widths and variants.

    Attributes:
        encoder: channels of the stride-2 convolutions; their number is the depth.
        decoder: channels of the convolutions between upsamplings, one per level that is climbed.
        extra: channels of the convolutions at the output's resolution.
        norm: "none" (official) or "instance" (affine-free, before the activation).
        flow_stride: 1 (official) or 2: the field is made at half resolution.
        forces: 0 (official), or the number of scales (1, 1/2, 1/4, ...) of :func:`structure_force`.
        features: 0 (official), or the number of learned features; they, and their forces at 1/2 and 1/4, stand beside
            the structure's. Fine-tuning with ``loss.features`` makes feature c of each image its label c.
        feature_width: channels of the features' U-Net at 1/2; twice and four times as many below.
    """

    encoder: tuple[int, ...] = (16, 32, 32, 32)
    decoder: tuple[int, ...] = (32, 32, 32, 32)
    extra: tuple[int, ...] = (32, 16, 16)
    norm: str = "none"
    flow_stride: int = 1
    forces: int = 0
    features: int = 0
    feature_width: int = 8

    def __post_init__(self) -> None:
        climbs = len(self.encoder) - (self.flow_stride == 2)
        if self.flow_stride not in (1, 2):
            raise ValueError(f"flow_stride is {self.flow_stride}; it must be 1 or 2")
        if not 0 <= self.forces <= len(self.encoder):
            raise ValueError(f"forces is {self.forces}; it must be 0 to {len(self.encoder)}, the number of levels")
        if self.features and not self.forces:
            raise ValueError("features need forces to stand beside; set forces to at least 1")
        if self.norm not in ("none", "instance"):
            raise ValueError(f"norm is '{self.norm}'; it must be 'none' or 'instance'")
        if len(self.decoder) != climbs:
            raise ValueError(f"decoder needs {climbs} widths for {len(self.encoder)} encoder levels")

    @property
    def raw(self) -> int:
        """Channels of what the first convolution reads: the images, their forces, the learned features' forces, the
        features of the moving and of the fixed image."""
        return 2 + 3 * self.forces + (6 + 2 * self.features if self.features else 0)

    @property
    def raw_again(self) -> int:
        """How often the first convolution at the output's resolution reads them too, after what it is made for."""
        return (self.flow_stride == 1) + (self.forces > 0)


VXM1 = VoxelMorphSettings(encoder=(8, 32, 32, 32), extra=(32, 8, 8))
VXM2 = VoxelMorphSettings()
VXM_X2 = VoxelMorphSettings(encoder=(32, 64, 64, 64), decoder=(64, 64, 64, 64), extra=(64, 32, 32))
VXM_HUGE = VoxelMorphSettings((14, 28, 144, 320), (1152, 1152, 320, 144), (28, 14, 14))
"""What this project takes the paper's "VoxelMorph-L" to be: the only published one of TransMorph's size."""


class ConvBlock(nn.Sequential):
    """3x3x3 convolution, optional InstanceNorm, LeakyReLU 0.2."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, norm: str = "none") -> None:
        layers: list[nn.Module] = [Conv3d(inputs, outputs, 3, stride, 1)]
        if norm == "instance":
            layers.append(nn.InstanceNorm3d(outputs))
        super().__init__(*layers, nn.LeakyReLU(0.2))


class FeatureNet(nn.Module):
    """A small U-Net from an image (batch, 1, i, j, k) to class-like features at half resolution, which sum to 1."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        a, b, c = width, 2 * width, 4 * width
        self.down = nn.ModuleList(ConvBlock(i, o, 2, "instance") for i, o in ((1, a), (a, b), (b, c)))
        self.up = nn.ModuleList([ConvBlock(c + b, b, 1, "instance"), ConvBlock(b + a, a, 1, "instance")])
        self.out = nn.Conv3d(a, features, 1)

    def forward(self, image: Tensor) -> Tensor:
        half = self.down[0](image)
        quarter = self.down[1](half)
        x = self.down[2](quarter)
        for block, skip in zip(self.up, (quarter, half), strict=True):
            x = block(torch.cat([F.interpolate(x, size=skip.shape[2:], mode="nearest"), skip], dim=1))
        return torch.softmax(self.out(x).float(), dim=1)


@register("voxelmorph", VoxelMorphSettings)
class VoxelMorph(Backbone):
    """See the module's docstring. Input sizes must be divisible by ``multiple_of``."""

    def __init__(self, settings: VoxelMorphSettings) -> None:
        super().__init__(settings)
        encoder, norm = settings.encoder, settings.norm
        self.top_channels = encoder[-1]
        self.multiple_of = 2 ** len(encoder)
        self.learned_features = settings.features
        self.features = FeatureNet(settings.features, settings.feature_width) if settings.features else None
        widths = [settings.raw, *encoder]
        self.down = nn.ModuleList(ConvBlock(a, b, 2, norm) for a, b in zip(widths, encoder, strict=False))
        skip_widths = widths[-2::-1]
        self.up = nn.ModuleList()
        inputs = encoder[-1]
        for width, skip in zip(settings.decoder, skip_widths, strict=False):
            self.up.append(ConvBlock(inputs, width, 1, norm))
            inputs = width + skip
        self.extra = nn.ModuleList()
        if settings.forces:
            inputs += widths[0]
        for width in settings.extra:
            self.extra.append(ConvBlock(inputs, width, 1, "none" if settings.forces else norm))
            inputs = width
        self.flow = Conv3d(inputs, 3, 3, 1, 1)
        start_near_zero(self.flow)

    def encode(self, moving: Tensor, fixed: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the features of a pair: the skips from fine to coarse (the raw pair first), and the top feature."""
        x = torch.cat([moving, fixed], dim=1)
        for scale in range(self.settings.forces):
            with torch.no_grad():
                force = structure_force(*(F.avg_pool3d(image.float(), 2**scale) for image in (moving, fixed)))
                x = torch.cat([x, F.interpolate(force.to(x.dtype), scale_factor=2**scale, mode="nearest")], dim=1)
        if self.features is not None:
            learned = shown = self.features(torch.cat([moving, fixed])).chunk(2)
            for _ in range(2):
                force = descriptor_force(*learned)
                x = torch.cat([x, F.interpolate(force.to(x.dtype), size=x.shape[2:], mode="nearest")], dim=1)
                learned = [F.avg_pool3d(f, 2) for f in learned]
            x = torch.cat([x, *(F.interpolate(f.to(x.dtype), size=x.shape[2:], mode="nearest") for f in shown)], dim=1)
        skips = []
        for block in self.down:
            skips.append(x)
            x = block(x)
        return skips, x

    def learned(self, skips: list[Tensor]) -> tuple[Tensor, Tensor] | None:
        """Return the learned features of moving and fixed from the skips, (batch, features, i/2, j/2, k/2) each."""
        if self.features is None:
            return None
        moving, fixed = F.avg_pool3d(skips[0][:, -2 * self.settings.features :], 2).chunk(2, dim=1)
        return moving, fixed

    def outermost(self) -> nn.Conv3d:
        """Return the first convolution at the output's resolution, which reads the raw channels again."""
        return first_convolution(self.extra) if self.extra else self.flow

    def with_features(self, count: int) -> VoxelMorph | None:
        """Return a network with this one's weights and at least ``count`` learned features, itself if it has them.

        None where it is built without forces, beside which features stand, and they would change its normalization.
        """
        old = self.settings
        if old.features >= count:
            return self
        if not old.forces and old.norm != "none":
            return None
        settings = dataclasses.replace(old, features=count, forces=max(1, old.forces))
        grown = VoxelMorph(settings)
        state, fresh = self.state_dict(), grown.state_dict()
        grown.load_state_dict({k: v if v.shape == fresh[k].shape else fresh[k] for k, v in state.items()}, strict=False)
        places = _places(old, settings)
        _take_inputs(first_convolution(grown.down), first_convolution(self.down), places)
        outer, mine = (net.outermost() for net in (grown, self))
        first = mine.in_channels - old.raw_again * old.raw
        again = [first + number * settings.raw + place for number in range(old.raw_again) for place in places]
        _take_inputs(outer, mine, [*range(first), *again])
        if self.features is not None and grown.features is not None:
            _take_classes(grown.features.out, self.features.out)
        return grown.to(self.flow.weight.device)

    def decode(self, skips: list[Tensor], top: Tensor) -> Tensor:
        """Return the field, (batch, 3, i, j, k), float32 or better, in voxels of the full grid."""
        x = top
        for block, skip in zip(self.up, reversed(skips), strict=False):
            x = F.interpolate(block(x), scale_factor=2, mode="nearest")
            x = torch.cat([x, skip.to(x.dtype)], dim=1)
        if self.settings.forces:
            raw = skips[0]
            x = torch.cat([x, (F.avg_pool3d(raw, 2) if self.settings.flow_stride == 2 else raw).to(x.dtype)], dim=1)
        for block in self.extra:
            x = block(x)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would round the field to a hundredth of itself
            flow = self.flow(x.to(self.flow.weight.dtype)).contiguous()  # what follows is slow on channels last
            return fields.resize(flow, skips[0].shape[2:])


def first_convolution(blocks: nn.ModuleList) -> nn.Conv3d:
    """Return the convolution that the first of some blocks begins with."""
    return next(layer for layer in blocks.modules() if isinstance(layer, nn.Conv3d))


def _places(old: VoxelMorphSettings, new: VoxelMorphSettings) -> list[int]:
    """Return where the raw channels of a network are among those of one with more features."""
    images, found = 2 + 3 * old.forces, 2 + 3 * new.forces
    places = [*range(images)]
    if old.features:
        places += [found + n for n in range(6 + old.features)]
        places += [found + 6 + new.features + n for n in range(old.features)]
    return places


@torch.no_grad()
def _take_inputs(new: nn.Conv3d, old: nn.Conv3d, places: Sequence[int]) -> None:
    """Take over a convolution's weights, whose inputs are at these places of a wider one's; the others weigh 0."""
    new.weight.zero_()
    new.weight[:, list(places)] = old.weight
    if new.bias is not None and old.bias is not None:
        new.bias.copy_(old.bias)


@torch.no_grad()
def _take_classes(new: nn.Conv3d, old: nn.Conv3d) -> None:
    """Take over the classes of a last layer before a softmax; those that are new begin improbable."""
    new.weight[: old.out_channels].copy_(old.weight)
    new.weight[old.out_channels :].mul_(0.1)
    if new.bias is not None and old.bias is not None:
        new.bias[: old.out_channels].copy_(old.bias)
        new.bias[old.out_channels :].fill_(-5.0)


def structure_force(moving: Tensor, fixed: Tensor) -> Tensor:
    """Return :func:`descriptor_force` between the MIND-SSC descriptors of two images (batch, 1, i, j, k)."""
    with torch.autocast(moving.device.type, enabled=False):
        return descriptor_force(*(mind_ssc(image.float(), radius=1) for image in (moving, fixed)))


def descriptor_force(moving: Tensor, fixed: Tensor) -> Tensor:
    """Return a Gauss-Newton step at each voxel toward equal descriptors (a demons force on what they describe).

    f = sum_c (F_c - M_c) grad M_c / (sum_c |grad M_c|^2 + sum_c (F_c - M_c)^2), each sum averaged over 3x3x3 voxels
    first; after Vercauteren et al. (2009) and Heinrich et al. (2013).

    Args:
        moving, fixed: (batch, channels, i, j, k), values around 0 to 1.

    Returns:
        (batch, 3, i, j, k), voxels, each component within about one voxel; float32.
    """
    with torch.autocast(moving.device.type, enabled=False):
        force, energy = descriptor_differences(moving, fixed)
        maps = torch.cat([force, energy], dim=1)
        if maps.requires_grad:
            sums = F.avg_pool3d(maps, 3, stride=1, padding=1)
        else:
            sums = box_sum(maps, 3) / 27  # the same mean, faster
        return sums[:, :3] / (sums[:, 3:] + 1e-3)


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the TransMorph repository's weights as ours; the warp's grid is not a weight."""
    ours = {"unet_model.downarm.": "down.", "unet_model.uparm.": "up.", "unet_model.extras.": "extra.", ".main.": ".0."}
    renamed = {}
    for name, value in state.items():
        if name == "transformer.grid":
            continue
        for official, own in ours.items():
            name = name.replace(official, own)
        renamed[name] = value
    return renamed


def widths_of(state: dict[str, Tensor], _arguments: Mapping[str, object]) -> VoxelMorphSettings:
    """Return the settings that weights of the TransMorph repository's form imply, under our names."""

    def widths(part: str) -> tuple[int, ...]:
        count = sum(name.startswith(f"{part}.") and name.endswith(".weight") for name in state)
        return tuple(len(state[f"{part}.{n}.0.weight"]) for n in range(count) if f"{part}.{n}.0.weight" in state)

    if not widths("down") or len(widths("up")) != len(widths("down")):
        return VoxelMorphSettings()  # weights of another network, which do not fit the defaults either
    return VoxelMorphSettings(widths("down"), widths("up"), widths("extra"))
