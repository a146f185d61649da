"""Correct a registration by hand: places that belong together are drawn near, and the fit goes on around them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..io.chain import inverse_points, itk_transform, links_of
from ..io.points import PointPairs
from ..protocol.errors import MorphSeekError
from ..protocol.job import Job, Notice
from ..protocol.options import RegistrationOptions
from ..protocol.report import CorrectedSection, CorrectionSection
from ..space import fields
from ..space.geometry import DenseTransform, Grid, Transform, apply_affine, voxel_displacement
from .descent import descend
from .fit import displacement_of
from .pair import Outcome, Pair, State
from .pictures import Pictures
from .plans import correction_plan

_REACH = 8.0  # mm at least, over which a correction fades (one standard deviation) ...
_LONG = 0.4  # ... and as a share of the longest one: wider ones spoil what is right beside it
_KNOWN = 10.0  # mm, how far off an answer is expected to be where nobody has looked
_SURE = 3.0  # standard deviations beyond which a distance is no chance
DEFINITION = (
    "distance in mm between where the transform leads the point of the fixed image and the point of the moving image, "
    "before and after the correction"
)


@dataclass(frozen=True)
class Correction:
    """From where a registration is corrected, and by what.

    Attributes:
        start: the state of an earlier call with the same images and model; or a whole map, fixed point -> moving point,
            LPS mm, of any origin.
        points: places of the fixed image and where they lie in the moving one.
        errors: (n,) how far off each of the points may be, mm, one standard deviation.
    """

    start: State | Transform
    points: PointPairs
    errors: np.ndarray

    def __post_init__(self) -> None:
        """
        Raises:
            MorphSeekError: no point, or an error that is none.
        """
        if not len(self.points.labels):
            raise MorphSeekError("There is no point to correct by; give at least one in both images.")
        if len(self.errors) != len(self.points.labels) or not np.all((self.errors > 0) & np.isfinite(self.errors)):
            raise MorphSeekError("The error of a point must be a number of mm above 0, such as 1.")


class Pull:
    """Moves control points so that places lie where they were corrected to.

    The field between the points is what is most likely of a displacement that varies over ``reach``, given points that
    are as far off as they say: the mean of a Gaussian process with a Gaussian covariance (Luethi et al., "Gaussian
    process morphable models", IEEE TPAMI 40(8), 2018, doi:10.1109/TPAMI.2017.2739743, conditioned on landmarks).

    Attributes:
        points: (n, 3) of the fixed image, LPS mm.
        targets: (n, 3) what the alignment leads to their partners.
        reach: mm.
    """

    def __init__(self, correction: Correction, alignment: Transform, present: DenseTransform) -> None:
        """
        Args:
            correction: the points.
            alignment: fixed point -> moving point, LPS mm.
            present: the displacement before it that is to be corrected.
        """
        self.points = np.asarray(correction.points.fixed, dtype=np.float64)
        self.targets = _before(np.asarray(correction.points.moving, dtype=np.float64), alignment)
        length = float(np.linalg.norm(self.targets - present.map_points(self.points), axis=1).max())
        self.reach = max(_REACH, _LONG * length)
        apart = np.linalg.norm(self.points[:, None] - self.points[None], axis=2)
        covariance = np.exp(-0.5 * (apart / self.reach) ** 2) + np.diag((correction.errors / _KNOWN) ** 2)
        self._solve = np.linalg.inv(covariance)

    def __call__(self, control: Tensor, nodes: Grid) -> None:
        """Move control points, in place.

        Args:
            control: (1, 3, a, b, c), half voxels of ``nodes``.
            nodes: the grid of the control points.
        """
        to_index = np.linalg.inv(nodes.affine)
        index = apply_affine(to_index, self.points)
        at = torch.from_numpy(index.T.copy()).to(control).view(1, 3, -1, 1, 1)
        found = fields.sample(control, at, padding="border")[0, :, :, 0, 0].T.double().cpu().numpy() / 2
        wanted = (self.targets - self.points) @ to_index[:3, :3].T
        weights = torch.from_numpy(2 * self._solve @ (wanted - found)).to(control)
        for center, weight in zip(index, weights, strict=True):
            box, bump = self._bump(center, nodes, control)
            control[0][:, box[0], box[1], box[2]] += weight.view(3, 1, 1, 1) * bump

    def _bump(self, center: np.ndarray, nodes: Grid, like: Tensor) -> tuple[list[slice], Tensor]:
        """Return the box of nodes that a point reaches, and how much each is moved with it, 0 to 1."""
        box, bump = [], like.new_ones(())
        for axis, (middle, size, spacing) in enumerate(zip(center, nodes.shape, nodes.spacing, strict=True)):
            reach = self.reach / spacing
            low = min(max(math.floor(middle - 4 * reach), 0), size - 1)
            high = min(max(math.ceil(middle + 4 * reach) + 1, low + 1), size)
            steps = (torch.arange(low, high, device=like.device, dtype=like.dtype) - middle) / reach
            side = torch.exp(-0.5 * steps.square())
            bump = bump * side.view([-1 if other == axis else 1 for other in range(3)])
            box.append(slice(low, high))
        return box, bump


@dataclass(frozen=True)
class CorrectedFit:
    """The points, and the fit around them.

    Attributes:
        options: ``fit`` "off": the points alone.
        correction: the points.
        trusted: the model's steps are better than a fit, so it is left out unless asked for.
    """

    options: RegistrationOptions
    correction: Correction
    trusted: bool = False

    def run(self, pair: Pair, begin: Outcome, pictures: Pictures, job: Job) -> Outcome:
        """Correct an outcome.

        Args:
            pair: aligned and prepared.
            begin: what is to be corrected.
            pictures: shown the points' effect before the fit.
            job: told of every iteration.

        Returns:
            the corrected one, whatever the judge says of it; a notice says what that is.
        """
        present = displacement_of(pair, begin)
        pull = Pull(self.correction, pair.alignment.transform, present)
        notices = contradictions(self.correction, pull)
        fitted = self.options.fit == "on" or (self.options.fit == "auto" and not self.trusted)
        plan = pair.fewer(correction_plan(pair.similarity, fitted))
        pyramid = pair.pyramid.after(present)
        control = pyramid.control(present, plan.levels[0])
        pull(control, pyramid.grid(plan.levels[0] + 1))
        row = len(begin.figures)
        pictures.show(
            row, pair, voxel_displacement(pyramid.displacement(control, plan.levels[0]), pair.grid, pair.device)
        )
        levels = [pair.level(pyramid, n, plan) for n in plan.levels]
        done, count = 0, sum(plan.iterations)

        def tick(_: int) -> None:
            nonlocal done
            done += 1
            job.report("correct", done / count, f"Fitting around the points, iteration {done} of {count}", done, count)
            job.check()

        ends = descend(
            levels, plan.iterations, control, plan.rate, torch.get_num_threads(), tick,
            lambda level, at: pull(at, pyramid.grid(plan.levels[level] + 1)),
        )  # fmt: skip
        found = pyramid.displacement(ends[-1].control, plan.levels[-1])
        total = voxel_displacement(found, pair.grid, pair.device)
        figures = pair.look("correct", begin.figures[-1]["step"], total, found)
        rows = [{**r, "answer": False} for r in begin.figures]
        after = Outcome(
            total, [*rows, {**figures, "answer": True}], row, figures["similarity"], found, begin.fitted,  # type: ignore[list-item]
            begin.notices + notices,
        )  # fmt: skip
        return after


def contradictions(correction: Correction, pull: Pull) -> list[Notice]:
    """Name pairs of points that say different things of one place, or that would have to change places.

    Args:
        correction: the points.
        pull: made of them.
    """
    labels, notices = correction.points.labels, []
    for i in range(len(labels)):
        for j in range(i):
            before, after = pull.points[i] - pull.points[j], pull.targets[i] - pull.targets[j]
            near, sure = float(np.linalg.norm(before)), _SURE * math.hypot(correction.errors[i], correction.errors[j])
            along = float(after @ before) / max(near, 1e-6)
            parted = float(np.linalg.norm(after - before)) > near + sure and near <= sure
            if not parted and along > -sure:
                continue
            words = f"The points {labels[j]} and {labels[i]} lie {near:.1f} mm apart in the fixed image and "
            words += f"{float(np.linalg.norm(after)):.1f} mm in the moving one"
            words += ", so they contradict each other" if parted else ", in the opposite order, which would fold"
            notices.append(Notice("points-contradict", words + "; check them, or state a larger error."))
    return notices


def corrected_section(
    correction: Correction, start: Transform, transform: DenseTransform
) -> tuple[CorrectedSection, list[Notice]]:
    """Return what the report says of a correction, and which points it could not bring near.

    Args:
        correction: the points.
        start: the whole map before, fixed point -> moving point, LPS mm.
        transform: the whole map after, as it is delivered.
    """
    points, rows, notices = correction.points, [], []
    maps = [start, transform]
    mapped = [apply_affine(m, points.fixed) if isinstance(m, np.ndarray) else m.map_points(points.fixed) for m in maps]
    left = [np.linalg.norm(at - points.moving, axis=1) for at in mapped]
    for n, label in enumerate(points.labels):
        error, before, after = float(correction.errors[n]), float(left[0][n]), float(left[1][n])
        row: CorrectionSection = {
            "label": label,
            "fixed": [float(x) for x in points.fixed[n]],
            "moving": [float(x) for x in points.moving[n]],
            "error_mm": error,
            "before": before,
            "after": after,
        }
        rows.append(row)
        if after > _SURE * error:
            words = (
                f"The point {label} is still {after:.1f} mm from where it should lie ({before:.1f} mm before; its "
                f"error is stated as {error:g} mm): nearer, the transform would fold, or other points contradict it."
            )
            notices.append(Notice("point-not-met", words))
    return {"points": rows, "definition": DEFINITION}, notices


def _before(points: np.ndarray, alignment: Transform) -> np.ndarray:
    """Return what an alignment leads to points (n, 3) of the moving image, LPS mm.

    Raises:
        MorphSeekError: nothing does.
    """
    if isinstance(alignment, np.ndarray):
        return apply_affine(np.linalg.inv(alignment), points)
    back, found = inverse_points(links_of(itk_transform(alignment)), points)
    if not found.all():
        raise MorphSeekError(
            f"Point {int(np.flatnonzero(~found)[0]) + 1} of the moving image cannot be followed back through the "
            "transform that is to be corrected, which folds there; move the point, or register again."
        )
    return back
