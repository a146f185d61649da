"""Noise in the air around an object, which the network must not take for structure.

MIND, which the network's forces compare, is normalized by the local variance: exactly black air has none and is quiet,
but the faintest noise in it becomes structure as strong as an organ's border, over most of the image. Noise in tissue
does no such harm. So air that holds nothing but noise is made flat, and nothing else is touched.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_BLOCK = 4  # voxels a side
_WITHIN = 2.0  # standard deviations above the level of air, a mean is that of air still
_BESIDE = 3.0  # and a voxel beside it, whose mean tissue takes part in
_APART = 5.0  # standard deviations must lie between air and the threshold to tissue (Rose's criterion)
_ALIKE = 0.5  # of the standard deviation is the most that the means of blocks of air may scatter; white noise: 1/8
_LEAST = 0.2  # of the dark blocks must be noisy air: the rims of an object on exact black are not


def quiet_background(data: Tensor) -> Tensor:
    """Give air that holds nothing but noise the image's least value (black); nothing else changes.

    Level and standard deviation of the noise are those of the darkest blocks of 4x4x4 voxels, as in the estimators
    from local moments of the background (Aja-Fernandez et al., "Noise estimation in single- and multiple-coil magnetic
    resonance data based on statistical models", Magn Reson Imaging 27(10), 2009, doi:10.1016/j.mri.2009.05.025): blocks
    below Otsu's threshold, the darkest tenth first, then all within two standard deviations of their level. They are
    taken for air only if they are noise (the blocks differ far less from each other than the voxels within them), are
    clearly darker than tissue, and are more than a rim. Neither shape nor place of the object counts, nor the scale and
    offset of the intensities. Air is then where the mean of 3x3x3 voxels is within two standard deviations of the
    level, or is darker (padding), and the voxels beside it that are within three themselves.

    Args:
        data: (i, j, k), floating point.

    Returns:
        ``data`` itself where there is no such air: exactly black, none in the image (crops), or not noise alone.
    """
    found = _air(data)
    if found is None:
        return data
    level, deviation = found
    inner = _around(data, Tensor.add_) <= 27 * (level + _WITHIN * deviation)
    air = inner | (_around(inner, Tensor.logical_or_) & (data <= level + _BESIDE * deviation))
    return data.masked_fill(air, float(data.min()))


def _around(data: Tensor, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return what an in-place operation makes of the 3x3x3 voxels around each; edge values hold beyond the image."""
    for axis in range(3):
        joined, n = data.clone(), data.shape[axis]
        join(joined.narrow(axis, 1, n - 1), data.narrow(axis, 0, n - 1))
        join(joined.narrow(axis, 0, n - 1), data.narrow(axis, 1, n - 1))
        for edge in (0, n - 1):
            join(joined.select(axis, edge), data.select(axis, edge))
        data = joined
    return data


def _air(data: Tensor) -> tuple[float, float] | None:
    """Return level and standard deviation of noisy air; None without such air."""
    size = [min(_BLOCK, n) for n in data.shape]
    count = [n // s for n, s in zip(data.shape, size, strict=True)]
    image = data[tuple(slice(n * s) for n, s in zip(count, size, strict=True))]
    blocks = image.reshape(count[0], size[0], count[1], size[1], count[2], size[2])
    variance, mean = (x.flatten() for x in torch.var_mean(blocks, dim=(1, 3, 5), correction=0))
    noisy = variance > 0
    if not bool(noisy.any()):
        return None
    ordered = mean[noisy].sort().values
    # padding far darker than air, and a spike, are no classes of their own
    usual = mean.clamp(ordered[len(ordered) // 10], ordered[len(ordered) * 99 // 100])
    threshold = _otsu(usual)
    dark = usual < threshold
    noisy &= dark
    if not bool(noisy.any()):
        return None
    mean, order = mean[noisy].sort()
    deviations = variance[noisy][order].sqrt()
    known, taken = 0, max(1, len(mean) // 10)
    for _ in range(100):  # until the set no longer changes
        level, deviation = float(mean[:taken].median()), float(deviations[:taken].median())
        known, taken = taken, int((mean <= level + _WITHIN * deviation).sum())
        if taken == known:
            break
    scatter = 1.4826 * float((mean[:taken] - level).abs().median())
    is_noise = scatter <= _ALIKE * deviation
    is_apart = threshold - level >= _APART * deviation
    return (level, deviation) if is_noise and is_apart and taken >= _LEAST * int(dark.sum()) else None


def _otsu(values: Tensor) -> float:
    """Return Otsu's threshold (IEEE Trans. SMC 9(1), 1979): halfway between the means of the two classes it makes."""
    values = values.double().sort().values
    if len(values) < 2:
        return float(values[0])
    count = torch.arange(1, len(values), device=values.device)
    sums = values.cumsum(0)
    low, high = sums[:-1] / count, (sums[-1] - sums[:-1]) / (len(values) - count)
    best = (count * (len(values) - count) * (high - low).square()).argmax()
    return float(low[best] + high[best]) / 2
