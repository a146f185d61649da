"""GRPO, one refinement step of one pair (METHOD.md, section C): sample a group, reward it, push the policy.

Memory does not grow with the number J of trajectories: they are sampled, decoded and scored in chunks without a graph;
the log-likelihood of the stored samples is then recomputed on the encoder's graph, and one decode, that of the mean, is
differentiated for the losses. Where the policy acts is :mod:`MorphSeekLib.training.policies`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..space import fields
from .policies import Policy, PolicyGradientSettings
from .rewards import RewardSettings, State, reward_map


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


@torch.no_grad()
def sample_group(
    policy: Policy, state: State, total: Tensor, reward: RewardSettings, generator: torch.Generator | None = None
) -> Group:
    """Draw J trajectories, decode, compose and reward them in chunks, without a graph.

    Args:
        policy: of the step.
        state: the pair before the step.
        total: (1, 3, i, j, k), the accumulated displacement after the mean's step.
        reward: what a trajectory is rewarded for.
        generator: of the CPU, for the noise.
    """
    settings, samples = policy.settings, policy.draw(generator)

    def in_cells(maps: Tensor) -> list[Tensor]:
        return [widen(sum_over_cells(maps, part.mu.shape[2:]), settings.reach) for part in policy.parts]

    mean_map = reward_map(state, total, reward)
    rewards, cells, best, best_reward = [], [], None, None
    for chunk in zip(*(s.split(settings.chunk) for s in samples), strict=True):
        totals = fields.compose(state.total, policy.displacements(list(chunk)))
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


def policy_loss(advantage: list[Tensor], log_likelihood: list[Tensor]) -> Tensor:
    """L_policy = -(1/J) sum_j sum_cells A_j log pi~_j (METHOD.md, C.5); one A for all cells is the paper's."""
    total = sum((a * log).sum() for a, log in zip(advantage, log_likelihood, strict=True))
    return -total / len(log_likelihood[0])


def next_kl_weight(weight: float, kl: float, target: float, rate: float = 0.1) -> float:
    """beta of the next iteration: up while KL is above its target, down while below, by at most ``rate``.

    The fixed-prior trust region of METHOD.md, C.7 (after the adaptive controller of Ziegler et al., 2019).
    """
    error = min(max(kl / target - 1, -1.0), 1.0)
    return min(max(weight * (1 + rate * error), 1e-6), 1e3)


def widen(cells: Tensor, reach: int) -> Tensor:
    """(J, 1, a, b, c) -> the same: each cell's sum over the cells up to ``reach`` away along every axis."""
    return F.avg_pool3d(cells, 2 * reach + 1, 1, reach, divisor_override=1) if reach else cells


def sum_over_cells(maps: Tensor, grid: tuple[int, ...]) -> Tensor:
    """(J, 1, i, j, k) -> (J, 1, *grid): sums over the blocks of voxels that share a cell; the total is kept."""
    for axis, count in enumerate(grid, start=2):
        size = maps.shape[axis]
        cell = torch.arange(size, device=maps.device) * count // size
        shape = list(maps.shape)
        shape[axis] = count
        maps = maps.new_zeros(shape).index_add_(axis, cell, maps)
    return maps
