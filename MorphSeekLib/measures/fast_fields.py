"""What a training computes on every voxel of a field: by :mod:`.field_kernels` on the CPU, else by torch.

The compiled form is used for float32 and float64 on the CPU where numba is there. Both place every voxel in the same
cell (coordinates are rounded alike), so that they differ by rounding alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..io.compiled import Kernels, kernels
from ..space import fields

R = TypeVar("R")


def kernels_for(name: Kernels, *tensors: Tensor) -> ModuleType | None:
    """Return a module of compiled functions that these tensors can be given to; None where torch must do."""
    dtype = tensors[0].dtype
    if dtype not in (torch.float32, torch.float64):
        return None
    if any(tensor.device.type != "cpu" or tensor.dtype != dtype for tensor in tensors):
        return None
    return kernels(name)


def in_slabs(planes: int, work: Callable[[int, int], R]) -> list[R]:
    """Do some work on slabs of planes, given the first plane and the one after the last; as many as torch has threads.

    Returns:
        what each slab gave, in their order, so that a number of threads always gives the same sums.
    """
    count = max(1, min(torch.get_num_threads(), planes // 2))
    cuts = [planes * n // count for n in range(count + 1)]
    if count == 1:
        return [work(0, planes)]
    return list(_pool(count).map(work, cuts[:-1], cuts[1:]))


@functools.cache
def _pool(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "morphseek-slab")


def label_sums(fixed: Tensor, moving: Tensor, count: int, displacement: Tensor) -> tuple[Tensor, Tensor]:
    """Warp a map of classes and sum over the voxels what soft Dice needs of each class; the kernels warp it once.

    A class's share of a warped voxel is the sum of the weights of those of its eight corners that have the class, 0
    beyond the map: what linear interpolation of a channel that is 1 in the class and 0 elsewhere gives.

    Args:
        fixed, moving: (1, 1, i, j, k) integers, 1 to ``count`` or 0 for none.
        count: of classes.
        displacement: (1, 3, i, j, k), voxels; gradients flow to it.

    Returns:
        (count,) sums of the shares where the fixed map has the class, and (count,) sums of the shares' squares; of the
        displacement's type.
    """
    displacement = displacement.to(torch.promote_types(displacement.dtype, torch.float32))
    if kernels_for("measures.field_kernels", displacement) is None:
        return _channel_sums(fixed, moving, count, displacement)
    together, squares = _LabelSums.apply(displacement, fixed[0, 0], moving[0, 0], count)
    return together, squares


class _LabelSums(torch.autograd.Function):
    """:func:`label_sums` by the kernels, with its gradient."""

    @staticmethod
    def forward(ctx: Any, displacement: Tensor, fixed: Tensor, moving: Tensor, count: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(displacement, fixed, moving)
        module = kernels_for("measures.field_kernels", displacement)
        assert module is not None
        grid = _grid(moving[None, None], displacement)
        classes = fixed.contiguous().numpy(), moving.contiguous().numpy()

        def work(begin: int, end: int) -> np.ndarray:
            sums = np.zeros((2, count + 1))
            module.label_sums(grid, *classes, sums[0], sums[1], begin, end)
            return sums

        total = np.sum(in_slabs(len(fixed), work), axis=0)[:, 1:]
        together, squares = torch.from_numpy(total).to(displacement.dtype)
        return together, squares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_together: Tensor, by_squares: Tensor) -> tuple[Tensor, None, None, None]:
        displacement, fixed, moving = ctx.saved_tensors
        numbers = [F.pad(by.to(displacement.dtype), (1, 0)) for by in (by_together, by_squares)]
        module = kernels_for("measures.field_kernels", displacement)
        assert module is not None
        grid, slope = _grid(moving[None, None], displacement), torch.empty_like(displacement)
        given = fixed.contiguous().numpy(), moving.contiguous().numpy(), *(number.numpy() for number in numbers)
        out = slope[0].numpy()
        in_slabs(len(fixed), lambda begin, end: module.label_slopes(grid, *given, out, begin, end))
        return slope, None, None, None


def _grid(image: Tensor, displacement: Tensor) -> tuple[np.ndarray, ...]:
    """Return where each voxel goes, as the kernels take it; of the first of a batch."""
    points = fields.relative_points(image, displacement[:1].detach())
    return tuple(axis[0].contiguous().numpy() for axis in points)


def _channel_sums(fixed: Tensor, moving: Tensor, count: int, displacement: Tensor) -> tuple[Tensor, Tensor]:
    """Return :func:`label_sums` by a warp of one channel for each class.

    Where there are no kernels, that is the faster form: on an H200, 860,000 voxels took 1.5 ms with 2 to 35 classes and
    3.3 ms with 99, with the gradient, and 18 ms when the classes of the eight corners were gathered once.
    """
    classes = torch.arange(1, count + 1, device=moving.device).view(1, -1, 1, 1, 1)
    warped = fields.warp((moving == classes).to(displacement.dtype), displacement)
    return (warped * (fixed == classes)).sum(dim=(0, 2, 3, 4)), warped.square().sum(dim=(0, 2, 3, 4))


def warp(image: Tensor, displacement: Tensor, padding: str = "zeros") -> Tensor:
    """Do as :func:`MorphSeekLib.space.fields.warp`, linear."""
    displacement = displacement if displacement.dtype == torch.float64 else displacement.float()
    usable = image.ndim == 5 and len(image) == 1 and not image.requires_grad
    if not usable or kernels_for("measures.field_kernels", displacement, image) is None:
        return fields.warp(image, displacement, padding=padding)
    warped: Tensor = _Warp.apply(image, displacement, padding == "border")
    return warped


class _Warp(torch.autograd.Function):
    """:func:`warp` by the kernels, of one image by one or more displacements, with the gradient to these."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, displacement: Tensor, border: bool) -> Tensor:
        ctx.save_for_backward(image, displacement)
        ctx.border = border
        module = kernels_for("measures.field_kernels", displacement)
        assert module is not None
        out = displacement.new_empty(len(displacement), image.shape[1], *displacement.shape[2:])
        source = image[0].contiguous().numpy()
        for n, warped in enumerate(out):
            grid, target = _grid(image, displacement[n : n + 1]), warped.numpy()
            in_slabs(len(target[0]), functools.partial(module.warp, grid, source, border, target))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[None, Tensor, None]:
        image, displacement = ctx.saved_tensors
        module = kernels_for("measures.field_kernels", displacement)
        assert module is not None
        slope, source = torch.empty_like(displacement), image[0].contiguous().numpy()
        for n, (out, pull) in enumerate(zip(slope, outer.contiguous(), strict=True)):
            grid, target = _grid(image, displacement[n : n + 1]), out.numpy()
            given = grid, source, ctx.border, pull.numpy(), target
            in_slabs(len(target[0]), functools.partial(module.warp_slopes, *given))
        return None, slope, None


