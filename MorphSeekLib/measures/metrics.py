"""Figures by which a registration is judged: overlap, surface distance, folding, landmarks.

Every figure has several definitions in the literature; each function here states its own, and the ones that reports
print carry it along. Label images are integer tensors (i, j, k), background 0; Dice, HD95 and ``sdlogj_learn2reg``
follow the Learn2Reg challenge's evaluation, so that published tables can stand beside ours.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..io.labels import check_label_values
from ..space import fields

_FIXED, _MOVING, _WARPED = "The fixed label map", "The moving label map", "The warped label map"
_LARGEST_DIRECT_LABEL = 1 << 20  # beyond it labels are renumbered before they are counted

# The surface that separates set from unset corners of a 2x2x2 cell, cut through the middles of the edges: the area
# vectors (absolute components, unit cell) of its plane pieces, for one representative of each of the 13 kinds of cell.
# Corners are numbered 4a + 2b + c; turning, mirroring and exchanging set with unset give the other 254 - 13 cells.
# Which surface belongs to an ambiguous cell is a convention: that of DeepMind's surface-distance (Apache-2.0), which
# Learn2Reg uses.
_CELL_SURFACES: dict[tuple[int, ...], list[tuple[float, float, float]]] = {
    (0,): [(1 / 8, 1 / 8, 1 / 8)],
    (0, 1): [(1 / 2, 1 / 2, 0)],
    (0, 3): [(1 / 8, 1 / 8, 1 / 8)] * 2,
    (0, 7): [(1 / 8, 1 / 8, 1 / 8)] * 2,
    (0, 1, 2): [(1 / 2, 0, 0), (3 / 8, 3 / 8, 3 / 8)],
    (0, 1, 6): [(1 / 2, 1 / 2, 0), (1 / 8, 1 / 8, 1 / 8)],
    (0, 3, 5): [(1 / 8, 1 / 8, 1 / 8)] * 3,
    (0, 1, 2, 3): [(1, 0, 0)],
    (0, 1, 2, 4): [(3 / 4, 3 / 4, 3 / 4)],
    (0, 1, 2, 5): [(1 / 2, 1 / 2, 1 / 2), (1 / 4, 0, 1 / 4), (0, 1 / 4, 1 / 4)],
    (0, 1, 2, 7): [(1 / 2, 0, 0), (3 / 8, 3 / 8, 3 / 8), (1 / 8, 1 / 8, 1 / 8)],
    (0, 1, 6, 7): [(1 / 2, 1 / 2, 0)] * 2,
    (0, 3, 5, 6): [(1 / 8, 1 / 8, 1 / 8)] * 4,
}


@dataclass(frozen=True)
class LabelFigures:
    """How well the labels of a pair agree: the one definition behind every score, table and card.

    Attributes:
        dice: label -> Dice of every label that can be judged, ascending; 0 for a lost one.
        hd95: label -> 95 % Hausdorff distance in mm of every judged label that warping did not lose; empty where
            distances were not asked for.
        lost: the judged labels that warping lost, ascending.
    """

    dice: dict[int, float]
    hd95: dict[int, float]
    lost: tuple[int, ...]

    @property
    def mean_dice(self) -> float | None:
        """Mean over the judged labels; None without any."""
        return mean(self.dice.values())

    @property
    def mean_hd95(self) -> float | None:
        """Mean over the labels that have a distance; None without any."""
        return mean(self.hd95.values())


@dataclass(frozen=True)
class FoldingFigures:
    """What :func:`folding` measures; ``definition`` is printed wherever the figures are.

    Attributes:
        njd_percent: share of voxels whose Jacobian determinant J is <= 0, in percent.
        folded_voxels, voxels: the counts behind it.
        sdlogj: standard deviation of ln J over the voxels that do not fold (J > 0); NaN where all fold.
        sdlogj_learn2reg: Learn2Reg's figure of the same name, of ln(J + 3); see :func:`sdlogj_learn2reg`.
        min_jacobian, max_jacobian: extremes of J.
        definition: one sentence that says how J and the figures are computed.
    """

    njd_percent: float
    folded_voxels: int
    voxels: int
    sdlogj: float
    sdlogj_learn2reg: float
    min_jacobian: float
    max_jacobian: float
    definition: str = (
        "J: Jacobian determinant of fixed -> moving on the fixed image's own voxels, central differences, one-sided at "
        "the border; NJD: share of voxels with J <= 0; SDlogJ: standard deviation of ln J over voxels with J > 0; "
        "SDlogJ (Learn2Reg): of ln(J + 3), two voxels cropped from every side."
    )

    @classmethod
    def from_report(cls, section: Mapping[str, Any]) -> FoldingFigures:
        """Return the figures that a report's section "folding" holds, its other keys left out."""
        return cls(**{figure.name: section[figure.name] for figure in dataclasses.fields(cls)})


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the finite values; None without any. What could not be measured is left out, never counted."""
    kept = _finite(values)
    return statistics.fmean(kept) if kept else None


def deviation(values: Iterable[float | None]) -> float | None:
    """Return the standard deviation (of the whole population) of the finite values; None without any."""
    kept = _finite(values)
    return statistics.pstdev(kept) if kept else None


def label_figures(
    fixed_labels: Tensor,
    warped_labels: Tensor,
    moving_labels: Tensor,
    spacing: Sequence[float] | np.ndarray | None = None,
    labels: Iterable[int] | None = None,
) -> LabelFigures:
    """Judge the labels of a pair; see :class:`LabelFigures`.

    Args:
        fixed_labels, warped_labels, moving_labels, labels: as in :func:`dice_per_label`.
        spacing: mm between voxels along i, j, k; None measures no distances.

    Raises:
        MorphSeekError, ValueError: as :func:`dice_per_label` and :func:`hd95_per_label`.
    """
    labels = None if labels is None else tuple(labels)
    dice = dice_per_label(fixed_labels, warped_labels, labels, moving_labels)
    left = _count(warped_labels.reshape(-1), _WARPED)
    distances = {}
    if spacing is not None:
        distances = hd95_per_label(fixed_labels, warped_labels, spacing, labels, moving_labels)
    kept = {label: distance for label, distance in distances.items() if label in left}
    return LabelFigures(dice, kept, tuple(label for label in dice if label not in left))


def judged_labels(fixed_labels: Tensor, moving_labels: Tensor, labels: Iterable[int] | None = None) -> list[int]:
    """Return the labels that can be judged, before any warping: asked for, and present in both images; ascending.

    Raises:
        MorphSeekError, ValueError: as :func:`dice_per_label`.
    """
    return _judged(_count(fixed_labels.reshape(-1), _FIXED), labels, moving_labels)


def dice_per_label(
    fixed_labels: Tensor,
    warped_labels: Tensor,
    labels: Iterable[int] | None = None,
    moving_labels: Tensor | None = None,
) -> dict[int, float]:
    """Return the Dice overlap 2|A and B| / (|A| + |B|) of each label, background 0 left out.

    Learn2Reg's rule: a label that is absent from the fixed or from the UNWARPED moving image cannot be judged and is
    left out of the result; one that is in both but was lost in warping scores 0.

    Args:
        fixed_labels, warped_labels: (i, j, k) integers >= 0 on one grid.
        labels: the labels to score; None for all.
        moving_labels: the moving image's labels before warping, on any grid. Without it only absence from the fixed
            image leaves a label out.

    Returns:
        {label: Dice}, ascending; empty where nothing can be judged.

    Raises:
        MorphSeekError: a label is negative.
        ValueError: shapes differ, or labels are not whole numbers.
    """
    _check_labels(fixed_labels, warped_labels)
    fixed, warped = fixed_labels.reshape(-1), warped_labels.reshape(-1)
    in_fixed, in_warped = _count(fixed, _FIXED), _count(warped, _WARPED)
    in_both = _count(fixed[fixed == warped], _FIXED)
    return {
        label: 2 * in_both.get(label, 0) / (in_fixed[label] + in_warped.get(label, 0))
        for label in _judged(in_fixed, labels, moving_labels)
    }


def hd95_per_label(
    fixed_labels: Tensor,
    warped_labels: Tensor,
    spacing: Sequence[float] | np.ndarray = (1.0, 1.0, 1.0),
    labels: Iterable[int] | None = None,
    moving_labels: Tensor | None = None,
) -> dict[int, float]:
    """Return each label's 95 % Hausdorff distance in mm (in voxels at unit spacing, which is what Learn2Reg prints).

    Learn2Reg's definition, which is that of DeepMind's surface-distance: a surface element sits at each corner shared
    by eight voxels that are not all alike; its distance is that to the nearest element of the other surface, its weight
    the area of the surface through its cell; the figure is the larger of the two directions' weighted 95th percentiles.
    Outside the image is background. (surface-distance 0.1 itself stops with an error on an empty structure under
    NumPy 2, so it serves as a reference in the tests only.)

    Args:
        fixed_labels, warped_labels, labels, moving_labels: as in :func:`dice_per_label`, with the same rule for
            skipping.
        spacing: mm between voxels along i, j, k.

    Returns:
        {label: distance}, ascending; infinity where warping lost the label.

    Raises:
        MorphSeekError, ValueError: as :func:`dice_per_label`, or a spacing that is not three positive numbers.
    """
    from scipy import ndimage  # here, so that what needs PyTorch alone can be used without SciPy

    _check_labels(fixed_labels, warped_labels)
    spacing = np.asarray(spacing, dtype=np.float64)
    if spacing.shape != (3,) or not (spacing > 0).all():
        raise ValueError(f"Spacing must be three positive numbers in mm, not {spacing.tolist()}.")
    judged = _judged(_count(fixed_labels.reshape(-1), _FIXED), labels, moving_labels)
    arrays = [_renumbered(image, judged) for image in (fixed_labels, warped_labels)]
    boxes = [ndimage.find_objects(array, max_label=max(len(judged), 1)) for array in arrays]
    areas = _cell_areas(tuple(spacing.tolist()))
    distances = {}
    for number, label in enumerate(judged, start=1):
        (a, area_a), (b, area_b) = (
            _surface(array, box[number - 1], number, areas) for array, box in zip(arrays, boxes, strict=True)
        )
        distances[label] = (
            max(_percentile_95(a, area_a, b, spacing), _percentile_95(b, area_b, a, spacing)) if len(b) else math.inf
        )
    return distances


def folding(displacement: Tensor | None = None, jacobian: Tensor | None = None) -> FoldingFigures:
    """Measure folding and unevenness of a deformation; see :class:`FoldingFigures` for the definitions.

    Args:
        displacement: (1, 3, i, j, k), voxels of the fixed image's own grid (:func:`geometry.voxel_displacement`).
        jacobian: (1, 1, i, j, k) or (i, j, k), its :func:`fields.jacobian_determinant`, where that is known already.

    Raises:
        ValueError: neither is given, or the field holds NaN or infinity.
    """
    jacobian = _determinant(displacement, jacobian)
    voxels = jacobian.numel()
    valid = jacobian[jacobian > 0]
    folded = voxels - valid.numel()
    return FoldingFigures(
        njd_percent=100 * folded / voxels,
        folded_voxels=folded,
        voxels=voxels,
        sdlogj=_deviation(valid.double().log_()) if valid.numel() else math.nan,
        sdlogj_learn2reg=sdlogj_learn2reg(jacobian=jacobian),
        min_jacobian=float(jacobian.min()),
        max_jacobian=float(jacobian.max()),
    )


def sdlogj_learn2reg(displacement: Tensor | None = None, jacobian: Tensor | None = None) -> float:
    """Return what Learn2Reg's evaluation calls SDlogJ: standard deviation of ln(clip(J + 3, 1e-9, 1e9)).

    J by central differences, two voxels cropped from every side. The 3 keeps folded voxels in the domain of the
    logarithm and also makes the figure several times smaller than that of ln J: compare it with itself alone.

    Args:
        displacement, jacobian: as in :func:`folding`.

    Returns:
        the figure, or NaN where an axis is shorter than five voxels.
    """
    inner = _determinant(displacement, jacobian)[2:-2, 2:-2, 2:-2]
    return _deviation((inner.double() + 3).clamp_(1e-9, 1e9).log_()) if inner.numel() else math.nan


def landmark_errors(total: Tensor, fixed_points: Tensor, moving_points: Tensor, spacing: Sequence[float]) -> Tensor:
    """Return the distance of each fixed landmark, mapped by displacements, to its partner on the same grid.

    Args:
        total: (J, 3, i, j, k), voxels of the grid.
        fixed_points, moving_points: (n, 3), voxels of the grid, in the same order.
        spacing: of the grid, mm.

    Returns:
        (J, n) mm.
    """
    points = fixed_points.T.view(1, 3, -1, 1, 1)
    mapped = (points + fields.sample(total, points, padding="border")).flatten(2)
    scale = fields.per_axis(spacing, mapped).view(1, 3, 1)
    return ((mapped - moving_points.T[None]) * scale).norm(dim=1)


def target_registration_error(
    transform_points: Callable[[np.ndarray], np.ndarray],
    fixed_points_mm: np.ndarray,
    moving_points_mm: np.ndarray,
) -> np.ndarray:
    """Return the distance of each mapped fixed landmark to its partner in the moving image.

    Args:
        transform_points: maps (n, 3) LPS mm of the fixed space to moving space (:meth:`DenseTransform.map_points`).
        fixed_points_mm, moving_points_mm: (n, 3) LPS mm, in the same order.

    Returns:
        (n,) mm.

    Raises:
        ValueError: the two sets are not equally many 3D points.
    """
    fixed = np.asarray(fixed_points_mm, dtype=np.float64)
    moving = np.asarray(moving_points_mm, dtype=np.float64)
    if fixed.ndim != 2 or fixed.shape[1] != 3 or fixed.shape != moving.shape:
        raise ValueError(
            f"Landmarks come in pairs of 3D points, but the fixed ones have the shape {fixed.shape} and the moving "
            f"ones {moving.shape}."
        )
    return np.linalg.norm(transform_points(fixed) - moving, axis=1)


def _determinant(displacement: Tensor | None, jacobian: Tensor | None) -> Tensor:
    """Return (i, j, k), finite."""
    if jacobian is None:
        if displacement is None:
            raise ValueError("Give a displacement or its Jacobian determinant.")
        jacobian = fields.jacobian_determinant(displacement)
    if not bool(torch.isfinite(jacobian).all()):  # NaN would count as unfolded
        raise ValueError("The deformation holds NaN or infinite values; its folding cannot be measured.")
    return jacobian.reshape(jacobian.shape[-3:])


def _deviation(values: Tensor) -> float:
    return float(values.std(correction=0))


def _check_labels(fixed: Tensor, warped: Tensor) -> None:
    if fixed.shape != warped.shape:
        raise ValueError(
            f"Labels must lie on one grid, but the fixed ones have the shape {tuple(fixed.shape)} and the warped ones "
            f"{tuple(warped.shape)}."
        )


def _finite(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def _count(labels: Tensor, name: str) -> dict[int, int]:
    """Return {label: voxels} of the labels that occur, background left out, ascending."""
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"Labels must be whole numbers, not {labels.dtype}.")
    if labels.numel() == 0:
        return {}
    labels = labels.to(torch.uint8) if labels.dtype == torch.bool else labels
    check_label_values(labels, name)
    if int(labels.max()) > _LARGEST_DIRECT_LABEL:
        found, counts = torch.unique(labels, return_counts=True)
    else:
        counts = torch.bincount(labels)
        found = counts.nonzero()[:, 0]
        counts = counts[found]
    return {label: n for label, n in zip(found.tolist(), counts.tolist(), strict=True) if label != 0}


def _judged(in_fixed: dict[int, int], labels: Iterable[int] | None, moving_labels: Tensor | None) -> list[int]:
    """Return the labels to score: asked for, in the fixed image, and in the unwarped moving one; ascending."""
    present = set(in_fixed)
    if labels is not None:
        present &= set(labels)
    if moving_labels is not None:
        present &= set(_count(moving_labels.reshape(-1), _MOVING))
    return sorted(present)


def _renumbered(labels: Tensor, judged: list[int]) -> np.ndarray:
    """Renumber judged labels as 1, 2, ... in their order, everything else as 0."""
    array = labels.cpu().numpy().astype(np.int64, copy=False)
    if not judged:
        return np.zeros(array.shape, np.int32)
    position = np.minimum(np.searchsorted(judged, array), len(judged) - 1)
    return np.where(np.asarray(judged)[position] == array, position + 1, 0).astype(np.int32)


def _surface(
    array: np.ndarray, box: tuple[slice, ...] | None, number: int, areas: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return (n, 3) indices of the surface's elements (between voxels index - 1 and index) and their (n,) areas."""
    if box is None:
        return np.zeros((0, 3), int), np.zeros(0)
    mask = np.pad((array[box] == number).astype(np.uint8), 1)
    code = np.zeros([n - 1 for n in mask.shape], np.uint8)
    for bit, (a, b, c) in enumerate(product((0, 1), repeat=3)):
        code |= mask[a : a + code.shape[0], b : b + code.shape[1], c : c + code.shape[2]] << bit
    at = np.nonzero((code != 0) & (code != 255))
    return np.stack(at, axis=1) + [axis.start for axis in box], areas[code[at]]


