"""TransMorph: a Swin transformer as encoder, convolutions as decoder (Chen et al., Medical Image Analysis 2022).

Patches of 4x4x4 voxels become tokens. Stages of attention within windows follow, every second block with its windows
shifted by half a window; between stages 2x2x2 tokens merge into one. What each stage gives, and two convolutions of the
images at half and at full resolution, are the skips of an ordinary convolutional way up. TINY, SMALL, BASE and LARGE
are the published sizes; OASIS and DIFFEOMORPHIC stop at half resolution, the latter with a velocity field.

The official codes of these two enlarge the field to full resolution without doubling its values, and have a defect
each of their own. ``official_defects`` repeats them, for weights that were trained with them; without it the field is
enlarged and integrated as one should.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..space import fields
from .backbone import Backbone, register, start_near_zero
from .memory import run
from .windows import attention, offset_numbers, pad_to_windows, seam_masks

PATCH = 4
FLOW_WIDTH = 16  # channels before the flow head, and of the images' convolution at full resolution


@dataclass(frozen=True)
class TransMorphSettings:
    """Widths and variants. The defaults are BASE, "TransMorph" without a suffix.

    Attributes:
        channels: of a token of the first stage; even; twice as many in each further stage.
        depths: blocks of each stage.
        heads: attention heads of each stage; they divide its channels.
        window: tokens of an attention window along (i, j, k).
        drop_path: the share of training steps in which the last block is skipped; from 0, linear over the blocks.
        flow_stride: 1, or 2 (OASIS, DIFFEOMORPHIC): the field is made at half resolution.
        squarings: 0, or the number of squarings that integrate a velocity field (DIFFEOMORPHIC).
        official_defects: with ``flow_stride`` 2, the official codes' treatment of the half-resolution field; see
            :meth:`TransMorph.decode`.
        recompute: less memory and more time in training.
    """

    channels: int = 96
    depths: tuple[int, ...] = (2, 2, 4, 2)
    heads: tuple[int, ...] = (4, 4, 8, 8)
    window: tuple[int, int, int] = (5, 6, 7)
    drop_path: float = 0.3
    flow_stride: int = 1
    squarings: int = 0
    official_defects: bool = False
    recompute: bool = False

    def __post_init__(self) -> None:
        if self.channels % 2 or self.channels < 2:
            raise ValueError(f"channels is {self.channels}; it must be even and at least 2")
        if len(self.depths) < 2 or len(self.depths) != len(self.heads):
            raise ValueError("depths and heads need one value for each stage, and at least two stages")
        for stage, heads in enumerate(self.heads):
            if heads < 1 or self.channels * 2**stage % heads:
                raise ValueError(f"{heads} heads do not divide the {self.channels * 2**stage} channels of a stage")
        if min(self.window) < 2 or min(self.depths) < 1:
            raise ValueError("a window must be at least 2 long on each axis, a stage at least 1 block deep")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path is {self.drop_path}; it must be at least 0 and below 1")
        if self.flow_stride not in (1, 2):
            raise ValueError(f"flow_stride is {self.flow_stride}; it must be 1 or 2")
        if self.squarings < 0:
            raise ValueError(f"squarings is {self.squarings}; it must be 0 (a displacement) or more")
        if self.official_defects and self.flow_stride == 1:
            raise ValueError("official_defects are those of the half-resolution variants; set flow_stride to 2")


BASE = TransMorphSettings()
TINY = TransMorphSettings(channels=6, heads=(2, 2, 4, 4))
SMALL = TransMorphSettings(channels=48, heads=(4, 4, 4, 4))
LARGE = TransMorphSettings(channels=128, depths=(2, 2, 12, 2), heads=(4, 4, 8, 16))
OASIS = TransMorphSettings(flow_stride=2, official_defects=True)
OASIS_LARGE = replace(LARGE, flow_stride=2, official_defects=True)
DIFFEOMORPHIC = TransMorphSettings(flow_stride=2, squarings=7, official_defects=True)


class WindowAttention(nn.Module):
    """Attention among the tokens of one window, with a learned bias for every offset between two tokens.

    The grid is padded with zeros to whole windows, and the padding takes part in the attention, as in the official
    code. With a shift the grid is rolled, so that the last window along an axis joins tokens of both ends; a penalty
    of 100 keeps the two sides apart.
    """

    offsets: Tensor
    seams: Tensor | None

    def __init__(self, channels: int, heads: int, window: Sequence[int], shifted: bool) -> None:
        super().__init__()
        self.heads = heads
        self.window = tuple(window)
        self.shift = tuple(n // 2 if shifted else 0 for n in window)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.proj = nn.Linear(channels, channels)
        self.bias = nn.Parameter(torch.empty(math.prod(2 * n - 1 for n in window), heads))
        nn.init.trunc_normal_(self.bias, std=0.02)
        self.register_buffer("offsets", offset_numbers(window), persistent=False)
        self.register_buffer("seams", seam_masks(window, self.shift) if shifted else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, i, j, k, channels) -> the same."""
        size = x.shape[1:4]
        bias = self.bias[self.offsets].permute(2, 0, 1)
        # without a bias the padding's queries, keys and values are zeros as well: they need not be computed
        qkv = pad_to_windows(self.qkv(x), self.window)
        out = attention(qkv, bias, self.window, self.shift, self.seams)
        return self.proj(out[:, : size[0], : size[1], : size[2]])


