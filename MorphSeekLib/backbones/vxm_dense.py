"""VxmDense: VoxelMorph as its authors' PyTorch package has it (Balakrishnan et al. 2019; Dalca et al. 2019).

A U-Net whose every resolution has a convolution of its own, followed by max-pooling on the way down and by
nearest-neighbor upsampling on the way up, then convolutions at full resolution and a flow head. Most of its work is
done at full resolution, unlike that of the strided network in :mod:`.voxelmorph`. The field is a stationary velocity,
integrated at half resolution (SVF, the defaults), or the displacement itself (DISPLACEMENT).

The official code halves the field's values where it halves its grid of n voxels from first center to last; but n - 1
steps become n / 2 - 1, so that what is integrated is (n - 1) / (n - 2) times the motion that the network asked for.
``official_defects`` (OFFICIAL_SVF) repeats it, for weights that were trained so; without it the motion is the same on
both grids.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..protocol.errors import MorphSeekError
from ..space import fields
from .backbone import Backbone, register, start_near_zero
from .voxelmorph import ConvBlock


@dataclass(frozen=True)
class VxmDenseSettings:
    """Widths and variants.

    Attributes:
        encoder: channels of the convolutions on the way down; their number is the depth.
        decoder: channels of the convolutions on the way up, one per level that is climbed.
        extra: channels of the convolutions at full resolution before the flow head.
        squarings: that integrate the velocity field; 0 for a displacement.
        velocity_stride: 1, or 2: a velocity is integrated at half resolution. Without meaning for a displacement.
        official_defects: the values of a field that changes its grid change by the ratio of voxels, not of steps.
    """

    encoder: tuple[int, ...] = (16, 32, 32, 32)
    decoder: tuple[int, ...] = (32, 32, 32, 32)
    extra: tuple[int, ...] = (32, 16, 16)
    squarings: int = 7
    velocity_stride: int = 2
    official_defects: bool = False

    def __post_init__(self) -> None:
        if not self.encoder or len(self.decoder) != len(self.encoder):
            raise ValueError(f"decoder needs {len(self.encoder)} widths, one for each of at least one encoder level")
        if min(self.encoder + self.decoder + self.extra) < 1:
            raise ValueError("a width must be at least 1")
        if self.squarings < 0:
            raise ValueError(f"squarings is {self.squarings}; it must be 0 (a displacement) or more")
        if self.velocity_stride not in (1, 2):
            raise ValueError(f"velocity_stride is {self.velocity_stride}; it must be 1 or 2")


SVF = VxmDenseSettings()
OFFICIAL_SVF = VxmDenseSettings(official_defects=True)
DISPLACEMENT = VxmDenseSettings(squarings=0)


@register("vxm_dense", VxmDenseSettings)
class VxmDense(Backbone):
    """See the module's docstring. Input sizes must be divisible by ``multiple_of``."""

    def __init__(self, settings: VxmDenseSettings) -> None:
        super().__init__(settings)
        encoder = settings.encoder
        self.top_channels = encoder[-1]
        self.multiple_of = 2 ** len(encoder)
        self.down = nn.ModuleList(ConvBlock(a, b) for a, b in zip((2, *encoder), encoder, strict=False))
        self.up = nn.ModuleList()
        inputs = encoder[-1]
        for width, skip in zip(settings.decoder, reversed(encoder), strict=True):
            self.up.append(ConvBlock(inputs, width))
            inputs = width + skip
        self.extra = nn.ModuleList(
            ConvBlock(a, b) for a, b in zip((inputs, *settings.extra), settings.extra, strict=False)
        )
        self.flow = nn.Conv3d(settings.extra[-1] if settings.extra else inputs, 3, 3, padding=1)
        start_near_zero(self.flow)

    def encode(self, moving: Tensor, fixed: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the features of a pair: the skips, fine to coarse, each before its pooling, and the top feature."""
        x = torch.cat([moving, fixed], dim=1)
        skips = []
        for block in self.down:
            skips.append(block(x))
            x = F.max_pool3d(skips[-1], 2)
        return skips, x

    def decode(self, skips: list[Tensor], top: Tensor) -> Tensor:
        """Return the displacement, (batch, 3, i, j, k), float32 or better, in voxels of the full grid."""
        x = top
        for block, skip in zip(self.up, reversed(skips), strict=True):
            x = F.interpolate(block(x), scale_factor=2, mode="nearest")
            x = torch.cat([x, skip.to(x.dtype)], dim=1)
        for block in self.extra:
            x = block(x)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would round the field to a hundredth of itself
            field = self.flow(x.to(self.flow.weight.dtype))
            return self._integrated(field) if self.settings.squarings else field

    def _integrated(self, velocity: Tensor) -> Tensor:
        """Integrate a velocity to a displacement, both (batch, 3, i, j, k) in voxels of the full grid."""
        shape, stride = velocity.shape[2:], self.settings.velocity_stride
        coarse = [n // stride for n in shape]
        resize = _official_resize if self.settings.official_defects else fields.resize
        return resize(fields.integrate(resize(velocity, coarse), self.settings.squarings), shape)


def _official_resize(field: Tensor, shape: Sequence[int]) -> Tensor:
    """Resize as :func:`fields.resize` does, by the official factor, new / old size."""
    factor = fields.per_axis([n / o for n, o in zip(shape, field.shape[2:], strict=True)], field)
    return F.interpolate(field, size=tuple(shape), mode="trilinear", align_corners=True) * factor


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of the official ``VxmDense`` as ours, without its sampling grids."""
    renamed = {}
    for name, value in state.items():
        if name.endswith(".grid"):
            continue
        name = re.sub(r"^unet_model\.encoder\.(\d+)\.0\.main\.", r"down.\1.0.", name)
        name = re.sub(r"^unet_model\.decoder\.(\d+)\.0\.main\.", r"up.\1.0.", name)
        renamed[re.sub(r"^unet_model\.remaining\.(\d+)\.main\.", r"extra.\1.0.", name)] = value
    return renamed


def settings_of(state: dict[str, Tensor], arguments: Mapping[str, object]) -> VxmDenseSettings:
    """Return the settings that an official file implies.

    Args:
        state: its weights under our names, from which the widths are read.
        arguments: of the official constructor, which keeps them beside the weights; what is not given has its default.

    Raises:
        MorphSeekError: the velocity is integrated at a resolution that is neither the full nor half of it.
    """

    def widths(part: str) -> tuple[int, ...]:
        found = (re.fullmatch(rf"{part}\.(\d+)\.0\.weight", name) for name in state)
        return tuple(len(state[f"{part}.{n}.0.weight"]) for n in sorted(int(match[1]) for match in found if match))

    squarings, stride = (_whole(arguments, name, known) for name, known in (("int_steps", 7), ("int_downsize", 2)))
    if squarings and stride not in (1, 2):
        raise MorphSeekError(f"This VxmDense integrates at 1/{stride} of the resolution; MorphSeek knows 1 and 1/2.")
    encoder, decoder = widths("down"), widths("up")
    if not encoder or len(encoder) != len(decoder):
        return OFFICIAL_SVF  # weights of another network, which do not fit the defaults either
    return VxmDenseSettings(encoder, decoder, widths("extra"), squarings, stride if squarings else 2, True)


def _whole(arguments: Mapping[str, object], name: str, default: int) -> int:
    """Return a whole number of the official constructor's arguments; the default where it is not given, 0 where it is
    none."""
    value = arguments.get(name, default)
    return value if isinstance(value, int) else 0
