"""Displacement-field algebra on one voxel grid.

Arrays are (batch, channel, i, j, k). A displacement has three channels in the order of the axes, in voxels of its own
grid, and maps the voxel x to x + u(x). Warping is backward: ``warp(image, u)(x) = image(x + u(x))``. Physical space
(millimeters, orientation) lives in :mod:`MorphSeekLib.space.geometry` alone.

Everything here is computed in float32 or better whatever autocast says: coordinates of a 256-voxel axis do not fit
bfloat16's eight bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def identity(shape: Sequence[int], like: Tensor | None = None) -> Tensor:
    """Return the voxel coordinates of a grid.

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


def per_axis(numbers: Sequence[float], like: Tensor) -> Tensor:
    """Return three numbers as (1, 3, 1, 1, 1), of the device and type of a tensor.

    They are written on the device: a copy from the processor would wait for what the device has still to do.
    """
    return torch.stack([like.new_full((), number) for number in numbers]).view(1, 3, 1, 1, 1)


def sample(image: Tensor, points: Tensor, mode: str = "linear", padding: str = "zeros") -> Tensor:
    """Interpolate an image at voxel coordinates.

    Args:
        image: (batch or 1, channel, i, j, k), of any type.
        points: (batch or 1, 3, ...three axes) voxel coordinates in ``image``; voxel centers are the integers.
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
    """Interpolate at the voxel coordinates ``start[axis] + moved[axis]``, in as few passes over memory as possible."""
    if mode not in ("linear", "nearest"):
        raise ValueError(f"mode is '{mode}'; it must be 'linear' or 'nearest'.")
    grid = torch.stack(_relative(image, moved, start), dim=-1)
    batch = max(image.shape[0], grid.shape[0])
    return F.grid_sample(
        image.expand(batch, -1, -1, -1, -1),
        grid.expand(batch, -1, -1, -1, -1),
        mode="bilinear" if mode == "linear" else "nearest",
        padding_mode=padding,
        align_corners=False,
    )


def _relative(image: Tensor, moved: list[Tensor], start: list) -> list[Tensor]:
    """Return voxel coordinates as grid_sample wants them.

    That is (x, y, z) = the axes reversed, from -1 to 1 between the outer faces of the first and last voxel
    (align_corners=False), which is defined for an axis of one voxel too.
    """
    points = []
    for axis in (2, 1, 0):
        size = image.shape[2 + axis]
        offset = (2 * start[axis] + 1) / size - 1
        if not isinstance(offset, Tensor):
            offset = image.new_full((), offset)
        points.append(torch.add(offset, moved[axis], alpha=2 / size))
    return points


def relative_points(image: Tensor, displacement: Tensor) -> list[Tensor]:
    """Return where :func:`warp` looks for each voxel: along k, j and i, -1 to 1 between the image's outer faces.

    Args:
        image: (batch or 1, channel, i, j, k).
        displacement: (batch, 3, i, j, k), voxels; float32 or float64.

    Returns:
        three tensors (batch, i, j, k), of the displacement's type.
    """
    return _relative(image, list(displacement.unbind(1)), _starts(displacement, displacement.dtype))


def _starts(displacement: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return the voxel coordinates of a grid along each axis, to be added to displacements (batch, i, j, k)."""
    axes = []
    for axis, size in enumerate(displacement.shape[2:]):
        view = [size if a == axis else 1 for a in range(3)]
        axes.append(torch.arange(size, device=displacement.device, dtype=dtype).view(view))
    return axes


def warp(image: Tensor, displacement: Tensor, mode: str = "linear", padding: str = "zeros") -> Tensor:
    """Warp an image backward: out(x) = image(x + u(x)).

    Args:
        image: (batch or 1, channel, i, j, k).
        displacement: (batch or 1, 3, i, j, k), voxels.
        mode, padding: as in :func:`sample`.
    """
    displacement = _precise(displacement)
    dtype = torch.promote_types(torch.promote_types(image.dtype, displacement.dtype), torch.float32)
    moved = displacement.to(dtype).unbind(1)
    return _interpolate(image.to(dtype), list(moved), _starts(displacement, dtype), mode, padding)


