"""GRPO, one step of one pair (Docs/method.md, section C): sample a group, reward it, push the policy.

Memory does not grow with the number J of trajectories: they are sampled, decoded and scored in chunks without a graph;
the log-likelihood of the stored samples is then recomputed on the encoder's graph, and one decode, that of the mean, is
differentiated for the losses. Where the policy acts is :mod:`MorphSeekLib.training.policies`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..measures.fast_fields import compose
from ..networks.policy import RegistrationModel
from .losses import Batch, LossSettings, advance, warmup_loss
from .policies import Policy, PolicyGradientSettings, make_policy
from .rewards import RewardSettings, State, reward_map


@dataclass(frozen=True)
class Objective:
    """What a step descends: lambda_policy L_policy + L_warm + lambda_Dice (1 - soft Dice) (Docs/method.md, C.7).

    Attributes:
        losses: weights of L_warm's terms and of soft Dice.
        policy: lambda_policy and how a group is sampled; weight 0 samples nothing.
        reward: what a trajectory is rewarded for.
        kl_weight: beta.
        parts: how many steps and pairs share an update of the weights; each counts as one of them.
    """

    losses: LossSettings
    policy: PolicyGradientSettings
    reward: RewardSettings
    kl_weight: float
    parts: int


@dataclass
class Walk:
    """A pair on its way through the steps.

    Attributes:
        state: where it is, for the rewards.
        batch: what the losses see.
        generator: of the noise of all its steps.
    """

    state: State
    batch: Batch
    generator: torch.Generator


class Learned(NamedTuple):
    """What a step leads to: the accumulated displacement (1, 3, i, j, k) to continue from; figures, on the device."""

    total: Tensor
    figures: dict[str, Tensor]


def learn_step(model: RegistrationModel, walk: Walk, objective: Objective) -> Learned:
    """Take one step of one pair, and add its gradients to those of the weights."""
    state, settings = walk.state, objective.policy
    step = advance(model, walk.batch, state.total)  # mu, sigma; phi of the mean; its Phi_t
    losses, terms = warmup_loss(step, walk.batch, objective.losses, objective.kl_weight)  # L_warm, L_Dice
    if settings.weight <= 0:
        (losses / objective.parts).backward()
        return Learned(step.total.detach(), terms | {"loss": losses.detach()})
    policy = make_policy(model, step.latent, step.field, settings)  # N(mu, (tau sigma)^2)
    group = sample_group(policy, state, step.total, objective.reward, walk.generator)  # z_j, Phi_t^(j), R_j
    advantage = advantages(group, settings)  # A_j
    gain = policy_loss(advantage, policy.log_likelihood(group.samples))  # -(1/J) sum_j A_j log pi~_j
    loss, ratio = policy.backward(losses, gain, objective.parts)
    figures = group_figures(group, advantage) | {"policy_loss": gain.detach()}
    figures |= {"sigma": step.latent.log_sigma.detach().exp().mean()}
    figures |= {} if ratio is None else {"policy_share": ratio}
    total = group.best if settings.advance == "greedy" else step.total.detach()  # Phi_t
    return Learned(total, terms | figures | {"loss": loss})


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
    rewards: list[Tensor] = []
    cells: list[list[Tensor]] = []
    best = best_reward = None
    for chunk in zip(*(s.split(settings.chunk) for s in samples), strict=True):
        totals = compose(state.total, policy.displacements(list(chunk)))
        maps = reward_map(state, totals, reward)
        rewards.append(maps.flatten(1).sum(dim=1))
        cells.append(in_cells(maps))
        top = rewards[-1].argmax(keepdim=True)  # chosen on the device, without waiting for it
        candidate, candidate_reward = totals[top], rewards[-1][top]
        if best is None or best_reward is None:
            best, best_reward = candidate, candidate_reward
        better = candidate_reward > best_reward
        best = torch.where(better.view(1, 1, 1, 1, 1), candidate, best)
        best_reward = torch.where(better, candidate_reward, best_reward)
    if best is None:
        raise ValueError("a group needs at least one trajectory")
    joined = [torch.cat(part) for part in zip(*cells, strict=True)]
    return Group(samples, torch.cat(rewards), joined, best, mean_map.sum(), in_cells(mean_map))


def advantages(group: Group, settings: PolicyGradientSettings, epsilon: float = 1e-4) -> list[Tensor]:
    """Return A for each part of the policy: of every trajectory, (J, 1, 1, 1, 1), or of its cells, (J, 1, a, b, c).

    "group" with "std" is the method page's C.3: (R_j - mean R) / (std R + epsilon), std over the J
    trajectories; with local credit the spread is the root mean square over trajectories and cells, so that
    cells where nothing happens stay silent instead of being blown up to unit spread.
    """
    if settings.credit == "trajectory":
        whole = _compared(group.rewards.view(-1, 1, 1, 1, 1), group.mean_reward.view(1, 1, 1, 1, 1), settings, epsilon)
        return [whole] * len(group.samples)
    return [
        _compared(cells, rollout, settings, epsilon / cells[0].numel())
        for cells, rollout in zip(group.cells, group.mean_cells, strict=True)
    ]


def _compared(rewards: Tensor, rollout: Tensor, settings: PolicyGradientSettings, epsilon: float) -> Tensor:
    """Return rewards (J, 1, a, b, c) minus their baseline, in the settings' scale."""
    count = len(rewards)
    mean = rewards.mean(dim=0, keepdim=True)
    if settings.baseline == "mean_rollout":
        centered = rewards - rollout
    elif settings.baseline == "leave_one_out":
        centered = (rewards - mean) * count / (count - 1)
    else:
        centered = rewards - mean
    if settings.scale == "none":
        return centered
    spread = (rewards - mean).square().mean().sqrt() * math.sqrt(count / (count - 1))
    return centered / (spread + epsilon)


