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
from ..networks.loading import LoadedModel
from ..protocol.errors import MorphSeekError
from ..protocol.job import SILENT, Job, Notice
from ..protocol.report import FitSection, Stage, StepSection
from ..space import fields
from ..space.background import quiet_background
from ..space.geometry import (
    DenseTransform,
    Grid,
    Transform,
    Volume,
    dense_from_voxels,
    in_box,
    is_mirrored,
    map_voxels,
    resample,
    smooth_for_spacing,
    voxel_displacement,
    world_spacing,
)
from ..space.preprocessing import Preprocessing, foreground_of, general, normalize, normalized, working_grid
from . import guards
from .alignment import alignments, object_size
from .body import beside_body, without
from .judge import FAR, Judge
from .learned import Features, Learned
from .masks import Masks, check_seen, filled
from .objective import Level, Maps
from .plans import BESIDE_LEVELS, BESIDE_WEIGHT, LEARNED_WEIGHT, Plan
from .pyramid import Coarse, Crop, Pyramid, lattice_of, nodes_around, with_opposite_contrast
from .wide import GAIN, look_around

# working grids beyond this would need more memory than any machine of the field has
MAX_WORKING_VOXELS = 512**3
OPPOSITE = -0.3
"""Below it (:meth:`.objective.Objective.contrast`) what is bright in one image is dark in the other. On development
pairs T1 and T1 had 1.0, CT and CT 0.5 to 0.9, MR and CT 0.2 to 0.6, T1 and inverted or T2-like images -0.9 to -1.0."""


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
        figures: after each stage and step, the alignment first; "answer" tells which of them ``total`` is.
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

    @property
    def determinant(self) -> float | None:
        """By how much it scales volumes, below 0 where it mirrors; None where it bends."""
        return float(np.linalg.det(self.transform[:3, :3])) if isinstance(self.transform, np.ndarray) else None


@dataclass
class Outcome:
    """What the stages of a registration found so far.

    Attributes:
        total: (1, 3, i, j, k) voxels of the working grid.
        figures: a row for each stage and each step of the network; the first is the alignment.
        answer: the row of ``total``.
        similarity: of ``total``, as the judge has it.
        found: the same displacement on the nodes on which a stage found it, finer than the working grid; None: there.
        fitted: what the fit did, for the report; None without one.
        notices: what the user should know.
        before: from where the fit started; None without one.
    """

    total: Tensor
    figures: list[StepSection]
    answer: int
    similarity: float
    found: DenseTransform | None = None
    fitted: FitSection | None = None
    notices: list[Notice] = field(default_factory=list)
    before: Outcome | None = None


