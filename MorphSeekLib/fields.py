"""Displacement-field algebra on one voxel grid.

Arrays are (batch, channel, i, j, k). A displacement has three channels in the order of the axes, in voxels of its own
grid, and maps the voxel x to x + u(x). Warping is backward: ``warp(image, u)(x) = image(x + u(x))``. Physical space
(millimetres, orientation) lives in :mod:`MorphSeekLib.geometry` alone.

Everything here is computed in float32 or better whatever autocast says: coordinates of a 256-voxel axis do not fit
bfloat16's eight bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def identity(shape: Sequence[int], like: Tensor | None = None) -> Tensor:
    """Voxel coordinates of a grid.

    Args:
        shape: the grid's size (i, j, k).
        like: a tensor whose device and (floating) type the result takes; float32 on the CPU without it.

    Returns:
        (1, 3, i, j, k): channel c holds the index along axis c.
    """
    device = like.device if like is not None else None
    dtype = torch.float64 if like is not None and like.dtype == torch.float64 else torch.float32
    axes = [torch.arange(n, device=device, dtype=dtype) for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]


def sample(image: Tensor, points: Tensor, mode: str = "linear", padding: str = "zeros") -> Tensor:
    """Interpolate an image at voxel coordinates.

    Args:
        image: (batch or 1, channel, i, j, k), of any type.
        points: (batch or 1, 3, ...three axes) voxel coordinates in ``image``; voxel centres are the integers.
        mode: "linear" or "nearest".
        padding: "zeros" (0 outside; linear fades to it over the first voxel beyond the edge) or "border" (edge value).

    Returns:
        (batch, channel, ...three axes of ``points``) in the wider type of image and points, at least float32.

    Raises:
        ValueError: the mode is neither of the two.
    """
    dtype = torch.promote_types(torch.promote_types(image.dtype, points.dtype), torch.float32)
    points = points.to(dtype)
    return _interpolate(image.to(dtype), [points[:, c] for c in range(3)], [0.0] * 3, mode, padding)


def _interpolate(image: Tensor, moved: list[Tensor], start: list, mode: str, padding: str) -> Tensor:
    """grid_sample at the voxel coordinates ``start[axis] + moved[axis]``, in as few passes over memory as it takes."""
    if mode not in ("linear", "nearest"):
        raise ValueError(f"mode is '{mode}'; it must be 'linear' or 'nearest'.")
    # grid_sample wants (x, y, z) = the axes reversed, from -1 to 1 between the outer faces of the first and last voxel
    # (align_corners=False), which is defined for an axis of one voxel too
    grid = []
    for axis in (2, 1, 0):
        size = image.shape[2 + axis]
        offset = torch.as_tensor((2 * start[axis] + 1) / size - 1, dtype=image.dtype, device=image.device)
        grid.append(torch.add(offset, moved[axis], alpha=2 / size))
    grid = torch.stack(grid, dim=-1)
    batch = max(image.shape[0], grid.shape[0])
    return F.grid_sample(
        image.expand(batch, -1, -1, -1, -1),
        grid.expand(batch, -1, -1, -1, -1),
        mode="bilinear" if mode == "linear" else "nearest",
        padding_mode=padding,
        align_corners=False,
    )


def warp(image: Tensor, displacement: Tensor, mode: str = "linear", padding: str = "zeros") -> Tensor:
    """Warp an image backward: out(x) = image(x + u(x)).

    Args:
        image: (batch or 1, channel, i, j, k).
        displacement: (batch or 1, 3, i, j, k), voxels.
        mode, padding: as in :func:`sample`.
    """
    displacement = _precise(displacement)
    dtype = torch.promote_types(torch.promote_types(image.dtype, displacement.dtype), torch.float32)
    shape, axes = displacement.shape[2:], []
    for axis, size in enumerate(shape):
        view = [size if a == axis else 1 for a in range(3)]
        axes.append(torch.arange(size, device=displacement.device, dtype=dtype).view(view))
    moved = displacement.to(dtype).unbind(1)
    return _interpolate(image.to(dtype), list(moved), axes, mode, padding)


def compose(outer: Tensor, step: Tensor) -> Tensor:
    """The field of Phi_t = Phi_{t-1} o phi_t: ``u(x) = step(x) + outer(x + step(x))`` (METHOD.md, Notation).

    Args:
        outer: (batch or 1, 3, i, j, k), the deformation accumulated so far, voxels; beyond its grid its edge value
            holds.
        step: (batch or 1, 3, i, j, k), the new step, applied to a point first, voxels.
    """
    step = _precise(step)
    return step + warp(_precise(outer), step, padding="border")


def resize(displacement: Tensor, shape: Sequence[int]) -> Tensor:
    """Resample a displacement onto another number of voxels over the same extent, first centre to last centre.

    Each channel is multiplied by (new - 1) / (old - 1) of its axis, so that it means the same motion exactly: an affine
    displacement stays that affine displacement. (Official codes multiply by new / old; see ENGINE.md sections 4-6.)

    Args:
        displacement: (batch, 3, i, j, k), voxels of the old grid.
        shape: the new size (i, j, k).

    Returns:
        (batch, 3, *shape), voxels of the new grid.
    """
    displacement = _precise(displacement)
    old = displacement.shape[2:]
    if tuple(old) == tuple(shape):
        return displacement
    factor = [(n - 1) / (o - 1) if min(n, o) > 1 else 1.0 for n, o in zip(shape, old, strict=True)]
    resized = F.interpolate(displacement, size=tuple(shape), mode="trilinear", align_corners=True)
    return resized * displacement.new_tensor(factor).view(1, 3, 1, 1, 1)


def integrate(velocity: Tensor, squarings: int = 7, padding: str = "zeros") -> Tensor:
    """Exponential of a stationary velocity field by scaling and squaring: the displacement at time 1.

    Args:
        velocity: (batch, 3, i, j, k), voxels per unit of time.
        squarings: n in u_0 = v / 2^n, u <- u o u, n times.
        padding: what holds outside the grid, as in :func:`sample`.
    """
    displacement = _precise(velocity) / 2**squarings
    for _ in range(squarings):
        displacement = displacement + warp(displacement, displacement, padding=padding)
    return displacement


def invert(displacement: Tensor, iterations: int = 50, tolerance: float = 1e-3) -> Tensor:
    """Inverse field v on the same grid: v(y) = -u(y + v(y)), by fixed-point iteration.

    Converges where nothing is folded or stretched fourfold (eigenvalues of du/dx between -1 and 3). Where u folds there
    is no inverse; the iteration's last value stands there, and :func:`compose` of the two shows how far off it is.

    Args:
        displacement: (batch, 3, i, j, k), voxels; beyond its grid its edge value holds.
        iterations: the most iterations to do.
        tolerance: stop when no voxel moved by more than this (voxels).
    """
    displacement = _precise(displacement)
    inverse = -displacement
    for _ in range(iterations):
        # half a step: the undamped iteration oscillates or diverges where an eigenvalue of du/dx reaches 1
        update = 0.5 * (-warp(displacement, inverse, padding="border") - inverse)
        inverse = inverse + update
        if float(update.abs().max()) < tolerance:
            break
    return inverse


def jacobian_determinant(displacement: Tensor) -> Tensor:
    """Determinant of d(x + u(x))/dx: central differences inside, one-sided at the borders (numpy.gradient's rule).

    The value does not depend on spacing or orientation: in voxels of one grid, source and target share the affine.

    Args:
        displacement: (batch, 3, i, j, k), voxels; every axis at least two long.

    Returns:
        (batch, 1, i, j, k); 1 = volume kept, <= 0 = folded.

    Raises:
        ValueError: an axis is one voxel long, where no derivative exists.
    """
    if min(displacement.shape[2:]) < 2:
        raise ValueError("The Jacobian needs at least two voxels along every axis.")
    displacement = _precise(displacement)
    # rows of the matrix: gradients[c][a] = d u_c / d axis a
    gradients = [torch.gradient(displacement[:, c], dim=(1, 2, 3)) for c in range(3)]
    (a, b, c), (d, e, f), (g, h, i) = gradients
    a, e, i = a + 1, e + 1, i + 1
    return (a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g))[:, None]


def _precise(field: Tensor) -> Tensor:
    """At least float32."""
    return field if field.dtype == torch.float64 else field.float()
