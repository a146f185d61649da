"""The figures of a registered pair: one row, one function that measures it, one table of what the figures mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from ..space import fields
from .metrics import FoldingFigures, folding, label_figures, landmark_errors

Value = float | str | list[str] | dict[str, float] | None
"""What a figure is in JSON."""


@dataclass(frozen=True)
class Place:
    """Where figures are measured, as their definitions say.

    Attributes:
        grid: whose voxels count.
        cells: what ``folded_percent`` is.
    """

    grid: str
    cells: str


DELIVERED = Place(
    "the fixed image's grid",
    "share of the cells of the delivered transform, alignment included, in which a determinant <= 0 was found; "
    "no_fold_proven: whether every cell is proven not to fold (MorphSeekLib.measures.folds)",
)
WORKING = Place(
    "the working grid",
    "share of the working grid's cells with a corner determinant <= 0 (one-sided differences), without the alignment",
)

_DEFINITIONS = {
    "dice": "mean over labels of 2|A and B| / (|A| + |B|), moving labels warped nearest-neighbor onto {grid}; labels "
    "absent from the fixed or the unwarped moving image are left out, a label that warping lost counts as 0",
    "dice_before": "the same before registration",
    "hd95": "mean over labels of Learn2Reg's 95 % Hausdorff distance, in mm; labels that warping lost have none and "
    "are left out, null where all were lost",
    "lost_labels": "labels of both images of which warping left no voxel on {grid}; as a mean, their number a pair",
    "folded_percent": "{cells}",
    "njd_percent": "share of the voxels of {grid} with a Jacobian determinant <= 0 (central differences, one-sided at "
    "the border)",
    "sdlogj": "standard deviation of the logarithm of that determinant over the voxels where it is above 0",
    "tre_mm": "mean distance of mapped fixed landmarks to their partners, mm",
    "before": "the images as they come; aligned: after the alignment; warped: after the registration",
    "mean": "over the pairs that have the figure; null where none has it; std: standard deviation over the same pairs",
}


def definitions(place: Place, names: Iterable[str]) -> dict[str, str]:
    """Return what figures mean that are measured at a place."""
    return {name: _DEFINITIONS[name].format(grid=place.grid, cells=place.cells) for name in names}


@dataclass(frozen=True)
class PairRow:
    """The figures of a pair; None where one was not measured.

    Attributes:
        fixed, moving: names of the two images or cases.
        dice_before, dice_aligned, dice: mean Dice as the images come, after the alignment, after the registration.
        hd95: mean 95 % Hausdorff distance, mm.
        folded_percent, no_fold_proven: folded cells.
        njd_percent, sdlogj: as :class:`.metrics.FoldingFigures`.
        seconds, cpu_seconds, peak_gb: time and memory spent.
        lost_labels: names of the labels that warping lost.
        dice_per_label: name -> Dice.
        tre_mm: mean error of landmarks, mm.
        folding_definition: how the folding was measured, in full.
    """

    fixed: str | None = None
    moving: str | None = None
    dice_before: float | None = None
    dice_aligned: float | None = None
    dice: float | None = None
    hd95: float | None = None
    folded_percent: float | None = None
    no_fold_proven: bool | None = None
    njd_percent: float | None = None
    sdlogj: float | None = None
    seconds: float | None = None
    cpu_seconds: float | None = None
    peak_gb: float | None = None
    lost_labels: list[str] | None = None
    dice_per_label: dict[str, float] | None = None
    tre_mm: float | None = None
    folding_definition: str | None = None

    def number(self, name: str) -> float | None:
        """Return a figure as a number; of a list its length."""
        value = getattr(self, name)
        return float(len(value)) if isinstance(value, list) else value

    def to_json(self, names: Iterable[str]) -> dict[str, Value]:
        """Return some of the figures as files hold them, in the order of their names."""
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class LabelMaps:
    """The labels of a pair, integers (i, j, k).

    Attributes:
        fixed, warped: on one grid.
        moving: before warping, on any grid.
        spacing: mm between voxels along i, j, k; None measures no distances.
        evaluated: the labels to judge; None for all.
        name_of: what a label is called.
    """

    fixed: Tensor
    warped: Tensor
    moving: Tensor
    spacing: Sequence[float] | np.ndarray | None = None
    evaluated: Iterable[int] | None = None
    name_of: Callable[[int], str] = str


def score(
    labels: LabelMaps | None, folds: FoldingFigures, folded_percent: float, no_fold_proven: bool | None = None
) -> PairRow:
    """Return the figures of a pair from its labels and its folding.

    Args:
        labels: None where there are none.
        folds: of the voxels of the grid that the labels lie on.
        folded_percent, no_fold_proven: of the cells.

    Raises:
        MorphSeekError, ValueError: as :func:`.metrics.label_figures`.
    """
    row = PairRow(
        folded_percent=folded_percent,
        no_fold_proven=no_fold_proven,
        njd_percent=folds.njd_percent,
        sdlogj=folds.sdlogj,
        folding_definition=folds.definition,
    )
    if labels is None:
        return row
    found = label_figures(labels.fixed, labels.warped, labels.moving, labels.spacing, labels.evaluated)
    return replace(
        row,
        dice=found.mean_dice,
        hd95=found.mean_hd95,
        lost_labels=[labels.name_of(label) for label in found.lost],
        dice_per_label={labels.name_of(label): value for label, value in found.dice.items()},
    )


def score_displacement(
    total: Tensor,
    spacing: Sequence[float],
    labels: tuple[Tensor, Tensor] | None = None,
    points: tuple[Tensor, Tensor] | None = None,
    distances: bool = False,
) -> PairRow:
    """Return the figures of a pair on its working grid, on which all of it lies.

    Args:
        total: (1, 3, i, j, k), voxels of the grid.
        spacing: of the grid, mm.
        labels: fixed and moving, (1, 1, i, j, k).
        points: fixed and moving landmarks, (n, 3), voxels of the grid.
        distances: measure the distances of the labels' surfaces as well.
    """
    maps, before, error = None, None, None
    if labels is not None:
        fixed, moving = labels[0][0, 0], labels[1][0, 0]
        warped = fields.warp(labels[1].float(), total, "nearest").int()[0, 0]
        maps = LabelMaps(fixed, warped, moving, spacing if distances else None)
        before = label_figures(fixed, moving, moving).mean_dice
    if points is not None:
        error = float(landmark_errors(total, *points, spacing).mean())
    folded = 100 * float((fields.least_determinant(total) <= 0).float().mean())
    return replace(score(maps, folding(total), folded), dice_before=before, tre_mm=error)
