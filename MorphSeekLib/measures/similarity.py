"""Image similarity as losses: the smaller, the more alike.

Images are (batch, channel, i, j, k) on one grid. Everything is computed in float32 or better whatever autocast says,
and nothing waits for the device. Definitions are those of the official codes, with whose
values and gradients the tests compare.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .fast_fields import in_slabs, kernels_for

# The patches that MIND-SSC compares lie at the six face neighbors of a voxel, here as steps along (i, j, k) ...
_NEIGHBORS = ((-1, 0, 0), (0, -1, 0), (0, 0, -1), (0, 0, 1), (0, 1, 0), (1, 0, 0))
# ... and make twelve pairs a diagonal apart, in the order in which the published descriptors hold them.
_PAIRS = ((1, 5), (0, 4), (0, 1), (4, 5), (1, 2), (3, 4), (0, 2), (3, 5), (2, 4), (1, 3), (2, 5), (0, 3))

_RUN = 64  # voxels of an axis that one matrix product makes, see _runs


def lncc(fixed: Tensor, warped: Tensor, window: int = 9, epsilon: float = 1e-5) -> Tensor:
    """Return local normalized cross-correlation as VoxelMorph defines it: minus the mean over voxels of

        cross^2 / (variance(fixed) * variance(warped) + epsilon),

    where cross and variances are sums over a cube of ``window`` voxels a side around the voxel. Outside the image is
    zero, and a cube counts window^3 voxels even there. The square makes it blind to the sign of the correlation.

    A constant added to an image changes nothing but the outermost window / 2 voxels (where the zero outside is now
    further away), and costs no precision. Cubes whose variance lies below what the floating type resolves are flat:
    they add nothing, and no gradient.

    Args:
        fixed, warped: (batch, channel, i, j, k), the same shape. Intensities in [0, 1] are what ``epsilon`` is meant
            for. Gradients flow to either.
        window: odd number of voxels.
        epsilon: keeps flat cubes from dividing by zero.

    Returns:
        A scalar in [-1, 0].

    Raises:
        ValueError: the shapes differ, or the window is not odd and positive.
    """
    fixed, warped = _pair(fixed, warped)
    if window < 1 or window % 2 == 0:
        raise ValueError(f"The LNCC window is {window}; it must be an odd number of voxels, such as 9.")
    return _LNCC.apply(fixed, warped, window, epsilon, torch.is_grad_enabled())


@torch.no_grad()
def lncc_map(fixed: Tensor, warped: Tensor, window: int = 9, epsilon: float = 1e-5) -> Tensor:
    """Return the map whose mean is minus :func:`lncc`: (batch, channel, i, j, k) in [0, 1], without gradient.

    Raises:
        ValueError: as :func:`lncc`.
    """
    fixed, warped = _pair(fixed, warped)
    if window < 1 or window % 2 == 0:
        raise ValueError(f"The LNCC window is {window}; it must be an odd number of voxels, such as 9.")
    _, _, _, cross, slope = _lncc_parts(fixed, warped, window, epsilon)
    return cross * slope


def multiresolution_lncc(fixed: Tensor, warped: Tensor, window: int = 7, scales: int = 3) -> Tensor:
    """Return LapIRN's pyramid of LNCC: windows 7, 5, 3 on images of size 1, 1/2, 1/4, with weights 1, 1/2, 1/4.

    Args:
        fixed, warped: (batch, channel, i, j, k), the same shape, intensities in [0, 1].
        window: the odd window at full size; each scale takes off two voxels.
        scales: how many, at least one.

    Returns:
        A scalar; -1.75 is the least for three scales.

    Raises:
        ValueError: the shapes differ, or the last window is not odd and positive.
    """
    loss = lncc(fixed, warped, window)
    for scale in range(1, scales):
        fixed, warped = (
            F.avg_pool3d(image, 3, stride=2, padding=1, count_include_pad=False) for image in _pair(fixed, warped)
        )
        loss = loss + lncc(fixed, warped, window - 2 * scale) / 2**scale
    return loss


def mse(fixed: Tensor, warped: Tensor) -> Tensor:
    """Return the mean squared difference of two images (batch, channel, i, j, k) of the same shape; a scalar."""
    fixed, warped = _pair(fixed, warped)
    return (fixed - warped).square().mean()


def mind_ssc(image: Tensor, radius: int = 2, dilation: int = 2) -> Tensor:
    """Compute MIND-SSC, the self-similarity context descriptor (Heinrich et al., MICCAI 2013): alike across modalities.

    Twelve pairs of patches around each voxel, ``dilation`` voxels from it, are compared by their mean squared
    difference over (2 radius + 1)^3 voxels; d becomes exp(-(d - least d) / mean d). Edge values hold beyond the image.
    The mean is kept within 0.001 to 1000 times its average over the image (of this sample alone: the official code
    averages over the whole batch, which makes one sample's descriptor depend on the others).

    Args:
        image: (batch, 1, i, j, k).
        radius: of the patches, voxels.
        dilation: distance of the patches from the voxel, voxels.

    Returns:
        (batch, 12, i, j, k) in (0, 1].

    Raises:
        ValueError: the image does not have exactly one channel.
    """
    if image.ndim != 5 or image.shape[1] != 1:
        raise ValueError(f"MIND needs an image of shape (batch, 1, i, j, k), not {tuple(image.shape)}.")
    image = image.to(torch.promote_types(image.dtype, torch.float32))
    if not (image.requires_grad and torch.is_grad_enabled()) and image.dtype == torch.float32 and len(image) == 1:
        module = kernels_for("measures.descriptor_kernels", image)
        if module is not None:
            return _compiled_mind(module, image.detach(), radius, dilation)
    n_i, n_j, n_k = image.shape[2:]
    padded = F.pad(image, (dilation,) * 6, mode="replicate")[:, 0]
    starts = [[dilation * (1 + step) for step in steps] for steps in _NEIGHBORS]
    patches = [padded[:, i : i + n_i, j : j + n_j, k : k + n_k] for i, j, k in starts]
    squares = torch.stack([patches[a] - patches[b] for a, b in _PAIRS], dim=1).square()
    distance = _BoxMean.apply(squares, 2 * radius + 1)
    distance = distance - distance.min(dim=1, keepdim=True).values
    scale = distance.mean(dim=1, keepdim=True)
    typical = scale.detach().mean(dim=(1, 2, 3, 4), keepdim=True)
    scale = scale.clamp(0.001 * typical, 1000 * typical)
    # a constant image has no scale at all: its descriptor is 1 everywhere
    return torch.exp(-distance / scale.clamp(min=torch.finfo(image.dtype).eps ** 2))


def _compiled_mind(module: ModuleType, image: Tensor, radius: int, dilation: int) -> Tensor:
    """Return :func:`mind_ssc` of one image by the kernels."""
    padded = F.pad(image, (dilation,) * 6, mode="replicate")[0, 0].numpy()
    starts = np.array([[dilation * (1 + step) for step in steps] for steps in _NEIGHBORS])
    distance, scale = image.new_empty(1, len(_PAIRS), *image.shape[2:]), torch.empty_like(image)
    given = padded, starts, np.array(_PAIRS), radius, distance[0].numpy(), scale[0, 0].numpy()
    in_slabs(image.shape[2], functools.partial(module.self_similarity, *given))
    typical = scale.mean()
    scale = scale.clamp(0.001 * typical, 1000 * typical).clamp(min=torch.finfo(image.dtype).eps ** 2)
    return distance.div_(scale.neg_()).exp_()


def descriptor_differences(moving: Tensor, fixed: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a Gauss-Newton step toward equal descriptors is made of, at each voxel.

    Args:
        moving, fixed: (batch, channels, i, j, k); every axis at least two long.

    Returns:
        (batch, 3, i, j, k) sum_c (F_c - M_c) grad M_c, and (batch, 1, i, j, k) sum_c |grad M_c|^2 + (F_c - M_c)^2.
    """
    moving, fixed = moving.float(), fixed.float()
    followed = torch.is_grad_enabled() and (moving.requires_grad or fixed.requires_grad)
    module = None if followed or len(moving) != 1 else kernels_for("measures.descriptor_kernels", moving, fixed)
    if module is not None and min(moving.shape[2:]) > 1:
        out = moving.new_empty(1, 4, *moving.shape[2:])
        given = moving[0].detach().contiguous().numpy(), fixed[0].detach().contiguous().numpy(), out[0].numpy()
        in_slabs(moving.shape[2], functools.partial(module.forces, *given))
        return out[:, :3], out[:, 3:]
    difference = fixed - moving
    force, energy = [], difference.square().sum(dim=1, keepdim=True)
    for axis in (2, 3, 4):
        gradient = torch.gradient(moving, dim=axis)[0]
        force.append((difference * gradient).sum(dim=1, keepdim=True))
        energy = energy + gradient.square().sum(dim=1, keepdim=True)
    return torch.cat(force, dim=1), energy


class Similarity(ABC):
    """How alike two images are, in two parts: features of each image, and a loss between the features.

    A training computes the features of each warped image again, see :meth:`__call__`. The fit computes those of either
    image once on each level, warps the moving ones, and lowers their squared difference, whatever :meth:`compare` says;
    only correlation has a form of its own there (:mod:`MorphSeekLib.registration.objective`). A new measure is a
    subclass and a line in :data:`SIMILARITIES`.

    Attributes:
        fit_weight: what the squared difference of two voxels' features, the mean over channels, is multiplied by in the
            fit, so that the same weights of the regularizers suit all.
    """

    fit_weight = 1.0

    def prepare(self, image: Tensor) -> Tensor:
        """Return the features of an image (batch, 1, i, j, k): (batch, channels, i, j, k); here the image itself."""
        return image

    @abstractmethod
    def compare(self, fixed: Tensor, warped: Tensor) -> Tensor:
        """Return a scalar from the features of two images: the smaller, the more alike.

        Raises:
            ValueError: the shapes differ.
        """

    def __call__(self, fixed: Tensor, warped: Tensor) -> Tensor:
        """Return the loss of two images, both (batch, 1, i, j, k)."""
        return self.compare(self.prepare(fixed), self.prepare(warped))


class LNCC(Similarity):
    """:func:`lncc`, for images of the same modality."""

    def compare(self, fixed: Tensor, warped: Tensor) -> Tensor:
        """Return :func:`lncc`."""
        return lncc(fixed, warped)


class MSE(Similarity):
    """:func:`mse`, for images of the same modality and the same intensities."""

    def compare(self, fixed: Tensor, warped: Tensor) -> Tensor:
        """Return :func:`mse`."""
        return mse(fixed, warped)


@dataclass(frozen=True)
class MIND(Similarity):
    """Mean squared difference of MIND-SSC descriptors, across modalities; arguments as for :func:`mind_ssc`.

    A descriptor that is computed once and warped costs a third of one computed from every warped image.
    """

    radius: int = 2
    dilation: int = 2

    fit_weight = 3.0

    def prepare(self, image: Tensor) -> Tensor:
        """Return :func:`mind_ssc`."""
        return mind_ssc(image, self.radius, self.dilation)

    def compare(self, fixed: Tensor, warped: Tensor) -> Tensor:
        """Return the mean squared difference of two descriptors."""
        return mse(fixed, warped)


SIMILARITIES: dict[str, Similarity] = {"lncc": LNCC(), "mse": MSE(), "mind": MIND()}
"""The similarities by the names that settings use."""


class _LNCC(torch.autograd.Function):
    """LNCC with its gradient, which costs three more box sums and is made at once, so that nothing else is kept.

    With F, W, FF, WW, FW the sums over a cube of n voxels of the images f, w and their products: the cross sum is
    C = FW - F W / n, the variances U = FF - F^2 / n and V = WW - W^2 / n, the value C^2 / (U V + epsilon).
    """

    @staticmethod
    def forward(ctx, fixed: Tensor, warped: Tensor, window: int, epsilon: float, differentiate: bool) -> Tensor:
        with torch.autocast(fixed.device.type, enabled=False):
            images, total, variance, cross, slope = _lncc_parts(fixed, warped, window, epsilon)
            loss = -(cross * slope).mean()

            ctx.save_for_backward(
                *(
                    _lncc_gradient(images, total, variance, slope, window, of)
                    if differentiate and ctx.needs_input_grad[of]
                    else None
                    for of in (0, 1)
                )
            )
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, outer: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if gradient is None else gradient * outer for gradient in ctx.saved_tensors), None, None, None


