"""Align before the network: centers, then rigid, then affine, by mutual information.

All of it is computed on the images averaged to voxels of about 3 mm (images of an unusual size are first scaled to a
usual one, so that a mouse is aligned as a human is), with SimpleITK's Mattes mutual information (Mattes
et al., IEEE TMI 22(1), 2003, doi:10.1109/TMI.2003.809072), so that the contrasts may differ. One thread and seeded
samples: the same two images give the same matrix every time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
import torch
import torch.nn.functional as F
from torch import Tensor

from ..io.images import check_overlap, sitk_from_volume
from ..protocol.errors import MorphSeekError
from ..protocol.job import SILENT, Job
from ..space import fields
from ..space.geometry import (
    DenseTransform,
    Grid,
    Transform,
    Volume,
    apply_affine,
    dense_from_voxels,
    index_points,
    resample,
)
from ..space.preprocessing import sampled
from .masks import Masks

KINDS = ("none", "center", "rigid", "affine")

_SPACING = 3.0  # mm of the averaged voxels
_MARGIN = 9.0  # mm around the foreground are sampled too: the outline fixes the scale
_SMOOTH = (2.0, 5.0)  # mm, the fine and the coarse look
_USUAL = (150.0, 1000.0)  # mm a side, for which these lengths are right
_FILL = (0.01, 0.9)  # of the voxels on an image's faces are fill, where there is one
_LEVEL = 0.02  # of the range: so far apart, values are one level still
_AIR = 0.1  # of the range above a fill, that noise of air may take
_SAMPLES = 6000
_BINS = 32
_SEED = 1
_TILT = np.deg2rad(15.0)
_SCALES = (0.5, 2.0)  # no two scans that can be registered differ more in size,
_STRETCH = 1.6  # nor in shape: largest over smallest singular value of the linear part
_OVERLAP = 0.6  # a start or result that sees much less of the sampled foreground than another is none

_WORDS = "Aligning the images"


def align(
    fixed: Volume,
    moving: Volume,
    kind: str = "affine",
    initial: Transform | None = None,
    job: Job = SILENT,
) -> Transform:
    """Bring the moving image roughly onto the fixed one; see :func:`alignments`."""
    return alignments(fixed, moving, (kind,), initial, job)[kind]


def alignments(
    fixed: Volume,
    moving: Volume,
    kinds: Sequence[str],
    initial: Transform | None = None,
    job: Job = SILENT,
    masks: Masks | None = None,
) -> dict[str, Transform]:
    """Bring the moving image roughly onto the fixed one, in several ways.

    Args:
        fixed, moving: intensities, on grids that may lie anywhere; contrasts, orientations and fields of view may
            differ.
        kinds: of "none"; "center" (shift the middle of one foreground onto the other's); "rigid" (shift and rotation
            from there, or from where the files lie when that fits better); "affine" (then scale and shear too).
        initial: fixed point -> moving point, LPS mm, to start from; the result contains it.
        job: told the fraction done of the last kind, 0 to 1; checked many times a second.
        masks: what counts of the images, which are already filled elsewhere; None for all.

    Returns:
        For each kind fixed point -> moving point: a (4, 4) matrix, LPS mm; a DenseTransform (on the grid of
        ``initial``) only when ``initial`` is one. By the images' mutual information it is never worse than where they
        started.

    Raises:
        MorphSeekError: unknown kind, or the images do not overlap after ``initial``.
    """
    if unknown := set(kinds) - set(KINDS):
        raise MorphSeekError(f"There is no alignment '{unknown.pop()}'; choose one of none, center, rigid, affine.")
    masks = Masks() if masks is None else masks
    found: dict[str, Transform] = {"none": np.eye(4) if initial is None else initial}
    wanted = [kind for kind in kinds if kind != "none"]
    if wanted and isinstance(initial, DenseTransform):
        found |= _after_dense(fixed, moving, wanted, initial, job, masks)
    elif wanted:
        if initial is not None and wanted != ["center"]:
            check_overlap(fixed, moving, initial)
        unit = _unit(fixed.grid, moving.grid)
        scale, back = np.diag([unit, unit, unit, 1.0]), np.diag([1 / unit, 1 / unit, 1 / unit, 1.0])
        images = ((fixed, masks.fixed), (moving, masks.moving))
        f, m = (_Scan.of(_moved(volume, back), counts, job) for volume, counts in images)
        begin = None if initial is None else back @ initial @ scale
        for kind in wanted:
            heard = job if kind == wanted[-1] else job.heard_by(None)
            found[kind] = scale @ _climb(f, m, kind, begin, heard) @ back
    return {kind: found[kind] for kind in kinds}


def _after_dense(
    fixed: Volume, moving: Volume, kinds: Sequence[str], initial: DenseTransform, job: Job, masks: Masks
) -> dict[str, Transform]:
    """Align to what an initial transform makes of the moving image, in the fixed image's space."""
    check_overlap(fixed, moving, initial)
    unit = _unit(fixed.grid, moving.grid)
    block = _average(fixed, _SPACING * unit)
    background = float(moving.data.min())
    seen = resample(_average(moving, _SPACING * unit), block.grid, initial, background=background, job=job)
    left = None
    if masks.moving is not None:
        marked = Volume(masks.moving.to(torch.uint8), moving.grid)
        left = resample(marked, block.grid, initial, mode="nearest", job=job).data > 0
    within = Masks(None if masks.fixed is None else _kept(masks.fixed, fixed, _SPACING * unit), left)
    nodes, found = initial.grid, alignments(block, seen, kinds, None, job, within)
    return {
        kind: dense_from_voxels(index_points(nodes, matrix, nodes) - fields.identity(nodes.shape), nodes, initial)
        for kind, matrix in found.items()
    }


