"""Where the policy of a step acts: a list of independent Gaussians (Docs/method.md, section C), at one of two places.

"latent" is the paper's: the Gaussian over the encoder's top feature; ``levels`` lets it act on finer features too, or
instead. "field" is ours: a Gaussian over control points, every few voxels, of the field that the decoder makes. There
one decode serves all trajectories, and a reward can be credited to the control points near which it arose. The policy's
likelihood is the product of its parts' densities, and N, whose root LDVN divides by, the number of all their
dimensions.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..networks.devices import training_autocast
from ..networks.policy import Latent, RegistrationModel, draw, likelihood_normalizer
from ..protocol.errors import MorphSeekError

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
        share: "field": the policy's gradient at the field is made no longer than this many times that of the losses, so
            that one weight serves networks whose fields answer to their weights more or less.
        tau: temperature of the samples, above 0.
        place: "latent" (the paper) or "field" (control points of the decoder's field, displacement or velocity).
        levels: "latent": the features that the policy acts on, counted from the coarsest: 0 the paper's top feature,
            whose head says mu and sigma; 1, 2, ... the encoder's skips, whose own values are the mean.
        cell: "field": voxels between control points.
        sigma: standard deviation (times tau) where no head says it: of a control point, in voxels; of a skip, in units
            of that feature's root mean square.
        smooth: noise is equal in blocks of this many cells a side; 1 for independent noise. The likelihood stays
            that of independent noise: its gradient is then the reward's, averaged over the blocks (the covariance of
            the noise preconditions it).
        credit: "trajectory" (one advantage per trajectory, the paper) or "local" (one per cell of the place's grid).
        reach: "local": a cell is also credited with the rewards of cells up to this many away from it.
        baseline: what a reward is compared with: "group" (the group's mean), "leave_one_out" (the mean of the others)
            or "mean_rollout" (the roll-out at tau = 0).
        scale: "std" divides advantages by the group's spread (over trajectories and, for "local", over cells), "none"
            keeps the reward's units.
        antithetic: draw noise in pairs of opposite sign; J must be even.
        s: normalizer of the log-likelihood, "sqrt_n" (LDVN) or a number.
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
            ("place", POLICIES), ("credit", CREDITS), ("baseline", BASELINES), ("scale", SCALES), ("advance", ADVANCES)
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


class Policy(ABC):
    """The policy of one step of one pair.

    Attributes:
        model, latent, field: the network, the encoder's Gaussian, and what the decoder makes of its mean, on the graph.
        settings: how it is sampled and what its rewards teach.
        parts: the Gaussians; the means carry the gradient.
    """

    def __init__(
        self, model: RegistrationModel, latent: Latent, field: Tensor, settings: PolicyGradientSettings
    ) -> None:
        self.model, self.latent, self.field, self.settings = model, latent, field, settings
        self.parts = self.distribution()

    @abstractmethod
    def distribution(self) -> list[Gaussian]:
        """Return the Gaussians, independent of each other."""

    @abstractmethod
    def displacements(self, samples: list[Tensor]) -> Tensor:
        """Return the steps (J, 3, i, j, k), in voxels, that samples (for each part (J, ...)) stand for."""

    def draw(self, generator: torch.Generator | None = None) -> list[Tensor]:
        """Draw J samples of each part, (J, channels, a, b, c), detached."""
        s = self.settings
        return [draw(*part, s.tau, s.trajectories, s.antithetic, s.smooth, generator) for part in self.parts]

    def log_likelihood(self, samples: list[Tensor]) -> list[Tensor]:
        """Return :func:`log_likelihood` of the parts."""
        return log_likelihood(self.parts, samples, self.settings)

    def backward(self, losses: Tensor, gain: Tensor, parts: int) -> tuple[Tensor, Tensor | None]:
        """Add to the weights' gradients those of the losses and of L_policy, each as one of ``parts`` of an update.

        Args:
            losses: a scalar on the graph: L_warm and what goes with it.
            gain: L_policy, a scalar on the graph.
            parts: how many steps and pairs share the update.

        Returns:
            the loss that was descended (detached), and where it was limited, how many times the losses' gradient that
            of the policy was long.
        """
        loss = losses + self.settings.weight * gain
        (loss / parts).backward()
        return loss.detach(), None


class LatentPolicy(Policy):
    """Acts on the encoder's features: the paper's."""

    def distribution(self) -> list[Gaussian]:
        """Return a Gaussian for each level.

        Raises:
            MorphSeekError: a level that the backbone does not have.
        """
        latent, skips, parts = self.latent, self.latent.skips, []
        for level in self.settings.levels:
            if level >= max(len(skips), 1):  # the finest skip is the pair of images itself
                raise MorphSeekError(
                    f"policy.levels asks for level {level}; this backbone has 0 to {max(len(skips), 1) - 1}."
                )
            if level == 0:
                parts.append(Gaussian(latent.mu, latent.log_sigma))
            else:
                mean = skips[-level].float()
                deviation = self.settings.sigma * mean.detach().square().mean().sqrt().clamp(min=1e-6)
                parts.append(Gaussian(mean, deviation.log().expand_as(mean)))
        return parts

    def displacements(self, samples: list[Tensor]) -> Tensor:
        """Decode the samples in place of the features."""
        count = len(samples[0])
        latent = expand_latent(self.latent, count)
        z, skips = latent.mu.expand(count, *latent.mu.shape[1:]), list(latent.skips)
        for level, sample in zip(self.settings.levels, samples, strict=True):
            if level == 0:
                z = sample
            else:
                skips[-level] = sample
        with training_autocast(z.device):
            decoded = self.model.field(latent._replace(skips=skips), z)
        return self.model.displacement(decoded.float())


class FieldPolicy(Policy):
    """Acts on control points of the decoder's field, displacement or velocity."""

    def distribution(self) -> list[Gaussian]:
        """Return one Gaussian, whose mean is the field's mean over each cell."""
        mean = F.avg_pool3d(self.field, self.settings.cell, ceil_mode=True)
        return [Gaussian(mean, torch.full_like(mean, math.log(self.settings.sigma)).detach())]

    def displacements(self, samples: list[Tensor]) -> Tensor:
        """Add to the field what the samples differ from the mean by."""
        return self.model.displacement(self.field + upsample(samples[0] - self.parts[0].mu, self.field.shape[2:]))

    def backward(self, losses: Tensor, gain: Tensor, parts: int) -> tuple[Tensor, Tensor | None]:
        """Do as :meth:`Policy.backward`; at the field, the policy's gradient keeps to its ``share`` of the losses'."""
        (push,) = torch.autograd.grad(self.settings.weight / parts * gain, self.field)
        limited = LimitedPush(push, self.settings.share)
        self.field.register_hook(limited)
        (losses / parts).backward()
        return losses.detach(), limited.ratio


