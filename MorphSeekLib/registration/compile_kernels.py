"""Compile the kernels ahead of their first use: ``python -m MorphSeekLib.registration.compile_kernels``."""

from __future__ import annotations

import numpy as np
import torch

from ..backbones.voxelmorph import structure_force
from ..io.compiled import completion_mark, kernels, own_folder
from ..measures.fast_fields import compose, credit, label_sums, least_determinant, nearest_classes, warp
from ..measures.folds import certify
from ..measures.regularizers import diffusion
from ..measures.similarity import mind_ssc
from ..space.geometry import DenseTransform, Grid
from .descent import descend
from .objective import Level
from .search import Pass, search


def main() -> None:
    """Compile every kernel by fitting a small pair in each way and judging its folds, and note that it was done."""
    image = torch.rand(1, 2, 16, 16, 16)
    counted = torch.ones(8, 8, 8, dtype=torch.bool)
    descend([Level(image[:, :1], image[:, 1:], counted)], [1])
    descend([Level(image, image, counted, 1.0)], [1])
    search(image, image, (Pass(4, 1),))
    grid = Grid((4, 4, 4), np.eye(4))
    mind_ssc(image[:, :1])
    structure_force(image[:, :1], image[:, 1:])
    _train(image[:, :1])
    certify(DenseTransform(torch.zeros(3, 4, 4, 4), grid), grid)
    folder = own_folder()
    if folder is not None and kernels("registration.kernels") is not None:
        (folder / completion_mark()).touch()


def _train(image: torch.Tensor) -> None:
    """Compile what a training computes on every voxel."""
    classes = (image > 0.5).int()
    u = torch.zeros(1, 3, *image.shape[2:], requires_grad=True)
    together, squares = label_sums(classes, classes, 1, u)
    total = compose(u.detach(), u)
    (together.sum() + squares.sum() + warp(image, total).sum() + diffusion(total)).backward()
    least_determinant(total.detach())
    found = nearest_classes(classes, total.detach(), classes, 1)
    if found is not None:
        credit(classes, found[0], torch.zeros(1, 2), torch.zeros(1, 2))


if __name__ == "__main__":
    main()
