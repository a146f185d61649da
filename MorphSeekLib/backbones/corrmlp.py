"""CorrMLP: local correlations and MLPs in windows of several sizes, coarse to fine (Meng et al., CVPR 2024).

At each level a block correlates the fixed image's features with the warped moving ones' over the 27 neighbors and
mixes the result in windows of 3, 5 and 7 voxels; a second block joins it with what the coarser level found. The top
feature is the coarsest block's result.

The windows' MLPs run slab by slab: what a slab needs stays in the processor's cache, which is two to three times as
fast on a CPU, and without gradient a slab's memory is all they take. ``official_upsampling`` is there for official
weights alone, which were trained with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from types import EllipsisType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..space import fields
from .backbone import register
from .memory import run
from .siamese import ChannelNorm, Expansion, FlowHead, Pyramid, Siamese, double, rename, shared_names

LEVELS = 4
SLAB = 2**15  # voxels of a slab in windows
CACHED = 2**17  # values of a slab in correlations


@dataclass(frozen=True)
class CorrMLPSettings:
    """Widths and variants; the defaults are the published network, but for the upsampling.

    Attributes:
        encoder_width: channels of an image's features at full resolution, doubled at each of three coarser levels.
        decoder_width: channels of the decoder at full resolution, doubled likewise; divisible by 4.
        windows: sizes in voxels along each axis.
        official_upsampling: see :func:`MorphSeekLib.backbones.siamese.double`.
        recompute: less memory and more time in training.
    """

    encoder_width: int = 8
    decoder_width: int = 16
    windows: tuple[int, ...] = (3, 5, 7)
    official_upsampling: bool = False
    recompute: bool = False

    def __post_init__(self) -> None:
        if self.encoder_width < 1:
            raise ValueError(f"encoder_width is {self.encoder_width}; it must be at least 1")
        if self.decoder_width < 4 or self.decoder_width % 4:
            raise ValueError(f"decoder_width is {self.decoder_width}; it must be a multiple of 4")
        if not self.windows or min(self.windows) < 1:
            raise ValueError("windows must name at least one size, each at least 1")


OFFICIAL = CorrMLPSettings(official_upsampling=True)


@register("corrmlp", CorrMLPSettings)
class CorrMLP(Siamese):
    """See the module's docstring. Input sizes must be divisible by ``multiple_of``."""

    def __init__(self, settings: CorrMLPSettings) -> None:
        super().__init__(settings)
        encoder = [settings.encoder_width * 2**level for level in range(LEVELS)]
        decoder = [settings.decoder_width * 2**level for level in range(LEVELS)]
        self.top_channels = decoder[-1]
        self.multiple_of = 2 ** (LEVELS - 1)
        self.pyramid = Pyramid(settings.encoder_width, LEVELS, settings.recompute)
        # lists of the decoder go from fine to coarse, as the skips do
        self.compare = nn.ModuleList(Block(a, b, settings.windows) for a, b in zip(encoder, decoder, strict=True))
        self.join = nn.ModuleList(Block(width, width, settings.windows) for width in decoder[:-1])
        self.expand = nn.ModuleList(Expansion(width) for width in decoder[1:])
        self.flow = nn.ModuleList(FlowHead(width) for width in decoder)

    def fused(self, coarsest: Tensor) -> Tensor:
        """Return the top feature, of the coarsest ones of both images."""
        return self._run(self.compare[-1], *coarsest.chunk(2, dim=1))

    def decode(self, skips: list[Tensor], top: Tensor) -> Tensor:
        """Return the field, (batch, 3, i, j, k), float32 or better, in voxels of the full grid."""
        x, field = top, self.flow[-1](top)
        for level in reversed(range(LEVELS - 1)):
            field = double(field, self.settings.official_upsampling)
            fixed, moving = skips[level].chunk(2, dim=1)
            compared = self._run(self.compare[level], fixed, fields.warp(moving, field).to(fixed.dtype))
            x = self._run(self.join[level], compared, self.expand[level](x).to(compared.dtype))
            field = field + self.flow[level](x)
        return field

    def _run(self, block: nn.Module, a: Tensor, b: Tensor) -> Tensor:
        return run(block, a, b, save=self.settings.recompute)


