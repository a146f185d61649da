"""Where a delivered transform folds, a proof where it does not, and how folds are pulled apart.

A dense transform is linear along each axis between its nodes (trilinear), so each cell between eight nodes is a linear
hexahedron. The Jacobian determinant of the map within a cell is a polynomial of degree 2 in each coordinate; its 27
Bernstein coefficients bound it, and eight of them are its values at the corners, which are the determinants of
one-sided differences. Central differences look past a fold that alternates from voxel to voxel.

Sources: Liu et al., "On finite difference Jacobian computation in deformable image registration", IJCV 2024 (corner
determinants); Johnen, Weill, Remacle, "Robust and efficient validation of the linear hexahedral element", 2017 (the
bound by Bernstein coefficients).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from . import fields
from .geometry import DenseTransform, Grid, Volume, apply_affine

MARGIN = 1e-9
"""A determinant above it counts as positive: far more than float64 rounds away."""
HALVINGS = 5
"""A cell that its coefficients do not decide is halved along each axis at most so many times."""
_CLEAR = 0.3  # a cell whose cheap bound reaches it needs no coefficients
_BLOCK_CELLS = 40_000  # of these a block's numbers stay in the processor's cache
_CHUNK = 20_000  # cells whose coefficients are computed together
# unfolding: corner determinants below _WANTED are raised until all are above this share of it; what is proven then is
# proven with a margin that the file's rounding cannot undo
_WANTED, _ENOUGH, _ROUNDED = 0.1, 0.2, 0.003
_RATE = 1.9  # of a projection: beyond the goal, which takes a third of the iterations
_STRIDE = 0.25  # voxels that a node moves by at most in an iteration
_RELAX = 10  # iterations between moves towards the neighbors, where a cell stays folded
# de Casteljau's halves of a polynomial of degree 2: coefficients of each half from those of the whole
_HALVES = (
    ((1.0, 0.0, 0.0), (0.5, 0.5, 0.0), (0.25, 0.5, 0.25)),
    ((0.25, 0.5, 0.25), (0.0, 0.5, 0.5), (0.0, 0.0, 1.0)),
)
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
    checkpoint: Callable[[], None] = lambda: None,
) -> Certificate:
    """Judge every cell of the grid on which a transform is delivered.

    Args:
        transform: the map as written; every axis at least two nodes.
        fixed: the fixed image's grid; shares are of the cells whose center lies in it.
        mirrored: whether the alignment exchanges left and right, so that determinants count with the other sign.
        checkpoint: called once a slab; may raise to cancel.

    Raises:
        ValueError: the displacement is not finite.
    """
    frame = _Frame(transform, mirrored)
    to_fixed = np.linalg.inv(fixed.affine) @ transform.grid.affine
    totals: dict[str, int] = dict.fromkeys(("cells", "folded", "undecided", "folded_outside", "undecided_outside"), 0)
    smallest = math.inf
    found: list[Parts] = []
    for block in frame.blocks():
        checkpoint()
        inside = _centers_inside(block, to_fixed, fixed)
        totals["cells"] += int(inside.sum()) if inside is not None else block.bound.numel()
        for cells in block.open_cells().split(_CHUNK):
            cell = _decide(bernstein(frame.corners(cells + block.first)))
            at = tuple(cells.unbind(1))
            block.bound[at] = torch.where(cell.folded | cell.undecided, math.inf, cell.bound).float()
            near = torch.ones_like(cell.folded) if inside is None else inside[at]
            for name, which in (("folded", cell.folded), ("undecided", cell.undecided)):
                totals[name] += int((which & near).sum())
                totals[f"{name}_outside"] += int((which & ~near).sum())
            number, low, size, determinant = cell.parts
            found.append(Parts(cells[number] + block.first + low, size, determinant))
        smallest = block.least(inside, smallest)
    count = FoldCount(
        **totals,
        proven=totals["cells"] - totals["folded"] - totals["undecided"],
        folded_percent=100 * totals["folded"] / max(totals["cells"], 1),
        smallest_proven=smallest * frame.scale if math.isfinite(smallest) else math.nan,
        no_fold_proven=not any(value for name, value in totals.items() if name != "cells"),
    )
    columns = zip(Parts(torch.zeros(0, 3), torch.zeros(0), torch.zeros(0)), *found, strict=True)
    low, size, determinant = (torch.cat(column) for column in columns)
    return Certificate(count, Parts(low, size, determinant * frame.scale))


def bernstein(corners: Tensor) -> Tensor:
    """Bernstein coefficients of the Jacobian determinant of trilinear cells.

    Args:
        corners: (2, 2, 2, 3, n): where the corner (a, b, c) of each of n cells goes.

    Returns:
        (3, 3, 3, n), of degree 2 along each axis. Those at even indices are the determinants at the corners; the least
        and the largest of all bound the determinant within the cell.
    """
    # derivatives: along the first axis bilinear in the other two, and so on
    s, t, r = corners[1] - corners[0], corners[:, 1] - corners[:, 0], corners[:, :, 1] - corners[:, :, 0]

    def cross(a: int, b: int) -> Tensor:  # (c, b, 3, n): of t at its first index a, and r at its first index b
        return torch.linalg.cross(t[a][:, None], r[b][None], dim=2)

    crosses = torch.stack([cross(0, 0), (cross(0, 1) + cross(1, 0)) / 2, cross(1, 1)])
    out = torch.zeros_like(corners[0, 0, 0, 0]).expand(3, 3, 3, -1).clone()
    for b, c, c2, b2 in product((0, 1), repeat=4):
        j, k = b + b2, c + c2
        weight = 0.5 ** ((j == 1) + (k == 1))
        x, y, z = crosses[:, c2, b2].unbind(1)
        out[:, j, k] += weight * (s[b, c, 0] * x + s[b, c, 1] * y + s[b, c, 2] * z)
    return out


def folded_voxels(folded: Parts, nodes: Grid, fixed: Grid) -> Tensor:
    """The least determinant of the folded cells and parts that meet each voxel's box, infinite where none does.

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
        position: LPS mm of the folded voxel next to its middle (the middle of a banana need not be folded).
        radius_mm: how far its farthest voxel lies from there.
    """

    voxels: int
    mm3: float
    determinant: float
    position: tuple[float, float, float]
    radius_mm: float


def regions(least: Volume) -> list[Region]:
    """The folded regions, largest first.

    Args:
        least: what :func:`folded_voxels` gives, on the fixed grid.
    """
    folded = (least.data <= 0).numpy()
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
    checkpoint: Callable[[], None] = lambda: None,
) -> DenseTransform:
    """Move nodes until every cell is proven not to fold, as little as it takes.

    Each node of a cell with a corner determinant below 0.1 moves by the mean of the moves that would raise these, one
    by one, to 0.1 (averaged projections); where a cell stays folded its nodes move towards their neighbors now and
    then, and a cell that folds between positive corners is asked for more. Only cells that are not proven and those
    about them are worked on.

    Args:
        transform, mirrored: as for :func:`certify`.
        iterations: the most; none where every cell is proven.
        checkpoint: called once an iteration; may raise to cancel.

    Returns:
        the transform; it may still fold where the iterations did not suffice.
    """
    frame = _Frame(transform, mirrored)
    active = torch.zeros([n - 1 for n in frame.shape], dtype=torch.bool)
    for block in frame.blocks():
        cells = block.open_cells() + block.first
        active[tuple(cells[_unproven(frame.corners(cells), 0.0)].unbind(1))] = True
    if not iterations or not bool(active.any()):
        return transform
    nodes = frame.nodes()
    start = nodes.clone()
    touched = active.clone()
    wanted = torch.full(active.shape, _WANTED)
    for iteration in range(iterations):
        checkpoint()
        touched |= _with_neighbors(active)
        cells = _with_neighbors(active).nonzero()
        least = torch.cat([_corner_determinants(nodes, chunk).amin(dim=0) for chunk in cells.split(_CHUNK)])
        goal = wanted[tuple(cells.unbind(1))]
        if bool((least < _ENOUGH * goal).any()):
            if iteration % _RELAX == _RELAX - 1:
                _relax(nodes, cells[least <= 0])
            cells = cells[least < goal]
            _project(nodes, cells, wanted)
        else:  # what is left folds between its corners
            cells = touched.nonzero()
            cells = cells[_unproven(_gathered(nodes, cells), _ROUNDED)]
            if not len(cells):
                break
            wanted[tuple(cells.unbind(1))] = (1.5 * wanted[tuple(cells.unbind(1))]).clamp(max=1)
        active.zero_()[tuple(cells.unbind(1))] = True
    moved = frame.to_mm((nodes - start)[0]).float()
    return DenseTransform(transform.displacement + moved, transform.grid)


class _Frame:
    """A transform in voxels of its own grid, with the whole map's affine part divided out.

    So displacements are small whatever the alignment, and a cell that keeps its shape has the determinant 1.

    Attributes:
        scale: what determinants in this frame are multiplied by to be those of the transform, relative to the
            alignment's sign.
    """

    def __init__(self, transform: DenseTransform, mirrored: bool) -> None:
        affine = transform.affine_part()
        if (np.linalg.det(affine[:3, :3]) < 0) != mirrored:
            affine = np.diag([-1.0 if mirrored else 1.0, 1, 1, 1])
        self.displacement = transform.displacement
        self.middle = self.displacement.mean(dim=(1, 2, 3), keepdim=True)
        self.shape = self.displacement.shape[1:]
        linear = transform.grid.affine[:3, :3]
        forth = np.linalg.inv(linear) @ affine[:3, :3] @ linear  # in voxels
        back = np.linalg.inv(forth)
        self.scale = abs(float(np.linalg.det(affine[:3, :3])))
        self._of_index = torch.from_numpy(back - np.eye(3))
        self._of_mm = torch.from_numpy(back @ np.linalg.inv(linear))
        self._to_mm = torch.from_numpy(linear @ forth)

    def nodes(self) -> Tensor:
        """(1, 3, i, j, k) float64: all displacements in this frame, but for a constant."""
        return self._moved(self.displacement.double() - self.middle.double(), (0, 0, 0))[None]

    def corners(self, cells: Tensor) -> Tensor:
        """(2, 2, 2, 3, n) float64: where the corners of cells (n, 3) go, but for a constant."""
        gathered = _gathered(self.displacement[None], cells) - _CORNER  # the displacements themselves
        at = cells.T + _CORNER
        moved = self._of_mm @ gathered.double() + self._of_index @ at
        return moved + _CORNER

    def blocks(self) -> Iterator[_Block]:
        """Blocks of nodes that share a face with the next; together their cells are all cells, each once."""
        rows = max(2, round(math.sqrt(_BLOCK_CELLS / self.shape[2])))
        for i, j in product(range(0, self.shape[0] - 1, rows), range(0, self.shape[1] - 1, rows)):
            block = self.displacement[:, i : i + rows + 1, j : j + rows + 1] - self.middle
            yield _Block(torch.tensor([i, j, 0]), self._moved(block, (i, j, 0))[None])

    def to_mm(self, difference: Tensor) -> Tensor:
        """(3, ...) LPS mm that nodes moved by, of their move in this frame."""
        return (self._to_mm @ difference.flatten(1)).view_as(difference)

    def _moved(self, block: Tensor, first: tuple[int, int, int]) -> Tensor:
        nodes = (self._of_mm.to(block) @ block.flatten(1)).view_as(block)
        for axis, begin in enumerate(first):
            index = torch.arange(begin, begin + block.shape[1 + axis], dtype=torch.float64) - self.shape[axis] / 2
            view = [3, *(-1 if a == axis else 1 for a in range(3))]
            nodes += (self._of_index[:, axis, None] * index).to(block).view(view)
        return nodes


_CORNER = torch.tensor(list(product((0.0, 1.0), repeat=3)), dtype=torch.float64).view(2, 2, 2, 3, 1)


class _Block:
    """Some rows of nodes, in single precision, and lower bounds of the determinant in each of their cells.

    Attributes:
        first: the index of the first node.
        bound: (i, j, k), below the determinant by more than single precision rounds away.
    """

    def __init__(self, first: Tensor, nodes: Tensor) -> None:
        self.first, self._nodes = first, nodes
        largest = float(nodes.abs().max())
        if not math.isfinite(largest):
            raise ValueError("The deformation holds NaN or infinite values; its folding cannot be measured.")
        # how far off an edge may be; a determinant by three times that times the product of two other edges
        self._rounding = 16 * torch.finfo(torch.float32).eps * max(largest, 1.0)
        self.bound = fields.determinant_bound(nodes)[0].sub_(20 * self._rounding)  # above 0 edges are below 2.5

    def open_cells(self) -> Tensor:
        """(n, 3): the cells that may fold, after a closer look at those that the cheap bound leaves open."""
        cells = (~(self.bound > MARGIN)).nonzero()
        self._look_closer(cells)
        self._looked_at = tuple(cells.unbind(1))
        return cells[~(self.bound[self._looked_at] > MARGIN)]

    def least(self, inside: Tensor | None, least: float) -> float:
        """The least of ``least`` and the bounds of the cells inside (None: all); after :meth:`open_cells`."""
        known = min(least, _CLEAR, _least(self.bound[self._looked_at]))
        self._look_closer((self.bound < known).nonzero())  # cheap bounds may lie far below the determinant
        return min(least, _least(self.bound if inside is None else self.bound[inside]))

    def _look_closer(self, cells: Tensor) -> None:
        for chunk in cells.split(_CHUNK):
            at = tuple(chunk.unbind(1))
            self.bound[at] = torch.maximum(self.bound[at], self._closer(chunk))

    def _closer(self, cells: Tensor) -> Tensor:
        """(n,): the least corner determinant, less how far a determinant may lie below those of its cell's corners.

        Along each axis the determinant is a polynomial of degree 2, so it lies below its linear interpolation by at
        most an eighth of its second derivative: along the first axis 2 det(s, dt/da, dr/da).
        """
        p = _gathered(self._nodes, cells)
        s, t, r = p[1] - p[0], p[:, 1] - p[:, 0], p[:, :, 1] - p[:, :, 0]
        least = fields.determinants_at_corners(p).amin(dim=0)

        def longest(*vectors: Tensor) -> Tensor:  # squared, of vectors (..., 3, n)
            squares = [x * x + y * y + z * z for x, y, z in (v.unbind(-2) for v in vectors)]
            return torch.stack([square.flatten(0, -2).amax(dim=0) for square in squares])

        edges = longest(s, t, r)
        mixed = longest(s[1] - s[0], s[:, 1] - s[:, 0], t[:, 1] - t[:, 0])  # of axes 0 1, 0 2, 1 2
        bends = (edges[0] * mixed[0] * mixed[1]).sqrt() + (edges[1] * mixed[0] * mixed[2]).sqrt()
        bends += (edges[2] * mixed[1] * mixed[2]).sqrt()
        return least - bends / 4 - 3 * self._rounding * edges.amax(dim=0)


def _least(values: Tensor) -> float:
    return float(values.min()) if values.numel() else math.inf


def _centers_inside(block: _Block, to_fixed: np.ndarray, fixed: Grid) -> Tensor | None:
    """(i, j, k) bool: which cells of a block have their center in the fixed image's box; None when all have."""
    limit = np.array(fixed.shape) - 0.5
    first, shape = block.first.tolist(), block.bound.shape
    ends = [(begin + 0.5, begin + n - 0.5) for begin, n in zip(first, shape, strict=True)]
    corners = apply_affine(to_fixed, np.array(list(product(*ends))))
    if ((corners >= -0.5) & (corners <= limit)).all():
        return None
    axes = [torch.arange(n, dtype=torch.float64) + begin + 0.5 for begin, n in zip(first, shape, strict=True)]
    i, j, k = axes[0].view(-1, 1, 1), axes[1].view(1, -1, 1), axes[2]
    inside = torch.ones(shape, dtype=torch.bool)
    for (a, b, c, shift), most in zip(to_fixed[:3].tolist(), limit, strict=True):
        at = a * i + (b * j + (c * k + shift))
        inside &= (at >= -0.5) & (at <= most)
    return inside