def _climb(
    f: _Scan,
    m: _Scan,
    kind: str,
    initial: np.ndarray | None,
    job: Job,
) -> np.ndarray:
    """Align two scans; arguments as for :func:`align`."""
    begin = np.eye(4) if initial is None else initial
    if kind == "center":
        job.report("align", 1.0, _WORDS)
        return _shift(m.center - apply_affine(begin, f.center[None])[0]) @ begin
    # sample the smaller foreground: the brain in a head, the head in a head with shoulders, whichever image has it
    swap = m.volume < f.volume
    if swap:
        f, m, begin = m, f, np.linalg.inv(begin)
    starts = list(_starts(f, m)) if initial is None else [begin]
    search = _Search(f, m, job)
    seeds = sorted(starts, key=lambda s: search.cost(s, coarse=True))[:3]
    if len(seeds) > 1:
        found = []
        for n, seed in enumerate(seeds):
            found.append(search.improve(seed, "rigid", 10, job.part(0.1 * (n + 1), 0.1 * (n + 2)), coarse=True))
        seeds = [min(found, key=search.cost)]
    candidates = [begin, seeds[0]]
    candidates.append(search.improve(seeds[0], "rigid", 20, job.part(0.4, 0.6)))
    if kind == "affine":
        affine = search.improve(candidates[-1], "affine", 30, job.part(0.6, 1.0))
        if _is_sane(affine @ np.linalg.inv(begin)):
            candidates.append(affine)
    best = min(candidates, key=search.cost)
    job.report("align", 1.0, _WORDS)
    return np.linalg.inv(best) if swap else best


def object_size(volume: Volume, job: Job = SILENT) -> float:
    """Return the longest side in mm of what an image shows: of its foreground's box, but for the outermost
    hundredths."""
    block = _average(volume, _SPACING * _unit(volume.grid))
    if float(block.data.min()) == float(block.data.max()):
        return float((block.grid.spacing * block.grid.shape).max())
    index = np.argwhere(_array(_foreground(_clipped(block)))).astype(np.float64)
    job.check()
    sides = np.percentile(index, 99, axis=0) - np.percentile(index, 1, axis=0) + 1
    return float((sides * block.grid.spacing).max())