def compose(outer: Tensor, step: Tensor) -> Tensor:
    """Return the field of Phi_t = Phi_{t-1} o phi_t: ``u(x) = step(x) + outer(x + step(x))`` (Docs/method.md,
    Notation).

    Args:
        outer: (batch or 1, 3, i, j, k), the deformation accumulated so far, voxels; beyond its grid its edge value
            holds.
        step: (batch or 1, 3, i, j, k), the new step, applied to a point first, voxels.
    """
    step = _precise(step)
    return step + warp(_precise(outer), step, padding="border")


def resize(displacement: Tensor, shape: Sequence[int]) -> Tensor:
    """Resample a displacement onto another number of voxels over the same extent, first center to last center.

    Each channel is multiplied by (new - 1) / (old - 1) of its axis, so that it means the same motion exactly: an affine
    displacement stays that affine displacement. (Official codes multiply by new / old)

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
    return resized * per_axis(factor, displacement)


def integrate(velocity: Tensor, squarings: int = 7, padding: str = "zeros") -> Tensor:
    """Integrate a stationary velocity field by scaling and squaring: the displacement at time 1.

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
    """Invert a field on the same grid: v(y) = -u(y + v(y)), by fixed-point iteration.

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
    """Return det d(x + u(x))/dx: central differences inside, one-sided at the borders (numpy.gradient's rule).

    The value does not depend on spacing or orientation: in voxels of one grid, source and target share the affine.

    Args:
        displacement: (batch, 3, i, j, k), voxels; every axis at least two long.

    Returns:
        (batch, 1, i, j, k); 1 = volume kept, <= 0 = folded.

    Raises:
        ValueError: an axis is one voxel long, where no derivative exists.
    """
    _check_axes(displacement)
    displacement = _precise(displacement)
    # rows of the matrix: gradients[c][a] = d u_c / d axis a
    gradients = [torch.gradient(displacement[:, c], dim=(1, 2, 3)) for c in range(3)]
    (a, b, c), (d, e, f), (g, h, i) = gradients
    a, e, i = a + 1, e + 1, i + 1
    return (a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g))[:, None]


def corner_determinants(displacement: Tensor) -> Tensor:
    """Return det d(x + u(x))/dx at the corners of each cell between eight voxel centers.

    The one-sided differences are those of the trilinear map, so these are its determinants exactly; a fold that
    alternates from voxel to voxel, which central differences do not see, is seen (Liu et al., IJCV 2024).

    Args:
        displacement: (batch, 3, i, j, k), voxels; every axis at least two long.

    Returns:
        (batch, 8, i - 1, j - 1, k - 1), corner 4a + 2b + c of the cell; <= 0 = folded.

    Raises:
        ValueError: an axis is one voxel long.
    """
    _check_axes(displacement)
    return torch.stack(list(_at_corners(_precise(displacement))), dim=1)


def least_determinant(displacement: Tensor, below: float = 0.0) -> Tensor:
    """Return the least corner determinant of each cell, exact where it does not exceed ``below``.

    Args:
        displacement: (batch, 3, i, j, k), voxels; every axis at least two long.
        below: elsewhere any number between ``below`` and the least determinant may stand (a bound that costs less).

    Returns:
        (batch, 1, i - 1, j - 1, k - 1).

    Raises:
        ValueError: an axis is one voxel long.
    """
    _check_axes(displacement)
    u = _precise(displacement)
    if u.device.type != "cpu":  # looking for the cells that need it would wait for the device
        each = _at_corners(u)
        least = next(each)
        for at_corner in each:
            least = torch.minimum(least, at_corner)
        return least[:, None]
    least = determinant_bound(u)
    needed = ~(least > below + 1e-3)  # NaN included
    batch, *cells = needed.nonzero(as_tuple=True)
    corners = gather_corners(u, batch, cells)
    least[needed] = determinants_at_corners(corners).amin(dim=0)
    return least[:, None]


def determinant_bound(displacement: Tensor) -> Tensor:
    """Return a lower bound of the Jacobian determinant within each cell of the trilinear map, in a few passes over
    memory.

    With G = du/dx, det(I + G) = 1 + tr G + (tr(G)^2 - tr(G^2)) / 2 + det G, |tr(G^2)| <= f^2 and |det G| <= f^3 / 3^1.5
    for the Frobenius norm f of G. Within a cell every column of G is a mean of the four edges along its axis.

    Args:
        displacement: (batch, 3, i, j, k).

    Returns:
        (batch, i - 1, j - 1, k - 1); at most 1, and above 0 where the cell cannot fold.
    """
    squares, trace = _edge_bounds(displacement, 0)
    for axis in (1, 2):
        square, own = _edge_bounds(displacement, axis)
        squares.add_(square)
        trace.add_(own)
    trace.clamp_(min=-1)  # 1 + t + t^2 / 2 is least at -1
    bound = trace.square().mul_(0.5).add_(trace).add_(1).sub_(squares, alpha=0.5)
    return bound.sub_(squares.sqrt().mul_(squares), alpha=3**-1.5)


def _edge_bounds(displacement: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Return the largest square of each cell's four edges along an axis, and their least share in the trace."""
    edge = displacement.diff(dim=2 + axis)
    square, own = edge.square().sum(dim=1), edge[:, axis]
    for other in {0, 1, 2} - {axis}:
        n = square.shape[1 + other] - 1
        square = torch.maximum(square.narrow(1 + other, 0, n), square.narrow(1 + other, 1, n))
        own = torch.minimum(own.narrow(1 + other, 0, n), own.narrow(1 + other, 1, n))
    return square, own


def gather_corners(displacement: Tensor, batch: Tensor, cells: Sequence[Tensor]) -> Tensor:
    """Return (2, 2, 2, 3, n): where the corners of n cells go, from the corner of least index, in voxels.

    Args:
        displacement: (batch, 3, i, j, k).
        batch, cells: (n,) indices along the batch, i, j and k.
    """
    u = displacement
    strides = [u.shape[3] * u.shape[4], u.shape[4], 1]
    at = cells[0] * strides[0] + cells[1] * strides[1] + cells[2]
    steps = torch.tensor([a * strides[0] + b * strides[1] + c for a, b, c in _CORNERS], device=u.device)
    n = len(at)
    flat = u.flatten(2)
    if u.shape[0] == 1:
        values = flat[0].index_select(1, (steps[:, None] + at).flatten()).view(3, 8, n).transpose(0, 1)
    else:
        values = flat[batch[None, :, None], torch.arange(3, device=u.device), (steps[:, None] + at)[..., None]]
        values = values.transpose(1, 2)
    corner = torch.tensor(_CORNERS, dtype=u.dtype, device=u.device)
    return (values + corner[..., None]).reshape(2, 2, 2, 3, n)


_CORNERS = [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)]


