"""Test-time refinement without labels: optimise the pair at hand, from the network's answer on.

First the policy's latent z of the last step (the decoder's weights keep the field plausible), then the field itself on
the network's grid, then the field on the fixed image's own, finer grid, each by

    similarity(fixed, moving o Phi) + lambda_reg diffusion(u) + lambda_fold folding_penalty(u),

by Adam. The lowest objective that was met is kept, so the answer is never worse by it than the one it started from.
:func:`MorphSeekLib.measures.folds.unfold` then pulls apart what still folds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..measures.regularizers import diffusion, folding_penalty
from ..measures.similarity import SIMILARITIES, mse
from ..networks.policy import Latent, RegistrationModel, draw
from ..space import fields

MAX_ITERATIONS = 1000


@dataclass(frozen=True)
class RefinementSettings:
    """How a pair is refined.

    Attributes:
        iterations: K on the network's grid.
        fine_iterations: then on the fixed image's own grid (:func:`MorphSeekLib.space.preprocessing.fine_grid`); an
        iteration
            there costs as many times more as it has voxels. Without any of both the network's answer stays as it is.
        latent_share: share of the K iterations spent on z, before the field.
        similarity: "lncc", "mse" or "mind" (for two modalities).
        regularization: lambda_reg, of the diffusion regulariser in voxels.
        folding: lambda_fold, of :func:`MorphSeekLib.measures.regularizers.folding_penalty`.
        latent_rate, field_rate: Adam's steps, in units of z and in voxels.
        stride, fine_stride: voxels between the control points of the field's correction, on either grid.
        unfold: the most iterations of :func:`MorphSeekLib.measures.folds.unfold` that follow.
    """

    iterations: int = 0
    fine_iterations: int = 0
    latent_share: float = 0.2
    similarity: str = "lncc"
    regularization: float = 1.0
    folding: float = 100.0
    latent_rate: float = 0.05
    field_rate: float = 0.25
    stride: int = 4
    fine_stride: int = 2
    unfold: int = 300

    def __post_init__(self) -> None:
        if self.similarity not in SIMILARITIES:
            raise ValueError(f"similarity is '{self.similarity}'; it must be one of {', '.join(SIMILARITIES)}")
        for name in ("iterations", "fine_iterations", "unfold"):
            if not 0 <= getattr(self, name) <= MAX_ITERATIONS:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 to {MAX_ITERATIONS}")
        if not 0 <= self.latent_share <= 1:
            raise ValueError("latent_share must be between 0 and 1")
        if min(self.stride, self.fine_stride) < 1:
            raise ValueError("stride and fine_stride must be at least 1")


class Refined(NamedTuple):
    """The field (1, 3, i, j, k) in voxels, and all objectives met on the way, (n,); the first is the start's."""

    total: Tensor
    objectives: Tensor


Objective = Callable[[Tensor], Tensor]


def objective(fixed: Tensor, moving_at: Callable[[Tensor], Tensor], settings: RefinementSettings) -> Objective:
    """Field (1, 3, i, j, k) -> the scalar that refinement lowers; see the module's text.

    Args:
        fixed: (1, 1, i, j, k), intensities in [0, 1]; for "mind" its descriptor, (1, 12, i, j, k).
        moving_at: field -> the moving image, or its descriptor, warped by it, differentiable. A descriptor that is made
            once and warped costs a third of one made anew from every warped image.
    """
    similarity = _descriptors_apart if settings.similarity == "mind" else SIMILARITIES[settings.similarity]

    def value(total: Tensor) -> Tensor:
        return (
            similarity(fixed, moving_at(total))
            + settings.regularization * diffusion(total)
            + settings.folding * folding_penalty(total)
        )

    return value


def _descriptors_apart(fixed: Tensor, warped: Tensor) -> Tensor:
    """Three times their mean squared difference, which weighs against the regularisers about as LNCC does."""
    return 3 * mse(fixed, warped)


def optimize(
    model: RegistrationModel,
    latent: Latent,
    outer: Tensor,
    total: Tensor,
    value: Objective,
    settings: RefinementSettings,
    on_iteration: Callable[[], None] = lambda: None,
) -> Refined:
    """K iterations on one pair, z first and then the field.

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
    kept = Refined(total, torch.empty(0, device=total.device))
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
    start: Refined,
    iterations: int,
    value: Objective,
    rate: float,
    stride: int,
    on_iteration: Callable[[], None] = lambda: None,
) -> Refined:
    """Iterations on the field alone: a correction on control points, added to the start's field.

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


@torch.no_grad()
def best_of(
    model: RegistrationModel,
    latent: Latent,
    outer: Tensor,
    total: Tensor,
    value: Objective,
    count: int,
    tau: float = 1.0,
    generator: torch.Generator | None = None,
) -> Refined:
    """The best by the objective among the network's answer and ``count`` samples of the last step's latent.

    The rival of :func:`optimize` that needs no gradient; arguments as there.
    """
    kept = Refined(total, value(total).view(1))
    for _ in range(count):
        z = draw(latent.mu, latent.log_sigma, tau, 1, generator=generator)
        candidate = fields.compose(outer, model.displacement(model.field(latent, z)).float())
        kept = _better(kept, candidate, value(candidate))
    return kept


def _descend(
    variable: Tensor,
    rate: float,
    iterations: int,
    value: Objective,
    kept: Refined,
    on_iteration: Callable[[], None],
    field_of: Callable[[], Tensor],
) -> Refined:
    """Adam on one variable; the best field so far, and all objectives."""
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


def _better(kept: Refined, candidate: Tensor, value: Tensor) -> Refined:
    """The candidate if it has the lowest objective so far; chosen on the device, without waiting for it."""
    best = kept.objectives.min() if len(kept.objectives) else torch.full_like(value, torch.inf)
    total = torch.where(value < best, candidate, kept.total)
    return Refined(total, torch.cat([kept.objectives, value.view(1)]))
