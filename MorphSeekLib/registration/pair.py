"""Two images on the working grid, and what a displacement makes of them."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ..io.images import air_value, check_overlap
from ..io.transforms import rounded
from ..measures.similarity import Judge
from ..networks.loading import LoadedModel
from ..protocol.errors import MorphSeekError
from ..protocol.job import SILENT, Job, Notice
from ..protocol.report import FitSection, StepSection
from ..space import fields
from ..space.background import quiet_background
from ..space.geometry import (
    DenseTransform,
    Grid,
    Transform,
    Volume,
    dense_from_voxels,
    is_mirrored,
    map_voxels,
    resample,
    smooth_for_spacing,
)
from ..space.preprocessing import Preprocessing, foreground_of, normalize, normalized, working_grid
from . import guards
from .alignment import align, object_size

# working grids beyond this would need more memory than any machine of the field has
MAX_WORKING_VOXELS = 512**3


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add what happens within to a phase."""
        begin = time.perf_counter()
        yield
        self.seconds[phase] = round(self.seconds.get(phase, 0.0) + time.perf_counter() - begin, 3)


@dataclass(frozen=True)
class State:
    """Where a registration stands: enough to take further steps on the same images with the same model.

    Attributes:
        start: fixed point -> moving point, the alignment before the network.
        align: its name.
        total: (1, 3, i, j, k) voxels of the working grid, the answer so far.
        figures: after each step, index 0 before the first; "answer" tells which of them ``total`` is, or began with
            when it was fitted.
    """

    start: Transform
    align: str
    total: Tensor
    figures: list[StepSection]


@dataclass(frozen=True)
class Alignment:
    """What leads from the fixed to the moving image before anything deformable; fixed point -> moving point, LPS mm.

    Attributes:
        transform: the alignment, with the initial transform in it.
        kind: "none", "center", "rigid" or "affine".
        before: from where it was computed; None where this call computed none.
    """

    transform: Transform
    kind: str
    before: Transform | None = None

    @functools.cached_property
    def mirrored(self) -> bool:
        """Whether it exchanges left and right."""
        return is_mirrored(self.transform)


@dataclass
class Outcome:
    """What the stages of a registration found so far.

    Attributes:
        total: (1, 3, i, j, k) voxels of the working grid.
        transform: the whole map as it is delivered, alignment included, rounded as its file is.
        figures: after each step, index 0: before; "answer" is true in one of them.
        answer: its index.
        similarity: of ``total``, as the judge has it.
        before: the displacement from which the step to the answer was taken; None when no step of this call was.
        fitted: what the fit did, for the report; None without one.
        notices: what the user should know.
    """

    total: Tensor
    transform: DenseTransform
    figures: list[StepSection]
    answer: int
    similarity: float
    before: Tensor | None = None
    fitted: FitSection | None = None
    notices: list[Notice] = field(default_factory=list)


