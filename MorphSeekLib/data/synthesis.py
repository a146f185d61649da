"""Pairs of images synthesized from label maps: random contrast, bias, noise, resolution and deformation.

After Hoffmann et al., "SynthMorph" (IEEE TMI 2022) and Billot et al., "SynthSeg": a network that never sees the same
contrast twice learns shapes, so it registers any contrast. Because the labels are known, the training signal is
measured on them. Every pair is a pure function of (settings, seed, iteration): a resumed training sees the same pairs.

Contrasts are painted on the label maps at half the working spacing and averaged down before the deformation, so that
borders have the partial volumes of real images at the price of the working grid.

Air is black, or noise over the whole image where nothing is stripped. Real scans come with noisy air made flat (see
background.py) and synthetic ones do not: the next training from scratch should pass its images through the same
function, and may add air with a structure of its own (ghosts, noise that varies over the image), which that one leaves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..io.images import read_labels
from ..protocol.errors import MorphSeekError
from ..space import fields
from ..space.geometry import Grid, orientation_matrix, resample
from ..space.preprocessing import Preprocessing, normalize, sampled


@dataclass(frozen=True)
class SynthesisSettings:
    """Ranges are uniform unless said otherwise.

    Attributes:
        anatomy: labels of the organ itself: it is centered, its moments are matched between cases (a crude affine
            alignment), and its labels are scored.
        unscored: labels of the anatomy that are not scored (such as cerebrospinal fluid).
        groups: labels of one tissue; half of the random contrasts give a group one intensity, which then varies little
            within it.
        typical: the usual intensity of each group, 0..1 (white over gray matter in T1); empty for none.
        typical_share: share of pairs in which both images have the typical contrast, a little varied.
        scored: how many structures one pair is scored on, drawn with odds of the square root of their volumes.
        same_case: share of pairs whose two images show the same case under two deformations, so that every structure
            has an exact counterpart and no pair of people can be learned by heart.
        strip: share of pairs in which everything but the anatomy is removed from one or both images.
        same_contrast: share of pairs in which both images have the same tissue contrast.
        rotation, scale, shear, translation: spread (standard deviation) of the random affine maps, in degrees, shares,
            shares and mm.
        deformation: greatest spread of the random smooth velocity, in mm; its control points lie 20 to 50 mm apart.
        noise, bias, blur: greatest spread of the noise (share of the range), of the log bias field, and of the Gaussian
            blur (mm).
        thick: share of images with slices of up to 7 mm along a random axis.
        mirror: share of single images (:meth:`LabelMapSource.labeled`) that are mirrored along their first axis: with
            the left and the right of a structure in one channel, each label map counts twice.
    """

    anatomy: tuple[int, ...] = ()
    unscored: tuple[int, ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()
    typical: tuple[float, ...] = ()
    typical_share: float = 0.4
    scored: int = 10
    same_case: float = 0.0
    strip: float = 0.5
    same_contrast: float = 0.5
    rotation: float = 3.0
    scale: float = 0.04
    shear: float = 0.02
    translation: float = 2.0
    deformation: float = 4.0
    noise: float = 0.08
    bias: float = 0.3
    blur: float = 1.5
    thick: float = 0.2
    mirror: float = 0.0


@dataclass
class SyntheticPair:
    """One training pair on the working grid.

    Attributes:
        fixed, moving: (1, 1, i, j, k), 0..1, what the network sees.
        fixed_target, moving_target: (1, 1, i, j, k), the anatomy alone, clean and in one contrast: similarity measured
            on these draws at every border, whatever the contrasts of the images.
        fixed_labels, moving_labels: (1, structures, i/2, j/2, k/2), shares of each scored structure in blocks of 2x2x2
            voxels: soft Dice sees borders finer than a block, and its warps cost an eighth.
    """

    fixed: Tensor
    moving: Tensor
    fixed_target: Tensor
    moving_target: Tensor
    fixed_labels: Tensor
    moving_labels: Tensor


class LabelMapSource:
    """Synthetic pairs from a folder of label maps."""

    def __init__(self, paths: list[Path], preprocessing: Preprocessing, settings: SynthesisSettings) -> None:
        if len(paths) < 2:
            raise MorphSeekError("Synthesis needs at least two label maps; point to a folder that holds more.")
        if preprocessing.spacing is None or preprocessing.shape is None:
            raise MorphSeekError("Synthesis needs preprocessing.spacing and preprocessing.shape; set both.")
        self.preprocessing, self.settings = preprocessing, settings
        shape, spacing = np.array(preprocessing.shape), np.array(preprocessing.spacing)
        self.spacing = spacing
        cases = [read_labels(path) for path in paths]
        moments = [_moments(case, settings.anatomy) for case in cases]
        mean_covariance = np.mean([covariance for _, covariance in moments], axis=0)
        direction = orientation_matrix(preprocessing.orientation)
        values = sorted({value for case in cases for value in label_values(case.data)} | {0})
        index = {v: n for n, v in enumerate(values)}
        self.values = torch.tensor(values)  # of 0, 1, 2, ..., as the label maps hold them
        anatomy = [v for v in (settings.anatomy or values) if v in index and v != 0]
        self.anatomy = torch.zeros(len(values), dtype=torch.bool)
        self.anatomy[[index[v] for v in anatomy]] = True
        scored = [index[v] for v in anatomy if v not in settings.unscored]
        self.groups = torch.arange(len(values))  # label -> group; a label outside all groups is its own
        for n, group in enumerate(settings.groups):
            self.groups[[index[v] for v in group if v in index]] = len(values) + n
        # labels become 0, 1, 2, ...: a contrast is then one look-up
        renumber = torch.zeros(values[-1] - values[0] + 1, dtype=torch.int32)
        renumber[torch.tensor(values) - values[0]] = torch.arange(len(values), dtype=torch.int32)
        origin = -direction @ (spacing / 2 * (2 * shape - 1) / 2)
        grid = Grid.from_parts(tuple(2 * shape), spacing / 2, direction, origin)
        self.labels, self.shares, volumes = [], [], []
        for case, (center, covariance) in zip(cases, moments, strict=True):
            to_case = np.eye(4)
            to_case[:3, :3] = _root(covariance) @ np.linalg.inv(_root(mean_covariance))
            to_case[:3, 3] = center
            labels = renumber[resample(case, grid, to_case, mode="nearest").data - values[0]]
            self.labels.append(labels)
            # of 64 fine voxels in each coarse one
            self.shares.append(torch.stack([_halve(_halve(labels == n, torch.uint8), torch.uint8) for n in scored]))
            volumes.append(self.shares[-1].flatten(1).sum(dim=1, dtype=torch.float32))
        self.odds = torch.stack(volumes).amin(dim=0).sqrt()
        if int((self.odds > 0).sum()) < 1:
            raise MorphSeekError("The label maps have no scored structure in common; check synthesis.anatomy.")

    def __len__(self) -> int:
        return len(self.labels)

    def pair(self, generator: torch.Generator) -> SyntheticPair:
        """Return a random pair, of two different cases unless the settings say otherwise."""
        g, s = generator, self.settings
        first, second = torch.randperm(len(self.labels), generator=g)[:2].tolist()
        if s.same_case and _uniform(g) < s.same_case:
            second = first
        count = min(s.scored, int((self.odds > 0).sum()))
        structures = torch.multinomial(self.odds, count, generator=g)
        target = self._contrast(g, typical=True)
        typical = bool(s.typical) and _uniform(g) < s.typical_share
        contrast = self._contrast(g, typical)
        same = typical or _uniform(g) < s.same_contrast
        other = contrast if same else self._contrast(g)
        strip = _uniform(g) < s.strip
        both = _uniform(g) < 0.7
        made = []
        for case, own, stripped in ((first, contrast, strip), (second, other, strip and both)):
            points = self._points(g)
            made.append((*self._image(case, own, target, stripped, points, g), self._shares(case, structures, points)))
        (fixed, fixed_target, fixed_labels), (moving, moving_target, moving_labels) = made
        return SyntheticPair(fixed, moving, fixed_target, moving_target, fixed_labels, moving_labels)

    def labeled(
        self, generator: torch.Generator, box: tuple[slice, slice, slice] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return a random image and the label value of each of its voxels, (1, 1, i, j, k) each, the labels int64.

        Args:
            generator: of the CPU.
            box: of the working grid, what of the image is wanted; None: all.
        """
        g, s = generator, self.settings
        case = int(torch.randint(len(self.labels), (1,), generator=g))
        contrast = self._contrast(g, typical=bool(s.typical) and _uniform(g) < s.typical_share)
        strip = _uniform(g) < s.strip
        points = self._points(g)
        if s.mirror and _uniform(g) < s.mirror:
            points[:, 0] = points.shape[2] - 1 - points[:, 0]
        if box is not None:
            cut = (slice(None), slice(None), *box)
            points = points[cut]
        image, _ = self._image(case, contrast, contrast, strip, points, g)
        fine = self.labels[case][None, None].float()
        known = fields.sample(fine, 2 * points + 0.5, mode="nearest").round().long()
        return image, self.values[known]

    def _contrast(self, g: torch.Generator, typical: bool = False) -> tuple[Tensor, Tensor]:
        """Draw mean and spread of the intensity of every label; background is dark in most images."""
        s, n = self.settings, len(self.groups)
        means = torch.rand(n, generator=g)
        grouped = _uniform(g) < 0.5
        tissue = torch.rand(n + len(s.groups), generator=g)
        if typical and s.typical:
            tissue[n:] = torch.tensor(s.typical) + 0.08 * torch.randn(len(s.typical), generator=g)
        if grouped or typical:
            means = tissue[self.groups] + 0.04 * torch.randn(n, generator=g)
        spread = 0.12 * torch.rand(n, generator=g)
        if typical or _uniform(g) < 0.9:
            means[0], spread[0] = 0.0, 0.03 * _uniform(g)
        return means, spread

    def _image(
        self,
        case: int,
        contrast: tuple[Tensor, Tensor],
        target: tuple[Tensor, Tensor],
        strip: bool,
        points: Tensor,
        g: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Return an image of a case and its clean target, (1, 1, i, j, k), whose voxels lie at points of the map."""
        s, labels = self.settings, self.labels[case]
        means, spread = contrast
        if strip:
            means, spread = means * self.anatomy, spread * self.anatomy
        painted = _halve(means[labels], torch.float32) / 8
        clean = _halve((target[0] * self.anatomy)[labels], torch.float32) / 8
        coarse = labels[::2, ::2, ::2]
        channels = torch.stack([painted, spread[coarse], self.anatomy[coarse].float(), clean])[None]
        image, spread, mask, clean = fields.sample(channels, points).split(1, dim=1)
        image = image + spread * torch.randn(image.shape, generator=g)
        image = _blur(image, s.blur * _uniform(g) / self.spacing)
        if _uniform(g) < s.thick:
            axis = int(torch.randint(3, (1,), generator=g))
            size = list(image.shape[2:])
            size[axis] = max(8, round(size[axis] * float(self.spacing[axis]) / (2 + 5 * _uniform(g))))
            thick = F.interpolate(image, size=size, mode="area")
            image = F.interpolate(thick, size=image.shape[2:], mode="trilinear", align_corners=False)
        smooth = torch.randn(1, 1, 4, 4, 4, generator=g) * s.bias * _uniform(g)
        image = image * F.interpolate(smooth, size=image.shape[2:], mode="trilinear", align_corners=True).exp()
        image = image + s.noise * _uniform(g) * torch.randn(image.shape, generator=g)
        if strip:
            image = image * (mask > 0.2)
        image = normalize(image, self.preprocessing)
        return image.pow(math.exp(0.25 * float(torch.randn(1, generator=g)))), clean

    def _shares(self, case: int, structures: Tensor, points: Tensor) -> Tensor:
        """Return the structures' shares of an image whose voxels lie at points of the map, (1, n, i/2, j/2, k/2)."""
        shares = self.shares[case][structures][None].float() / 64
        return fields.sample(shares, (F.avg_pool3d(points, 2) - 0.5) / 2)

    def _points(self, g: torch.Generator) -> Tensor:
        """Return where the voxels of the new image lie in the case's label map: random affine after random
        deformation."""
        s, shape = self.settings, self.labels[0][::2, ::2, ::2].shape
        apart = 20 + 30 * _uniform(g)
        coarse = [max(3, round(n * float(h) / apart)) for n, h in zip(shape, self.spacing, strict=True)]
        velocity = torch.randn(1, 3, *coarse, generator=g) * s.deformation * _uniform(g)
        velocity = velocity / torch.from_numpy(self.spacing).float().view(1, 3, 1, 1, 1)
        # integrated at half the resolution: smooth fields lose nothing there
        half = [n // 2 for n in shape]
        velocity = F.interpolate(velocity, size=half, mode="trilinear", align_corners=True)
        velocity = velocity * torch.tensor([(h - 1) / (n - 1) for h, n in zip(half, shape, strict=True)]).view(
            1, 3, 1, 1, 1
        )
        displacement = fields.resize(fields.integrate(velocity, 4), shape)
        angles = math.radians(s.rotation) * torch.randn(3, generator=g)
        skew = torch.zeros(3, 3)
        skew[0, 1], skew[0, 2], skew[1, 2] = angles
        linear = torch.linalg.matrix_exp(skew - skew.T)
        linear = linear @ (torch.eye(3) + s.shear * torch.randn(3, 3, generator=g))
        linear = linear @ torch.diag((s.scale * torch.randn(3, generator=g)).exp())
        shift = s.translation * torch.randn(3, generator=g) / torch.from_numpy(self.spacing).float()
        center = (torch.tensor(list(shape)) - 1) / 2
        points = fields.identity(shape) + displacement - center.view(1, 3, 1, 1, 1)
        return torch.einsum("ab,nbijk->naijk", linear, points) + (center + shift).view(1, 3, 1, 1, 1)


def label_values(labels: Tensor) -> list[int]:
    """Return all values of a label map, ascending; whatever its shape, none is missed."""
    return torch.unique(torch.unique_consecutive(labels.flatten())).tolist()


def _uniform(g: torch.Generator) -> float:
    return float(torch.rand(1, generator=g))


def _halve(fine: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over 2x2x2 blocks of (2i, 2j, 2k); much faster than pooling one channel."""
    fine = fine.to(dtype)
    fine = fine[0::2] + fine[1::2]
    fine = fine[:, 0::2] + fine[:, 1::2]
    return fine[..., 0::2] + fine[..., 1::2]


def _blur(image: Tensor, sigma: np.ndarray) -> Tensor:
    """Blur by a Gaussian, one width per axis, in voxels."""
    for axis, width in enumerate(sigma.tolist()):
        if width < 0.2:
            continue
        radius = max(1, math.ceil(2.5 * width))
        taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / width) ** 2)
        shape = [1] * 5
        shape[2 + axis] = len(taps)
        padding = [0, 0, 0]
        padding[axis] = radius
        image = F.conv3d(image, (taps / taps.sum()).view(shape), padding=padding)
    return image


def _moments(case, anatomy: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return center (mm, LPS) and covariance (mm^2) of the anatomy's voxels, or of a sample if there are many."""
    labels = case.data
    inside = torch.isin(labels, torch.tensor(anatomy, dtype=labels.dtype)) if anatomy else labels != 0
    index = torch.nonzero(inside)
    index = index[sampled(torch.arange(len(index)))]
    points = index.double().numpy() @ case.grid.affine[:3, :3].T + case.grid.origin
    if len(points) < 100:
        raise MorphSeekError(
            "A label map holds almost nothing of the anatomy that the settings name; check its labels."
        )
    return points.mean(axis=0), np.cov(points.T)


def _root(matrix: np.ndarray) -> np.ndarray:
    """Return the symmetric square root of a positive matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.sqrt(values) @ vectors.T
