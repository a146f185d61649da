"""Label values and the channels that stand for them in a network's class-like features.

A network has a few channels, while label maps may hold values such as 1002 and 2035. ``{1002: 1, 2035: 2}`` says which
channel stands for which value; channel 0 is the background, and whatever is not named.
:func:`MorphSeekLib.data.datasets.label_values` reads the values of cases; a model's card keeps the dict
(``Card.labels``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..protocol.errors import MorphSeekError

MOST_LABELS = 100


def channels_for(values: Iterable[int], known: Mapping[int, int] | None = None) -> dict[int, int]:
    """Return the channel of each label value, from 1 on.

    Args:
        values: label values above 0.
        known: channels that are given already, as on the card of a model; they are kept, and new values take the
            lowest free ones. Those of values that do not occur are given to others where channels become too few.

    Raises:
        MorphSeekError: more than :data:`MOST_LABELS` values.
    """
    wanted = set(values)
    if len(wanted) > MOST_LABELS:
        raise MorphSeekError(
            f"The label maps hold {len(wanted)} different labels, and a model learns at most {MOST_LABELS}; merge "
            "labels, or remove those that need not be aligned."
        )
    channels = dict(known or {})
    if len(wanted | set(channels)) > MOST_LABELS:
        channels = {value: channel for value, channel in channels.items() if value in wanted}
    new, taken = sorted(wanted - set(channels)), set(channels.values())
    free = (channel for channel in range(1, MOST_LABELS + len(taken) + 1) if channel not in taken)
    return channels | dict(zip(new, free, strict=False))


def to_channels(labels: Tensor, channels: Mapping[int, int]) -> Tensor:
    """Return a label map with the channel of each value in its place, int32; 0 for values that have none."""
    known = sorted(channels)
    if not known:
        return torch.zeros_like(labels, dtype=torch.int32)
    values = torch.tensor(known, dtype=labels.dtype, device=labels.device)
    targets = torch.tensor([channels[value] for value in known], dtype=torch.int32, device=labels.device)
    places = torch.searchsorted(values, labels.contiguous()).clamp(max=len(known) - 1)
    return torch.where(values[places] == labels, targets[places], 0)