def compose(outer: Tensor, step: Tensor) -> Tensor:
    """Do as :func:`MorphSeekLib.space.fields.compose`."""
    return step + warp(outer, step, "border")


@torch.no_grad()
def least_determinant(displacement: Tensor) -> Tensor:
    """Return :func:`MorphSeekLib.space.fields.least_determinant`, exact where it does not exceed 0."""
    module = kernels_for("measures.field_kernels", displacement)
    if module is None:
        return fields.least_determinant(displacement)
    out = displacement.new_empty(len(displacement), 1, *(n - 1 for n in displacement.shape[2:]))
    for u, least in zip(displacement.contiguous(), out, strict=True):
        given = u.numpy(), least[0].numpy()
        in_slabs(len(least[0]), functools.partial(module.least_determinants, *given))
    return out


def nearest_classes(
    classes: Tensor, displacement: Tensor, fixed: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Warp a map of classes to the nearest voxel, and count.

    Args:
        classes, fixed: (1, 1, i, j, k) int32, 1 to ``count`` or 0 for none, of the moving and the fixed image.
        displacement: (batch, 3, i, j, k), voxels.
        count: of classes.

    Returns:
        (batch, 1, i, j, k) int32, the warped classes; (batch, count) how many voxels of each class both maps have in
        common, and how many the warped one has. None where the kernels cannot be used.
    """
    module = kernels_for("measures.field_kernels", displacement)
    if module is None:
        return None
    out = classes.new_empty(len(displacement), 1, *fixed.shape[2:])
    numbers = np.zeros((2, len(displacement), count + 1), np.int64)
    maps = classes[0, 0].contiguous().numpy(), fixed[0, 0].contiguous().numpy()
    for n, warped in enumerate(out):
        grid, target = _grid(classes, displacement[n : n + 1]), warped[0].numpy()

        def work(begin: int, end: int, grid: tuple = grid, target: np.ndarray = target) -> np.ndarray:
            found = np.zeros((2, count + 1), np.int64)
            module.nearest_classes(grid, *maps, target, found[0], found[1], begin, end)
            return found

        numbers[:, n] = np.sum(in_slabs(len(target), work), axis=0)
    together, counts = torch.from_numpy(numbers[:, :, 1:]).float()
    return out, together, counts


def credit(fixed: Tensor, warped: Tensor, both: Tensor, apart: Tensor) -> Tensor:
    """Return ``both`` of a class where the warped map agrees with the fixed one, minus ``apart`` of each one's class.

    Args:
        fixed, warped: (1, 1, i, j, k) and (batch, 1, i, j, k) classes; int32 on the CPU for the kernels.
        both, apart: (batch, classes + 1), 0 first.

    Returns:
        (batch, 1, i, j, k).
    """
    module = kernels_for("measures.field_kernels", both, apart) if fixed.dtype == warped.dtype == torch.int32 else None
    if module is None:
        j = torch.arange(len(warped), device=warped.device).view(-1, 1, 1, 1, 1)
        return both[j, fixed] * (fixed == warped) - apart[j, fixed] - apart[j, warped]
    out = both.new_empty(warped.shape)
    still = fixed[0, 0].contiguous().numpy()
    for n, target in enumerate(out):
        given = still, warped[n, 0].numpy(), both[n].numpy(), apart[n].numpy(), target[0].numpy()
        in_slabs(len(still), functools.partial(module.credit, *given))
    return out