def _lncc_parts(fixed: Tensor, warped: Tensor, window: int, epsilon: float) -> tuple[Tensor, ...]:
    """Return centered images, their box sums, their variances, the cross sum and C / (U V + epsilon)."""
    n = window**3
    # U and V are small differences of large sums, so the images are centered first. What was zero outside is minus the
    # mean then; those voxels of each cube are added to the sums by their number.
    images = torch.stack((fixed, warped))
    mean = images.mean(dim=(-3, -2, -1), keepdim=True)
    images -= mean
    sums = torch.cat((images, images.square(), images[:1] * images[1:]))
    _box_sum_(sums, window)
    sums.addcmul_(n - _voxels_inside(window, fixed), torch.cat((-mean, mean.square(), mean[:1] * mean[1:])))
    total = sums[:2]
    variance = torch.addcmul(sums[2:4], total, total, value=-1 / n)
    cross = torch.addcmul(sums[4], total[0], total[1], value=-1 / n)
    slope = cross / (variance[0] * variance[1]).add_(epsilon)
    # a variance no larger than rounding is noise of either sign: divided by, it would blow the loss up
    flat = (variance <= 8 * torch.finfo(sums.dtype).eps * sums[2:4]).any(dim=0)
    return images, total, variance, cross, slope.masked_fill_(flat, 0)


