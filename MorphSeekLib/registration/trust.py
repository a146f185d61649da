"""Estimate, without labels, how far off a registration may be at each place.

Three quantities are compared on the control points of the fit's level 0 (blocks of 2x2x2 voxels):

- inconsistency: |u(x) + v(x + u(x))|, where u is the answer and v that of the same stages with the images exchanged;
- spread: |w(x) - u(x)|, where w is a fit from the same start that is held stiffer (from the alignment, where u is the
  mean of a network's steps and of a fit);
- unlikeness: 1 - C^2 / (U V + epsilon) of the window around x, the fit's own correlation, after u.

Lengths are in voxels h of level 0. Each is blurred, and the error is taken to be below

    bound_q = h max(0.02, exp(sum_k w_k ln(f_k + e_k) + o_q) - 0.05)

in a share q of places. Weights w and offsets o come from simulated deformations (:mod:`.trust_calibration`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..networks.devices import network_autocast
from ..networks.loading import LoadedModel
from ..networks.policy import take_steps
from ..protocol.job import Job
from ..protocol.options import RegistrationOptions
from ..space import fields
from ..space.geometry import DenseTransform, Grid, dense_from_voxels, voxel_displacement
from .find import searched
from .fit import descended, displacement_of, plans_for
from .objective import Objective, upsample
from .pair import Outcome, Pair
from .plans import Plan
from .pyramid import Pyramid, level_grid
from .steps import interruptible

ADDED = (0.05, 0.05, 0.001)
"""To inconsistency and spread (voxels) and unlikeness before their logarithms; the first also to the error."""
LEAST = 0.02
"""The smallest bound, voxels."""
SIGMA = 1.5
"""Blocks: of the blur."""
STIFFER = {"lncc": 5.0, "features": 5.0}
"""Times the weight of the regularizer in the stiffer fit, by what is compared ..."""
STIFFER_ELSE = 3.75
"""... and by anything else."""
_RADIUS = 5  # blocks, of the blur
_LEAST_WEIGHT = 1e-3  # of the blur's weights must lie where anything is known


@dataclass(frozen=True)
class Quantities:
    """What tells of errors.

    Attributes:
        maps: (3, a, b, c), blurred: inconsistency and spread in voxels, unlikeness from 0 to 1.
        known: (a, b, c) bool, the blocks that both images see and that masks leave of both.
        grid: whose voxels are the blocks, on the fixed image's axes.
        voxel: h, mm.
    """

    maps: Tensor
    known: Tensor
    grid: Grid
    voxel: float

    def score(self, weights: Sequence[float]) -> Tensor:
        """Return the sum of the weighted logarithms, (a, b, c)."""
        return score(self.maps, weights)


def score(maps: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the sum of the weighted logarithms of quantities (3, ...)."""
    total = torch.zeros_like(maps[0])
    for values, weight, added in zip(maps, weights, ADDED, strict=True):
        total += weight * (values + added).log()
    return total


def bound(scores: Tensor, offset: float, voxel: float) -> Tensor:
    """Return what the error is below, mm, in the share of places that the offset stands for.

    Args:
        scores: from :func:`score`.
        offset: o.
        voxel: h, mm.
    """
    return voxel * ((scores + offset).exp() - ADDED[0]).clamp(min=LEAST)


def quantities(pair: Pair, there: DenseTransform, back: DenseTransform, stiff: DenseTransform) -> Quantities:
    """Return what tells of errors of a displacement.

    Args:
        pair: aligned and prepared.
        there: the answer, before the alignment.
        back: that of the exchanged images, see :meth:`.pyramid.Pyramid.swapped`.
        stiff: that of the stiffer fit.
    """
    pyramid = pair.pyramid.after(there)
    controls = [pyramid.control(one, 0) for one in (there, back, stiff)]
    spacing = pyramid.crop.grid.spacing
    voxel = float(math.prod(spacing) ** (1 / 3))
    lengths = fields.per_axis((spacing / voxel).tolist(), controls[0])
    known = pyramid.whole(0)
    maps = torch.stack(
        [
            inconsistency(controls[0], controls[1], lengths),
            (lengths * (controls[2] - controls[0])).norm(dim=1)[0],
            unlikeness(pyramid, controls[0]),
        ]
    )
    return Quantities(blurred(maps, known), known, level_grid(pyramid.crop.grid, 1), voxel)


def inconsistency(there: Tensor, back: Tensor, lengths: Tensor) -> Tensor:
    """Return |u(x) + v(x + u(x))|, (a, b, c), of two displacements on one grid of control points.

    Args:
        there, back: (1, 3, a, b, c), voxels; two of these lie between control points.
        lengths: (1, 3, 1, 1, 1), of a voxel along each axis, in the unit of what is returned.
    """
    return (lengths * (there + fields.warp(back, there / 2, padding="border"))).norm(dim=1)[0]