class SwinBlock(nn.Module):
    """Attention and a two-layer perceptron, each on normalized tokens and added to them."""

    def __init__(self, channels: int, heads: int, window: Sequence[int], shifted: bool, drop: float) -> None:
        super().__init__()
        self.drop = drop
        self.norm1 = nn.LayerNorm(channels)
        self.attention = WindowAttention(channels, heads, window, shifted)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, i, j, k, channels) -> the same."""
        x = x + self._drop_path(self.attention(self.norm1(x)))
        return x + self._drop_path(self.mlp(self.norm2(x)))

    def _drop_path(self, change: Tensor) -> Tensor:
        """Drop the change for a random share of the pairs in training, and scale the others up (stochastic depth)."""
        if not self.training or self.drop == 0:
            return change
        kept = torch.empty(len(change), 1, 1, 1, 1, device=change.device).bernoulli_(1 - self.drop)
        return change * (kept / (1 - self.drop)).to(change.dtype)


class Merging(nn.Module):
    """2x2x2 tokens become one of twice the width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8 * channels)
        self.reduction = nn.Linear(8 * channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, i, j, k, channels) -> (batch, i / 2, j / 2, k / 2, 2 channels)."""
        corners = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1), (1, 1, 1))
        return self.reduction(self.norm(torch.cat([x[:, i::2, j::2, k::2] for i, j, k in corners], dim=-1)))


class ConvBlock(nn.Sequential):
    """3x3x3 convolution without bias, InstanceNorm, LeakyReLU 0.01."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv3d(inputs, outputs, 3, padding=1, bias=False), nn.InstanceNorm3d(outputs), nn.LeakyReLU(0.01)
        )