def _lncc_gradient(images: Tensor, total: Tensor, variance: Tensor, slope: Tensor, window: int, of: int) -> Tensor:
    """Return the derivative of LNCC with respect to image ``of`` (0 or 1); names as in ``_LNCC.forward``."""
    by_cross = slope * (2 / slope.numel())
    own = slope * variance[1 - of]
    by_variance = by_cross * own
    by_total = torch.mul(total[of], own).neg_().add_(total[1 - of]).mul_(by_cross).div_(window**3)
    by_cross, by_variance, by_total = _box_sum_(torch.stack((by_cross, by_variance, by_total)), window)
    return by_total.addcmul_(images[of], by_variance).addcmul_(images[1 - of], by_cross, value=-1)


class _BoxMean(torch.autograd.Function):
    """Mean over a cube around each voxel; edge values hold beyond the image."""

    @staticmethod
    def forward(ctx, image: Tensor, window: int) -> Tensor:
        ctx.window = window
        return _box_sum_(image.clone(memory_format=torch.contiguous_format), window, "edge").div_(window**3)

    @staticmethod
    @once_differentiable
    def backward(ctx, outer: Tensor) -> tuple[Tensor, None]:
        maps = outer.clone(memory_format=torch.contiguous_format)
        return _box_sum_(maps, ctx.window, "edge", transposed=True).div_(ctx.window**3), None


