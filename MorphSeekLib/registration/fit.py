"""The fit of the pair at hand, without labels, from the network's answer on.

First the policy's latent z of the last step (the decoder's weights keep the field plausible), then the field itself on
the network's grid, then the field on the fixed image's own, finer grid, each by

    similarity(fixed, moving o Phi) + lambda_reg diffusion(u) + lambda_fold folding_penalty(u),

by Adam. The lowest objective that was met is kept, so the answer is never worse by it than the one it started from.
:func:`MorphSeekLib.measures.folds.unfold` then pulls apart what still folds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..io.transforms import rounded
from ..measures.folds import unfold
from ..measures.regularizers import diffusion, folding_penalty
from ..measures.similarity import SIMILARITIES
from ..networks.devices import network_autocast
from ..networks.policy import Latent, RegistrationModel
from ..protocol.job import Job
from ..protocol.options import FitOptions
from ..protocol.report import CourseSection, FitSection
from ..protocol.settings import to_dict
from ..space import fields
from ..space.geometry import Grid, Volume, covering_grid, dense_from_voxels, map_voxels, resample, voxel_displacement
from ..space.preprocessing import fine_grid
from . import guards
from .pair import Outcome, Pair, world_spacing
from .steps import interruptible

DEFINITION = (
    "objective: similarity + regularization * diffusion + folding * mean(relu(0.05 - det J)), in "
    "voxels of its grid; lower is better. network, refined: on the working grid"
)


@dataclass(frozen=True)
class Fit:
    """The iterations on one pair, after the network's steps.

    Attributes:
        options: how many, and by what.
        network: whose latent is fitted first.
    """

    options: FitOptions
    network: RegistrationModel

    def run(self, pair: Pair, begin: Outcome, job: Job) -> Outcome:
        """Fit the pair from an outcome on.

        Args:
            pair: aligned and prepared.
            begin: the steps' outcome. Where its ``before`` is None there is no latent to begin with, and all iterations
                go to the field.
            job: told of every iteration.
        """
        options = self.options
        finest = fine_grid(pair.fixed.grid, pair.grid) if options.fine_iterations else pair.grid
        progress = _Progress(options, math.prod(finest.shape) / math.prod(pair.grid.shape), job)
        with interruptible(self.network, job):
            coarse = self._on_working_grid(pair, begin, progress.tick)
        found, fine = coarse.total, None
        if options.fine_iterations:
            fine = self._on_fine_grid(pair, found, finest, progress.tick)
            found = fine.total
        transform = pair.delivered(found, finest)
        transform = rounded(unfold(transform, pair.alignment.mirrored, options.unfold, pair.job))
        total = found if fine is None else _moved_to(found, finest, pair.grid)
        with torch.no_grad():
            after = pair.look(begin.answer, total, pair.moving_by(transform))
        fitted: FitSection = {
            "settings": to_dict(options),
            "objective": _course(coarse.objectives),
            "fine": None if fine is None else {**finest.describe(), "objective": _course(fine.objectives)},
            "network": begin.figures[begin.answer],
            "refined": after,
            "definition": DEFINITION,
        }
        aligned, similarity = begin.figures[0]["similarity"], after["similarity"]
        fell = guards.fit_fell(SIMILARITIES[options.similarity], aligned, begin.similarity, similarity)
        return replace(
            begin,
            total=total,
            transform=transform,
            similarity=similarity,
            fitted=fitted,
            notices=begin.notices + fell,
        )

    def _on_working_grid(self, pair: Pair, begin: Outcome, tick: Callable[[], None]) -> Fitted:
        images = pair.fixed_intensities, pair.moving_intensities
        value = pair_objective(pair, *images, pair.grid, self.options, pair.seen)
        start = Fitted(begin.total, torch.empty(0, device=pair.device))
        if begin.before is None:
            return fit(start, self.options.iterations, value, self.options.field_rate, self.options.stride, tick)
        with torch.no_grad(), network_autocast(pair.device):
            latent = self.network.encode(pair.moving_at(begin.before), pair.fixed_intensities)
        with network_autocast(pair.device):
            return optimize(self.network, latent, begin.before, begin.total, value, self.options, tick)

    def _on_fine_grid(self, pair: Pair, found: Tensor, finest: Grid, tick: Callable[[], None]) -> Fitted:
        options = self.options
        value = pair_objective(pair, *pair.intensities_on(finest), finest, options)
        start = Fitted(_moved_to(found, pair.grid, finest), torch.empty(0, device=pair.device))
        return fit(start, options.fine_iterations, value, options.field_rate, options.fine_stride, tick)


class _Progress:
    """Counts iterations; those on the finer grid cost more.

    Args:
        options: how many there are.
        cost: of a fine iteration, in iterations on the working grid.
        job: told of each.
    """

    def __init__(self, options: FitOptions, cost: float, job: Job) -> None:
        self._options, self._cost, self._job = options, cost, job
        self._done = 0

    def tick(self) -> None:
        """Tell that an iteration is done."""
        self._done += 1
        options = self._options
        spent = min(self._done, options.iterations) + self._cost * max(0, self._done - options.iterations)
        whole = options.iterations + self._cost * options.fine_iterations
        message = f"Fitting this pair, iteration {self._done} of {options.total}"
        self._job.report("fit", spent / whole, message, self._done, options.total)
        self._job.check()


def pair_objective(
    pair: Pair, fixed: Tensor, moving: Tensor, grid: Grid, options: FitOptions, seen: Tensor | bool = True
) -> Objective:
    """Return what the fit lowers on a grid.

    Args:
        pair: aligned.
        fixed, moving: what :meth:`Pair.intensities_on` gives for the grid.
        grid: of the displacement.
        options: the similarity and the weights.
        seen: where the fixed image lies; True: everywhere.
    """
    similarity, moving_grid = SIMILARITIES[options.similarity], pair.moving.grid
    if similarity.counts_voxels:
        lattice = covering_grid(moving_grid, world_spacing(grid))
        moving = resample(Volume(moving[0, 0].cpu(), moving_grid), lattice, job=pair.job).data[None, None].to(fixed)
        moving_grid = lattice
    features = similarity.prepare(moving)

    def moving_at(total: Tensor) -> Tensor:
        pair.job.check()
        points = map_voxels(total, grid, pair.alignment.transform, moving_grid)
        return seen * fields.sample(features, points, padding=similarity.padding)

    return objective(similarity.prepare(fixed), moving_at, options)


def _moved_to(total: Tensor, grid: Grid, other: Grid) -> Tensor:
    """Return a displacement (1, 3, i, j, k) in voxels of one grid as one in voxels of another."""
    return voxel_displacement(dense_from_voxels(total, grid), other, total.device)


def _course(objectives: Tensor) -> CourseSection:
    """Return an objective before and after, and what was met on the way."""
    curve = objectives.tolist()
    return {"start": curve[0], "refined": min(curve), "curve": curve} if curve else {}


class Fitted(NamedTuple):
    """The field (1, 3, i, j, k) in voxels, and all objectives met on the way, (n,); the first is the start's."""

    total: Tensor
    objectives: Tensor


