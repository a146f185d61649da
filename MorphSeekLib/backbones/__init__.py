"""Registration networks by name, behind one contract.

A backbone is an ``nn.Module`` with

- ``encode(moving, fixed) -> (skips, top)``: features of a pair of (batch, 1, i, j, k) images; ``top`` is the coarsest,
  (batch, top_channels, ...), the one that the policy replaces;
- ``decode(skips, top) -> field``: (batch, 3, i, j, k) in voxels, channel c along axis c;
- ``top_channels``: int, and ``multiple_of``: int, what every image size must be divisible by.

A new backbone is one file and one line in BACKBONES: (settings dataclass, module built from it).
"""

from __future__ import annotations

from torch import nn

from ..errors import MorphSeekError
from ..settings import from_dict
from .lapirn import LapIRN, LapIRNSettings
from .voxelmorph import VoxelMorph, VoxelMorphSettings

BACKBONES = {
    "lapirn": (LapIRNSettings, LapIRN),
    "voxelmorph": (VoxelMorphSettings, VoxelMorph),
}


def build_backbone(name: str, settings: dict | None = None) -> nn.Module:
    """Make a network with fresh weights.

    Args:
        name: a key of BACKBONES.
        settings: fields of its settings dataclass; missing ones take their defaults.

    Raises:
        MorphSeekError: unknown name or setting.
    """
    if name not in BACKBONES:
        raise MorphSeekError(f"There is no backbone '{name}'; choose one of: {', '.join(sorted(BACKBONES))}.")
    settings_type, module = BACKBONES[name]
    return module(from_dict(settings_type, settings or {}, f"backbone '{name}'"))
