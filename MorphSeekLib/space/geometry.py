"""Physical space: where voxels lie, how a volume is resampled, how a dense transform maps points.

World coordinates are millimeters in LPS (x to the patient's left, y to posterior, z to superior), as in ITK and DICOM.
Slicer's RAS is met only in the Slicer module. A transform here always maps a point of the FIXED image to a point of the
MOVING image, which is ITK's resampling convention: ``warped(p) = moving(T(p))``.

Grids may have any orientation, spacing, handedness or obliqueness; everything goes through their 4x4 affines, kept in
float64. Dense arithmetic is float32, so it is done in voxels or in differences of positions: affines are multiplied out
first, and an origin 1500 mm away never meets a float32. This is the only room of the engine that knows millimeters.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..protocol.job import SILENT, Job, Notice
from ..protocol.report import GridSection
from . import fields

# letter of an orientation code -> unit vector in LPS
_DIRECTIONS = {"L": (1, 0, 0), "R": (-1, 0, 0), "P": (0, 1, 0), "A": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
# a (4, 4) matrix minus this maps a point to its displacement
_IDENTITY = np.diag([1.0, 1.0, 1.0, 0.0])
# one slab of resampling holds about this many points: the peak memory stays flat, a cancel waits for one slab only
_SLAB_POINTS = 1_000_000


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the voxels of an array (i, j, k) lie.

    Attributes:
        shape: number of voxels along i, j, k.
        affine: (4, 4) float64, voxel index -> LPS mm (of the voxel's center).
        nifti_codes: what a NIfTI file calls the space of its qform and its sform (1: of the scanner, 4: of MNI, ...);
            results on the grid of an image carry the codes of its file.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    nifti_codes: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        object.__setattr__(self, "affine", np.asarray(self.affine, dtype=np.float64))
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(f"A grid needs three axes of at least one voxel, not {self.shape}.")
        if self.affine.shape != (4, 4) or not np.isfinite(self.affine).all():
            raise ValueError("A grid needs a finite 4x4 matrix.")
        volume = abs(np.linalg.det(self.affine[:3, :3]))
        if not volume > 1e-6 * np.prod(self.spacing) or not np.prod(self.spacing) > 0:
            raise ValueError(
                "The image's direction matrix is singular or its spacing is zero: voxels have no place in space. "
                "Repair the header (for instance with Slicer's Volumes module) and try again."
            )

    @property
    def spacing(self) -> np.ndarray:
        """(3,) mm between voxel centers along i, j, k."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    @property
    def direction(self) -> np.ndarray:
        """(3, 3), columns are the unit vectors of the axes i, j, k in LPS; its determinant may be -1."""
        return self.affine[:3, :3] / self.spacing

    @property
    def origin(self) -> np.ndarray:
        """(3,) LPS mm of the center of voxel (0, 0, 0)."""
        return self.affine[:3, 3]

    @property
    def center(self) -> np.ndarray:
        """(3,) LPS mm of the middle of the grid."""
        return self.affine[:3, :3] @ ((np.array(self.shape) - 1) / 2) + self.origin

    def corners(self) -> np.ndarray:
        """Return (8, 3) LPS mm of the centers of the corner voxels."""
        index = np.array(np.meshgrid(*[(0, n - 1) for n in self.shape], indexing="ij")).reshape(3, -1)
        return (self.affine[:3, :3] @ index).T + self.origin

    def describe(self) -> GridSection:
        """Return shape and spacing (mm) for a report."""
        return {"shape": list(self.shape), "spacing": [round(float(s), 6) for s in self.spacing]}

    def same_as(self, other: Grid, tolerance_mm: float = 1e-2) -> bool:
        """Return whether both grids have the same voxels at the same places.

        Args:
            tolerance_mm: the most that corners may lie apart; never more than a tenth of a voxel.
        """
        apart = min(tolerance_mm, 0.1 * float(self.spacing.min()))
        return self.shape == other.shape and float(np.abs(self.corners() - other.corners()).max()) < apart

    @classmethod
    def from_parts(
        cls,
        shape: Sequence[int] | np.ndarray,
        spacing: Sequence[float] | np.ndarray,
        direction: np.ndarray,
        origin: Sequence[float] | np.ndarray,
    ) -> Grid:
        """Make a grid of ITK's parts: spacing (mm), direction (3, 3) and origin (LPS mm)."""
        affine = np.eye(4)
        affine[:3, :3] = np.asarray(direction, dtype=np.float64).reshape(3, 3) * np.asarray(spacing, dtype=np.float64)
        affine[:3, 3] = origin
        return cls(tuple(shape), affine)


