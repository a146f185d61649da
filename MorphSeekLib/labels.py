"""What the values of a label map may be, in one place for files, nodes of Slicer and arrays."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from .errors import MorphSeekError

LARGEST_LABEL = 2**31 - 1


def check_label_values(values: Tensor | np.ndarray, name: str) -> None:
    """Refuse values that cannot be labels.

    Args:
        values: whole or floating-point numbers, any shape.
        name: what to call the label map in the sentence (its file).

    Raises:
        MorphSeekError: a value that is not a whole number, is negative, or does not fit 32 bits.
    """
    if 0 in values.shape:
        return
    low, high = values.min().item(), values.max().item()
    if low < 0:
        raise MorphSeekError(
            f"{name} has negative values (down to {low:g}), and a label must be 0 (background) or above; give a "
            "segmentation, or change its negative values to 0."
        )
    if _fractional(values) and not bool((values % 1 == 0).all()):
        raise MorphSeekError(
            f"{name} is not a label map: some of its values are not whole numbers; give a segmentation that was "
            "resampled with nearest-neighbor interpolation."
        )
    if high > LARGEST_LABEL:
        raise MorphSeekError(
            f"{name} has a label of {high:.0f}, and {LARGEST_LABEL} is the largest that can be read; give its labels "
            "smaller numbers."
        )


def _fractional(values: Tensor | np.ndarray) -> bool:
    """Whether the type could hold fractions."""
    return values.is_floating_point() if isinstance(values, Tensor) else values.dtype.kind == "f"