POLICIES: dict[str, type[Policy]] = {"latent": LatentPolicy, "field": FieldPolicy}
"""The policies by the places that settings name."""


def make_policy(model: RegistrationModel, latent: Latent, field: Tensor, settings: PolicyGradientSettings) -> Policy:
    """Make the policy at the settings' place; arguments as for :class:`Policy`."""
    return POLICIES[settings.place](model, latent, field, settings)


class LimitedPush:
    """A gradient hook: adds a push to the gradient that arrives, no longer than ``share`` times it.

    Attributes:
        ratio: how many times as long as the gradient the push was; None before the gradient arrived.
    """

    def __init__(self, push: Tensor, share: float) -> None:
        self._push, self._share = push, share
        self.ratio: Tensor | None = None

    def __call__(self, gradient: Tensor) -> Tensor:
        self.ratio = self._push.norm() / gradient.norm().clamp(min=1e-20)
        return gradient + self._push * (self._share / self.ratio.clamp(min=1e-20)).clamp(max=1.0)


def log_likelihood(parts: list[Gaussian], samples: list[Tensor], settings: PolicyGradientSettings) -> list[Tensor]:
    """Return :func:`log_likelihood_map` of each part, with the settings' s over the dimensions of all."""
    s = likelihood_normalizer(settings.s, sum(part.mu.numel() for part in parts))
    return [log_likelihood_map(part, drawn, settings.tau, s) for part, drawn in zip(parts, samples, strict=True)]


def log_likelihood_map(policy: Gaussian, samples: Tensor, tau: float, s: float) -> Tensor:
    """Return the LDVN log-likelihood by cell, (J, 1, a, b, c); its sum is the method page's log pi~ (C.4).

    -1/(2s) sum_channels [((z - mu) / (tau sigma))^2 + log(2 pi tau^2 sigma^2)], z detached. s = sqrt(N) keeps the
    spread of the sum over N independent dimensions at order one, on whichever grid and however credited.
    """
    log_sigma = policy.log_sigma + math.log(tau)
    squared = ((samples.detach() - policy.mu) * (-log_sigma).exp()).square()
    return -(squared + math.log(2 * math.pi) + 2 * log_sigma).sum(dim=1, keepdim=True) / (2 * s)


def expand_latent(latent: Latent, count: int) -> Latent:
    """Return the same skips for ``count`` latents, without copying."""
    return latent._replace(skips=[skip.expand(count, *skip.shape[1:]) for skip in latent.skips])


def upsample(control: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Interpolate control-point displacements (J, 3, a, b, c), voxels, to (J, 3, *shape); magnitudes are kept."""
    return F.interpolate(control, size=tuple(shape), mode="trilinear", align_corners=False)
