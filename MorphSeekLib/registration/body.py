"""What a CT scan shows beside the body: the table and its pads, and arms that lie apart from it.

All of it has a place of its own in every scan, and follows no motion of the organs; where two images show it in
different places, alignment and fit follow it. Real tables and arms touch the body, so connected parts are not enough:
what hangs on it by a narrow neck is not part of it (an opening, as of Serra, 1982, whose residue of large parts is
left out).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..space.geometry import Volume
from ..space.preprocessing import HOUNSFIELD
from .alignment import in_blocks

_SPACING = 3.0  # mm of the averaged voxels
_NECK = 9.0  # mm; what hangs on the body by less than twice this is not part of it
_BODY = 0.4  # of the largest part, and another is body too: one of two legs
_LEAST = 20.0  # milliliters; smaller parts (the tip of a nose) stay
_TRUNK = 2000.0  # milliliters; of a smaller body (a hand, whose fingers hang on it) all stays
_TISSUE = HOUNSFIELD[0] / 2
_AIR = HOUNSFIELD[0]


def beside_body(scan: Volume) -> Tensor | None:
    """Return which voxels of a CT scan show something that is not the body, (i, j, k) bool; None where there is
    nothing, or no trunk or head.

    Args:
        scan: in Hounsfield units.
    """
    from scipy import ndimage  # what is no CT goes without it

    averaged = in_blocks((scan.data > _TISSUE).float(), scan.grid, _SPACING)
    shown, size = (averaged.data > 0.5).numpy(), averaged.grid.spacing
    depth = ndimage.distance_transform_edt(_with_gas(shown, int(np.abs(scan.grid.direction[2]).argmax())), size)
    edge = float(size.max()) / 2  # distances are those of middles of voxels
    core, count = ndimage.label(depth > _NECK + edge)
    if not count:
        return None
    counts = np.bincount(core.ravel())[1:]
    cores = np.isin(core, 1 + np.flatnonzero(counts >= _BODY * counts.max()))
    body = ndimage.distance_transform_edt(~cores, size) <= _NECK + 3 * edge
    if float((shown & body).sum() * np.prod(size)) / 1000 < _TRUNK:
        return None
    parts, _ = ndimage.label(shown & ~body)
    volumes = np.bincount(parts.ravel())[1:] * float(np.prod(size)) / 1000
    large = 1 + np.flatnonzero(volumes >= _LEAST)
    if not large.size:
        return None
    # blocks that it reaches into are its own, but not those of the body
    left_out = ndimage.binary_dilation(np.isin(parts, large), np.ones((3, 3, 3))) & ~body
    return _on_voxels(torch.from_numpy(left_out), size / scan.grid.spacing, scan.grid.shape) & (scan.data > _AIR)


def without(scan: Volume, left_out: Tensor | None) -> Volume:
    """Return a CT scan with air in the place of what :func:`beside_body` found."""
    return scan if left_out is None else replace(scan, data=scan.data.masked_fill(left_out, _AIR))


def _with_gas(shown: np.ndarray, axis: int) -> np.ndarray:
    """Fill what is enclosed in each slice across an axis: lungs and bowel are body."""
    from scipy import ndimage

    filled = [ndimage.binary_fill_holes(piece) for piece in np.moveaxis(shown, axis, 0)]
    return np.moveaxis(np.stack(filled), 0, axis)


def _on_voxels(marked: Tensor, block: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    """Give every voxel what its block has, of so many voxels; those beyond the last whole block what the last has."""
    for axis, (n, length) in enumerate(zip(block.round().astype(int).tolist(), shape, strict=True)):
        places = torch.arange(length).div(n, rounding_mode="floor").clamp(max=marked.shape[axis] - 1)
        marked = marked.index_select(axis, places)
    return marked