Objective = Callable[[Tensor], Tensor]


def objective(fixed: Tensor, moving_at: Callable[[Tensor], Tensor], settings: FitOptions) -> Objective:
    """Return the scalar that the fit lowers, of a field (1, 3, i, j, k); see the module's docstring.

    Args:
        fixed: (1, channels, i, j, k), the fixed image's features as the similarity prepares them.
        moving_at: field -> the moving image's features, warped by it, differentiable.
    """
    similarity = SIMILARITIES[settings.similarity]

    def value(total: Tensor) -> Tensor:
        return (
            similarity.fit_weight * similarity.compare(fixed, moving_at(total))
            + settings.regularization * diffusion(total)
            + settings.folding * folding_penalty(total)
        )

    return value


def optimize(
    model: RegistrationModel,
    latent: Latent,
    outer: Tensor,
    total: Tensor,
    value: Objective,
    settings: FitOptions,
    on_iteration: Callable[[], None] = lambda: None,
) -> Fitted:
    """Fit one pair by K iterations, z first and then the field.

    Args:
        model: its weights are left alone.
        latent: the encoder's Gaussian at the state before the last step.
        outer: (1, 3, i, j, k), that state; voxels.
        total: (1, 3, i, j, k), the network's answer: ``outer`` composed with the step decoded from ``latent.mu``.
        value: from :func:`objective`.
        settings: see there.
        on_iteration: called after each; may raise to cancel.
    """
    on_latent = round(settings.iterations * settings.latent_share)
    z = latent.mu.detach().clone().requires_grad_()
    kept = Fitted(total, torch.empty(0, device=total.device))
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:  # gradients of the weights would cost a third of the time
        parameter.requires_grad_(False)
    try:
        kept = _descend(
            z, settings.latent_rate, on_latent, value, kept, on_iteration,
            lambda: fields.compose(outer, model.displacement(model.field(latent, z)).float()),
        )  # fmt: skip
    finally:
        for parameter in trained:
            parameter.requires_grad_()
    return fit(kept, settings.iterations - on_latent, value, settings.field_rate, settings.stride, on_iteration)


def fit(
    start: Fitted,
    iterations: int,
    value: Objective,
    rate: float,
    stride: int,
    on_iteration: Callable[[], None] = lambda: None,
) -> Fitted:
    """Fit the field alone: a correction on control points, added to the start's field.

    Args:
        start: the field, and the objectives met so far.
        iterations, value, on_iteration: as for :func:`optimize`.
        rate: Adam's steps, in voxels.
        stride: voxels between control points.
    """
    shape = start.total.shape[2:]
    points = [-(-n // stride) for n in shape]
    correction = torch.zeros(1, 3, *points, device=start.total.device, requires_grad=True)
    return _descend(
        correction, rate, iterations, value, start, on_iteration,
        lambda: start.total + F.interpolate(correction, size=tuple(shape), mode="trilinear", align_corners=True),
    )  # fmt: skip


def _descend(
    variable: Tensor,
    rate: float,
    iterations: int,
    value: Objective,
    kept: Fitted,
    on_iteration: Callable[[], None],
    field_of: Callable[[], Tensor],
) -> Fitted:
    """Descend on one variable by Adam; return the best field so far, and all objectives."""
    optimizer = torch.optim.Adam([variable], lr=rate)
    for _ in range(iterations):
        optimizer.zero_grad(set_to_none=True)
        candidate = field_of()
        loss = value(candidate)
        loss.backward()
        kept = _better(kept, candidate.detach(), loss.detach())
        optimizer.step()
        on_iteration()
    if iterations:
        with torch.no_grad():
            candidate = field_of()
            kept = _better(kept, candidate, value(candidate))
    return kept


def _better(kept: Fitted, candidate: Tensor, value: Tensor) -> Fitted:
    """Return the candidate if it has the lowest objective so far; chosen on the device, without waiting for it."""
    best = kept.objectives.min() if len(kept.objectives) else torch.full_like(value, torch.inf)
    total = torch.where(value < best, candidate, kept.total)
    return Fitted(total, torch.cat([kept.objectives, value.view(1)]))