class _Decided(NamedTuple):
    """Of n cells: folded, undecided (n,) bool; bound (n,), what the determinant stays above where proven; parts where a
    fold was found: the cell's number, its corner within the cell (m, 3), its edge and the least determinant (m,)."""

    folded: Tensor
    undecided: Tensor
    bound: Tensor
    parts: tuple[Tensor, Tensor, Tensor, Tensor]


def _decide(coefficients: Tensor) -> _Decided:
    """Proven, folded or undecided, by halving what the coefficients (3, 3, 3, n) leave open."""
    n = coefficients.shape[-1]
    cell, low, size = torch.arange(n), torch.zeros(n, 3, dtype=torch.float64), 1.0
    folded, undecided = torch.zeros(2, n, dtype=torch.bool)
    bound = torch.full((n,), math.inf, dtype=torch.float64)
    parts = []
    for level in range(HALVINGS + 1):
        least = coefficients.flatten(0, 2).amin(dim=0)
        at_corners = coefficients[::2, ::2, ::2].flatten(0, 2).amin(dim=0)
        bad = at_corners <= 0
        folded[cell[bad]] = True
        parts.append((cell[bad], low[bad], torch.full_like(at_corners[bad], size), at_corners[bad]))
        bound.scatter_reduce_(0, cell, torch.where(least > MARGIN, least, math.inf), "amin")
        left = (least <= MARGIN) & ~folded[cell]
        if not bool(left.any()):
            break
        cell, low, coefficients = cell[left], low[left], coefficients[..., left]
        if level == HALVINGS:
            undecided[cell] = True
            break
        size /= 2
        children = list(product((0, 1), repeat=3))
        coefficients = torch.cat([_child(coefficients, child) for child in children], dim=-1)
        low = torch.cat([low + size * torch.tensor(child, dtype=torch.float64) for child in children])
        cell = cell.repeat(8)
    return _Decided(folded, undecided, bound, tuple(torch.cat(column) for column in zip(*parts, strict=True)))