class Block(nn.Module):
    """Two features (batch, inputs, i, j, k) and their correlation, mixed: (batch, width, i, j, k)."""

    def __init__(self, inputs: int, width: int, windows: tuple[int, ...]) -> None:
        super().__init__()
        self.fuse = nn.Conv3d(2 * inputs + 27, width, 3, 1, 1)
        self.mlp = MultiWindowMLP(width, windows)
        self.attention = ChannelAttention(width)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        x = self.fuse(with_correlation(a, b))
        return x + self.attention(self.mlp(x.movedim(1, -1)).movedim(-1, 1))


class MultiWindowMLP(nn.Module):
    """A gated MLP per window size, and a share for each that every channel takes from the whole volume's mean.

    Maps (batch, i, j, k, width) to the same shape.
    """

    def __init__(self, width: int, windows: tuple[int, ...]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlps = nn.ModuleList(GatedMLP(width, window) for window in windows)
        self.share = nn.Sequential(nn.Linear(width, width // 4), nn.GELU(), nn.Linear(width // 4, len(windows) * width))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        changes = [mlp(normed) for mlp in self.mlps]
        # each MLP's result is the input and its change; the shares sum to 1, so that the input is added once
        mean = len(changes) * normed.mean(dim=(1, 2, 3)) + sum(change.mean(dim=(1, 2, 3)) for change in changes)
        shares = self.share(mean).unflatten(1, (-1, len(changes))).softmax(dim=-1)[:, None, None, None]
        for n, change in enumerate(changes):
            normed = torch.addcmul(normed, change, shares[..., n].to(change.dtype))
        return x + self.out(normed)


class GatedMLP(nn.Module):
    """What a gated MLP changes in cubic windows: half of the channels, mixed across positions, gate the other half.

    Maps (batch, i, j, k, width) to the same shape; windows that reach beyond the volume see zeros there.
    """

    def __init__(self, width: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.norm = nn.LayerNorm(width)
        self.into = nn.Linear(width, 2 * width)
        self.gate_norm = nn.LayerNorm(width)
        self.gate = nn.Linear(window**3, window**3)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows = max(1, SLAB // (self.window * x[:, 0, ..., 0].numel()))
        return torch.cat([self._slab(slab) for slab in x.split(rows * self.window, dim=1)], dim=1)

    def _slab(self, x: Tensor) -> Tensor:
        n, (i, j, k) = self.window, x.shape[1:4]
        padded = F.pad(x, (0, 0, 0, -k % n, 0, -j % n, 0, -i % n))
        blocks = padded.unflatten(3, (-1, n)).unflatten(2, (-1, n)).unflatten(1, (-1, n))  # batch, i, n, j, n, k, n, c
        windows = blocks.permute(2, 4, 6, 0, 1, 3, 5, 7)
        x = windows.flatten(3, 6).flatten(0, 2)  # positions first: the gate is one matrix product for all windows
        kept, gate = F.gelu(self.into(self.norm(x))).chunk(2, dim=-1)
        # kept * (gate + 1): the 1 goes into the bias
        gate = torch.addmm(self.gate.bias[:, None] + 1, self.gate.weight, self.gate_norm(gate).flatten(1)).view_as(x)
        x = self.out(kept * gate)
        x = x.view(windows.shape).permute(3, 4, 0, 5, 1, 6, 2, 7).reshape(padded.shape)
        return x[:, :i, :j, :k]


class ChannelAttention(nn.Module):
    """Two convolutions whose channels are weighed by what they hold on average, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(width)
        self.convolve = nn.Sequential(
            nn.Conv3d(width, width, 3, 1, 1), nn.LeakyReLU(0.2, inplace=True), nn.Conv3d(width, width, 3, 1, 1)
        )
        self.weigh = nn.Sequential(
            nn.Conv3d(width, width // 4, 1), nn.ReLU(), nn.Conv3d(width // 4, width, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolve(self.norm(x))
        return torch.addcmul(x, y, self.weigh(y.mean(dim=(2, 3, 4), keepdim=True)))


def with_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return (a, correlation, b) along the channels: the correlation of each voxel of a with 27 neighbors in b.

    Args:
        a, b: (batch, channels, i, j, k), of one type.

    Returns:
        (batch, channels + 27 + channels, i, j, k): the mean over channels of a(p) b(p + o), for the offsets o from
        (-1, -1, -1) to (1, 1, 1), last axis fastest; zeros outside. Summed in float32 or better.
    """
    return _Correlation.apply(a, b)


class _Correlation(torch.autograd.Function):
    """Gradient written out: autograd would keep 27 products and 27 padded gradients, and take six times as long.

    The volume is taken in slabs along its first axis, so that all 27 neighbors of one come from the cache.
    """

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        channels, padded = a.shape[1], F.pad(b, (1,) * 6)
        out = a.new_empty(a.shape[0], 2 * channels + 27, *a.shape[2:])
        out[:, :channels], out[:, -channels:] = a, b
        for start, rows in _slabs(a):
            here, near = _precise(a.narrow(2, start, rows)), _precise(padded.narrow(2, start, rows + 2))
            products = out[:, channels:-channels].narrow(2, start, rows)
            for offset, shift in enumerate(_shifts(here)):
                products[:, offset] = (here * near[shift]).mean(dim=1)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        channels, padded = a.shape[1], F.pad(b, (1,) * 6)
        grad = _precise(grad)
        grad_a, grad_padded = grad[:, :channels].clone(), F.pad(grad[:, -channels:], (1,) * 6)
        for start, rows in _slabs(a):
            here, near = _precise(a.narrow(2, start, rows)), _precise(padded.narrow(2, start, rows + 2))
            grad_here, grad_near = grad_a.narrow(2, start, rows), grad_padded.narrow(2, start, rows + 2)
            weights = grad[:, channels:-channels].narrow(2, start, rows) / channels
            for offset, shift in enumerate(_shifts(here)):
                weight = weights[:, offset : offset + 1]
                grad_here.addcmul_(weight, near[shift])
                grad_near[shift].addcmul_(weight, here)
        return grad_a.to(a.dtype), grad_padded[:, :, 1:-1, 1:-1, 1:-1].to(b.dtype)


def _slabs(a: Tensor) -> list[tuple[int, int]]:
    """Return the first row and the number of rows of slabs that fit the cache."""
    rows = max(1, CACHED // a[:, :, 0].numel())
    return [(start, min(rows, a.shape[2] - start)) for start in range(0, a.shape[2], rows)]


def _shifts(here: Tensor) -> list[tuple[slice | EllipsisType, ...]]:
    """Return where the 27 neighbors of a slab are in the slab padded by one voxel on all sides."""
    return [
        (..., *(slice(o, o + n) for o, n in zip(offset, here.shape[2:], strict=True)))
        for offset in product(range(3), repeat=3)
    ]


def _precise(x: Tensor) -> Tensor:
    """Return a tensor in float32 or better."""
    return x if x.dtype == torch.float64 else x.float()


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the official code's weights as ours."""
    names = [(f"Encoder.Convblock_{level + 1}.", f"pyramid.{level}.") for level in range(LEVELS)]
    for level in range(LEVELS):
        names += [(f"mlp_1{level + 1}.", f"compare.{level}."), (f"mlp_2{level + 1}.", f"join.{level}.")]
    names += [(f"mlpLayer.WinGmlpLayer_{n + 1}.", f"mlp.mlps.{n}.") for n in range(3)]
    names += [
        ("mlpLayer.reweight.fc1.", "mlp.share.0."),
        ("mlpLayer.reweight.fc2.", "mlp.share.2."),
        ("mlpLayer.", "mlp."),
        ("SpatialGatingUnit.Dense_0.", "gate."),
        ("SpatialGatingUnit.LayerNorm.", "gate_norm."),
        ("in_project.", "into."),
        ("out_project.", "out."),
        ("channel_attention_block.channel_attention.Conv_0.", "attention.weigh.0."),
        ("channel_attention_block.channel_attention.Conv_1.", "attention.weigh.2."),
        ("channel_attention_block.conv1.", "attention.convolve.0."),
        ("channel_attention_block.conv2.", "attention.convolve.2."),
        ("channel_attention_block.", "attention."),
        ("LayerNorm.", "norm."),
        ("Conv.", "fuse."),
    ]
    return rename(state, [*names, *shared_names(LEVELS)])
