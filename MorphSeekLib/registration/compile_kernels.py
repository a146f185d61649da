"""Compile the kernels ahead of their first use: ``python -m MorphSeekLib.registration.compile_kernels``."""

from __future__ import annotations

import numpy as np
import torch

from ..io.compiled import completion_mark, kernels, own_folder
from ..measures.folds import certify
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
    certify(DenseTransform(torch.zeros(3, 4, 4, 4), grid), grid)
    folder = own_folder()
    if folder is not None and kernels("registration.kernels") is not None:
        (folder / completion_mark()).touch()


if __name__ == "__main__":
    main()