def _child(coefficients: Tensor, child: tuple[int, int, int]) -> Tensor:
    """The coefficients (3, 3, 3, n) of one of a cell's eight halves along each axis."""
    for axis, half in enumerate(child):
        weights = coefficients.new_tensor(_HALVES[half])
        coefficients = torch.tensordot(weights, coefficients, dims=([1], [axis])).movedim(0, axis)
    return coefficients


def _gathered(nodes: Tensor, cells: Tensor) -> Tensor:
    """(2, 2, 2, 3, n): where the corners of cells (n, 3) go."""
    return fields.gather_corners(nodes, torch.zeros_like(cells[:, 0]), cells.unbind(1))


def _with_neighbors(cells: Tensor) -> Tensor:
    """A mask grown by one cell, over faces, edges and corners."""
    for axis in range(3):
        grown = cells.clone()
        n = cells.shape[axis] - 1
        grown.narrow(axis, 0, n).logical_or_(cells.narrow(axis, 1, n))
        grown.narrow(axis, 1, n).logical_or_(cells.narrow(axis, 0, n))
        cells = grown
    return cells


def _unproven(corners: Tensor, margin: float) -> Tensor:
    """(n,) bool: which cells (2, 2, 2, 3, n) are not proven to keep their determinant above a margin."""
    parts = []
    for chunk in corners.split(_CHUNK, dim=-1):
        cell = _decide(bernstein(chunk) - margin)
        parts.append(cell.folded | cell.undecided)
    return torch.cat(parts)


def _corner_determinants(nodes: Tensor, cells: Tensor) -> Tensor:
    """(8, n) of cells (n, 3)."""
    return fields.determinants_at_corners(_gathered(nodes, cells))


def _project(nodes: Tensor, cells: Tensor, wanted: Tensor) -> None:
    """Raise the corner determinants of cells (n, 3) that are below what is wanted, in place: one averaged projection.

    The determinant of the edges s, t, r that meet at a corner grows fastest along t x r, r x s and s x t.
    """
    strides = nodes.new_tensor([nodes.shape[3] * nodes.shape[4], nodes.shape[4], 1], dtype=torch.long)
    corner = _CORNER.view(8, 3).long()
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
    at = torch.unique((cells[:, None] + _CORNER.view(8, 3).long()).view(-1, 3), dim=0)
    mean = torch.zeros(3, len(at), dtype=nodes.dtype)
    for axis, way in product(range(3), (-1, 1)):
        beside = at.clone()
        beside[:, axis] = (beside[:, axis] + way).clamp(0, shape[axis] - 1)
        mean += nodes[0][(slice(None), *beside.unbind(1))] / 6
    here = (slice(None), *at.unbind(1))
    nodes[0][here] = (nodes[0][here] + mean) / 2
