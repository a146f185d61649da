"""Find where a delivered transform folds, prove where it does not, and pull folds apart.

A dense transform is linear along each axis between its nodes (trilinear), so each cell between eight nodes is a linear
hexahedron. The Jacobian determinant of the map within a cell is a polynomial of degree 2 in each coordinate; its 27
Bernstein coefficients bound it, and eight of them are its values at the corners, which are the determinants of
one-sided differences. Central differences look past a fold that alternates from voxel to voxel.

Sources: Liu et al., "On finite difference Jacobian computation in deformable image registration", IJCV 2024 (corner
determinants); Johnen, Weill, Remacle, "Robust and efficient validation of the linear hexahedral element", 2017 (the
bound by Bernstein coefficients).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..io.compiled import kernels
from ..protocol.job import SILENT, Job
from ..space import fields
from ..space.geometry import DenseTransform, Grid, Volume, apply_affine

MARGIN = 1e-9
"""A determinant above it counts as positive: far more than float64 rounds away."""
HALVINGS = 5
"""A cell that its coefficients do not decide is halved along each axis at most this many times."""
_CLEAR = 0.01  # a cell whose cheap bound exceeds it needs no coefficients
_BLOCK_NODES = 100_000  # of these a block's numbers stay in the processor's cache
_CHUNK = 8_000  # cells whose coefficients are computed together
# unfolding: corner determinants below _WANTED are raised until all are above this share of it; what is proven then is
# proven with a margin that the file's rounding cannot undo
_WANTED, _ENOUGH, _ROUNDED = 0.1, 0.2, 0.003
_RATE = 1.9  # of a projection: beyond the goal, which takes a third of the iterations
_STRIDE = 0.25  # voxels that a node moves by at most in an iteration
_FEW = 50  # cells, of which the last may take longer
_RELAX = 10  # iterations between moves toward the neighbors, where a cell stays folded
# de Casteljau's halves of a polynomial of degree 2: coefficients of each half from those of the whole
_HALVES = np.array(
    [
        [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.25, 0.5, 0.25]],
        [[0.25, 0.5, 0.25], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]],
    ]
)
# (216, 27): of the halves along three axes, in corner order, the coefficients
_EIGHTHS = np.einsum("aip,bjq,ckr->abcijkpqr", _HALVES, _HALVES, _HALVES).reshape(216, 27)
_CYCLIC = ((0, 1, 2), (1, 2, 0), (2, 0, 1))
_AT_CORNERS = [9 * a + 3 * b + c for a, b, c in product((0, 2), repeat=3)]  # of the 27
_CORNERS = torch.tensor(list(product((0.0, 1.0), repeat=3)), dtype=torch.float64)
DEFINITION = (
    "Judged is each cell between eight nodes of the transform as written, alignment included, linear between its nodes "
    "(Slicer sets transforms that it reads from files to cubic, which is another map; set them to linear), in the box "
    "between the outermost nodes. Determinants are relative to the sign of the alignment's. Folded: a determinant <= 0 "
    "was found at a corner of the cell or of a part of it; proven: the Bernstein coefficients of the determinant bound "
    f"it above 0 everywhere in the cell; undecided: neither after {HALVINGS} halvings. Shares are of the cells whose "
    "center lies in the fixed image. Proven cells do not fold; that far places do not meet is not proven."
)


@dataclass(frozen=True)
class FoldCount:
    """How the cells of a transform fold; ``definition`` is printed wherever the figures are.

    Attributes:
        cells: cells whose center lies in the fixed image.
        proven, folded, undecided: of those; see the definition.
        folded_percent: folded of cells, in percent.
        smallest_proven: what the determinant is proven to stay above in all proven cells of those; NaN without any.
        folded_outside, undecided_outside: cells whose center lies outside of the fixed image.
        no_fold_proven: whether no cell at all, inside or outside, is folded or undecided.
        definition: what the figures mean.
    """

    cells: int
    proven: int
    folded: int
    undecided: int
    folded_percent: float
    smallest_proven: float
    folded_outside: int
    undecided_outside: int
    no_fold_proven: bool
    definition: str = DEFINITION


class Parts(NamedTuple):
    """Cells, or parts of cells, where a determinant <= 0 was found, in voxels of the transform's grid.

    low (n, 3): the corner of least index; size (n,): the edge's length; determinant (n,): the least one found.
    """

    low: Tensor
    size: Tensor
    determinant: Tensor


@dataclass(frozen=True)
class Certificate:
    """What :func:`certify` found: the figures, and where the transform folds."""

    count: FoldCount
    folded: Parts


def certify(
    transform: DenseTransform,
    fixed: Grid,
    mirrored: bool = False,
    job: Job = SILENT,
) -> Certificate:
    """Judge every cell of the grid on which a transform is delivered.

    Args:
        transform: the map as written; every axis at least two nodes.
        fixed: the fixed image's grid; shares are of the cells whose center lies in it.
        mirrored: whether the alignment exchanges left and right, so that determinants count with the other sign.
        job: checked once per slab.

    Raises:
        ValueError: the displacement is not finite.
    """
    frame = _Frame(transform, mirrored)
    to_fixed = np.linalg.inv(fixed.affine) @ transform.grid.affine
    tally = _Tally(frame)
    for block in frame.blocks():
        job.check()
        inside = _centers_inside(block, to_fixed, fixed)
        clear, cells = block.bound > _CLEAR, block.open_cells()
        if inside is None:
            tally.cells += block.bound.size
            tally.judge(cells, np.ones(len(cells), bool))
        else:
            tally.cells += int(inside.sum())
            tally.judge(cells, inside[tuple((cells - block.first).T)])
            clear &= inside
        tally.smallest = min(tally.smallest, float(block.bound[clear].min(initial=math.inf)))
    return tally.certificate()


class _Tally:
    """What has been found so far; cells that need judging wait until there are enough of them."""

    def __init__(self, frame: _Frame) -> None:
        self.cells = 0
        self.smallest = math.inf
        self._frame = frame
        self._counts = dict.fromkeys(("folded", "undecided", "folded_outside", "undecided_outside"), 0)
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._found = [Parts(torch.zeros(0, 3), torch.zeros(0), torch.zeros(0))]

    def judge(self, cells: np.ndarray, near: np.ndarray) -> None:
        """Count cells (n, 3); near: (n,) bool, whether the center of each is in the fixed image."""
        self._waiting.append((cells, near))
        if sum(len(waiting) for waiting, _ in self._waiting) >= _CHUNK:
            self._judge_waiting()

    def certificate(self) -> Certificate:
        """Return all that was found, relative to the alignment's sign."""
        self._judge_waiting()
        counts, scale = self._counts, self._frame.scale
        count = FoldCount(
            cells=self.cells,
            folded=counts["folded"],
            undecided=counts["undecided"],
            folded_outside=counts["folded_outside"],
            undecided_outside=counts["undecided_outside"],
            proven=self.cells - counts["folded"] - counts["undecided"],
            folded_percent=100 * counts["folded"] / max(self.cells, 1),
            smallest_proven=self.smallest * scale if math.isfinite(self.smallest) else math.nan,
            no_fold_proven=not any(counts.values()),
        )
        low, size, determinant = (torch.cat(column) for column in zip(*self._found, strict=True))
        return Certificate(count, Parts(low, size, determinant * scale))

    def _judge_waiting(self) -> None:
        if not self._waiting:
            return
        cells, near = (np.concatenate(column) for column in zip(*self._waiting, strict=True))
        self._waiting = []
        for begin in range(0, len(cells), _CHUNK):
            chunk = slice(begin, begin + _CHUNK)
            self._judge_chunk(cells[chunk], near[chunk])

    def _judge_chunk(self, cells: np.ndarray, near: np.ndarray) -> None:
        found = _decide(self._frame.coefficients(cells))
        self._count("folded", near[found.folded])
        self._count("undecided", near[found.undecided])
        proven = found.bound[near & ~(found.folded | found.undecided)]
        self.smallest = min(self.smallest, float(proven.min(initial=math.inf)))
        number, low, size, determinant = map(torch.from_numpy, found.parts)
        self._found.append(Parts(torch.from_numpy(cells)[number] + low, size, determinant))

    def _count(self, name: str, near: np.ndarray) -> None:
        inside = int(near.sum())
        self._counts[name] += inside
        self._counts[f"{name}_outside"] += len(near) - inside