def policy_loss(advantage: list[Tensor], log_likelihood: list[Tensor]) -> Tensor:
    """Return L_policy = -(1/J) sum_j sum_cells A_j log pi~_j (Docs/method.md, C.5); in the paper A is one number."""
    total = reduce(add, ((a * log).sum() for a, log in zip(advantage, log_likelihood, strict=True)))
    return -total / len(log_likelihood[0])


def group_figures(group: Group, advantage: list[Tensor]) -> dict[str, Tensor]:
    """Return for the curves a group's rewards, and its advantages over trajectories and cells."""
    spread = group.rewards.std()
    flat = torch.cat([a.flatten() for a in advantage])
    return {
        "advantage_rms": flat.square().mean().sqrt(),
        "advantage_largest": flat.abs().max(),
        "reward": group.rewards.mean(),
        "reward_best": group.rewards.max(),
        "reward_spread": spread,
        "groups_without_spread": (spread < 1e-7).float(),
        "reward_of_mean": group.mean_reward,
    }


def next_kl_weight(weight: float, kl: float, target: float, rate: float = 0.1) -> float:
    """Return the next iteration's beta: higher while KL is above its target, lower while below, by ``rate`` at most.

    The fixed-prior trust region of Docs/method.md, C.7 (after the adaptive controller of Ziegler et al., 2019).
    """
    error = min(max(kl / target - 1, -1.0), 1.0)
    return min(max(weight * (1 + rate * error), 1e-6), 1e3)


def widen(cells: Tensor, reach: int) -> Tensor:
    """Return (J, 1, a, b, c) -> the same: each cell's sum over the cells up to ``reach`` away along every axis."""
    return F.avg_pool3d(cells, 2 * reach + 1, 1, reach, divisor_override=1) if reach else cells


def sum_over_cells(maps: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Return (J, 1, i, j, k) -> (J, 1, *grid): sums over the blocks of voxels that share a cell; the total is kept."""
    for axis, count in enumerate(grid, start=2):
        size = maps.shape[axis]
        cell = torch.arange(size, device=maps.device) * count // size
        shape = list(maps.shape)
        shape[axis] = count
        maps = maps.new_zeros(shape).index_add_(axis, cell, maps)
    return maps