def determinants_at_corners(corners: Tensor) -> Tensor:
    """Return (8, n): the determinants at the corners of cells (2, 2, 2, 3, n), as :func:`gather_corners` gives them."""
    s, t, r = corners[1] - corners[0], corners[:, 1] - corners[:, 0], corners[:, :, 1] - corners[:, :, 0]
    return torch.stack([_determinant(s[b, c], t[a, c], r[a, b]) for a, b, c in _CORNERS])


def _at_corners(u: Tensor) -> Iterator[Tensor]:
    """Yield the determinants at each corner of every cell, (batch, i - 1, j - 1, k - 1)."""
    edges = [u.diff(dim=2 + axis).movedim(1, 0).clone() for axis in range(3)]
    for axis, edge in enumerate(edges):
        edge[axis] += 1
    cells = [n - 1 for n in u.shape[2:]]
    for corner in _CORNERS:
        here = []
        for axis, edge in enumerate(edges):
            for other in {0, 1, 2} - {axis}:
                edge = edge.narrow(2 + other, corner[other], cells[other])
            here.append(edge)
        yield _determinant(*here)


def _determinant(s: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """Return the determinant of the matrix with the columns s, t, r (3, ...)."""
    return s[0] * (t[1] * r[2] - t[2] * r[1]) + s[1] * (t[2] * r[0] - t[0] * r[2]) + s[2] * (t[0] * r[1] - t[1] * r[0])


def _check_axes(displacement: Tensor) -> None:
    if min(displacement.shape[2:]) < 2:
        raise ValueError("The Jacobian needs at least two voxels along every axis.")


def _precise(field: Tensor) -> Tensor:
    """Return a tensor in float32 or better."""
    return field if field.dtype == torch.float64 else field.float()
