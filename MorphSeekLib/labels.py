"""What the values of a label map may be, in one place for files, nodes of Slicer and arrays."""

from __future__ import annotations

from torch import Tensor

from .errors import MorphSeekError

LARGEST_LABEL = 2**31 - 1


def check_label_values(values: Tensor, name: str) -> None:
    """Refuse values that cannot be labels.

    Args:
        values: whole numbers of any type and shape.
        name: what to call the label map in the sentence (its file).

    Raises:
        MorphSeekError: a value is negative or does not fit 32 bits.
    """
    if not values.numel():
        return
    low, high = values.min().item(), values.max().item()
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