class Pair:
    """A fixed and a moving image on a working grid, with the alignment between them.

    Args:
        fixed, moving: the images, on any grids.
        model: from :func:`MorphSeekLib.networks.loading.load_model`; its card says how images are prepared.
        job: asked for cancellation while images are made and warped.

    Raises:
        MorphSeekError: the working grid would not fit into any memory.

    Attributes:
        grid: the working grid.
        notices: what there is to say about the two images.
        alignment: from :meth:`align` or :meth:`go_on_from`.
        moving_intensities: (1, 1, i, j, k), as the network takes them, on the moving image's own grid.
        fixed_intensities: (1, 1, i, j, k), on the working grid.
        seen: (1, 1, i, j, k), bool, where the fixed image lies.
        judge: of warped images, where both lie after the alignment.
    """

    alignment: Alignment
    fixed_intensities: Tensor
    moving_intensities: Tensor
    seen: Tensor
    judge: Judge

    def __init__(self, fixed: Volume, moving: Volume, model: LoadedModel, job: Job = SILENT) -> None:
        self.fixed, self.moving, self.device, self.job = fixed, moving, model.device, job
        self.background = air_value(moving.data)
        self.preprocessing, found = _known_world(fixed, moving, model.card.preprocessing, job)
        self.notices = [*fixed.notices, *moving.notices, *found]
        self.grid = working_grid(fixed.grid, self.preprocessing, model.network.multiple_of)
        _check_size(self.grid, fixed)

    def align(self, kind: str, initial: Transform | None, job: Job = SILENT) -> None:
        """Bring the moving image roughly onto the fixed one.

        Args:
            kind: "none", "center", "rigid" or "affine".
            initial: fixed point -> moving point (LPS mm), to start from.
            job: told how far it is.

        Raises:
            MorphSeekError: the images do not overlap, or the alignment is not made of finite numbers.
        """
        job.report("align", 0.0, "Aligning the images" if kind != "none" else "Checking that the images overlap")
        found = align(self.fixed, self.moving, kind, initial=initial, job=job)
        before = None if kind == "none" else np.eye(4) if initial is None else initial
        self._use(Alignment(found, kind, before))

    def go_on_from(self, state: State) -> None:
        """Take over the alignment of an earlier call.

        Raises:
            MorphSeekError: it was made on another working grid.
        """
        self._use(Alignment(state.start, state.align))
        if tuple(state.total.shape[2:]) != self.grid.shape:
            raise MorphSeekError("The steps so far were taken on another grid; register from the start again.")

    def _use(self, alignment: Alignment) -> None:
        guards.check_finite(alignment.transform, "The alignment")
        check_overlap(self.fixed, self.moving, alignment.transform)
        self.alignment = alignment
        self.notices += guards.mirrored_alignment(alignment.mirrored)

    def prepare(self) -> None:
        """Make the intensities that the network takes, and the judge of what it answers."""
        self.fixed_intensities, self.moving_intensities = self.intensities_on(self.grid)
        shown = Volume(foreground_of(quiet_background(self.fixed.data)).to(torch.uint8), self.fixed.grid)
        foreground = resample(shown, self.grid, mode="nearest", job=self.job).data.bool()
        # what one image does not see must not count as black there: a stretch of thin slices would be taken for a gain
        self.seen = self._inside(self.fixed.grid, np.eye(4))
        by_both = self.seen & self._inside(self.moving.grid, self.alignment.transform)
        self.judge = Judge(self.fixed_intensities, foreground[None, None].to(self.device), by_both)
        self.notices += guards.small_foreground(self.judge.voxels)
        for volume, role in ((self.fixed, "The fixed image"), (self.moving, "The moving image")):
            self.notices += guards.few_values(normalize(volume.data, self.preprocessing), volume.called(role))

    def intensities_on(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """Return the two images as the network takes them, (1, 1, i, j, k).

        The fixed one lies on ``grid``, the moving one on its own, as smooth as that.
        """
        spacing = world_spacing(grid)
        roles = ((self.fixed, "The fixed image"), (self.moving, "The moving image"))
        images = [smooth_for_spacing(normalized(v, self.preprocessing, v.called(r)), spacing) for v, r in roles]
        on_grid = resample(images[0], grid, job=self.job).data
        return on_grid[None, None].to(self.device), images[1].data[None, None].to(self.device)

    def nothing(self) -> Tensor:
        """Return the displacement that moves nothing, (1, 3, i, j, k)."""
        return torch.zeros(1, 3, *self.grid.shape, device=self.device)

    def moving_at(self, total: Tensor) -> Tensor:
        """Warp the moving image by a displacement, (1, 1, i, j, k), as far as the fixed one sees it."""
        self.job.check()
        points = map_voxels(total, self.grid, self.alignment.transform, self.moving.grid)
        return self.seen * fields.sample(self.moving_intensities, points)

    def moving_by(self, transform: Transform) -> Tensor:
        """Warp the moving image by a whole map, (1, 1, i, j, k)."""
        return fields.sample(
            self.moving_intensities, map_voxels(self.nothing(), self.grid, transform, self.moving.grid)
        )

    def warped(self, transform: Transform) -> Volume:
        """Warp the moving image by a whole map at full resolution, on the fixed image's grid."""
        out = resample(
            self.moving, self.fixed.grid, transform, background=self.background, device=self.device, job=self.job
        )
        return replace(out, dtype=self.moving.dtype)

    def delivered(self, displacement: Tensor, grid: Grid) -> DenseTransform:
        """Return a displacement (1, 3, i, j, k) in voxels of a grid as the whole map that is written.

        Raises:
            MorphSeekError: the displacement is not made of finite numbers.
        """
        transform = rounded(dense_from_voxels(displacement, grid, self.alignment.transform))
        guards.check_finite(transform, "The registration")
        return transform

    def similarity(self, total: Tensor) -> float:
        """Return what the judge says of a displacement."""
        return float(self.judge(self.moving_at(total)))

    def similarity_as_given(self) -> float | None:
        """Return what the judge says of the images before their alignment; None where this call aligned none."""
        before = self.alignment.before
        return None if before is None else float(self.judge(self.moving_by(before)))

    def overlap(self, total: Tensor) -> float:
        """Return the share of what the fixed image shows that lands in the moving image; 1 where it shows nothing."""
        inside = self._inside(self.moving.grid, self.alignment.transform, total)[self.judge.shown]
        return float(inside.float().mean()) if inside.numel() else 1.0

    def look(self, step: int, total: Tensor, warped: Tensor) -> StepSection:
        """Return the figures after a step, of its displacement and of the moving image warped by it.

        Raises:
            MorphSeekError: the displacement is not made of finite numbers.
        """
        length = displacement_mm(total, self.grid).norm(dim=0)
        determinants = (fields.least_determinant(total), fields.jacobian_determinant(total))
        shares = [100 * (j <= 0).float().mean() for j in determinants]
        values = torch.stack([self.judge(warped), length.mean(), *shares]).tolist()
        guards.check_finite(values, f"Step {step}")
        similarity, mean_displacement, folded, njd = values
        return {
            "step": step,
            "similarity": similarity,
            "mean_displacement_mm": mean_displacement,
            "folded_percent": folded,
            "njd_percent": njd,
        }

    def _inside(self, grid: Grid, transform: Transform, total: Tensor | None = None) -> Tensor:
        """Return which voxels of the working grid a displacement and a transform lead into an image's box, (1, 1, i, j,
        k)."""
        points = map_voxels(self.nothing() if total is None else total, self.grid, transform, grid)
        limit = torch.tensor(grid.shape, device=points.device).view(1, 3, 1, 1, 1) - 0.5
        return ((points >= -0.5) & (points <= limit)).all(dim=1, keepdim=True)


def world_spacing(grid: Grid) -> np.ndarray:
    """Return a grid's spacing along the world's axes, (3,) mm."""
    return np.linalg.norm(grid.direction * grid.spacing, axis=1)


def displacement_mm(total: Tensor, grid: Grid) -> Tensor:
    """Turn (1, 3, i, j, k) voxels into (3, i, j, k) mm along the grid's axes (lengths do not depend on these)."""
    return total[0] * torch.from_numpy(grid.spacing).to(total).view(3, 1, 1, 1)


def _known_world(
    fixed: Volume, moving: Volume, preprocessing: Preprocessing, job: Job
) -> tuple[Preprocessing, list[Notice]]:
    """Return the card's preprocessing, with a coarser grid for objects of another size than the model was trained
    on."""
    if preprocessing.knows is None:
        return preprocessing, []
    sizes = [object_size(volume, job) for volume in (fixed, moving)]
    notices, factor = guards.unknown_sizes(sizes, preprocessing)
    return preprocessing.scaled(factor), notices


def _check_size(grid: Grid, fixed: Volume) -> None:
    """Refuse a working grid beyond any machine's memory."""
    if math.prod(grid.shape) > MAX_WORKING_VOXELS:
        raise MorphSeekError(
            f"{fixed.called('The fixed image')} would need a working grid of {' x '.join(map(str, grid.shape))} "
            "voxels; check its spacing and its unit, crop it to the region of interest, or choose a model with a "
            "coarser working grid."
        )
