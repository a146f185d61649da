"""What a CT scan shows beside the body: the table and its pads, and arms that lie apart from it.

All of it has a place of its own in every scan, and follows no motion of the organs; where two images show it in
different places, alignment and fit follow it. Real tables and arms touch the body, so connected parts are not enough:
what hangs on it by a narrow neck is not part of it (an opening, as of Serra, 1982, whose residue of large parts is
left out).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import SimpleITK as sitk
import torch
import torch.nn.functional as F
from torch import Tensor

from ..space.geometry import Volume
from ..space.preprocessing import HOUNSFIELD

_SPACING = 3.0  # mm of the averaged voxels
_NECK = 9.0  # mm; what hangs on the body by less than twice this is not part of it
_BODY = 0.4  # of the largest part, and another is body too: one of two legs
_LEAST = 20.0  # milliliters; smaller parts (the tip of a nose) stay
_TISSUE = HOUNSFIELD[0] / 2
_AIR = HOUNSFIELD[0]


def beside_body(scan: Volume) -> Tensor | None:
    """Return which voxels of a CT scan show something that is not the body, (i, j, k) bool; None where there is
    nothing, or no body.

    Args:
        scan: in Hounsfield units.
    """
    spacing, shape = scan.grid.spacing, scan.grid.shape
    block = [int(max(1, min(round(_SPACING / s), n // 8))) for s, n in zip(spacing, shape, strict=True)]
    averaged = F.avg_pool3d((scan.data > _TISSUE).float()[None, None], block)[0, 0]
    shown = sitk.GetImageFromArray((averaged > 0.5).to(torch.uint8).numpy().transpose(2, 1, 0))
    axial = int(np.abs(scan.grid.direction[2]).argmax())
    whole = _with_gas(shown, axial)
    size = [s * b for s, b in zip(spacing, block, strict=True)]
    reach = [max(1, min(round(_NECK / s), n // 4)) for s, n in zip(size, averaged.shape, strict=True)]
    core = sitk.ConnectedComponent(sitk.BinaryErode(whole, reach, sitk.sitkBall, 0.0, 1.0))
    counts = np.bincount(_array(core).ravel())[1:]
    if not counts.size:
        return None
    own = np.isin(_array(core), 1 + np.flatnonzero(counts >= _BODY * counts.max()))
    body = sitk.BinaryDilate(_image(own), [n + 1 for n in reach])
    parts = _array(sitk.ConnectedComponent(shown & (body == 0)))
    volumes = np.bincount(parts.ravel()) * float(np.prod(size)) / 1000
    large = 1 + np.flatnonzero(volumes[1:] >= _LEAST)
    if not large.size:
        return None
    # blocks that it reaches into are its own, but not those of the body
    left_out = _array(sitk.BinaryDilate(_image(np.isin(parts, large)), [1, 1, 1]) & (body == 0))
    marked = torch.from_numpy(left_out.copy()).float()[None, None]
    return _on_voxels(marked, block, shape) & (scan.data > _AIR)


def without(scan: Volume, left_out: Tensor | None) -> Volume:
    """Return a CT scan with air in the place of what :func:`beside_body` found."""
    return scan if left_out is None else replace(scan, data=scan.data.masked_fill(left_out, _AIR))


def _with_gas(shown: sitk.Image, axis: int) -> sitk.Image:
    """Fill what is enclosed in each slice across an axis: lungs and bowel are body."""
    values = np.moveaxis(_array(shown), axis, 0)
    filled = [sitk.GetArrayFromImage(sitk.BinaryFillhole(sitk.GetImageFromArray(piece))) for piece in values.copy()]
    return _image(np.moveaxis(np.stack(filled), 0, axis))


def _on_voxels(marked: Tensor, block: list[int], shape: tuple[int, ...]) -> Tensor:
    """Give every voxel what its block has; those beyond the last whole block what the last has."""
    marked = marked[0, 0]
    for axis, (n, length) in enumerate(zip(block, shape, strict=True)):
        places = torch.arange(length).div(n, rounding_mode="floor").clamp(max=marked.shape[axis] - 1)
        marked = marked.index_select(axis, places)
    return marked > 0


def _array(image: sitk.Image) -> np.ndarray:
    """Return (i, j, k): the image's values."""
    return sitk.GetArrayFromImage(image).transpose(2, 1, 0)


def _image(values: np.ndarray) -> sitk.Image:
    """Return an image of (i, j, k) bool."""
    return sitk.GetImageFromArray(values.astype(np.uint8).transpose(2, 1, 0))
