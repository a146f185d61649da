"""How alike two images are under a map: by it alone all stages and alignments of a registration are compared."""

from __future__ import annotations

import torch
from torch import Tensor

from ..measures.similarity import SIMILARITIES
from ..space import fields
from ..space.geometry import Transform, map_voxels
from .objective import Level, Objective
from .pyramid import Coarse

FAR = 0.8
"""Images that are more alike than this after the alignment, by MIND, are near enough for the fit alone; others may be
far apart, or their alignment lost."""


class Judge:
    """Measures how like the fixed image the moving one is under a map: the fit's objective at its coarsest level.

    The figure is 1 for the fixed image itself and about 0 for an image that has nothing to do with it. What one of the
    images does not see does not count.

    Attributes:
        definition: what the figure is, in words.
    """

    def __init__(self, coarse: Coarse, similarity: str) -> None:
        """
        Args:
            coarse: the two images.
            similarity: a key of SIMILARITIES; "features": the images are learned features already.
        """
        self._coarse, self._similarity = coarse, similarity
        features = self._features(coarse.fixed)
        level = Level(features, features, coarse.counted, None if similarity == "lncc" else 1.0, valid=coarse.valid)
        self._objective = Objective(level)
        if similarity == "lncc":
            self._worst, self._best = (
                features.new_zeros(()),
                self._objective.alike(features * self._objective.voxels)[0],
            )
        else:
            # of two images that have nothing to do with each other: twice the variance
            voxels = features[..., self._objective.voxels[0, 0]]
            self._worst = 2 * (voxels - voxels.mean(dim=2, keepdim=True)).square().sum()
            self._best = features.new_zeros(())
        spacing = " x ".join(f"{s:.3g}" for s in coarse.grid.spacing)
        names = {"lncc": "squared correlation in windows of ten voxels", "features": "squares of learned features"}
        name = names.get(similarity, similarity.upper())
        self.definition = f"{name} on voxels of {spacing} mm, where both images lie (1 is best)"

    def __call__(self, displacement: Tensor | None, alignment: Transform) -> Tensor:
        """Return the figure, a scalar; 0 where nothing can be judged.

        Args:
            displacement: (1, 3, i, j, k), voxels of the coarse grid, before the alignment; None for none.
            alignment: fixed point -> moving point, LPS mm.
        """
        coarse = self._coarse
        if displacement is None:
            displacement = coarse.fixed.new_zeros(1, 3, *coarse.grid.shape)
        points = map_voxels(displacement, coarse.grid, alignment, coarse.moving_grid)
        warped = fields.sample(coarse.moving, points, padding="border")
        found = self._objective.alike(self._features(warped) * self._objective.voxels)[0]
        span = self._worst - self._best
        return torch.where(span > 1e-6, (self._worst - found) / span.clamp(min=1e-6), 0.0)

    def _features(self, image: Tensor) -> Tensor:
        return image if self._similarity in ("lncc", "features") else SIMILARITIES[self._similarity].prepare(image)
