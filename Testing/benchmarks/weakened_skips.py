"""VoxelMorph whose skips are weakened or dropped, so that more of the field is decided at the top feature.

For the experiment "skips" of hippocampus.py; import this file before a model of it is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from MorphSeekLib.backbones import VoxelMorph, register
from MorphSeekLib.backbones.voxelmorph import VoxelMorphSettings


@dataclass(frozen=True)
class WeakenedSkipsSettings(VoxelMorphSettings):
    """VoxelMorph's settings, and how much of the skips is left.

    Attributes:
        skip_gains: factors on the skips, coarsest first; 1 each where none is given. The finest skip, the images, has
            none.
    """

    skip_gains: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.skip_gains) >= len(self.encoder):
            weakened = len(self.encoder) - 1
            raise ValueError(f"skip_gains has {len(self.skip_gains)} factors, but {weakened} skips can be weakened")


@register("voxelmorph_weakened_skips", WeakenedSkipsSettings)
class WeakenedSkips(VoxelMorph):
    """VoxelMorph with factors on its skips."""

    def decode(self, skips: list[Tensor], top: Tensor) -> Tensor:
        """Return the field of VoxelMorph from the weakened skips."""
        weakened = list(skips)
        for number, gain in enumerate(self.settings.skip_gains, start=1):
            weakened[-number] = skips[-number] if gain == 1 else gain * skips[-number]
        return super().decode(weakened, top)