@dataclass(frozen=True)
class _Scan:
    """An averaged image, where its foreground is, and how large.

    Attributes:
        image: float32; the origin of its space is ``center``.
        mask: uint8, the foreground and a margin around it; in the space of ``image``.
        grid: of both, LPS mm.
        points: (n, 3) LPS mm of the foreground's voxels.
        center: their mean.
        volume: of the foreground, mm^3.
        left: (i, j, k) uint8, what a mask leaves; None for all.
    """

    image: sitk.Image
    mask: sitk.Image
    grid: Grid
    points: np.ndarray
    center: np.ndarray
    volume: float
    left: np.ndarray | None = None

    @classmethod
    def of(cls, volume: Volume, counts: Tensor | None, job: Job) -> _Scan:
        block = _average(volume, _SPACING)
        job.check()
        image = _clipped(block)
        foreground = _foreground(image)
        left = None
        if counts is not None:
            left = _kept(counts, volume, _SPACING).numpy().astype(np.uint8)
            mask = sitk.GetImageFromArray(left.transpose(2, 1, 0))
            mask.CopyInformation(foreground)
            shown = foreground & mask
            foreground = shown if _array(shown).any() else mask
        job.check()
        spacing = block.grid.spacing
        reach = [min(round(_MARGIN / s), n) for s, n in zip(spacing, block.grid.shape, strict=True)]
        around = sitk.BinaryDilate(foreground, reach)
        mask = around if left is None else around & mask
        job.check()
        index = np.argwhere(_array(foreground))
        points = apply_affine(block.grid.affine, index)
        center = points.mean(axis=0)
        # ITK's scales of the parameters depend on where in the world the images lie, and fail far from its origin
        for moved in (image, mask):
            moved.SetOrigin((moved.GetOrigin() - center).tolist())
        return cls(image, mask, block.grid, points, center, len(index) * float(np.prod(spacing)), left)

    def smoothed(self, sigma: float) -> sitk.Image:
        """Return the image blurred by a Gaussian of ``sigma`` mm."""
        # the recursive filter needs four voxels along each axis
        rim = [max(0, 4 - n) for n in self.grid.shape]
        padded = sitk.ZeroFluxNeumannPad(self.image, rim, rim) if any(rim) else self.image
        smooth = sitk.SmoothingRecursiveGaussian(padded, sigma)
        return sitk.Crop(smooth, rim, rim) if any(rim) else smooth


class _Search:
    """Mutual information of two scans, and the search for its maximum.

    Matrices map points of ``fixed`` to points of ``moving``, which may be the caller's images exchanged.
    """

    def __init__(self, fixed: _Scan, moving: _Scan, job: Job) -> None:
        self.fixed, self.moving, self.job = fixed, moving, job
        # fine and coarse: Mattes' histogram is smooth only over smooth images
        self.levels = [[scan.smoothed(sigma) for scan in (fixed, moving)] for sigma in _SMOOTH]
        self.bins = [[_in_bins(image) for image in level] for level in self.levels]
        # random places between the voxels: on the grid itself, interpolation would favor shifts by whole voxels
        random = np.random.default_rng(_SEED)
        inside = np.argwhere(_array(fixed.mask))
        index = inside[random.integers(len(inside), size=_SAMPLES)] + random.random((_SAMPLES, 3)) - 0.5
        self.points = apply_affine(fixed.grid.affine, index)

    def cost(self, matrix: np.ndarray, coarse: bool = False) -> float:
        """Return the negative mutual information of the samples; infinite if too few land in the moving image."""
        self.job.check()
        inside = self._inside(matrix)
        if inside.mean() < 0.25:
            return np.inf
        fixed, moving = self.bins[coarse]
        points = self.points[inside]
        x = _values(fixed, self.fixed.grid, points)
        y = _values(moving, self.moving.grid, apply_affine(matrix, points))
        joint = torch.zeros(_BINS * _BINS, dtype=torch.float64)
        for i in (0, 1):  # each sample is shared out among the four bins around it
            for j in (0, 1):
                column, row = x.floor().clamp(max=_BINS - 2) + i, y.floor().clamp(max=_BINS - 2) + j
                weight = (1 - (x - column).abs()) * (1 - (y - row).abs())
                joint += torch.bincount((column * _BINS + row).long(), weight, _BINS * _BINS)
        joint = joint.view(_BINS, _BINS) / joint.sum()
        apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
        return -float(torch.special.xlogy(joint, joint / apart.clamp(min=1e-300)).sum())

    def improve(
        self,
        matrix: np.ndarray,
        kind: str,
        iterations: int,
        job: Job,
        coarse: bool = False,
    ) -> np.ndarray:
        """Climb from ``matrix``, which is applied after what is searched for; at worst the result is ``matrix``."""
        step = sitk.AffineTransform(3) if kind == "affine" else sitk.Euler3DTransform()
        method = self._method(matrix)
        method.SetInitialTransform(step, inPlace=True)
        method.SetOptimizerAsConjugateGradientLineSearch(
            learningRate=1.0,
            numberOfIterations=iterations,
            convergenceMinimumValue=1e-4,
            convergenceWindowSize=5,
            lineSearchLowerLimit=0.0,
            lineSearchUpperLimit=4.0,
            lineSearchEpsilon=0.2,
            lineSearchMaximumIterations=5,
            estimateLearningRate=method.EachIteration,
        )
        method.SetOptimizerScalesFromPhysicalShift()
        stop: list[BaseException] = []

        def each() -> None:
            # an exception may not pass through ITK
            try:
                job.check()
                job.report("align", min(1.0, method.GetOptimizerIteration() / iterations), _WORDS)
            except BaseException as error:
                stop.append(error)
                method.StopRegistration()

        method.AddCommand(sitk.sitkIterationEvent, each)
        # the metric heeds only the global number; with two threads, sums differ in their last digits from run to run
        threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
        try:
            method.Execute(*self.levels[coarse])
        except RuntimeError:  # it climbed out of the moving image
            if not stop:
                return matrix
        finally:
            sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
        if stop:
            raise stop[0]
        found = np.eye(4)
        found[:3, :3] = np.array(step.GetMatrix()).reshape(3, 3)
        found[:3, 3] = step.GetTranslation()
        found = matrix @ _shift(self.fixed.center) @ found @ _shift(-self.fixed.center)
        return found if self._inside(found).mean() > _OVERLAP * self._inside(matrix).mean() else matrix

    def _method(self, matrix: np.ndarray) -> sitk.ImageRegistrationMethod:
        method = sitk.ImageRegistrationMethod()
        method.SetMetricAsMattesMutualInformation(_BINS)
        method.SetInterpolator(sitk.sitkLinear)
        method.SetMetricFixedMask(self.fixed.mask)
        if self.moving.left is not None:
            left = sitk.GetImageFromArray(self.moving.left.transpose(2, 1, 0))
            left.CopyInformation(self.moving.image)
            method.SetMetricMovingMask(left)
        method.SetMetricSamplingStrategy(method.RANDOM)
        inside = int(sitk.GetArrayViewFromImage(self.fixed.mask).sum())
        method.SetMetricSamplingPercentage(min(1.0, _SAMPLES / inside), _SEED)
        matrix = _shift(-self.moving.center) @ matrix @ _shift(self.fixed.center)
        start = sitk.AffineTransform(3)
        start.SetMatrix(matrix[:3, :3].ravel().tolist())
        start.SetTranslation(matrix[:3, 3].tolist())
        method.SetMovingInitialTransform(start)
        return method

    def _inside(self, matrix: np.ndarray) -> np.ndarray:
        """Return (samples,): whether each lands in the moving image's box, and in what a mask leaves of it."""
        index = apply_affine(np.linalg.inv(self.moving.grid.affine) @ matrix, self.points)
        last = np.array(self.moving.grid.shape) - 1
        lands = np.all((index >= -0.5) & (index <= last + 0.5), axis=1)
        if self.moving.left is not None:
            i, j, k = np.clip(np.round(index), 0, last).astype(int).T
            lands &= self.moving.left[i, j, k] > 0
        return lands