def box_sum(maps: Tensor, window: int) -> Tensor:
    """Return the sums over a cube of ``window`` (odd) voxels around each; zero beyond the image. (..., i, j, k)."""
    return _box_sum_(maps.clone(memory_format=torch.contiguous_format), window)


def _box_sum_(maps: Tensor, window: int, padding: str = "zeros", transposed: bool = False) -> Tensor:
    """Sum over a cube around each voxel, in place, as one product with a band of ones for each axis.

    The fastest exact way measured (Testing/benchmarks/lncc.py), and unlike running sums it keeps float32's precision.

    Args:
        maps: (..., i, j, k), contiguous, float32 or float64.
        window: odd number of voxels.
        padding: what lies beyond the image: "zeros", or "edge" for its nearest value.
        transposed: apply the transposed linear map, the gradient of the sum.

    Returns:
        ``maps``.
    """
    if maps.dtype == torch.float32 and not _matmul_is_exact(maps.device):
        return maps.copy_(_box_sum_(maps.double(), window, padding, transposed))
    shape = maps.shape[-3:]
    bands = [_band(n, window, padding, maps.dtype, maps.device) for n in shape]
    if transposed:
        bands = [band.T for band in bands]
    runs = [_runs(n, window) for n in shape]
    n_i, _, n_k = shape
    along_k, along_j = maps.new_empty(2, *shape)  # one map at a time: these stay in the processor's cache
    for volume in maps.view(-1, *shape):
        for out, of in runs[2]:
            torch.mm(volume.view(-1, n_k)[:, of], bands[2][out, of].T, out=along_k.view(-1, n_k)[:, out])
        for out, of in runs[1]:
            torch.bmm(bands[1][out, of].expand(n_i, -1, -1), along_k[:, of], out=along_j[:, out])
        for out, of in runs[0]:
            torch.mm(bands[0][out, of], along_j.view(n_i, -1)[of], out=volume.view(n_i, -1)[out])
    return maps


