"""What counts of two images: masks, and what is left out of them.

What is masked is taken for unknown. Every stage sees a smooth continuation of the rest there
(:func:`filled`), so that nothing that lies outside can change an answer, and no stage compares it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..protocol.errors import MorphSeekError
from ..protocol.job import SILENT, Job, Notice
from ..space.geometry import Volume, resample

FEW = 1_000
"""Voxels of an image, below which a mask shows little ..."""
FEWEST = 64
"""... and voxels of the grid on which results are judged, below which nothing can be judged."""


@dataclass(frozen=True)
class Masks:
    """Which voxels of two images count, (i, j, k) bool on their own grids; None for all."""

    fixed: Tensor | None = None
    moving: Tensor | None = None

    def __bool__(self) -> bool:
        return self.fixed is not None or self.moving is not None


def masked(
    image: Volume, inside: Volume | None = None, ignore: Volume | None = None, role: str = "fixed", job: Job = SILENT
) -> Volume:
    """Return an image of which only a part counts in a registration.

    Args:
        image: whose data stays as it is.
        inside: a label map or mask on any grid; everything but 0 in it counts, by its nearest voxel; None: all.
        ignore: the same of what does not count, such as a lesion, an electrode or a resection; None: nothing.
        role: "fixed" or "moving", for messages.
        job: checked.

    Raises:
        MorphSeekError: nothing of the image is left, or nothing that could be compared.
    """
    if inside is None and ignore is None:
        return image
    counts = torch.ones(image.grid.shape, dtype=torch.bool)
    if inside is not None:
        counts &= _marked(inside, image, job)
        if not bool(counts.any()):
            raise MorphSeekError(
                f"{inside.called(f'The mask of the {role} image')} marks nothing inside of that image; check that it "
                "was drawn on it, and that it is not empty."
            )
    if ignore is not None:
        counts &= ~_marked(ignore, image, job)
        if not bool(counts.any()):
            raise MorphSeekError(
                f"{ignore.called(f'What is to be ignored of the {role} image')} leaves nothing of that image; check "
                "whether you meant it as a mask."
            )
    left = image.data[counts]
    if float(left.min()) == float(left.max()):
        raise MorphSeekError(
            f"Nothing can be compared: what the mask leaves of the {role} image has one value only; draw it wider."
        )
    notices = image.notices
    if left.numel() < FEW:
        words = (
            f"The mask leaves {left.numel()} voxels of the {role} image, which is little to register by; look at the "
            "result, or draw it wider."
        )
        notices += (Notice("small-mask", words),)
    return replace(image, counts=counts, notices=notices)


def check_seen(voxels: int) -> None:
    """Refuse masks that leave too few voxels of the grid on which results are judged.

    Raises:
        MorphSeekError: fewer than :data:`FEWEST`.
    """
    if voxels < FEWEST:
        raise MorphSeekError(
            f"The masks leave {voxels} voxels of the grid by which results are judged, and at least {FEWEST} are "
            "needed; draw them wider, or check that both lie on the same part of the body."
        )


def filled(data: Tensor, counts: Tensor | None) -> Tensor:
    """Return an image in which what does not count is a smooth continuation of the rest.

    Means of what counts are taken over ever larger blocks; each voxel that does not count takes that of the smallest
    blocks that hold anything, interpolated between these.

    Args:
        data: (i, j, k), floating point.
        counts: (i, j, k) bool, with at least one voxel; None: all.
    """
    if counts is None or bool(counts.all()):
        return data
    known = counts.to(data.dtype)[None, None]
    levels = [(torch.where(counts, data, 0)[None, None], known)]
    while max(levels[-1][0].shape[2:]) > 1:
        block = [min(2, n) for n in levels[-1][0].shape[2:]]
        levels.append(tuple(F.avg_pool3d(x, block, ceil_mode=True) for x in levels[-1]))  # type: ignore[arg-type]
    value = levels[-1][0] / levels[-1][1]
    for summed, weight in levels[-2::-1]:
        wide = F.interpolate(value, size=summed.shape[2:], mode="trilinear", align_corners=False)
        value = torch.where(weight > 0, summed / weight.clamp(min=1e-12), wide)
    return torch.where(counts, data, value[0, 0])


def _marked(mask: Volume, image: Volume, job: Job) -> Tensor:
    """Return where an image is marked, (i, j, k) bool."""
    marked = Volume((mask.data != 0).to(torch.uint8), mask.grid)
    return resample(marked, image.grid, mode="nearest", job=job).data > 0