def _percentile_95(elements: np.ndarray, area: np.ndarray, others: np.ndarray, spacing: np.ndarray) -> float:
    """Return the area-weighted 95th percentile of the distances of ``elements`` to the nearest of ``others``."""
    # lattice points: halving boxes takes a third of the time of the default, which looks for medians
    from scipy.spatial import KDTree

    tree = KDTree(others * spacing, balanced_tree=False, compact_nodes=False)
    nearest = tree.query(elements * spacing)[1]
    # again from whole indices: the tree's rounding would split equal distances
    distance = np.linalg.norm((elements - others[nearest]) * spacing, axis=1)
    order = np.argsort(distance, kind="stable")
    share = np.cumsum(area[order]) / area.sum()
    return float(distance[order[min(int(np.searchsorted(share, 0.95)), len(order) - 1)]])


@cache
def _cell_areas(spacing: tuple[float, float, float]) -> np.ndarray:
    """Return (256,) mm2: area of the surface through a cell whose corner 4a + 2b + c is set where that bit is."""
    sides = np.array([spacing[1] * spacing[2], spacing[0] * spacing[2], spacing[0] * spacing[1]])
    areas = np.zeros(256)
    corners = np.array(list(product((0, 1), repeat=3)))
    for kind, pieces in _CELL_SURFACES.items():
        for axes, mirrored in product(permutations(range(3)), product((0, 1), repeat=3)):
            turned = corners[list(kind)][:, list(axes)] ^ np.array(mirrored)
            code = int(np.sum(1 << (turned @ [4, 2, 1])))
            area = np.linalg.norm(np.array(pieces)[:, list(axes)] * sides, axis=1).sum()
            areas[code] = areas[255 - code] = area
    return areas
