"""What an iteration of a segmentation sees, and its loss; PyTorch alone is needed."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..space import fields

MOST_VOXELS = 192_000
"""Of what one iteration sees of a case: a part of it where it is larger."""


def patch_size(shapes: list[tuple[int, ...]], multiple_of: int, most: int = MOST_VOXELS) -> tuple[int, int, int]:
    """Return how much of images of these shapes is seen at once: all of the smallest, or a box of ``most`` voxels."""
    least = [min(shape[axis] for shape in shapes) for axis in range(3)]
    shrink = min(1.0, (most / math.prod(least)) ** (1 / 3))
    i, j, k = (max(2 * multiple_of, int(shrink * n) // multiple_of * multiple_of) for n in least)
    return i, j, k


def window(shape: tuple[int, ...], multiple_of: int, generator: torch.Generator) -> tuple[slice, slice, slice]:
    """Return a random box of an image, of two thirds of it to all along each axis."""
    cut = []
    for length in shape:
        most = length // multiple_of
        size = multiple_of * int(torch.randint(math.ceil(2 * most / 3), most + 1, (1,), generator=generator))
        begin = int(torch.randint(length - size + 1, (1,), generator=generator))
        cut.append(slice(begin, begin + size))
    i, j, k = cut
    return i, j, k


def bent(
    image: Tensor, labels: Tensor, size: tuple[int, int, int], strength: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return a part of an image and of its labels, bent at random.

    Rotations reach 15 degrees, scales 15 %, the smooth part has a standard deviation of up to 1.5 ``strength`` voxels
    on nodes 8 voxels apart.

    Args:
        image, labels: (1, 1, i, j, k), the labels int.
        size: of the part.
        strength: of the smooth deformations.
        generator: of the CPU.

    Returns:
        (1, 1, *size) each, the labels int64, on the image's device.
    """
    shape, device = torch.tensor(image.shape[2:]).float(), image.device
    uniform = lambda *n: 2 * torch.rand(*n, generator=generator) - 1  # noqa: E731
    skew = torch.zeros(3, 3)
    skew[0, 1], skew[0, 2], skew[1, 2] = 0.26 * uniform(3)
    matrix = torch.linalg.matrix_exp(skew - skew.T) @ torch.diag((0.15 * uniform(3)).exp())
    matrix = matrix @ (torch.eye(3) + 0.05 * uniform(3, 3))
    wide = torch.tensor(size).float()
    slack = (shape - wide).clamp(min=0) / 2
    middle = (shape - 1) / 2 + slack * uniform(3) + 0.05 * wide * uniform(3)
    nodes = 1.5 * strength * float(torch.rand(1, generator=generator))
    smooth = nodes * torch.randn(1, 3, *(max(2, n // 8) for n in size), generator=generator)
    points = fields.identity(size)[0] - ((wide - 1) / 2).view(3, 1, 1, 1)
    points = torch.einsum("ab,bijk->aijk", matrix, points) + middle.view(3, 1, 1, 1)
    at = (points[None] + F.interpolate(smooth, size=size, mode="trilinear", align_corners=True)).to(device)
    return fields.sample(image, at), fields.sample(labels.to(image.dtype), at, mode="nearest").round().long()


def painted(seen: Tensor, generator: torch.Generator) -> Tensor:
    """Return an image, (1, 1, i, j, k), in other shades: intensities are raised to a power of 0.74 to 1.35, shaded,
    scaled, shifted and noisy, and one in five is blurred."""
    size, device = tuple(seen.shape[2:]), seen.device
    power, gain, offset = (2 * float(torch.rand(1, generator=generator)) - 1 for _ in range(3))
    seen = seen.clamp(min=0) ** math.exp(0.3 * power)
    shade = (0.2 * torch.randn(1, 1, 3, 3, 3, generator=generator)).exp()
    seen = seen * F.interpolate(shade.to(device), size=size, mode="trilinear", align_corners=True)
    noise = 0.04 * float(torch.rand(1, generator=generator)) * torch.randn(seen.shape, generator=generator)
    seen = (seen + noise.to(device)) * (1 + 0.2 * gain) + 0.05 * offset
    if float(torch.rand(1, generator=generator)) < 0.2:
        seen = F.avg_pool3d(F.pad(seen, [1] * 6, mode="replicate"), 3, stride=1)
    return seen


def segmentation_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Return cross-entropy + 1 - mean soft Dice of the labels that are there.

    Args:
        scores: (n, features, i, j, k), logits.
        labels: (n, 1, i, j, k) int64.
    """
    logs, at = scores.log_softmax(dim=1), labels.flatten()
    found = logs.gather(1, labels)
    counts = torch.bincount(at, minlength=scores.shape[1]).to(scores.dtype)
    both = torch.zeros_like(counts).index_add(0, at, found.exp().flatten())
    either = logs.exp().square().sum(dim=(0, 2, 3, 4)) + counts
    there = (counts > 0)[1:].to(scores.dtype)
    dice = ((2 * both + 1) / (either + 1))[1:]
    return 1 - found.mean() - (dice * there).sum() / there.sum().clamp(min=1)