@dataclass
class Volume:
    """An image: data (i, j, k) tensor on the CPU and the grid it lies on.

    Attributes:
        notices: what a user should know of how it was read.
        dtype: the number type of its file, such as "int16", in which what is made of it is written; the data itself is
            float32 whatever that is.
        elsewhere: (4, 4) voxel index -> LPS mm, the other place that the file's header states when it states two.
        name: of its file, for messages; "" when it comes from none.
        counts: (i, j, k) bool, which voxels count in a registration, see
            :func:`MorphSeekLib.registration.masks.masked`; None: all.
    """

    data: Tensor
    grid: Grid
    notices: tuple[Notice, ...] = ()
    dtype: str = "float32"
    elsewhere: np.ndarray | None = None
    name: str = ""
    counts: Tensor | None = None

    def __post_init__(self) -> None:
        if tuple(self.data.shape) != self.grid.shape:
            raise ValueError(f"The array has the shape {tuple(self.data.shape)}, its grid {self.grid.shape}.")

    def called(self, role: str) -> str:
        """Name the image in a message: its role, such as "The fixed image", and its file if there is one."""
        return f"{role} ({self.name})" if self.name else role


@dataclass
class DenseTransform:
    """Fixed point -> moving point, T(p) = p + d(p), d linearly interpolated between the nodes of a grid.

    The grid is the model's working grid, which covers the whole fixed image, so that the file, Slicer's node and the
    warped image all come from the very same nodes and nothing is lost by storing the coarse ones. An affine or initial
    transform is contained in d (exactly so: linear interpolation reproduces affine maps).

    Attributes:
        displacement: (3, i, j, k) float32 on the CPU, LPS mm. Beyond the grid the edge value holds.
        grid: where the nodes lie, in the fixed image's space.
    """

    displacement: Tensor
    grid: Grid

    def displacement_at(self, grid: Grid, device: torch.device | str = "cpu") -> Tensor:
        """Return (3, *grid.shape) LPS mm at the voxels of another grid, linearly interpolated."""
        nodes = self.displacement.to(device)[None]
        to_node = np.linalg.inv(self.grid.affine) @ grid.affine
        slabs = [fields.sample(nodes, _map(to_node, at), padding="border")[0] for at in _slabs(grid, device)]
        return torch.cat(slabs, dim=1)

    def map_points(self, points: np.ndarray) -> np.ndarray:
        """Map (n, 3) LPS mm of the fixed space to (n, 3) LPS mm of the moving space."""
        points = np.asarray(points, dtype=np.float64).reshape(-1, 3)
        index = apply_affine(np.linalg.inv(self.grid.affine), points)
        places = torch.from_numpy(np.ascontiguousarray(index.T)).reshape(1, 3, -1, 1, 1)
        displacement = fields.sample(self.displacement.double()[None], places, padding="border")
        return points + displacement.reshape(3, -1).numpy().T

    def inverse(
        self,
        grid: Grid,
        iterations: int = 100,
        tolerance_mm: float = 0.01,
        job: Job = SILENT,
    ) -> DenseTransform:
        """Invert by damped fixed-point iteration: moving point -> fixed point, on the nodes of ``grid`` (moving space).

        The affine part is divided out first, so that the iteration only has to undo the rest; beyond the nodes of the
        transform it goes on as that affine. Where the transform folds there is no inverse and the last iterate stands.

        Args:
            grid: nodes for the inverse; it should cover the moving image.
            iterations, tolerance_mm: stop after this many; a node rests when it moved by no more than this and by no
                more than a hundredth of the distance between nodes.
            job: checked once per iteration.
        """
        back = np.linalg.inv(self.affine_part())
        to_index = np.linalg.inv(self.grid.affine)
        # in node indices: T = affine o (id + u), so u = back T - id; the inverse of y is the x with x = back y - u(x)
        rest = to_index @ back @ self.grid.affine - _IDENTITY
        u = torch.cat([_map(rest, at) for at in _slabs(self.grid)], dim=2) + _turn(to_index @ back, self.displacement)
        start = _points(grid, to_index @ back)
        x = start.clone()
        spacing = torch.from_numpy(self.grid.spacing).float()
        tolerance_mm = min(tolerance_mm, 0.01 * float(spacing.min()))
        goals, found = start.view(3, -1), x.view(3, -1)
        moving = torch.arange(goals.shape[1])  # nodes that have not come to rest
        for _ in range(iterations):
            job.check()
            goal, at = (goals, found) if len(moving) == goals.shape[1] else (goals[:, moving], found[:, moving])
            update = 0.7 * (goal - fields.sample(u, at[None, :, :, None, None], padding="border")[0, :, :, 0, 0] - at)
            found[:, moving] = at + update
            moving = moving[(update.abs() * spacing[:, None]).amax(dim=0) >= tolerance_mm]
            if not len(moving):
                break
        # x - y in mm, where y = grid's node and start = back y
        return DenseTransform(_points(grid, back - _IDENTITY)[0] + _turn(self.grid.affine, (x - start)[0]), grid)

    def affine_part(self) -> np.ndarray:
        """Return (4, 4) LPS: least-squares affine of the whole map over a subset of the nodes."""
        if min(self.grid.shape) < 2:
            return np.eye(4)
        step = [max(1, n // 12) for n in self.grid.shape]
        nodes = self.displacement[:, :: step[0], :: step[1], :: step[2]].double().numpy()
        index = [np.arange(n) * s for n, s in zip(nodes.shape[1:], step, strict=True)]
        middle = [axis.mean() for axis in index]
        # the nodes are a grid, whose axes do not correlate: the slope along each is a regression of its own
        slopes = np.empty((3, 3))
        for axis, beyond in enumerate(((2, 3), (1, 3), (1, 2))):
            away = index[axis] - middle[axis]
            slopes[:, axis] = nodes.mean(axis=beyond) @ away / (away @ away)
        if not np.isfinite(slopes).all():
            return np.eye(4)
        affine = np.eye(4)
        affine[:3, :3] += slopes @ np.linalg.inv(self.grid.affine[:3, :3])
        center = apply_affine(self.grid.affine, np.array([middle]))[0]
        affine[:3, 3] = center + nodes.mean(axis=(1, 2, 3)) - affine[:3, :3] @ center
        return affine if abs(np.linalg.det(affine[:3, :3])) > 1e-3 else np.eye(4)


Transform = np.ndarray | DenseTransform  # a (4, 4) matrix in LPS mm, or a dense one


def is_mirrored(transform: Transform) -> bool:
    """Return whether a map exchanges left and right: its linear part has a negative determinant."""
    affine = transform.affine_part() if isinstance(transform, DenseTransform) else transform
    return bool(np.linalg.det(affine[:3, :3]) < 0)


def apply_affine(affine: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return (n, 3) points through a (4, 4) matrix."""
    return np.asarray(points) @ affine[:3, :3].T + affine[:3, 3]


def resample(
    volume: Volume,
    onto: Grid,
    transform: Transform | None = None,
    *,
    mode: str = "linear",
    background: float = 0.0,
    device: torch.device | str = "cpu",
    job: Job = SILENT,
) -> Volume:
    """Resample a volume onto a grid: out(p) = volume(T(p)), one interpolation, slab by slab.

    Inside means within half a voxel of the outermost centers, as for ITK and VTK; edge values hold in that rim.

    Args:
        volume: the image to read (the moving one).
        onto: the grid to fill (the fixed one).
        transform: point of ``onto``'s space -> point of ``volume``'s space; None for the identity.
        mode: "linear", or "nearest" (halves round up, as ITK does) for labels, which keep their integer type.
        background: the value outside.
        device: where to compute; the result is on the CPU.
        job: checked once per slab.

    Returns:
        On ``onto``: float32 for "linear", the volume's own type for "nearest".

    Raises:
        ValueError: the mode is neither of the two.
    """
    if mode not in ("linear", "nearest"):
        raise ValueError(f"mode is '{mode}'; it must be 'linear' or 'nearest'.")
    source = volume.data.to(device, None if mode == "nearest" else torch.float32)
    fill = torch.tensor(background, dtype=source.dtype, device=device)
    limit = torch.tensor(source.shape, device=device).view(3, 1, 1, 1) - 0.5
    out = torch.empty(onto.shape, dtype=source.dtype)
    begin = 0
    for points in _landing_slabs(onto, transform, volume.grid, device):
        job.check()
        if mode == "nearest":  # by indexing: labels of any integer type stay exact
            i, j, k = (
                torch.floor(p + 0.5).long().clamp_(0, n - 1) for p, n in zip(points[0], source.shape, strict=True)
            )
            values = source[i, j, k]
        else:
            values = fields.sample(source[None, None], points, padding="border")[0, 0]
        outside = ((points[0] < -0.5) | (points[0] >= limit)).any(dim=0)
        out[begin : begin + len(values)] = torch.where(outside, fill, values)
        begin += len(values)
    return Volume(out, onto)


def world_spacing(grid: Grid) -> np.ndarray:
    """Return a grid's spacing along the world's axes, (3,) mm."""
    return np.linalg.norm(grid.direction * grid.spacing, axis=1)


def in_box(points: Tensor, grid: Grid) -> Tensor:
    """Return which points lie in an image's box, within half a voxel of its outermost centers.

    Args:
        points: (1, 3, i, j, k), voxels of ``grid``.

    Returns:
        (1, 1, i, j, k) bool.
    """
    limit = fields.per_axis(grid.shape, points) - 0.5
    return ((points >= -0.5) & (points <= limit)).all(dim=1, keepdim=True)


def orientation_matrix(code: str) -> np.ndarray:
    """Return the (3, 3) direction in LPS of an axis code such as "RAS": axis i runs toward R, j toward A, k toward S.

    Raises:
        ValueError: not three letters, one of each pair L/R, P/A, S/I.
    """
    code = code.upper()
    if len(code) != 3 or any(c not in _DIRECTIONS for c in code):
        raise ValueError(f"'{code}' is not an orientation; use three of R/L, A/P and S/I, for instance RAS.")
    matrix = np.array([_DIRECTIONS[c] for c in code], dtype=np.float64).T
    if abs(np.linalg.det(matrix)) < 0.5:
        raise ValueError(f"'{code}' names one direction twice; use three of R/L, A/P and S/I, for instance RAS.")
    return matrix


def covering_grid(
    covered: Grid,
    spacing: Sequence[float] | np.ndarray | None = None,
    orientation: str | np.ndarray = "RAS",
    multiple_of: int = 1,
    at_least: Sequence[int] | None = None,
) -> Grid:
    """Return a grid along the world's axes that covers all of another one, voxel rims included, concentric with it.

    Args:
        covered: the grid to cover, of any orientation.
        spacing: mm along the new axes; None keeps the covered grid's (of its axis nearest to each new one).
        orientation: axis code of the new grid, or its (3, 3) direction.
        multiple_of: sizes are rounded up to a multiple of this (a network's stride).
        at_least: sizes are no smaller than these.
    """
    direction = orientation_matrix(orientation) if isinstance(orientation, str) else orientation
    if spacing is None:
        nearest = np.abs(direction.T @ covered.direction).argmax(axis=1)
        spacing = covered.spacing[nearest]
    spacing = np.asarray(spacing, dtype=np.float64)
    rim = (np.abs(direction.T @ covered.direction) * covered.spacing).sum(axis=1) / 2
    projected = covered.corners() @ direction
    extent = projected.max(axis=0) - projected.min(axis=0) + 2 * rim
    shape = np.maximum(np.ceil(extent / spacing - 1e-6).astype(int) + 1, 2)
    if at_least is not None:
        shape = np.maximum(shape, at_least)
    shape = np.ceil(shape / multiple_of).astype(int) * multiple_of
    origin = covered.center - direction @ (spacing * (shape - 1) / 2)
    return Grid.from_parts(shape.tolist(), spacing, direction, origin)


def reordered(volume: Volume, grid: Grid) -> Volume | None:
    """Return a volume with its axes in another order or direction; None when the voxels of ``grid`` are not the same
    ones."""
    turn = np.rint(np.linalg.inv(grid.direction) @ volume.grid.direction).astype(int)
    if not (np.abs(turn).sum(axis=0) == 1).all() or not (np.abs(turn).sum(axis=1) == 1).all():
        return None
    i, j, k = order = np.abs(turn).argmax(axis=1).tolist()  # which axis of the volume runs along each of the grid's
    backward = [axis for axis in range(3) if turn[axis, order[axis]] < 0]
    shape = volume.grid.shape[i], volume.grid.shape[j], volume.grid.shape[k]
    affine = volume.grid.affine[:, [*order, 3]]
    for axis in backward:
        affine[:3, 3] += affine[:3, axis] * (shape[axis] - 1)
        affine[:3, axis] *= -1
    if not Grid(shape, affine).same_as(grid):
        return None
    return dataclasses.replace(volume, data=volume.data.permute(order).flip(backward).contiguous(), grid=grid)


def smooth_for_spacing(volume: Volume, spacing: Sequence[float] | np.ndarray | float) -> Volume:
    """Blur a volume so that sampling it every ``spacing`` mm does not alias (Gaussian; FWHM grows to the new voxel).

    Args:
        volume: linear intensities (not labels).
        spacing: mm between the coming samples: one number, or one per world axis x, y, z; along each of the volume's
            axes that of the nearest world axis counts, and where it is no coarser than the volume nothing is blurred.
    """
    nearest = np.abs(volume.grid.direction).argmax(axis=0)
    wanted = np.broadcast_to(np.asarray(spacing, dtype=np.float64), (3,))[nearest]
    data = volume.data.float()
    for axis, factor in enumerate(wanted / volume.grid.spacing):
        if factor <= 1.05:
            continue
        sigma = math.sqrt(factor**2 - 1) / 2.3548
        radius = min(math.ceil(3 * sigma), data.shape[axis])  # an axis of less than a new voxel is averaged whole
        weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
        margin = [0] * 6
        margin[4 - 2 * axis] = margin[5 - 2 * axis] = radius
        padded = F.pad(data[None], margin, mode="replicate")[0]
        # shifted sums: five times faster on the CPU than conv1d with one channel
        data = torch.zeros_like(data)
        for shift, weight in enumerate((weights / weights.sum()).tolist()):
            data.add_(padded.narrow(axis, shift, data.shape[axis]), alpha=weight)
    return Volume(data, volume.grid)


def dense_from_voxels(displacement: Tensor, grid: Grid, then: Transform | None = None) -> DenseTransform:
    """Return a transform from a network's displacement: T(p) = then(p + u(p)).

    Args:
        displacement: (1, 3, i, j, k) voxels of ``grid``.
        grid: the working grid.
        then: what maps on from there (the alignment before the network); None for the identity.
    """
    u = _turn(grid.affine, displacement[0].detach().float().cpu())
    if then is None:
        return DenseTransform(u, grid)
    if isinstance(then, np.ndarray):
        # (A - 1) p + A u: the small u is never added to the large p
        return DenseTransform(_points(grid, then - _IDENTITY)[0] + _turn(then, u), grid)
    to_node = np.linalg.inv(then.grid.affine)
    at = _points(grid, to_node) + _turn(to_node, u)
    return DenseTransform(u + fields.sample(then.displacement[None], at, padding="border")[0], grid)


def voxel_displacement(transform: DenseTransform, grid: Grid, device: torch.device | str = "cpu") -> Tensor:
    """Return (1, 3, *grid.shape): the transform's displacement at the voxels of ``grid``, in voxels of ``grid``.

    What :func:`MorphSeekLib.space.fields.jacobian_determinant` needs for figures on the fixed image's own grid.
    """
    return _turn(np.linalg.inv(grid.affine), transform.displacement_at(grid, device))[None]


def jacobian_volume(
    transform: DenseTransform,
    grid: Grid,
    device: torch.device | str = "cpu",
    job: Job = SILENT,
) -> Volume:
    """Return the Jacobian determinant of a transform on another grid (the fixed image's own), slab by slab.

    Same values as :func:`fields.jacobian_determinant` of :func:`voxel_displacement`, in a fraction of its memory.
    """
    out = torch.empty(grid.shape)
    length = max(1, _SLAB_POINTS // (grid.shape[1] * grid.shape[2]))
    for begin in range(0, grid.shape[0], length):
        job.check()
        end = min(begin + length, grid.shape[0])
        # one more row on each side for the central differences
        first, last = max(0, min(begin - 1, grid.shape[0] - 2)), min(grid.shape[0], end + 1)
        affine = grid.affine.copy()
        affine[:3, 3] += affine[:3, 0] * first
        part = Grid((last - first, *grid.shape[1:]), affine)
        rows = fields.jacobian_determinant(voxel_displacement(transform, part, device))[0, 0]
        out[begin:end] = rows[begin - first : end - first].cpu()
    return Volume(out, grid)


def map_voxels(displacement: Tensor, grid: Grid, then: Transform | None, into: Grid) -> Tensor:
    """Return (1, 3, i, j, k): where ``then(p + u(p))`` of each voxel of ``grid`` lies, in voxels of ``into``.

    What a step samples the original moving image at: one interpolation, no detour over another grid.

    Args:
        displacement: (1, 3, i, j, k), u in voxels of ``grid``.
        grid: the working grid.
        then: the alignment; None for the identity.
        into: the moving image's grid.
    """
    to_index = np.linalg.inv(into.affine)
    at = fields.identity(grid.shape, displacement) + displacement
    if not isinstance(then, DenseTransform):
        return _map(to_index @ grid.affine if then is None else to_index @ then @ grid.affine, at)
    nodes = _turn(to_index, then.displacement).to(at)[None]
    to_node = np.linalg.inv(then.grid.affine) @ grid.affine
    return _map(to_index @ grid.affine, at) + fields.sample(nodes, _map(to_node, at), padding="border")


def index_points(grid: Grid, transform: Transform | None, into: Grid, device: torch.device | str = "cpu") -> Tensor:
    """Return (1, 3, *grid.shape): where each voxel of ``grid`` lands in ``into``, in voxels of ``into``."""
    return torch.cat(list(_landing_slabs(grid, transform, into, device)), dim=2)


def _landing_slabs(
    grid: Grid, transform: Transform | None, into: Grid, device: torch.device | str = "cpu"
) -> Iterator[Tensor]:
    """Yield :func:`index_points` slab by slab along i, each (1, 3, length, j, k)."""
    to_index = np.linalg.inv(into.affine)
    if not isinstance(transform, DenseTransform):
        matrix = to_index @ grid.affine if transform is None else to_index @ transform @ grid.affine
        yield from (_map(matrix, at) for at in _slabs(grid, device))
        return
    # the mean displacement goes into the matrix: the images may lie meters apart
    mean = transform.displacement.mean(dim=(1, 2, 3))
    matrix = np.eye(4)
    matrix[:3, 3] = mean.double().numpy()
    matrix = to_index @ matrix @ grid.affine
    nodes = _turn(to_index, transform.displacement - mean.view(3, 1, 1, 1)).to(device)[None]
    to_node = np.linalg.inv(transform.grid.affine) @ grid.affine
    for at in _slabs(grid, device):
        yield _map(matrix, at) + fields.sample(nodes, _map(to_node, at), padding="border")


def _slabs(grid: Grid, device: torch.device | str = "cpu") -> Iterator[Tensor]:
    """Yield the grid's voxel indices, slab by slab along i, each (1, 3, length, j, k)."""
    length = max(1, _SLAB_POINTS // (grid.shape[1] * grid.shape[2]))
    for begin in range(0, grid.shape[0], length):
        size = (min(length, grid.shape[0] - begin), *grid.shape[1:])
        indices = fields.identity(size, torch.empty(0, device=device))
        indices[:, 0] += begin
        yield indices


def _points(grid: Grid, matrix: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """Return (1, 3, *grid.shape): the grid's voxel centers (LPS mm), through a (4, 4) matrix."""
    return torch.cat([_map(matrix @ grid.affine, at) for at in _slabs(grid, device)], dim=2)


def _map(matrix: np.ndarray, points: Tensor) -> Tensor:
    """Return (1, 3, ...) points through a (4, 4) matrix."""
    return _turn(matrix, points[0])[None] + fields.per_axis(matrix[:3, 3].tolist(), points)


def _turn(matrix: np.ndarray, vectors: Tensor) -> Tensor:
    """Return (3, ...) vectors through the linear part of a (4, 4) matrix."""
    # by hand: autocast, TF32 and the like round the factors of a matrix product, which coordinates do not survive
    return torch.stack([a * vectors[0] + b * vectors[1] + c * vectors[2] for a, b, c in matrix[:3, :3].tolist()])