def _in_bins(image: sitk.Image) -> Tensor:
    """Return (1, 1, i, j, k): intensities from 0 to the last bin."""
    data = torch.from_numpy(_array(image).astype(np.float64))
    return ((data - data.min()) / (data.max() - data.min()).clamp(min=1e-12) * (_BINS - 1))[None, None]


def _values(data: Tensor, grid: Grid, points: np.ndarray) -> Tensor:
    """Return (n,): data at (n, 3) LPS mm."""
    index = torch.from_numpy(apply_affine(np.linalg.inv(grid.affine), points).T.copy()).view(1, 3, -1, 1, 1)
    return fields.sample(data, index, padding="border").flatten()


def _starts(fixed: _Scan, moving: _Scan) -> Iterator[np.ndarray]:
    """Yield where to start: by world coordinates, by centers, by tops; each upright and tilted six ways."""
    centered = moving.center - fixed.center
    # two heads match at the top however much neck the scans show
    top = np.array([*centered[:2], np.percentile(moving.points[:, 2], 99) - np.percentile(fixed.points[:, 2], 99)])
    about = _shift(fixed.center)
    for shift in (np.zeros(3), centered, top):
        for axis, angle in [(0, 0.0), *((a, s * _TILT) for a in range(3) for s in (-1, 1))]:
            turn = np.eye(4)
            i, j = (axis + 1) % 3, (axis + 2) % 3
            turn[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
            yield _shift(shift) @ about @ turn @ np.linalg.inv(about)


def _unit(*grids: Grid) -> float:
    """Return 1 for images of a usual size; for others, the size of the largest over the smallest usual one."""
    size = max(float(np.prod(grid.spacing * grid.shape)) ** (1 / 3) for grid in grids)
    return 1.0 if _USUAL[0] <= size <= _USUAL[1] else size / _USUAL[0]


def _moved(volume: Volume, matrix: np.ndarray) -> Volume:
    """Return the volume elsewhere: every point of it moved by a (4, 4) matrix."""
    return Volume(volume.data, Grid(volume.grid.shape, matrix @ volume.grid.affine))


def _average(volume: Volume, spacing: float) -> Volume:
    """Return the means of blocks of voxels, about ``spacing`` mm each way, any fill having become air."""
    return in_blocks(_without_fill(volume.data.float()), volume.grid, spacing)


def in_blocks(data: Tensor, grid: Grid, spacing: float) -> Volume:
    """Return the means of blocks of voxels, about ``spacing`` mm each way."""
    block = [int(max(1, min(round(spacing / s), n // 8))) for s, n in zip(grid.spacing, grid.shape, strict=True)]
    data = F.avg_pool3d(data[None, None], block)[0, 0].contiguous()
    to_first = np.diag([*block, 1.0])
    to_first[:3, 3] = (np.array(block) - 1) / 2
    i, j, k = data.shape
    return Volume(data, Grid((i, j, k), grid.affine @ to_first))


def _kept(counts: Tensor, volume: Volume, spacing: float) -> Tensor:
    """Return which blocks of :func:`_average` hold mostly voxels that count, bool; at least one."""
    share = in_blocks(counts.float(), volume.grid, spacing).data
    return share >= min(0.5, float(share.max()))


def _clipped(block: Volume) -> sitk.Image:
    """Return the image without the values, few or meaningless, that would rule its histogram."""
    data = block.data
    values = data.flatten().sort().values
    least, most = values[len(values) // 1000], values[-1 - len(values) // 1000]
    above_air = values[values > -1000.0]
    if least < -500.0 and len(above_air) and above_air[len(above_air) // 2] < 1000.0:
        # CT: padding below air, and metal
        data = data.clamp(-1000.0, 1000.0)
    elif most > least:
        data = data.clamp(least, most)
    return sitk_from_volume(Volume(data, block.grid))


def _without_fill(data: Tensor) -> Tensor:
    """Turn a fill around the field of view that is darker than air into air.

    It has a place in the scanner, not in the body: where both images have it, their mutual information is highest with
    fill on fill. The faces of an image with a fill show fill and air; those of others show air alone, or air and
    tissue, which is not of one level.
    """
    values = sampled(data).sort().values
    least, most = float(values[len(values) // 1000]), float(values[-1 - len(values) // 1000])
    faces = torch.cat([data.select(axis, end).flatten() for axis in range(3) for end in (0, -1)])
    rest = faces[faces > least + _LEVEL * (most - least)]
    if not _FILL[0] <= 1 - len(rest) / len(faces) <= _FILL[1]:
        return data
    rest = rest.sort().values
    low, high = float(rest[len(rest) // 100]), float(rest[len(rest) * 4 // 5])
    apart = low - least > 2 * _LEVEL * (most - least)  # noise is not
    return data.clamp(min=low) if apart and low < most and high - low <= _AIR * (most - low) else data


def _foreground(image: sitk.Image) -> sitk.Image:
    """Return the largest connected part that is not air, without table and noise."""
    # Otsu's threshold separates dark tissue from bright; half of it separates tissue from air
    otsu = sitk.OtsuThresholdImageFilter()
    otsu.Execute(image)
    low = float(_array(image).min())
    parts = sitk.ConnectedComponent(image > low + 0.5 * (otsu.GetThreshold() - low))
    return sitk.RelabelComponent(parts, sortByObjectSize=True) == 1


def _array(image: sitk.Image) -> np.ndarray:
    """Return (i, j, k): the image's values."""
    return sitk.GetArrayFromImage(image).transpose(2, 1, 0)


def _is_sane(matrix: np.ndarray) -> bool:
    sizes = np.linalg.svd(matrix[:3, :3], compute_uv=False)
    return bool(
        np.linalg.det(matrix[:3, :3]) > 0
        and sizes[2] > _SCALES[0]
        and sizes[0] < _SCALES[1]
        and sizes[0] < _STRETCH * sizes[2]
    )


def _shift(vector: np.ndarray) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, 3] = vector
    return matrix