def _matmul_is_exact(device: torch.device) -> bool:
    """Return whether float32 products keep float32; with TF32 or bfloat16 allowed, variances would be lost in
    rounding."""
    if device.type == "mps":  # has neither, nor the float64 that would replace them
        return True
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # says so when torch's newer settings were used, none of which is the default
        return False


@lru_cache(maxsize=64)
def _band(n: int, window: int, padding: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the (n, n) matrix whose product with a line of voxels sums each one's window."""
    with torch.inference_mode(False):
        index = torch.arange(n, device=device)
        reach = window // 2
        band = ((index[:, None] - index).abs() <= reach).to(dtype)
        if padding == "edge":
            band[:, 0] += (reach - index).clamp(min=0)
            band[:, -1] += (reach - (n - 1 - index)).clamp(min=0)
        return band


@lru_cache(maxsize=64)
def _runs(n: int, window: int) -> list[tuple[slice, slice]]:
    """Cut an axis into runs of about 64 voxels: (the run, the voxels its windows see).

    A band is mostly zeros on a long axis; longer and shorter runs were slower (64 to 224 voxels, window 9).
    """
    count = -(-n // _RUN)
    edges = [n * r // count for r in range(count + 1)]
    reach = window // 2
    return [(slice(a, b), slice(max(a - reach, 0), min(b + reach, n))) for a, b in pairwise(edges)]


def _voxels_inside(window: int, image: Tensor) -> Tensor:
    """Return (i, j, k): how many voxels of each cube lie inside the image."""
    i, j, k = (_band(n, window, "zeros", image.dtype, image.device).sum(dim=1) for n in image.shape[-3:])
    return i[:, None, None] * j[:, None] * k


def _pair(fixed: Tensor, warped: Tensor) -> tuple[Tensor, Tensor]:
    """Return both images in one floating type, float32 or better."""
    if fixed.ndim != 5 or fixed.shape != warped.shape:
        raise ValueError(
            f"Similarity needs two images of one shape (batch, channel, i, j, k), "
            f"not {tuple(fixed.shape)} and {tuple(warped.shape)}."
        )
    dtype = torch.promote_types(torch.promote_types(fixed.dtype, warped.dtype), torch.float32)
    return fixed.to(dtype), warped.to(dtype)
