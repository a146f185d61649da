"""What the values of a label map may be, in one place for files, nodes of Slicer and arrays."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ..protocol.errors import MorphSeekError

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
    if _fractional(values) and not bool((values % 1 == 0).all()):
        raise MorphSeekError(
            f"{name} is not a label image: some of its values are not whole numbers; give a segmentation that was "
            "resampled with nearest-neighbor interpolation."
        )
    if low < 0:
        raise MorphSeekError(
            f"{name} has the label {low:.0f}, and labels must not be negative; give that structure a number above 0, "
            "or 0 if it is background."
        )
    if high > LARGEST_LABEL:
        raise MorphSeekError(
            f"{name} has the label {high:.0f}, and labels must not be larger than {LARGEST_LABEL}; give that structure "
            "a smaller number."
        )


def _fractional(values: Tensor | np.ndarray) -> bool:
    """Return whether the type could hold fractions."""
    return values.is_floating_point() if isinstance(values, Tensor) else values.dtype.kind == "f"
