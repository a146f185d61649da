"""GRPO, one refinement step of one pair (METHOD.md, section C): sample a group, reward it, push the policy.

Memory does not grow with the number J of trajectories: they are sampled, decoded and scored in chunks without a graph;
the log-likelihood of the stored samples is then recomputed on the encoder's graph, and one decode, that of the mean, is
differentiated for the losses.

The policy may act in two places. "latent" is the paper's: the Gaussian over the encoder's top feature; ``levels`` lets
it act on finer features too, or instead. "field" is ours: a Gaussian over control points, every few voxels, of the
field that the decoder makes. There one decode serves all trajectories, and a reward can be credited to the control
points near which it arose. Wherever it acts, the policy is a list of independent Gaussians; its likelihood is their
product, and N, whose root LDVN divides by, the number of all their dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..networks.devices import training_autocast
from ..networks.policy import Latent, RegistrationModel, draw, likelihood_normalizer
from ..protocol.errors import MorphSeekError
from ..space import fields
from .rewards import RewardSettings, State, reward_map

PLACES = ("latent", "field")
CREDITS = ("trajectory", "local")
BASELINES = ("group", "leave_one_out", "mean_rollout")
SCALES = ("std", "none")
ADVANCES = ("greedy", "mean")


@dataclass(frozen=True)
class PolicyGradientSettings:
    """How a group is sampled and what its rewards teach.

    Attributes:
        trajectories: J.
        weight: lambda_policy, of L_policy.
        share: "field": the policy's gradient at the field is made no longer than so many times that of the losses, so
            that one weight serves networks whose fields answer to their weights more or less.
        tau: temperature of the samples, above 0.
        place: "latent" (the paper) or "field" (control points of the decoder's field, displacement or velocity).
        levels: "latent": the features that the policy acts on, counted from the coarsest: 0 the paper's top feature,
            whose head says mu and sigma; 1, 2, ... the encoder's skips, whose own values are the mean.
        cell: "field": voxels between control points.
        sigma: standard deviation (times tau) where no head says it: of a control point, in voxels; of a skip, in units
            of that feature's root mean square.
        smooth: noise is alike in blocks of so many cells along each axis; 1 for independent noise. The likelihood stays
            that of independent noise: its gradient is then the reward's, averaged over the blocks (the covariance of
            the noise preconditions it).
        credit: "trajectory" (one advantage per trajectory, the paper) or "local" (one per cell of the place's grid).
        reach: "local": a cell is credited with the rewards of the cells up to so many away from it, too.
        baseline: what a reward is compared with: "group" (the group's mean), "leave_one_out" (the mean of the others)
            or "mean_rollout" (the roll-out at tau = 0).
        scale: "std" divides advantages by the group's spread (over trajectories and, for "local", over cells), "none"
            keeps the reward's units.
        antithetic: draw noise in pairs of opposite sign; J must be even.
        s: normaliser of the log-likelihood, "sqrt_n" (LDVN) or a number.
        advance: the state of the next step: "greedy" (the best trajectory, the paper) or "mean" (the roll-out at
            tau = 0, which is what inference does).
        chunk: trajectories decoded and scored at once; changes speed and memory, not the result.
    """

    trajectories: int = 6
    weight: float = 1.0
    share: float = 1.0
    tau: float = 1.0
    place: str = "latent"
    levels: tuple[int, ...] = (0,)
    cell: int = 4
    sigma: float = 1.0
    smooth: int = 1
    credit: str = "trajectory"
    reach: int = 0
    baseline: str = "group"
    scale: str = "std"
    antithetic: bool = False
    s: str = "sqrt_n"
    advance: str = "greedy"
    chunk: int = 2

    def __post_init__(self) -> None:
        for name, known in (
            ("place", PLACES), ("credit", CREDITS), ("baseline", BASELINES), ("scale", SCALES), ("advance", ADVANCES)
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is '{getattr(self, name)}'; it must be one of {', '.join(known)}")
        if self.trajectories < 2:
            raise ValueError("trajectories must be at least 2: a group of one has nothing to compare with")
        if self.antithetic and self.trajectories % 2:
            raise ValueError("antithetic noise needs an even number of trajectories")
        if min(self.tau, self.sigma, self.share) <= 0:
            raise ValueError("tau, sigma and share must be above 0")
        if min(self.cell, self.chunk, self.smooth) < 1:
            raise ValueError("cell, chunk and smooth must be at least 1")
        if not self.levels or min(self.levels) < 0 or len(set(self.levels)) < len(self.levels) or self.reach < 0:
            raise ValueError("levels must name at least one level, each once, from 0; reach must be 0 or more")
        likelihood_normalizer(self.s, 1)


class Gaussian(NamedTuple):
    """A part of the policy: (1, channels, a, b, c) each; the mean carries the gradient."""

    mu: Tensor
    log_sigma: Tensor


class Group(NamedTuple):
    """What sampling and scoring J trajectories left behind; nothing here carries a gradient.

    Attributes:
        samples: for each part of the policy (J, channels, a, b, c).
        rewards: (J,).
        cells: for each part (J, 1, a, b, c): rewards summed over the cells of its grid, as far as they reach.
        best: (1, 3, i, j, k), the accumulated field of the trajectory with the highest reward.
        mean_reward: the reward of the roll-out at tau = 0; ``mean_cells`` the same in cells, for each part.
    """

    samples: list[Tensor]
    rewards: Tensor
    cells: list[Tensor]
    best: Tensor
    mean_reward: Tensor
    mean_cells: list[Tensor]


def policy_at(latent: Latent, field: Tensor, settings: PolicyGradientSettings) -> list[Gaussian]:
    """The policy at the settings' place, on the graph.

    Args:
        latent: of the encoder.
        field: (1, 3, i, j, k), what the decoder makes of its mean.

    Raises:
        MorphSeekError: a level that the backbone does not have.
    """
    if settings.place == "field":
        mean = F.avg_pool3d(field, settings.cell, ceil_mode=True)
        return [Gaussian(mean, torch.full_like(mean, math.log(settings.sigma)).detach())]
    skips, parts = latent.skips, []
    for level in settings.levels:
        if level >= max(len(skips), 1):  # the finest skip is the pair of images itself
            raise MorphSeekError(
                f"policy.levels asks for level {level}; this backbone has 0 to {max(len(skips), 1) - 1}."
            )
        if level == 0:
            parts.append(Gaussian(latent.mu, latent.log_sigma))
        else:
            mean = skips[-level].float()
            deviation = settings.sigma * mean.detach().square().mean().sqrt().clamp(min=1e-6)
            parts.append(Gaussian(mean, deviation.log().expand_as(mean)))
    return parts


def steps_of(
    model: RegistrationModel,
    latent: Latent,
    field: Tensor,
    policy: list[Gaussian],
    samples: list[Tensor],
    settings: PolicyGradientSettings,
) -> Tensor:
    """Displacements (J, 3, i, j, k) of the steps that samples (for each part of the policy (J, ...)) stand for."""
    if settings.place == "field":
        return model.displacement(field + upsample(samples[0] - policy[0].mu, field.shape[2:]))
    latent = expand_latent(latent, len(samples[0]))
    z, skips = latent.mu.expand(len(samples[0]), *latent.mu.shape[1:]), list(latent.skips)
    for level, sample in zip(settings.levels, samples, strict=True):
        if level == 0:
            z = sample
        else:
            skips[-level] = sample
    with training_autocast(z.device):
        decoded = model.field(latent._replace(skips=skips), z)
    return model.displacement(decoded.float())


@torch.no_grad()
def sample_and_score(
    model: RegistrationModel,
    latent: Latent,
    field: Tensor,
    total: Tensor,
    state: State,
    settings: PolicyGradientSettings,
    reward: RewardSettings,
    generator: torch.Generator | None = None,
) -> Group:
    """Draw J trajectories, decode, compose and reward them in chunks, without a graph.

    Args:
        latent, field: the encoder's Gaussian, and what the decoder makes of its mean.
        total: (1, 3, i, j, k), the accumulated displacement after the mean's step.
        state: the pair before the step.
    """
    policy = policy_at(latent, field, settings)
    drawn = (settings.tau, settings.trajectories, settings.antithetic, settings.smooth, generator)
    samples = [draw(*part, *drawn) for part in policy]

    def in_cells(maps: Tensor) -> list[Tensor]:
        return [widen(sum_over_cells(maps, part.mu.shape[2:]), settings.reach) for part in policy]

    mean_map = reward_map(state, total, reward)
    rewards, cells, best, best_reward = [], [], None, None
    for chunk in zip(*(s.split(settings.chunk) for s in samples), strict=True):
        totals = fields.compose(state.total, steps_of(model, latent, field, policy, list(chunk), settings))
        maps = reward_map(state, totals, reward)
        rewards.append(maps.flatten(1).sum(dim=1))
        cells.append(in_cells(maps))
        top = rewards[-1].argmax(keepdim=True)  # chosen on the device, without waiting for it
        candidate, candidate_reward = totals[top], rewards[-1][top]
        if best is None:
            best, best_reward = candidate, candidate_reward
        better = candidate_reward > best_reward
        best = torch.where(better.view(1, 1, 1, 1, 1), candidate, best)
        best_reward = torch.where(better, candidate_reward, best_reward)
    cells = [torch.cat(part) for part in zip(*cells, strict=True)]
    return Group(samples, torch.cat(rewards), cells, best, mean_map.sum(), in_cells(mean_map))


def advantages(group: Group, settings: PolicyGradientSettings, epsilon: float = 1e-4) -> list[Tensor]:
    """For each part of the policy A of every trajectory, (J, 1, 1, 1, 1), or of each of its cells, (J, 1, a, b, c).

    "group" with "std" is METHOD.md C.3: (R_j - mean R) / (std R + epsilon), std over the J trajectories; with local
    credit the spread is the root mean square over trajectories and cells, so that cells where nothing happens stay
    silent instead of being blown up to unit spread.
    """
    if settings.credit == "trajectory":
        whole = _compared(group.rewards.view(-1, 1, 1, 1, 1), group.mean_reward.view(1, 1, 1, 1, 1), settings, epsilon)
        return [whole] * len(group.samples)
    return [
        _compared(cells, rollout, settings, epsilon / cells[0].numel())
        for cells, rollout in zip(group.cells, group.mean_cells, strict=True)
    ]


def _compared(rewards: Tensor, rollout: Tensor, settings: PolicyGradientSettings, epsilon: float) -> Tensor:
    """Rewards (J, 1, a, b, c) less their baseline, in the settings' scale."""
    count = len(rewards)
    mean = rewards.mean(dim=0, keepdim=True)
    if settings.baseline == "mean_rollout":
        centred = rewards - rollout
    elif settings.baseline == "leave_one_out":
        centred = (rewards - mean) * count / (count - 1)
    else:
        centred = rewards - mean
    if settings.scale == "none":
        return centred
    spread = (rewards - mean).square().mean().sqrt() * math.sqrt(count / (count - 1))
    return centred / (spread + epsilon)


def log_likelihood_map(policy: Gaussian, samples: Tensor, tau: float, s: float) -> Tensor:
    """LDVN log-likelihood, summed over channels alone: (J, 1, a, b, c); its sum is METHOD.md's log pi~ (C.4).

    -1/(2s) sum_channels [((z - mu) / (tau sigma))^2 + log(2 pi tau^2 sigma^2)], z detached. s = sqrt(N) keeps the
    spread of the sum over N independent dimensions at order one, on whichever grid and however credited.
    """
    log_sigma = policy.log_sigma + math.log(tau)
    squared = ((samples.detach() - policy.mu) * (-log_sigma).exp()).square()
    return -(squared + math.log(2 * math.pi) + 2 * log_sigma).sum(dim=1, keepdim=True) / (2 * s)


def policy_loss(policy: list[Gaussian], group: Group, settings: PolicyGradientSettings) -> Tensor:
    """L_policy = -(1/J) sum_j sum_cells A_j log pi~_j (METHOD.md, C.5); one A for all cells is the paper's."""
    s = likelihood_normalizer(settings.s, sum(part.mu.numel() for part in policy))
    total = sum(
        (advantage * log_likelihood_map(part, samples, settings.tau, s)).sum()
        for part, samples, advantage in zip(policy, group.samples, advantages(group, settings), strict=True)
    )
    return -total / len(group.rewards)


def next_kl_weight(weight: float, kl: float, target: float, rate: float = 0.1) -> float:
    """beta of the next iteration: up while KL is above its target, down while below, by at most ``rate``.

    The fixed-prior trust region of METHOD.md, C.7 (after the adaptive controller of Ziegler et al., 2019).
    """
    error = min(max(kl / target - 1, -1.0), 1.0)
    return min(max(weight * (1 + rate * error), 1e-6), 1e3)


def expand_latent(latent: Latent, count: int) -> Latent:
    """The same skips for ``count`` latents, without copying."""
    return latent._replace(skips=[skip.expand(count, *skip.shape[1:]) for skip in latent.skips])


def widen(cells: Tensor, reach: int) -> Tensor:
    """(J, 1, a, b, c) -> the same: each cell's sum over the cells up to ``reach`` away along every axis."""
    return F.avg_pool3d(cells, 2 * reach + 1, 1, reach, divisor_override=1) if reach else cells


def upsample(control: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Control-point displacements (J, 3, a, b, c), voxels, interpolated to (J, 3, *shape); magnitudes kept."""
    return F.interpolate(control, size=tuple(shape), mode="trilinear", align_corners=False)


def sum_over_cells(maps: Tensor, grid: tuple[int, ...]) -> Tensor:
    """(J, 1, i, j, k) -> (J, 1, *grid): sums over the blocks of voxels that share a cell; the total is kept."""
    for axis, count in enumerate(grid, start=2):
        size = maps.shape[axis]
        cell = torch.arange(size, device=maps.device) * count // size
        shape = list(maps.shape)
        shape[axis] = count
        maps = maps.new_zeros(shape).index_add_(axis, cell, maps)
    return maps