@register("transmorph", TransMorphSettings)
class TransMorph(Backbone):
    """See the module's docstring. Input sizes must be divisible by ``multiple_of``."""

    def __init__(self, settings: TransMorphSettings) -> None:
        super().__init__(settings)
        widths = [settings.channels * 2**stage for stage in range(len(settings.depths))]
        self.top_channels = widths[-1]
        self.multiple_of = PATCH * 2 ** (len(widths) - 1)
        self.patch = nn.Conv3d(2, widths[0], PATCH, PATCH)
        self.patch_norm = nn.LayerNorm(widths[0])
        drops = iter(torch.linspace(0, settings.drop_path, sum(settings.depths), device="cpu").tolist())
        self.stages = nn.ModuleList(
            nn.Sequential(*(SwinBlock(w, heads, settings.window, b % 2 == 1, next(drops)) for b in range(depth)))
            for w, heads, depth in zip(widths, settings.heads, settings.depths, strict=True)
        )
        self.merges = nn.ModuleList(Merging(w) for w in widths[:-1])
        self.norms = nn.ModuleList(nn.LayerNorm(w) for w in widths)

        half = widths[0] // 2
        self.at_half = ConvBlock(2, half)
        self.at_full = ConvBlock(2, FLOW_WIDTH) if settings.flow_stride == 1 else None
        skip_widths = [*widths[-2::-1], half]
        up_widths = [*widths[-2::-1], FLOW_WIDTH]
        if settings.flow_stride == 1:
            skip_widths.append(FLOW_WIDTH)
            up_widths.insert(-1, half)
        self.up = nn.ModuleList()
        inputs = widths[-1]
        for width, skip in zip(up_widths, skip_widths, strict=True):
            self.up.append(nn.Sequential(ConvBlock(inputs + skip, width), ConvBlock(width, width)))
            inputs = width
        self.flow = nn.Conv3d(FLOW_WIDTH, 3, 3, padding=1)
        start_near_zero(self.flow)

    def encode(self, moving: Tensor, fixed: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the features of a pair: the skips from fine to coarse, and the top feature."""
        pair = torch.cat([moving, fixed], dim=1)
        skips = [] if self.at_full is None else [self.at_full(pair)]
        skips.append(self.at_half(F.avg_pool3d(pair, 3, 2, 1)))
        x = self.patch_norm(self.patch(pair).permute(0, 2, 3, 4, 1))
        for stage, norm, merge in zip(self.stages, self.norms, [*self.merges, None], strict=True):
            x = x.to(norm.weight.dtype)  # the sum that blocks add to is float32 whatever autocast says
            for block in stage.children():
                x = run(block, x, save=self.settings.recompute)
            skips.append(norm(x).permute(0, 4, 1, 2, 3).contiguous())
            if merge is not None:
                x = merge(x)
        return skips[:-1], skips[-1]

    def decode(self, skips: list[Tensor], top: Tensor) -> Tensor:
        """Return the displacement, (batch, 3, i, j, k), float32 or better, in voxels of the full grid.

        With ``official_defects`` it is the displacement by which :func:`fields.warp` does what the official code's own
        warp does with its output:

        - both variants enlarge the half-resolution field without doubling its values;
        - OASIS (``squarings`` 0) computes sampling points for align_corners=True and samples with False, so that
          the point p + u(p) is read at n / (n - 1) (p + u(p)) - 1/2 on an axis of n voxels: no motion is up to
          half a voxel of motion;
        - DIFFEOMORPHIC does not divide the velocity by 2^squarings before it squares.
        """
        x = top
        for block, skip in zip(self.up, reversed(skips), strict=True):
            with torch.autocast(x.device.type, enabled=False):  # which would have the largest tensors in float32
                x = F.interpolate(x, scale_factor=2, mode="trilinear")
                x = torch.cat([x, skip.to(x.dtype)], dim=1)
            x = run(block, x, save=self.settings.recompute)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would round the field to a hundredth of itself
            field = self.flow(x.to(self.flow.weight.dtype))
            squarings = self.settings.squarings
            if self.settings.official_defects:
                return _official_displacement(field, squarings)
            if squarings:
                field = fields.integrate(field, squarings)
            return fields.resize(field, [n * self.settings.flow_stride for n in field.shape[2:]])


def _official_displacement(field: Tensor, squarings: int) -> Tensor:
    """Return the half-resolution head's field as the official variants use it; see :meth:`TransMorph.decode`."""
    if squarings:
        field = fields.integrate(field * 2**squarings, squarings)
    displacement = F.interpolate(field, scale_factor=2, mode="trilinear")
    if squarings:
        return displacement
    shape = displacement.shape[2:]
    stretch = fields.per_axis([n / (n - 1) for n in shape], displacement)
    positions = fields.identity(shape, displacement)
    return (positions + displacement) * stretch - 0.5 - positions


def from_official(state: dict[str, Tensor], head: str = "reg_head.0") -> dict[str, Tensor]:
    """Rename the weights of the TransMorph repository's models as ours.

    Dropped are its tables and grids, and the full-resolution convolution that the OASIS variant holds but never calls
    (``c2``).

    Args:
        head: the official name of the flow head.
    """
    renamed = {}
    full_resolution = any(name.startswith("up4.") for name in state)
    for name, value in state.items():
        if name.endswith((".grid", ".relative_position_index")) or (name.startswith("c2.") and not full_resolution):
            continue
        if name.startswith(f"{head}."):
            name = name.replace(head, "flow", 1)
        for official, ours in OFFICIAL_NAMES.items():
            name = re.sub(official, ours, name)
        renamed[name] = value
    return renamed


def from_official_diff(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of TransMorph-diff as ours.

    Dropped is also ``flow_sigma``, the log sigma of the noise that the official training adds to the velocity.
    """
    kept = {name: value for name, value in state.items() if not name.startswith("flow_sigma.")}
    return from_official(kept, head="flow_mean")


OFFICIAL_NAMES = {
    r"^transformer\.patch_embed\.proj\.": "patch.",
    r"^transformer\.patch_embed\.norm\.": "patch_norm.",
    r"^transformer\.layers\.(\d+)\.blocks\.": r"stages.\1.",
    r"^transformer\.layers\.(\d+)\.downsample\.": r"merges.\1.",
    r"^transformer\.norm(\d+)\.": r"norms.\1.",
    r"\.attn\.relative_position_bias_table$": ".attention.bias",
    r"\.attn\.": ".attention.",
    r"\.mlp\.fc1\.": ".mlp.0.",
    r"\.mlp\.fc2\.": ".mlp.2.",
    r"^up(\d+)\.conv1\.0\.": r"up.\1.0.0.",
    r"^up(\d+)\.conv2\.0\.": r"up.\1.1.0.",
    r"^c1\.0\.": "at_half.0.",
    r"^c2\.0\.": "at_full.0.",
}
