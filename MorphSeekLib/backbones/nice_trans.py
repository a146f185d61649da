"""NICE-Trans: affine and deformable registration in one coarse-to-fine decoder (Meng et al., MICCAI 2023).

The coarsest features of both images pass a stage of windowed attention; its result, the top feature, gives 12 affine
parameters. Their dense displacement is where the field starts, so the field contains the affine part; each finer level
adds what it finds.

The official code serves one pair at a time and loses some motion at each doubling of the field; ours serves any batch,
and ``official_upsampling``, which official weights were trained with, is there for them alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..space import fields
from .backbone import register
from .memory import run
from .siamese import Expansion, FlowHead, Pyramid, Siamese, conv_block, double, rename, shared_names
from .windows import SwinStage

LEVELS = 5


@dataclass(frozen=True)
class NICETransSettings:
    """Widths and variants; the defaults are the published network, but for the upsampling.

    Attributes:
        encoder_width: channels of an image's features at full resolution, doubled at each of four coarser levels.
        decoder_width: channels of the decoder at full resolution, doubled likewise.
        head_width: channels of one attention head; divides twice the decoder's width.
        depth: attention layers at each of the four coarse levels.
        window: attention sees this many voxels along each axis; every second layer's windows are shifted by half.
        official_upsampling: see :func:`MorphSeekLib.backbones.siamese.double`.
        recompute: less memory and more time in training.
    """

    encoder_width: int = 8
    decoder_width: int = 16
    head_width: int = 16
    depth: int = 4
    window: int = 5
    official_upsampling: bool = False
    recompute: bool = False

    def __post_init__(self) -> None:
        if min(self.encoder_width, self.decoder_width, self.head_width, self.depth) < 1 or self.window < 2:
            raise ValueError("widths and depth must be at least 1, and window at least 2")
        if 2 * self.decoder_width % self.head_width:
            raise ValueError(f"head_width is {self.head_width}; it must divide {2 * self.decoder_width}")


OFFICIAL = NICETransSettings(official_upsampling=True)


@register("nice_trans", NICETransSettings)
class NICETrans(Siamese):
    """See the module's docstring. Input sizes must be divisible by ``multiple_of``."""

    def __init__(self, settings: NICETransSettings) -> None:
        super().__init__(settings)
        encoder = [settings.encoder_width * 2**level for level in range(LEVELS)]
        decoder = [settings.decoder_width * 2**level for level in range(LEVELS)]
        self.top_channels = decoder[-1]
        self.multiple_of = 2 ** (LEVELS - 1)
        self.pyramid = Pyramid(settings.encoder_width, LEVELS, settings.recompute)
        # lists of the decoder go from fine to coarse, as the skips do; the finest level has convolutions alone
        inputs = [2 * e + d for e, d in zip(encoder, decoder, strict=True)]
        inputs[-1] = 2 * encoder[-1]
        self.finest = conv_block(inputs[0], decoder[0])
        self.fuse = nn.ModuleList(nn.Conv3d(a, b, 1) for a, b in zip(inputs[1:], decoder[1:], strict=True))
        self.attend = nn.ModuleList(swin_stage(width, settings) for width in decoder[1:])
        self.expand = nn.ModuleList(Expansion(width) for width in decoder[1:])
        self.flow = nn.ModuleList(FlowHead(width) for width in decoder[:-1])
        narrow, out = nn.Linear(decoder[-1], decoder[-1] // 2, bias=False), nn.Linear(decoder[-1] // 2, 12, bias=False)
        self.affine_head = nn.Sequential(narrow, nn.ReLU(), out, nn.Tanh())
        nn.init.normal_(out.weight, 0.0, 1e-5)

    def fused(self, coarsest: Tensor) -> Tensor:
        """Return the top feature, of the coarsest ones of both images."""
        return self.attend[-1](self.fuse[-1](coarsest))

    def affine(self, top: Tensor) -> Tensor:
        """Return the affine part, (batch, 3, 4), less the identity: :func:`affine_field` makes its displacement."""
        dtype = next(self.affine_head.parameters()).dtype
        with torch.autocast(top.device.type, enabled=False):
            return self.affine_head(top.to(dtype).mean(dim=(2, 3, 4))).unflatten(1, (3, 4))

    def decode(self, skips: list[Tensor], top: Tensor) -> Tensor:
        """Return the field, (batch, 3, i, j, k), float32 or better, in voxels of the full grid, affine part
        included."""
        x, field = top, affine_field(self.affine(top), top.shape[2:])
        for level in reversed(range(LEVELS - 1)):
            field = double(field, self.settings.official_upsampling)
            fixed, moving = skips[level].chunk(2, dim=1)
            x = torch.cat([fixed, self.expand[level](x).to(fixed.dtype), fields.warp(moving, field).to(fixed.dtype)], 1)
            if level == 0:
                x = run(self.finest, x, save=self.settings.recompute)
            else:
                x = self.attend[level - 1](self.fuse[level - 1](x))
            field = field + self.flow[level](x)
        return field


def affine_field(parameters: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the dense displacement of an affine map.

    Args:
        parameters: (batch, 3, 4): a point p of the grid, -1 to 1 from the first center to the last and the last axis
            first, moves by ``parameters @ (p, 1)``.
        shape: the grid's size (i, j, k).

    Returns:
        (batch, 3, i, j, k), voxels, channel c along axis c.
    """
    half = fields.per_axis([(n - 1) / 2 for n in shape], parameters)
    points = (fields.identity(shape, parameters) - half) / half.clamp(min=0.5)
    matrix, shift = parameters[:, :, :3].flip(1, 2), parameters[:, :, 3].flip(1)
    with torch.autocast(parameters.device.type, enabled=False):
        return half * ((matrix @ points.flatten(2)).unflatten(2, tuple(shape)) + shift[:, :, None, None, None])


def swin_stage(width: int, settings: NICETransSettings) -> SwinStage:
    """Make the layers of windowed attention of one level, on (batch, width, i, j, k)."""
    heads, window = width // settings.head_width, (settings.window,) * 3
    return SwinStage(width, heads, window, settings.depth, settings.recompute)


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the official code's weights as ours."""
    names = [(f"Encoder.conv_{level + 1}.", f"pyramid.{level}.") for level in range(LEVELS)]
    for level in range(1, LEVELS):
        names += [(f"trans_{level + 1}.", f"attend.{level - 1}."), (f"backdim_{level + 1}.", f"fuse.{level - 1}.")]
    names += [("Decoder.conv_1.", "finest."), ("reghead_5.affine_head_1.", "affine_head.0.")]
    names += [("reghead_5.affine_head_2.", "affine_head.2.")]
    return rename(state, [*names, *shared_names(LEVELS - 1)])