def unlikeness(pyramid: Pyramid, control: Tensor) -> Tensor:
    """Return 1 - the squared correlation of the window around each block of level 0, (a, b, c), after a
    displacement."""
    level = pyramid.level(0, "lncc", 0.0, 0.0)
    points = upsample(control)
    points += fields.identity(points.shape[2:], like=points)
    objective = Objective(level)
    warped = fields.sample(level.moving, points, padding="border") * objective.voxels
    return (1 - objective.correlation(warped)[0, 0]).clamp(0, 1)


def blurred(maps: Tensor, known: Tensor) -> Tensor:
    """Blur maps by a Gaussian of :data:`SIGMA` over what is known; the rest takes no part.

    Args:
        maps: (n, a, b, c).
        known: (a, b, c) bool.
    """
    weight = known.to(maps.dtype)
    stacked = torch.cat([maps * weight, weight[None]])[None]
    taps = torch.exp(-0.5 * (torch.arange(-_RADIUS, _RADIUS + 1, device=maps.device) / SIGMA) ** 2).to(maps.dtype)
    for axis, n in enumerate(stacked.shape[2:], start=2):
        pad = [0] * 6
        pad[8 - 2 * axis] = pad[9 - 2 * axis] = _RADIUS
        padded, total = F.pad(stacked, pad), torch.zeros_like(stacked)
        for shift, tap in enumerate((taps / taps.sum()).tolist()):
            total.add_(padded.narrow(axis, shift, n), alpha=tap)
        stacked = total
    return stacked[0, :-1] / stacked[0, -1:].clamp(min=_LEAST_WEIGHT)


def stiffer(plans: Sequence[Plan]) -> list[Plan]:
    """Return plans with more weight on the regularizer, without the voxels of half the length, which take the longest
    and add little to what is stiff, unless there are no others."""
    found = []
    for plan in plans:
        every = list(zip(plan.levels, plan.iterations, strict=True))
        kept = [(level, count) for level, count in every if level >= 0] or every
        levels, iterations = zip(*kept, strict=True)
        weight = plan.regularization * STIFFER.get(plan.similarity, STIFFER_ELSE)
        found.append(replace(plan, levels=levels, iterations=iterations, regularization=weight))
    return found


def look_again(
    pair: Pair, outcome: Outcome, model: LoadedModel | None, options: RegistrationOptions, job: Job
) -> Quantities:
    """Run the stages with the images exchanged, and a stiffer fit, and compare both with the answer.

    Args:
        pair: aligned and prepared.
        outcome: the answer.
        model: that was used.
        options: that were used.
        job: told of every iteration, and asked for cancellation.
    """
    begin = outcome if outcome.before is None else outcome.before
    with torch.no_grad():
        plans = plans_for(pair, begin, options)
        back = _exchanged(pair, outcome, begin, model, plans, job.part(0.0, 0.55, "Checking backward: "))
        # held against a fit alone, a mean of steps and fit shows where these disagree
        went_on = outcome.before is not None and begin.answer > 0 and pair.share == 1
        start = displacement_of(pair, begin) if went_on else None
        again = job.part(0.55, 1.0, "Checking stiffer: ")
        stiff = descended(pair, stiffer(plans), start, again)[0]
        job.check()
        return quantities(pair, displacement_of(pair, outcome), back, stiff)


def _exchanged(
    pair: Pair, outcome: Outcome, begin: Outcome, model: LoadedModel | None, plans: Sequence[Plan], job: Job
) -> DenseTransform:
    """Return what the stages that led to an answer find with the images exchanged."""
    found = None
    stages = [row["stage"] for row in begin.figures[: begin.answer + 1]]
    if "search" in stages:
        job.report("search", 0.0, "searching for large motion")
        found = searched(pair.as_given.swapped(), job)
    steps = stages.count("network")
    if steps and model is not None:
        found = _exchanged_steps(pair, model, found, steps, job)
    fitted = outcome.before is not None and outcome.answer > begin.answer
    if fitted or found is None:
        found = descended(pair, plans, found, job, swapped=True)[0]
    return found


def _exchanged_steps(
    pair: Pair, model: LoadedModel, found: DenseTransform | None, steps: int, job: Job
) -> DenseTransform:
    """Take a network's steps from the fixed to the moving image, after what was found, on the working grid."""
    fixed = pair.moving_at(pair.nothing())
    base = None if found is None else voxel_displacement(found, pair.grid, pair.device)

    def whole(total: Tensor) -> Tensor:
        return total if base is None else fields.compose(base, total)

    def moving_at(total: Tensor) -> Tensor:
        job.check()
        return fields.warp(pair.fixed_intensities, whole(total))

    with network_autocast(pair.device), interruptible(model.network, job):
        total = take_steps(model.network, moving_at, fixed, steps)
    return dense_from_voxels(whole(total), pair.grid)
