"""GRPO, one refinement step of one pair (METHOD.md, section C): sample a group, reward it, push the policy.

Memory does not grow with the number J of trajectories: they are sampled, decoded and scored in chunks without a graph;
the log-likelihood of the stored samples is then recomputed on the encoder's graph, and one decode, that of the mean, is
differentiated for the losses.

The policy may act in two places. "latent" is the paper's: the Gaussian over the encoder's top feature. "field" is ours:
a Gaussian over control-point displacements every few voxels around the network's own step. There one decode serves all
trajectories, and a reward can be credited to the control points near which it arose.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import fields
from .policy import Latent, RegistrationModel, draw, likelihood_normalizer
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
        tau: temperature of the samples, above 0.
        place: "latent" (the paper) or "field" (control points of the step's displacement).
        cell: "field": voxels between control points.
        sigma: "field": standard deviation of a control point, voxels (times tau).
        credit: "trajectory" (one advantage per trajectory, the paper) or "local" (one per cell of the place's grid).
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
    tau: float = 1.0
    place: str = "latent"
    cell: int = 4
    sigma: float = 1.0
    credit: str = "trajectory"
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
        if self.tau <= 0 or self.sigma <= 0:
            raise ValueError("tau and sigma must be above 0")
        if self.cell < 1 or self.chunk < 1:
            raise ValueError("cell and chunk must be at least 1")
        likelihood_normalizer(self.s, 1)


class Gaussian(NamedTuple):
    """The policy at its place: (1, channels, a, b, c) each; the mean carries the gradient."""

    mu: Tensor
    log_sigma: Tensor


class Group(NamedTuple):
    """What sampling and scoring J trajectories left behind; nothing here carries a gradient.

    Attributes:
        samples: (J, channels, a, b, c), at the policy's place.
        rewards: (J,).
        cells: (J, 1, a, b, c), rewards summed over the cells of the place's grid.
        best: (1, 3, i, j, k), the accumulated field of the trajectory with the highest reward.
        mean_reward: the reward of the roll-out at tau = 0; ``mean_cells`` (1, 1, a, b, c) its map.
    """

    samples: Tensor
    rewards: Tensor
    cells: Tensor
    best: Tensor
    mean_reward: Tensor
    mean_cells: Tensor


def policy_at(latent: Latent, step: Tensor, settings: PolicyGradientSettings) -> Gaussian:
    """The Gaussian at the settings' place, on the graph.

    Args:
        latent: of the encoder.
        step: (1, 3, i, j, k), the displacement decoded from its mean.
    """
    if settings.place == "latent":
        return Gaussian(latent.mu, latent.log_sigma)
    mean = F.avg_pool3d(step, settings.cell, ceil_mode=True)
    return Gaussian(mean, torch.full_like(mean, math.log(settings.sigma)).detach())


@torch.no_grad()
def sample_and_score(
    model: RegistrationModel,
    latent: Latent,
    step: Tensor,
    state: State,
    settings: PolicyGradientSettings,
    reward: RewardSettings,
    generator: torch.Generator | None = None,
) -> Group:
    """Draw J trajectories, decode, compose and reward them in chunks, without a graph.

    Args:
        latent, step: the encoder's Gaussian and the displacement decoded from its mean.
        state: the pair before the step.
    """
    policy = policy_at(latent, step, settings)
    samples = draw(*policy, settings.tau, settings.trajectories, settings.antithetic, generator)
    grid = policy.mu.shape[2:]
    mean_map = reward_map(state, fields.compose(state.total, step), reward)
    rewards, cells, best, best_reward = [], [], None, None
    for chunk in samples.split(settings.chunk):
        if settings.place == "latent":
            steps = model.displacement(model.field(expand_latent(latent, len(chunk)), chunk))
        else:
            steps = step + upsample(chunk - policy.mu, step.shape[2:])
        totals = fields.compose(state.total, steps.float())
        maps = reward_map(state, totals, reward)
        rewards.append(maps.flatten(1).sum(dim=1))
        cells.append(sum_over_cells(maps, grid))
        top = rewards[-1].argmax(keepdim=True)  # chosen on the device, without waiting for it
        candidate, candidate_reward = totals[top], rewards[-1][top]
        if best is None:
            best, best_reward = candidate, candidate_reward
        better = candidate_reward > best_reward
        best = torch.where(better.view(1, 1, 1, 1, 1), candidate, best)
        best_reward = torch.where(better, candidate_reward, best_reward)
    return Group(samples, torch.cat(rewards), torch.cat(cells), best, mean_map.sum(), sum_over_cells(mean_map, grid))


def advantages(group: Group, settings: PolicyGradientSettings, epsilon: float = 1e-4) -> Tensor:
    """A of every trajectory, (J, 1, 1, 1, 1), or of every trajectory and cell, (J, 1, a, b, c).

    "group" with "std" is METHOD.md C.3: (R_j - mean R) / (std R + epsilon), std over the J trajectories; with local
    credit the spread is the root mean square over trajectories and cells, so that cells where nothing happens stay
    silent instead of being blown up to unit spread.
    """
    if settings.credit == "local":
        rewards, rollout = group.cells, group.mean_cells
    else:
        rewards, rollout = group.rewards.view(-1, 1, 1, 1, 1), group.mean_reward.view(1, 1, 1, 1, 1)
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
    if settings.credit == "local":
        spread = (rewards - mean).square().mean().sqrt() * math.sqrt(count / (count - 1))
        return centred / (spread + epsilon / rewards[0].numel())
    return centred / (rewards.std(dim=0, keepdim=True) + epsilon)


def log_likelihood_map(policy: Gaussian, samples: Tensor, tau: float, s: float) -> Tensor:
    """LDVN log-likelihood, summed over channels alone: (J, 1, a, b, c); its sum is METHOD.md's log pi~ (C.4).

    -1/(2s) sum_channels [((z - mu) / (tau sigma))^2 + log(2 pi tau^2 sigma^2)], z detached. s = sqrt(N) keeps the
    spread of the sum over N independent dimensions at order one, on whichever grid and however credited.
    """
    log_sigma = policy.log_sigma + math.log(tau)
    squared = ((samples.detach() - policy.mu) * (-log_sigma).exp()).square()
    return -(squared + math.log(2 * math.pi) + 2 * log_sigma).sum(dim=1, keepdim=True) / (2 * s)


def policy_loss(policy: Gaussian, group: Group, settings: PolicyGradientSettings) -> Tensor:
    """L_policy = -(1/J) sum_j sum_cells A_j log pi~_j (METHOD.md, C.5); one A for all cells is the paper's."""
    likelihood = log_likelihood_map(
        policy, group.samples, settings.tau, likelihood_normalizer(settings.s, policy.mu.numel())
    )
    return -(advantages(group, settings) * likelihood).sum() / len(group.samples)


def next_kl_weight(weight: float, kl: float, target: float, rate: float = 0.1) -> float:
    """beta of the next iteration: up while KL is above its target, down while below, by at most ``rate``.

    The fixed-prior trust region of METHOD.md, C.7 (after the adaptive controller of Ziegler et al., 2019).
    """
    error = min(max(kl / target - 1, -1.0), 1.0)
    return min(max(weight * (1 + rate * error), 1e-6), 1e3)


def expand_latent(latent: Latent, count: int) -> Latent:
    """The same skips for ``count`` latents, without copying."""

    def expand(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.expand(count, *value.shape[1:])
        if isinstance(value, (list, tuple)):
            return type(value)(expand(v) for v in value)
        return value

    return Latent(latent.mu, latent.log_sigma, expand(latent.skips))


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
