"""Regularizers of displacement fields, as losses.

Displacements are (batch, 3, i, j, k) in voxels of their own grid, channels in the order of the axes. Everything is
computed in float32 or better whatever autocast says. Every mean runs over samples, components and voxels alike, so that
a weight means the same at any size.
"""

from __future__ import annotations

import math
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..space import fields
from .fast_fields import in_slabs, kernels_for


def diffusion(displacement: Tensor) -> Tensor:
    """Return the mean squared forward difference, averaged over the three axes.

    VoxelMorph's and TransMorph's "l2 gradient loss"; zero for a translation.

    Args:
        displacement: (batch, 3, i, j, k), voxels; every axis at least two long.

    Returns:
        A scalar, in voxels squared per voxel squared.

    Raises:
        ValueError: an axis is too short.
    """
    u = _precise(displacement, 2, "Diffusion")
    if len(u) == 1 and kernels_for("measures.field_kernels", u) is not None:
        energy: Tensor = _Diffusion.apply(u)
        return energy
    return reduce(add, (u.diff(dim=axis).square().mean() for axis in (2, 3, 4))) / 3


class _Diffusion(torch.autograd.Function):
    """:func:`diffusion` of one field by the kernels, with its gradient."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        module = kernels_for("measures.field_kernels", u)
        assert module is not None
        slope, values = torch.empty_like(u, memory_format=torch.contiguous_format), u[0].contiguous().numpy()
        counts = [u[0].numel() // n * (n - 1) for n in u.shape[2:]]
        weights = np.array([2 / (3 * count) for count in counts], values.dtype)
        out = slope[0].numpy()
        sums = in_slabs(values.shape[1], lambda begin, end: module.diffusion(values, out, weights, begin, end))
        ctx.save_for_backward(slope)
        mean = sum(total / count for total, count in zip(np.sum(sums, axis=0), counts, strict=True)) / 3
        return u.new_tensor(mean)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        return slope * outer


def bending(displacement: Tensor) -> Tensor:
    """Return the bending energy: the mean squared second derivative, mixed ones twice; zero for an affine displacement.

    TransMorph's stencil: central differences, (u(x + 1) - u(x - 1)) / 2, applied twice, two voxels of every border
    left out.

    Args:
        displacement: (batch, 3, i, j, k), voxels; every axis at least five long.

    Returns:
        A scalar, in voxels squared per voxel to the fourth.

    Raises:
        ValueError: an axis is too short.
    """
    u = _precise(displacement, 5, "Bending energy")
    first = [_central(u, axis) for axis in (2, 3, 4)]
    pure = reduce(add, (_central(first[a], a + 2).square().mean() for a in range(3)))
    mixed = reduce(add, (_central(first[a], b + 2).square().mean() for a, b in ((0, 1), (0, 2), (1, 2))))
    return pure + 2 * mixed


def folding_penalty(displacement: Tensor, margin: float = 0.05) -> Tensor:
    """Return the mean of relu(margin - det J) over all cells' corners: zero where ``margin`` of the volume is kept.

    Args:
        displacement: (batch, 3, i, j, k), voxels; every axis at least two long.
        margin: the determinant below which a corner counts; above zero, so that voxels are pushed back before they
            fold.

    Returns:
        A scalar. Determinants as in :func:`MorphSeekLib.space.fields.corner_determinants`.

    Raises:
        ValueError: an axis is too short.
    """
    u = _precise(displacement, 2, "The folding penalty")
    if u.device.type != "cpu":  # looking for the cells that need it would wait for the device
        return torch.relu(margin - fields.corner_determinants(u)).mean()
    return _FoldingPenalty.apply(u, margin)


class _FoldingPenalty(torch.autograd.Function):
    """:func:`folding_penalty` of the cells that a cheap bound leaves open, with its gradient written out."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, margin: float) -> Tensor:
        batch, *cells = (~(fields.determinant_bound(u) > margin)).nonzero(as_tuple=True)
        size = 8 * u.shape[0] * math.prod(n - 1 for n in u.shape[2:])
        p = fields.gather_corners(u, batch, cells).movedim(3, 0)
        # an edge at each corner (a, b, c) of the cell, (3, a, b, c, n) of which one of a, b, c is 1 long
        s, t, r = p[:, 1:] - p[:, :1], p[:, :, 1:] - p[:, :, :1], p[:, :, :, 1:] - p[:, :, :, :1]
        by_s = _cross(t, r)
        lacking = torch.relu(margin - (s * by_s).sum(dim=0))
        if ctx.needs_input_grad[0]:
            short = lacking > 0
            slopes = zip((1, 2, 3), (by_s, _cross(r, s), _cross(s, t)), strict=True)
            gradient = torch.zeros_like(p)
            for axis, slope in slopes:  # an edge runs from its low corner to its high one
                of_edge = torch.where(short, slope, 0).sum(dim=axis) / size
                gradient.select(axis, 0).add_(of_edge)
                gradient.select(axis, 1).sub_(of_edge)
            ctx.save_for_backward(gradient, batch, *cells)
            ctx.shape = u.shape
        return lacking.sum() / size

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:
        gradient, batch, i, j, k = ctx.saved_tensors
        _, _, *n = ctx.shape
        first = batch * 3 * math.prod(n) + (i * n[1] + j) * n[2] + k  # among all numbers of the field
        component, a, b, c = (torch.arange(m).view(-1, *[1] * d) for m, d in ((3, 4), (2, 3), (2, 2), (2, 1)))
        at = component * math.prod(n) + (a * n[1] + b) * n[2] + c + first
        total = gradient.new_zeros(math.prod(ctx.shape)).index_add_(0, at.flatten(), gradient.flatten())
        return total.view(ctx.shape) * outer, None


def _cross(a: Tensor, b: Tensor) -> Tensor:
    """Return the cross product of vectors (3, ...)."""
    return torch.stack([a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]])


def _central(u: Tensor, axis: int) -> Tensor:
    """Return the central difference along one axis (2, 3 or 4); one voxel of every border is left out."""
    inner = u[tuple(slice(None) if a in (0, 1, axis) else slice(1, -1) for a in range(5))]
    n = u.shape[axis] - 2
    return (inner.narrow(axis, 2, n) - inner.narrow(axis, 0, n)) / 2


def _precise(displacement: Tensor, least: int, name: str) -> Tensor:
    """Return the field in at least float32, if every axis has enough voxels for the stencil."""
    if min(displacement.shape[2:]) < least:
        raise ValueError(f"{name} needs at least {least} voxels along every axis, not {tuple(displacement.shape[2:])}.")
    return displacement.to(torch.promote_types(displacement.dtype, torch.float32))