def bernstein(corners: Tensor) -> Tensor:
    """Return the Bernstein coefficients of the Jacobian determinant of trilinear cells.

    Args:
        corners: (2, 2, 2, 3, n): where the corner (a, b, c) of each of n cells goes.

    Returns:
        (3, 3, 3, n), of degree 2 along each axis. Those at even indices are the determinants at the corners; the least
        and the largest of all bound the determinant within the cell.
    """
    p = corners.movedim(3, 0)
    return _coefficients(p[:, 1] - p[:, 0], p[:, :, 1] - p[:, :, 0], p[:, :, :, 1] - p[:, :, :, 0])


def _coefficients(s: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """Return :func:`bernstein` of n cells' edges: (3, 2, 2, n), along an axis at each corner of the other two axes.

    The derivative along the first axis, s, is linear in the other two, and so on; a product of two polynomials of
    degree 1 has the products of the coefficients at its ends, and in the middle the mean of the mixed ones.
    """
    across = s.new_zeros(3, 2, 2, 2, 2, s.shape[-1])  # component; a of t, a of r, b of r, c of t
    _add_cross(across, t[:, :, None, None], r[:, None, :, :, None])
    across = _merged(across, 1)
    products = _dot(s[:, None, None, :, None], across[:, :, :, None, :, None])  # a; b of r, b of s, c of t, c of s
    return _merged(_merged(products, 1), 2)


def _merged(products: Tensor, axis: int) -> Tensor:
    """Return the three coefficients of degree 2 of the products of two polynomials of degree 1, whose ends stand along
    an axis and the next."""
    (first, mixed), (mixed_too, last) = (half.unbind(axis) for half in products.unbind(axis))
    return torch.stack([first, (mixed + mixed_too).div_(2), last], dim=axis)


def _add_cross(out: Tensor, t: Tensor, r: Tensor) -> None:
    """Add the cross product of vectors (3, ...), component by component: what is worked on stays in the cache."""
    for x, y, z in _CYCLIC:
        out[x].addcmul_(t[y], r[z]).addcmul_(t[z], r[y], value=-1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the scalar product of vectors (3, ...)."""
    return torch.mul(a[0], b[0]).addcmul_(a[1], b[1]).addcmul_(a[2], b[2])


def folded_voxels(folded: Parts, nodes: Grid, fixed: Grid) -> Tensor:
    """Return the least determinant of the folded cells and parts that meet each voxel's box, infinite where none does.

    Args:
        folded: from :func:`certify`.
        nodes: the transform's grid.
        fixed: the fixed image's grid, of any direction.

    Returns:
        float32 of the fixed grid's shape; folding.nii.gz is where it is <= 0.
    """
    out = torch.full((math.prod(fixed.shape),), math.inf)
    to_fixed = np.linalg.inv(fixed.affine) @ nodes.affine
    half_voxel = np.full(3, 0.5)
    edges = to_fixed[:3, :3]  # columns: a cell's edges, in voxels of the fixed grid
    # separating axes of two boxes: their faces' normals and the cross products of their edges
    normals = [*np.eye(3), *np.linalg.inv(edges), *(np.cross(a, b) for a in np.eye(3) for b in edges.T)]
    axes = np.array([normal / np.linalg.norm(normal) for normal in normals if np.linalg.norm(normal) > 1e-9])
    reach_voxel = np.abs(axes) @ half_voxel
    reach_cell = np.abs(axes @ edges).sum(axis=1) / 2
    strides = np.array([fixed.shape[1] * fixed.shape[2], fixed.shape[2], 1])
    for size in torch.unique(folded.size).tolist():
        chosen = folded.size == size
        centers = apply_affine(to_fixed, folded.low[chosen].double().numpy() + size / 2)
        values = folded.determinant[chosen].float().numpy()
        around = np.ceil(size * np.abs(edges).sum(axis=1) / 2 + 0.5).astype(int)
        near = np.indices(2 * around + 1).reshape(3, -1).T - around
        length = max(1, 2_000_000 // len(near))
        for begin in range(0, len(centers), length):
            center = centers[begin : begin + length, None]
            voxel = np.round(center).astype(int) + near
            apart = np.abs((voxel - center) @ axes.T) >= reach_voxel + size * reach_cell - 1e-6
            meets = ~apart.any(axis=2) & ((voxel >= 0) & (voxel < fixed.shape)).all(axis=2)
            which, _ = np.nonzero(meets)
            at = torch.from_numpy(voxel[meets] @ strides)
            out.scatter_reduce_(0, at, torch.from_numpy(values[begin : begin + length][which]), "amin")
    return out.view(fixed.shape)


@dataclass(frozen=True)
class Region:
    """Folded voxels that touch by face, edge or corner.

    Attributes:
        voxels, mm3: its size.
        determinant: the least one found in it.
        position: LPS mm of the folded voxel next to its middle (the middle of a bent region need not be folded).
        radius_mm: how far its farthest voxel lies from there.
    """

    voxels: int
    mm3: float
    determinant: float
    position: tuple[float, float, float]
    radius_mm: float


def regions(least: Volume) -> list[Region]:
    """Return the folded regions, largest first.

    Args:
        least: what :func:`folded_voxels` gives, on the fixed grid.
    """
    folded = (least.data <= 0).numpy()
    if not folded.any():
        return []
    from scipy import ndimage  # what does not fold goes without it

    clusters, count = ndimage.label(folded, np.ones((3, 3, 3)))
    voxel = abs(float(np.linalg.det(least.grid.affine[:3, :3])))
    rows = []
    for number, box in enumerate(ndimage.find_objects(clusters, count), start=1):
        here = clusters[box] == number
        index = np.argwhere(here) + [axis.start for axis in box]
        points = apply_affine(least.grid.affine, index)
        middle = points[np.linalg.norm(points - points.mean(axis=0), axis=1).argmin()]
        rows.append(
            Region(
                len(index),
                len(index) * voxel,
                float(least.data.numpy()[box][here].min()),
                tuple(middle.tolist()),
                float(np.linalg.norm(points - middle, axis=1).max()),
            )
        )
    return sorted(rows, key=lambda region: (-region.voxels, region.determinant))


def unfold(
    transform: DenseTransform,
    mirrored: bool = False,
    iterations: int = 300,
    job: Job = SILENT,
) -> DenseTransform:
    """Move nodes until every cell is proven not to fold, as little as it takes.

    Each node of a cell with a corner determinant below 0.1 moves by the mean of the moves that would raise these, one
    by one, to 0.1 (averaged projections); where a cell stays folded its nodes move toward their neighbors now and
    then, and a cell that folds between positive corners is asked for more. Only cells that are not proven and their
    neighbors are changed.

    Args:
        transform, mirrored: as for :func:`certify`.
        iterations: the most in which the folded cells that are left do not become fewer, ten times as many for the
            last few, which cost little; none where every cell is proven.
        job: checked once per iteration.

    Returns:
        the transform; it may still fold where that did not suffice.
    """
    frame = _Frame(transform, mirrored)
    active = torch.zeros([n - 1 for n in frame.shape], dtype=torch.bool)
    for block in frame.blocks():
        unsure = block.open_cells()
        found = _decide(frame.coefficients(unsure))
        active.numpy()[tuple(unsure[found.folded | found.undecided].T)] = True
    if not iterations or not bool(active.any()):
        return transform
    nodes = frame.nodes()
    start = nodes.clone()
    touched = active.clone()
    wanted = torch.full(active.shape, _WANTED)
    fewest, last = active.numel(), iterations
    for iteration in itertools.count():
        job.check()
        touched |= _with_neighbors(active)
        cells = _with_neighbors(active).nonzero()
        least = torch.cat([_corner_determinants(nodes, chunk).amin(dim=0) for chunk in cells.split(_CHUNK)])
        goal = wanted[tuple(cells.unbind(1))]
        if bool((least < _ENOUGH * goal).any()):
            left = int((least <= 0).sum())
            if iteration % _RELAX == _RELAX - 1:
                _relax(nodes, cells[least <= 0])
            cells = cells[least < goal]
            _project(nodes, cells, wanted)
        else:  # what is left folds between its corners
            cells = touched.nonzero()
            cells = cells[_unproven(_gathered(nodes, cells), _ROUNDED)]
            left = len(cells)
            if not left:
                break
            goal = wanted[tuple(cells.unbind(1))]
            _relax(nodes, cells[goal >= 1])
            wanted[tuple(cells.unbind(1))] = (1.5 * goal).clamp(max=1)
        if left < fewest:
            fewest = left
            last = iteration + iterations * (1 if fewest > _FEW else 10)
        elif iteration >= last:
            break
        active.zero_()[tuple(cells.unbind(1))] = True
    moved = frame.to_mm((nodes - start)[0]).float()
    return DenseTransform(transform.displacement + moved, transform.grid)


class _Frame:
    """What determinants of a transform are relative to: the whole map's affine part, and the grid's own.

    Attributes:
        scale: what determinants in this frame are multiplied by to be those of the transform, relative to the
            alignment's sign.
        volume: of a cell that keeps its shape, mm^3; below 0 where it is mirrored.
    """

    def __init__(self, transform: DenseTransform, mirrored: bool) -> None:
        self.displacement = transform.displacement.contiguous()
        # one pass tells almost always; a sum may be too large a number of finite values
        if not bool(self.displacement.sum().isfinite()) and not bool(self.displacement.isfinite().all()):
            raise ValueError("The deformation holds NaN or infinite values; its folding cannot be measured.")
        affine = transform.affine_part()[:3, :3]
        if (np.linalg.det(affine) < 0) != mirrored:
            affine = np.diag([-1.0 if mirrored else 1.0, 1, 1])
        self.shape = self.displacement.shape[1:]
        self.linear = transform.grid.affine[:3, :3]
        self.affine = affine
        self.scale = abs(float(np.linalg.det(affine)))
        self.volume = float(np.linalg.det(affine @ self.linear))
        compilable = self.displacement.device.type == "cpu" and self.displacement.dtype == torch.float32
        self._kernels = kernels("measures.fold_kernels") if compilable else None

    def nodes(self) -> Tensor:
        """Return (1, 3, i, j, k) float64: displacements in voxels, small whatever the alignment, but for a constant."""
        back = np.linalg.inv(self.affine @ self.linear)
        nodes = self._times(back, self.displacement.double())
        of_index = torch.from_numpy(back @ self.linear - np.eye(3))
        for axis, n in enumerate(self.shape):
            view = [3, *(-1 if a == axis else 1 for a in range(3))]
            nodes += (of_index[:, axis, None] * torch.arange(n, dtype=torch.float64)).view(view)
        return nodes[None]

    def to_mm(self, difference: Tensor) -> Tensor:
        """Return (3, ...) LPS mm that nodes moved by, of their move in :meth:`nodes`."""
        return self._times(self.affine @ self.linear, difference)

    def blocks(self) -> Iterator[_Block]:
        """Yield blocks whose cells together are all cells, each once."""
        rows = math.sqrt(_BLOCK_NODES / self.shape[2])
        starts = [range(0, n - 1, math.ceil((n - 1) / math.ceil((n - 1) / rows))) for n in self.shape[:2]]
        for i, j in product(*starts):
            end = [
                min(begin + start.step, n - 1) for begin, start, n in zip((i, j), starts, self.shape[:2], strict=True)
            ]
            yield _Block(np.array([i, j, 0]), self._cheap_bound((i, j), end))

    def coefficients(self, cells: np.ndarray) -> np.ndarray:
        """Return (27, n) Bernstein coefficients of the determinant (relative to the frame) in cells (n, 3).

        Of a cell that is folded at a corner, only the least one at a corner needs to be right.
        """
        if self._kernels is not None:
            out = np.empty((3, 3, 3, len(cells)))
            edges = np.ascontiguousarray(self.linear.T)
            self._kernels.coefficients(self.displacement.numpy(), edges, self.volume, cells, out)
            return out.reshape(27, -1)
        strides = torch.tensor([self.shape[1] * self.shape[2], self.shape[2], 1])
        corners = _CORNERS.long() @ strides
        places = (corners[:, None] + (torch.from_numpy(cells) * strides).sum(dim=1)).flatten()
        u = self.displacement.flatten(1).index_select(1, places).view(3, 2, 2, 2, -1).double()
        linear = torch.from_numpy(self.linear.T.copy())[..., None, None, None]
        s, t, r = (u.select(axis, 1) - u.select(axis, 0) + linear[axis - 1] for axis in (1, 2, 3))
        return _coefficients(s, t, r).div_(self.volume).flatten(0, 2).numpy()

    def _cheap_bound(self, begin: tuple[int, int], end: list[int]) -> np.ndarray:
        """Return (i, j, k): :func:`cheap_bound` in the cells from a first along i and j to the one after the last."""
        if self._kernels is None:
            nodes = self.displacement[:, begin[0] : end[0] + 1, begin[1] : end[1] + 1]
            return cheap_bound(nodes, torch.from_numpy(self.linear).float(), self.volume).numpy()
        bound = np.empty([end[0] - begin[0], end[1] - begin[1], self.shape[2] - 1], np.float32)
        edges = np.ascontiguousarray(self.linear.T, np.float32)
        self._kernels.cheap_bound(self.displacement.numpy(), edges, np.float32(1 / self.volume), begin, bound)
        return bound

    @staticmethod
    def _times(matrix: np.ndarray, field: Tensor) -> Tensor:
        return (torch.from_numpy(matrix) @ field.flatten(1)).view_as(field)


@dataclass(frozen=True)
class _Block:
    """Some cells: those next to each other along i and j, and all along k.

    Attributes:
        first: (3,), the index of the first.
        bound: (i, j, k), below the determinant (relative to the frame) of each.
    """

    first: np.ndarray
    bound: np.ndarray

    def open_cells(self) -> np.ndarray:
        """Return (n, 3): the index within the transform of cells that the cheap bound does not prove clear of 0."""
        places = np.flatnonzero(~(self.bound > _CLEAR))
        return np.stack(np.unravel_index(places, self.bound.shape), axis=1) + self.first


def cheap_bound(displacement: Tensor, linear: Tensor, volume: float) -> Tensor:
    """Bound the determinant in each cell from below, in few passes over memory.

    The least corner determinant, less how far a determinant may lie below those of its cell's corners: along each axis
    it is a polynomial of degree 2, so it lies below its linear interpolation by at most an eighth of its second
    derivative, which is along the first axis 2 det(s, dt/da, dr/da).

    In single precision differences of neighbors are off by 2 eps of the longest edge at most, a determinant so by 10
    eps of its cube, and the bends by 26 eps; 64 eps of it are taken off.

    Nodes lie in one row, so that the neighbors along an axis are a fixed number of places away and every step is over
    contiguous memory. A number of a cell stands at the cell's first node; what stands at the last node along an axis,
    whose neighbor is the first of the next line, belongs to no cell.

    Args:
        displacement: (3, i, j, k), mm.
        linear: (3, 3); columns: the edges of a cell at rest, mm.
        volume: of a cell that keeps its shape, mm^3, with its sign.

    Returns:
        (i - 1, j - 1, k - 1), relative to that volume; above 0 where the cell does not fold.
    """
    shape = displacement.shape[1:]
    strides = i, j, k = (shape[1] * shape[2], shape[2], 1)
    nodes = displacement.flatten(1)
    s, t, r = ((nodes[:, step:] - nodes[:, :-step]).add_(linear[:, axis, None]) for axis, step in enumerate(strides))
    number = nodes.shape[1] - i - j - k
    least = _least_at_corners(s, t, r, strides, number, volume < 0)
    edges = [_longest(s, j, k), _longest(t, i, k), _longest(r, i, j)]
    ij, ik, jk = (_longest(e[:, step:] - e[:, :-step], o) for e, step, o in ((s, j, k), (s, k, j), (t, k, i)))
    bends = (edges[0] * ij).mul_(ik).addcmul_(edges[1] * ij, jk).addcmul_(edges[2] * ik, jk)
    longest = torch.maximum(edges[0], edges[1])
    torch.maximum(longest, edges[2], out=longest).clamp_(min=float(linear.norm(dim=0).max()))
    least.sub_(bends, alpha=0.25).sub_(longest.pow(3), alpha=64 * torch.finfo(torch.float32).eps)
    at_nodes = torch.nn.functional.pad(least.div_(abs(volume)), (0, nodes.shape[1] - number)).view(shape)
    return at_nodes[:-1, :-1, :-1]


def _least_at_corners(
    s: Tensor, t: Tensor, r: Tensor, strides: tuple[int, int, int], number: int, mirrored: bool
) -> Tensor:
    """Return (number,): the least corner determinant of cells, of the edges (3, ...) that begin at each node; with the
    other sign where mirrored."""
    i, j, k = strides
    least = s.new_full((number,), math.inf)
    across = s.new_empty(3, number + i)
    for b, c in product((0, j), (0, k)):
        # s at (b, c) meets t at (a, c) and r at (a, b); the corner a = 1 of a cell is a = 0 of the next
        here = t[:, c : c + number + i], r[:, b : b + number + i]
        first, second = reversed(here) if mirrored else here
        for x, y, z in _CYCLIC:
            torch.mul(first[y], second[z], out=across[x]).addcmul_(first[z], second[y], value=-1)
        along = s[:, b + c : b + c + number]
        for a in (0, i):
            torch.minimum(least, _dot(along, across[:, a : a + number]), out=least)
    return least


def _longest(vectors: Tensor, *steps: int) -> Tensor:
    """Return the length of vectors (3, n); the largest of those that the steps along the row lead to."""
    squares = _dot(vectors, vectors)
    for step in steps:
        squares = torch.maximum(squares[step:], squares[:-step])
    return squares.sqrt_()


def _centers_inside(block: _Block, to_fixed: np.ndarray, fixed: Grid) -> np.ndarray | None:
    """Return (i, j, k) bool: which cells of a block have their center in the fixed image's box; None when all have."""
    limit = np.array(fixed.shape) - 0.5
    first, shape = block.first.tolist(), block.bound.shape
    ends = [(begin + 0.5, begin + n - 0.5) for begin, n in zip(first, shape, strict=True)]
    corners = apply_affine(to_fixed, np.array(list(product(*ends))))
    if ((corners >= -0.5) & (corners <= limit)).all():
        return None
    inside = np.ones(shape, bool)
    for row, most in zip(to_fixed[:3], limit, strict=True):
        at = np.full((1, 1, 1), row[3])
        for axis in (2, 1, 0):
            if abs(row[axis]) > 1e-12:  # along an axis of the fixed image the other two need not be looked at
                steps = np.arange(shape[axis]) + first[axis] + 0.5
                at = row[axis] * steps.reshape([-1 if a == axis else 1 for a in range(3)]) + at
        inside &= (at >= -0.5) & (at <= most)
    return inside


class _Decided(NamedTuple):
    """Of n cells: folded, undecided (n,) bool; bound (n,), what the determinant stays above where proven; parts where a
    fold was found: the cell's number, its corner within the cell (m, 3), its edge and the least determinant (m,)."""

    folded: np.ndarray
    undecided: np.ndarray
    bound: np.ndarray
    parts: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _decide(coefficients: np.ndarray) -> _Decided:
    """Decide proven, folded or undecided, by halving what the coefficients (27, n) leave open.

    Few cells are halved, many times: numpy, whose calls cost less than torch's.
    """
    n = coefficients.shape[1]
    cell, low, size = np.arange(n), np.zeros((n, 3)), 1.0
    folded, undecided = np.zeros((2, n), bool)
    bound = np.full(n, math.inf)
    parts = []
    for level in range(HALVINGS + 1):
        least = coefficients.min(axis=0)
        at_corners = coefficients[_AT_CORNERS].min(axis=0)
        bad = np.flatnonzero(at_corners <= 0)
        folded[cell[bad]] = True
        parts.append((cell[bad], low[bad], np.full(len(bad), size), at_corners[bad]))
        np.minimum.at(bound, cell, np.where(least > MARGIN, least, math.inf))
        left = np.flatnonzero(~(least > MARGIN) & ~folded[cell])
        if not len(left):
            break
        cell, low = cell[left], low[left]
        if level == HALVINGS:
            undecided[cell] = True
            break
        size /= 2
        # coefficients, low and cell of all first halves, then of all second ones, and so on
        coefficients = (_EIGHTHS @ coefficients[:, left]).reshape(8, 27, -1).swapaxes(0, 1).reshape(27, -1)
        low = (low + size * _CORNERS.numpy()[:, None]).reshape(-1, 3)
        cell = np.concatenate([cell] * 8)
    cells, lows, sizes, determinants = (np.concatenate(column) for column in zip(*parts, strict=True))
    return _Decided(folded, undecided, bound, (cells, lows, sizes, determinants))


def _gathered(nodes: Tensor, cells: Tensor) -> Tensor:
    """Return (2, 2, 2, 3, n): where the corners of cells (n, 3) go."""
    return fields.gather_corners(nodes, torch.zeros_like(cells[:, 0]), cells.unbind(1))


def _with_neighbors(cells: Tensor) -> Tensor:
    """Return a mask grown by one cell, over faces, edges and corners."""
    for axis in range(3):
        grown = cells.clone()
        n = cells.shape[axis] - 1
        grown.narrow(axis, 0, n).logical_or_(cells.narrow(axis, 1, n))
        grown.narrow(axis, 1, n).logical_or_(cells.narrow(axis, 0, n))
        cells = grown
    return cells


def _unproven(corners: Tensor, margin: float) -> Tensor:
    """Return (n,) bool: which cells (2, 2, 2, 3, n) are not proven to keep their determinant above a margin."""
    parts = []
    for chunk in corners.split(_CHUNK, dim=-1):
        cell = _decide(bernstein(chunk).flatten(0, 2).numpy() - margin)
        parts.append(torch.from_numpy(cell.folded | cell.undecided))
    return torch.cat(parts)


def _corner_determinants(nodes: Tensor, cells: Tensor) -> Tensor:
    """Return (8, n) of cells (n, 3)."""
    return fields.determinants_at_corners(_gathered(nodes, cells))


def _project(nodes: Tensor, cells: Tensor, wanted: Tensor) -> None:
    """Raise the corner determinants of cells (n, 3) that are below what is wanted, in place: one averaged projection.

    The determinant of the edges s, t, r that meet at a corner grows fastest along t x r, r x s and s x t.
    """
    strides = nodes.new_tensor([nodes.shape[3] * nodes.shape[4], nodes.shape[4], 1], dtype=torch.long)
    corner = _CORNERS.long()
    sign = (2 * corner - 1).to(nodes)[..., None]  # of the corner's own move: an edge runs from low to high
    moves, places = [], []
    for chunk in cells.split(_CHUNK):
        p = _gathered(nodes, chunk)
        s, t, r = p[1] - p[0], p[:, 1] - p[:, 0], p[:, :, 1] - p[:, :, 0]
        s, t, r = (
            torch.stack(e) for e in zip(*((s[b, c], t[a, c], r[a, b]) for a, b, c in corner.tolist()), strict=True)
        )
        slopes = [torch.linalg.cross(t, r, dim=1), torch.linalg.cross(r, s, dim=1), torch.linalg.cross(s, t, dim=1)]
        lacking = torch.relu(wanted[tuple(chunk.unbind(1))] - (s * slopes[0]).sum(dim=1))
        own = sum(sign[:, axis, None] * slope for axis, slope in enumerate(slopes))
        steepness = sum(slope.square().sum(dim=1) for slope in (*slopes, own)).clamp(min=0.5)
        push = (lacking / steepness)[:, None]
        at = chunk @ strides + (corner @ strides)[:, None]
        far = [at - sign[:, axis].long() * strides[axis] for axis in range(3)]
        pushes = [push * own, *(-sign[:, axis, None] * push * slope for axis, slope in enumerate(slopes))]
        needed = (lacking > 0).expand(4, -1, -1)
        moves.append(torch.stack(pushes).movedim(2, 0)[:, needed])
        places.append(torch.stack([at, *far])[needed])
    touched, place = torch.unique(torch.cat(places), return_inverse=True)
    total = torch.zeros(3, len(touched), dtype=nodes.dtype).index_add_(1, place, torch.cat(moves, dim=1))
    step = total.mul_(_RATE / torch.bincount(place, minlength=len(touched)))
    length = step.norm(dim=0)
    nodes[0].view(3, -1)[:, touched] += step * (_STRIDE / length.clamp(min=_STRIDE))


def _relax(nodes: Tensor, cells: Tensor) -> None:
    """Move the nodes of cells (n, 3) half of the way to the mean of their six neighbors, in place."""
    shape = nodes.shape[2:]
    at = torch.unique((cells[:, None] + _CORNERS.long()).view(-1, 3), dim=0)
    mean = torch.zeros(3, len(at), dtype=nodes.dtype)
    for axis, way in product(range(3), (-1, 1)):
        beside = at.clone()
        beside[:, axis] = (beside[:, axis] + way).clamp(0, shape[axis] - 1)
        there = (slice(None), *beside.unbind(1))
        mean += nodes[0][there] / 6
    here = (slice(None), *at.unbind(1))
    nodes[0][here] = (nodes[0][here] + mean) / 2
