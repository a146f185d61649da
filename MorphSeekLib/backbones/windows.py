"""Attention within windows of a 3D grid, every second layer with its windows shifted (Liu et al., ICCV 2021).

What TransMorph and NICE-Trans share, and the stage of NICE-Trans. Their official codes differ in what they do with a
grid that is not a whole number of windows, or smaller than one; each network's layer says how.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..space import fields
from .memory import run


def pad_to_windows(x: Tensor, window: Sequence[int]) -> Tensor:
    """Append zeros to (batch, i, j, k, channels) until each axis is a whole number of windows."""
    i, j, k = (-n % w for n, w in zip(x.shape[1:4], window, strict=True))
    return F.pad(x, (0, 0, 0, k, 0, j, 0, i)) if i or j or k else x


def attention(
    qkv: Tensor, bias: Tensor, window: Sequence[int], shift: Sequence[int], seams: Tensor | None = None
) -> Tensor:
    """Let the tokens of each window attend to each other.

    Args:
        qkv: (batch, i, j, k, 3 channels), queries, keys and values; each axis is a whole number of windows.
        bias: (heads, tokens, tokens), added to the logits of every window.
        window: tokens of a window along (i, j, k).
        shift: by how many tokens the grid is rolled back first, so that the last window along an axis joins tokens of
            both ends of it.
        seams: :func:`seam_masks`, which keep the two ends apart; None where nothing is shifted.

    Returns:
        (batch, i, j, k, channels).
    """
    batch, heads = len(qkv), len(bias)
    if any(shift):
        qkv = torch.roll(qkv, [-s for s in shift], (1, 2, 3))
    (a, b, c), (p, q, r) = (n // w for n, w in zip(qkv.shape[1:4], window, strict=True)), window
    qkv = qkv.view(batch, a, p, b, q, c, r, 3, heads, -1).permute(7, 0, 1, 3, 5, 8, 2, 4, 6, 9)
    queries, keys, values = qkv.reshape(3, batch * a * b * c, heads, p * q * r, -1)
    mask = bias[None]
    if seams is not None:  # no window but the last one along an axis holds a seam: eight masks serve every size
        last = [torch.arange(n, device=bias.device) == n - 1 for n in (a, b, c)]
        which = 4 * last[0][:, None, None] + 2 * last[1][:, None] + last[2]
        mask = (mask + seams[:, None]).to(queries.dtype)[which.flatten().repeat(batch)]
    out = F.scaled_dot_product_attention(queries, keys, values, mask.to(queries.dtype))
    out = out.view(batch, a, b, c, heads, p, q, r, -1).permute(0, 1, 5, 2, 6, 3, 7, 4, 8)
    out = out.reshape(batch, a * p, b * q, c * r, -1)
    return torch.roll(out, list(shift), (1, 2, 3)) if any(shift) else out


def offset_numbers(window: Sequence[int]) -> Tensor:
    """Return (tokens, tokens): the number of the offset query - key, in the order of the official bias table."""
    positions = fields.identity(window).long().flatten(2)[0]
    offsets = positions[:, :, None] - positions[:, None, :]
    number = torch.zeros_like(offsets[0])
    for offset, n in zip(offsets, window, strict=True):
        number = number * (2 * n - 1) + offset + n - 1
    return number


def seam_masks(window: Sequence[int], shift: Sequence[int], like: Tensor | None = None) -> Tensor:
    """Return (8, tokens, tokens): -100 between tokens that a seam parts, else 0.

    Mask number 4 a + 2 b + c has a seam along i, j and k where a, b and c are 1.

    Args:
        window, shift: tokens along (i, j, k).
        like: a tensor on whose device the masks are made; the processor without it.
    """
    positions = fields.identity(window, like).flatten(2)[0]
    beyond = torch.stack([p >= n - s for p, n, s in zip(positions, window, shift, strict=True)])
    parted = beyond[:, :, None] != beyond[:, None, :]
    number = torch.arange(8, device=positions.device)
    which = torch.stack([number // 4 % 2, number // 2 % 2, number % 2], dim=1).bool()
    return -100.0 * (parted & which[:, :, None, None]).any(dim=1).float()


class SwinStage(nn.Module):
    """Layers of windowed attention as in NICE-Trans, every second one with its windows shifted by half.

    Args:
        channels: of a token.
        heads: attention heads; they divide the channels.
        window: tokens of a window along (i, j, k).
        depth: layers.
        recompute: less memory and more time in training.
    """

    def __init__(self, channels: int, heads: int, window: Sequence[int], depth: int, recompute: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            SwinLayer(channels, heads, window, shifted=number % 2 == 1, recompute=recompute) for number in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, channels, i, j, k) -> the same."""
        x = x.movedim(1, -1)
        for block in self.blocks:
            x = block(x)
        return x.movedim(-1, 1)


class SwinLayer(nn.Module):
    """Attention and a two-layer perceptron, each on normalized tokens and added to them."""

    def __init__(
        self, channels: int, heads: int, window: Sequence[int], shifted: bool, recompute: bool = False
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.norm1 = nn.LayerNorm(channels)
        self.attn = SwinAttention(channels, heads, window, shifted)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Perceptron(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, i, j, k, channels) -> the same."""
        x = x + run(self._attended, x, save=self.recompute)
        return x + run(self._mixed, x, save=self.recompute)

    def _attended(self, x: Tensor) -> Tensor:
        return self.attn(self.norm1(x))

    def _mixed(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm2(x))


class SwinAttention(nn.Module):
    """Attention within windows, with a learned bias for every offset between two tokens.

    As in the official code the grid is padded with zeros before queries, keys and values are made of it, so that the
    padding takes part by their biases. Along an axis that is no longer than a window, the window is as long as the axis
    and nothing is shifted. The bias of such a smaller window of n tokens is that of the first n of a whole one.
    """

    offsets: Tensor

    def __init__(self, channels: int, heads: int, window: Sequence[int], shifted: bool) -> None:
        super().__init__()
        self.heads = heads
        self.window = tuple(window)
        self.shifted = shifted
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.relative_position_bias_table = nn.Parameter(torch.empty(math.prod(2 * n - 1 for n in window), heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("offsets", offset_numbers(window), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, i, j, k, channels) -> the same."""
        size = x.shape[1:4]
        window = [min(n, w) for n, w in zip(size, self.window, strict=True)]
        shift = [w // 2 if self.shifted and n > w else 0 for n, w in zip(size, self.window, strict=True)]
        tokens = math.prod(window)
        bias = self.relative_position_bias_table[self.offsets[:tokens, :tokens]].permute(2, 0, 1)
        seams = seam_masks(window, shift, bias).to(bias) if any(shift) else None
        out = attention(self.qkv(pad_to_windows(x, window)), bias, window, shift, seams)
        return self.proj(out[:, : size[0], : size[1], : size[2]])


class Perceptron(nn.Module):
    """Two linear layers with GELU between, four times as wide inside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(channels, 4 * channels)
        self.linear2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.gelu(self.linear1(x)))