class Pair:
    """A fixed and a moving image on a working grid, with the alignment between them.

    Args:
        fixed, moving: the images, on any grids.
        model: from :func:`MorphSeekLib.networks.loading.load_model`; its card says how images are prepared. None: by
            what the images show.
        device: where to compute; that of the model where there is one.
        job: asked for cancellation while images are made and warped.

    Raises:
        MorphSeekError: the working grid would not fit into any memory.

    Attributes:
        grid: the working grid: the model's, or without one the nodes of the fit's finest level.
        masks: what counts of the images.
        beside: which voxels of each image show something beside the body (:mod:`.body`), where both are CT and
            nothing is masked; None for none.
        known: fixed and moving, with a smooth continuation of the rest where masks leave nothing, and air where
            something is beside the body.
        notices: what there is to say about the two images.
        alignment: from :meth:`align` or :meth:`go_on_from`.
        similarity: what the pair is compared by, from :meth:`prepare`.
        seen: (1, 1, i, j, k), bool, which voxels of the working grid lie in the fixed image.
        as_given: the images as they are fitted, before the moving one's contrast is turned around.
        opposite: whether it is.
        learned: what the model has found in either image, where its card says that this is to be compared, alone or
            beside the intensities.
        judge: of displacements.
    """

    alignment: Alignment
    similarity: str
    as_given: Pyramid
    seen: Tensor
    judge: Judge

    def __init__(
        self,
        fixed: Volume,
        moving: Volume,
        model: LoadedModel | None = None,
        device: torch.device | None = None,
        job: Job = SILENT,
    ) -> None:
        self.fixed, self.moving, self.job, self.opposite = fixed, moving, job, False
        self.learned: Learned | None = None
        self._model = model
        self.masks = Masks(fixed.counts, moving.counts)
        usual = general(fixed.data, moving.data)
        is_ct = usual.intensity == "window"
        self.beside = (beside_body(fixed), beside_body(moving)) if is_ct and not self.masks else (None, None)
        self.known = (
            without(replace(fixed, data=filled(fixed.data, self.masks.fixed)), self.beside[0]),
            without(replace(moving, data=filled(moving.data, self.masks.moving)), self.beside[1]),
        )
        job.check()
        self.device = torch.device("cpu") if device is None else device
        self.background = air_value(moving.data)
        wanted = usual if model is None else model.card.preprocessing
        self.preprocessing, found = _known_world(fixed, moving, wanted, job)
        self.notices = [*fixed.notices, *moving.notices, *found]
        if model is None:
            self.grid = nodes_around(lattice_of(fixed.grid))
        else:
            self.device = model.device
            self.grid = working_grid(fixed.grid, self.preprocessing, model.network.multiple_of)
        _check_size(self.grid, fixed)

    def align(self, kind: str, initial: Transform | None, job: Job = SILENT) -> None:
        """Bring the moving image roughly onto the fixed one.

        Args:
            kind: "none", "center", "rigid" or "affine"; "auto": "none", "center" or "affine", whichever leaves the
                images most alike.
            initial: fixed point -> moving point (LPS mm), to start from.
            job: told how far it is.

        Raises:
            MorphSeekError: the images do not overlap, or the alignment is not made of finite numbers.
        """
        job.report("align", 0.0, "Aligning the images" if kind != "none" else "Checking that the images overlap")
        kinds = ("none", "center", "affine") if kind == "auto" else (kind,)
        fixed, moving = self.known
        searched = initial is None and kinds[-1] in ("rigid", "affine")
        found = alignments(fixed, moving, kinds, initial, job.part(0.0, 0.7) if searched else job, self.masks)
        if len(found) > 1 or searched:
            alike = {k: self._alike_after(found[k]) for k in found}
            kind = max(found, key=lambda k: alike[k])
            if searched and alike[kind] < FAR:
                kind = self._found_again(found, kind, alike[kind], kinds[-1], job.part(0.7, 1.0))
        elif initial is not None:
            self._compare_initial(found[kind], job)
        before = None if kind == "none" else np.eye(4) if initial is None else initial
        self._use(Alignment(found[kind], kind, before))

    def _found_again(self, found: dict[str, Transform], kind: str, alike: float, wanted: str, job: Job) -> str:
        """Look for an alignment that may be lost from many starts, and add it to what was found if it is better.

        Args:
            found: alignments by their kind.
            kind: the best of them.
            alike: how alike it leaves the images.
            wanted: "rigid" or "affine".
            job: told how far it is.

        Returns:
            the kind of the best alignment now.
        """
        own = found[kind]
        assert isinstance(own, np.ndarray)  # as there is no initial transform
        start = look_around(self.crop, self.source, own, self.masks.moving, job)
        after = -1.0 if start is None else self._alike_after(start)
        if start is None or after < alike + GAIN:
            return kind
        found["rigid"] = start
        climbed = alignments(*self.known, (wanted,), start, job, self.masks)[wanted]
        if self._alike_after(climbed) > after:
            found[wanted] = climbed
            return wanted
        return "rigid"

    def _compare_initial(self, initial: Transform, job: Job) -> None:
        """Note an initial transform that leaves the images far less alike than they could be."""
        alike = self._alike_after(initial)
        if alike < FAR:
            other = look_around(self.crop, self.source, None, self.masks.moving, job)
            possible = alike if other is None else self._alike_after(other)
            self.notices += guards.lost_initial(alike, possible)

    def _alike_after(self, alignment: Transform) -> float:
        """Return how alike the images are after an alignment, by features that heed no contrast."""
        coarse = Coarse.of(self.crop, self.source, alignment, self.masks.moving)
        return float(Judge(coarse, "mind")(None, alignment))

    def alike_by_features(self) -> float:
        """Return how alike the images are after their alignment, by features that heed no contrast."""
        return float(Judge(self.coarse, "mind")(None, self.alignment.transform))

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

    def prepare(self, similarity: str = "auto") -> None:
        """Choose what the pair is compared by, and make the judge.

        Args:
            similarity: a key of SIMILARITIES; "auto" for what the model's card says, and for "lncc" otherwise, which
                serves two modalities too: after a search, or with the moving image's contrast turned around where it is
                opposite.
        """
        compare = "intensities" if self._model is None else self._model.card.compare
        if similarity == "auto" and compare != "intensities" and self._find() and compare == "features":
            similarity = "features"
        self.similarity = "lncc" if similarity == "auto" else similarity
        self.as_given = self.pyramid
        if self.similarity == "lncc" and self.pyramid.contrast() < OPPOSITE:
            self.opposite = True
            for made in ("source", "coarse", "pyramid"):
                self.__dict__.pop(made, None)
        foreground = resample(self.tissue, self.grid, mode="nearest", job=self.job).data.bool()
        # what one image does not see must not count as black there: a stretch of thin slices would be taken for a gain
        self.seen = self._inside(self.fixed.grid, np.eye(4))
        self.shown = foreground[None, None].to(self.device)
        judged = self.coarse
        if self.learned is not None and self.similarity == "features":
            judged = self.learned.coarse(judged)
        self.judge = Judge(judged, self.similarity)
        self.notices += guards.small_foreground(int(self.shown.sum()))
        self.notices += guards.nothing_to_judge(self.coarse.counted)
        if self.masks:
            check_seen(8 * int(self.coarse.counted.sum()))
        for volume, role in zip(self.known, ("The fixed image", "The moving image"), strict=True):
            self.notices += guards.few_values(normalize(volume.data, self.preprocessing), volume.called(role))

    def _find(self) -> bool:
        """Find the features of both images; return whether there are any in either, which is noted otherwise."""
        assert self._model is not None  # whose features are compared
        model = self._model
        found = [Features.of(model.network, image, self.preprocessing, self.job) for image in self.intensities]
        roles = [
            volume.called(r) for volume, r in zip(self.known, ("The fixed image", "The moving image"), strict=True)
        ]
        nothing = [role for role, one in zip(roles, found, strict=True) if not one.found(model.card)]
        self.learned = None if nothing else Learned(*found).common(model.card)
        if self.learned is None:
            self.notices += guards.nothing_found(nothing)
        return self.learned is not None

    @property
    def share(self) -> float:
        """Of a fit in the answer, beside that of the network's steps; see :class:`.model_file.Card`."""
        return 1.0 if self._model is None or self.learned is None else self._model.card.share

    def level(self, images: Pyramid, number: int, plan: Plan, swapped: bool = False) -> Level:
        """Return what a plan compares on a level of images, numbered as in :meth:`.pyramid.Pyramid.images`.

        Args:
            images: the images.
            number: of the level.
            plan: of the fit.
            swapped: the images are those of :meth:`.pyramid.Pyramid.swapped`.
        """
        if plan.similarity != "features":
            level = images.level(number, plan.similarity, plan.regularization, plan.folding)
            if self.learned is None or number not in self.learned.levels(BESIDE_LEVELS, self.crop.grid.shape):
                return level
            maps = self.learned.compared(images.grid(number), self.alignment.transform, swapped)
            return replace(level, beside=Maps(*maps, BESIDE_WEIGHT))
        assert self.learned is not None
        first, second = self.learned.compared(images.grid(number), self.alignment.transform, swapped)
        return Level(first, second, images.whole(number), LEARNED_WEIGHT, plan.regularization, plan.folding)

    def fewer(self, plan: Plan) -> Plan:
        """Return a plan, if for learned features without the levels on which there would be too many to compare."""
        if self.learned is None or plan.similarity != "features":
            return plan
        kept = self.learned.levels(plan.levels, self.crop.grid.shape)
        iterations = tuple(n for level, n in zip(plan.levels, plan.iterations, strict=True) if level in kept)
        return replace(plan, levels=kept, iterations=iterations)

    @functools.cached_property
    def tissue(self) -> Volume:
        """What the fixed image shows and its mask leaves, 1 or 0, on its own grid."""
        shown = foreground_of(quiet_background(self.known[0].data))
        if self.masks.fixed is not None:
            shown = shown & self.masks.fixed
        return Volume(shown.to(torch.uint8), self.fixed.grid)

    @functools.cached_property
    def intensities(self) -> tuple[Volume, Volume]:
        """The two images with intensities in [0, 1], each on its own grid."""
        roles = zip(self.known, ("The fixed image", "The moving image"), strict=True)
        fixed, moving = (normalized(v, self.preprocessing, v.called(r)) for v, r in roles)
        return fixed, moving

    @functools.cached_property
    def fixed_intensities(self) -> Tensor:
        """(1, 1, i, j, k), as the network takes them, on the working grid."""
        smooth = smooth_for_spacing(self.intensities[0], world_spacing(self.grid))
        return resample(smooth, self.grid, job=self.job).data[None, None].to(self.device)

    @functools.cached_property
    def moving_intensities(self) -> Tensor:
        """(1, 1, i, j, k), as the network takes them, as smooth as the working grid, on the moving image's own."""
        return smooth_for_spacing(self.intensities[1], world_spacing(self.grid)).data[None, None].to(self.device)

    @functools.cached_property
    def _fitted(self) -> tuple[Volume, Volume]:
        """The two images as search, fit and judge take them."""
        if self.preprocessing.intensity == "window":
            return self.intensities
        as_given = general(*(volume.data for volume in self.known))
        roles = zip(self.known, ("The fixed image", "The moving image"), strict=True)
        fixed, moving = (normalized(v, as_given, v.called(r)) for v, r in roles)
        return fixed, moving

    @functools.cached_property
    def source(self) -> Volume:
        """The moving image as it is searched and fitted: in [0, 1], of the fixed image's contrast."""
        moving = self._fitted[1]
        return with_opposite_contrast(moving) if self.opposite else moving

    @functools.cached_property
    def crop(self) -> Crop:
        """The fixed image around what it shows."""
        return Crop.of(self._fitted[0], self.device, self.job, self.masks.fixed)

    @functools.cached_property
    def coarse(self) -> Coarse:
        """The images as they are judged."""
        return Coarse.of(self.crop, self.source, self.alignment.transform, self.masks.moving)

    @functools.cached_property
    def pyramid(self) -> Pyramid:
        """The images as they are fitted."""
        return Pyramid.of(self.crop, self.source, self.alignment.transform, self.job, self.masks.moving)

    def nothing(self) -> Tensor:
        """Return the displacement that moves nothing, (1, 3, i, j, k)."""
        return torch.zeros(1, 3, *self.grid.shape, device=self.device)

    def moving_at(self, total: Tensor) -> Tensor:
        """Warp the moving image by a displacement, (1, 1, i, j, k), as far as the fixed one sees it."""
        self.job.check()
        points = map_voxels(total, self.grid, self.alignment.transform, self.moving.grid)
        return self.seen * fields.sample(self.moving_intensities, points)

    def warped(self, transform: Transform) -> Volume:
        """Warp the moving image by a whole map at full resolution, on the fixed image's grid."""
        out = resample(
            self.moving, self.fixed.grid, transform, background=self.background, device=self.device, job=self.job
        )
        return replace(out, dtype=self.moving.dtype)

    def delivered(self, outcome: Outcome) -> DenseTransform:
        """Return the whole map of an outcome as it is written, alignment included.

        Raises:
            MorphSeekError: it is not made of finite numbers.
        """
        found, alignment = outcome.found, self.alignment.transform
        if found is None:
            return self.whole(outcome.total)
        transform = rounded(dense_from_voxels(voxel_displacement(found, found.grid), found.grid, alignment))
        guards.check_finite(transform, "The registration")
        return transform

    def whole(self, total: Tensor) -> DenseTransform:
        """Return the whole map of a displacement on the working grid, alignment included.

        Raises:
            MorphSeekError: it is not made of finite numbers.
        """
        transform = rounded(dense_from_voxels(total, self.grid, self.alignment.transform))
        guards.check_finite(transform, "The registration")
        return transform

    def alike(self, displacement: DenseTransform) -> Tensor:
        """Return what the judge says of a displacement before the alignment, a scalar."""
        there = voxel_displacement(displacement, self.coarse.grid, self.device)
        return self.judge(there, self.alignment.transform)

    def similarity_as_given(self) -> float | None:
        """Return what the judge says of the images before their alignment; None where this call aligned none."""
        before = self.alignment.before
        return None if before is None else float(self.judge(None, before))

    def overlap(self, total: Tensor) -> float:
        """Return the share of what the fixed image shows that lands in the moving image; 1 where it shows nothing."""
        inside = self._inside(self.moving.grid, self.alignment.transform, total)[self.shown]
        return float(inside.float().mean()) if inside.numel() else 1.0

    def look(self, stage: Stage, step: int, total: Tensor, found: DenseTransform | None = None) -> StepSection:
        """Return the figures after a stage.

        Args:
            stage: what was done.
            step: how many steps of the network were taken so far.
            total: the displacement, (1, 3, i, j, k) voxels of the working grid.
            found: the same on nodes of its own, see :class:`Outcome`.

        Raises:
            MorphSeekError: the displacement is not made of finite numbers.
        """
        displacement = dense_from_voxels(total, self.grid) if found is None else found
        cells = total if found is None else voxel_displacement(found, found.grid, self.device)
        length = displacement_mm(total, self.grid).norm(dim=0)
        determinants = (fields.least_determinant(cells), fields.jacobian_determinant(cells))
        shares = [100 * (j <= 0).float().mean() for j in determinants]
        values = torch.stack([self.alike(displacement), length.mean(), *shares]).tolist()
        guards.check_finite(values, NAMES[stage].format(step=step))
        similarity, mean_displacement, folded, njd = values
        return {
            "stage": stage,
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
        return in_box(points, grid)


NAMES: dict[str, str] = {
    "align": "The alignment",
    "search": "The search",
    "network": "Step {step}",
    "fit": "The fit",
    "correct": "The correction",
}
"""What the stages are called."""


def displacement_mm(total: Tensor, grid: Grid) -> Tensor:
    """Turn (1, 3, i, j, k) voxels into (3, i, j, k) mm along the grid's axes (lengths do not depend on these)."""
    return total[0] * torch.from_numpy(grid.spacing).to(total).view(3, 1, 1, 1)


def _known_world(
    fixed: Volume, moving: Volume, preprocessing: Preprocessing, job: Job
) -> tuple[Preprocessing, list[Notice]]:
    """Return a preprocessing, with a coarser grid for objects of another size than its model was trained on."""
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
