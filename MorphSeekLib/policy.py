"""The latent Gaussian policy around any backbone (METHOD.md, section A), and refinement in steps (section D).

Two 1x1x1 convolutions read the backbone's top feature f and put a Gaussian in its place:
mu = tanh(W_mu f) * lambda_scale, log sigma = clip(W_sigma f, sigma_min, sigma_max), z = mu + tau * sigma * noise.
tau = 0 gives z = mu: the deterministic network of warm-up and inference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import fields
from .backbones import build_backbone

OUTPUTS = ("displacement", "velocity")


@dataclass(frozen=True)
class PolicySettings:
    """The head.

    Attributes:
        lambda_scale: mu lies in (-lambda_scale, lambda_scale).
        log_sigma_min, log_sigma_max: the clip of log sigma.
        s: normaliser of the log-likelihood: "sqrt_n" (LDVN), or a number (1 and N are the paper's two failures).
    """

    lambda_scale: float = 5.0
    log_sigma_min: float = -5.0
    log_sigma_max: float = 1.0
    s: str = "sqrt_n"

    def normalizer(self, n: int) -> float:
        """s for N latent dimensions."""
        return math.sqrt(n) if self.s == "sqrt_n" else float(self.s)

    def __post_init__(self) -> None:
        if self.log_sigma_min >= self.log_sigma_max:
            raise ValueError("log_sigma_min must be below log_sigma_max")
        if self.normalizer(1) <= 0:
            raise ValueError(f"s is {self.s}; it must be 'sqrt_n' or a positive number")


@dataclass(frozen=True)
class ModelSettings:
    """What a checkpoint needs to be rebuilt.

    Attributes:
        backbone: name in :data:`MorphSeekLib.backbones.BACKBONES`.
        backbone_settings: its settings.
        policy: the head's.
        output: how the backbone's field is read: "displacement", or "velocity" (stationary; integrated by scaling and
            squaring, which makes each step diffeomorphic up to discretisation).
        squarings: for "velocity".
    """

    backbone: str = "voxelmorph"
    backbone_settings: dict[str, Any] = field(default_factory=dict)
    policy: PolicySettings = field(default_factory=PolicySettings)
    output: str = "displacement"
    squarings: int = 7

    def __post_init__(self) -> None:
        if self.output not in OUTPUTS:
            raise ValueError(f"output is '{self.output}'; it must be one of {', '.join(OUTPUTS)}")


class Latent(NamedTuple):
    """What the encoder says of a pair: the policy's Gaussian, and the skips for the decoder."""

    mu: Tensor
    log_sigma: Tensor
    skips: Any


class GaussianHead(nn.Module):
    """Top feature -> mu, log sigma; both (batch, channels, ...), float32."""

    def __init__(self, channels: int, settings: PolicySettings) -> None:
        super().__init__()
        self.settings = settings
        self.mu = nn.Conv3d(channels, channels, 1)
        self.log_sigma = nn.Conv3d(channels, channels, 1)
        # start near the plain backbone (small features pass tanh almost unchanged) and at sigma = e^-2
        with torch.no_grad():
            nn.init.normal_(self.mu.weight, 0.0, 0.01 / math.sqrt(channels))
            self.mu.weight += torch.eye(channels).view_as(self.mu.weight) / settings.lambda_scale
            nn.init.zeros_(self.mu.bias)
            nn.init.normal_(self.log_sigma.weight, 0.0, 0.01 / math.sqrt(channels))
            nn.init.constant_(self.log_sigma.bias, -2.0)

    def forward(self, top: Tensor) -> tuple[Tensor, Tensor]:
        mu = torch.tanh(self.mu(top).float()) * self.settings.lambda_scale
        log_sigma = self.log_sigma(top).float().clamp(self.settings.log_sigma_min, self.settings.log_sigma_max)
        return mu, log_sigma


class RegistrationModel(nn.Module):
    """Backbone + policy head. Images are (batch, 1, i, j, k) on one grid, normalised as the checkpoint's card says."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.settings = settings
        self.backbone = build_backbone(settings.backbone, settings.backbone_settings)
        self.head = GaussianHead(self.backbone.top_channels, settings.policy)

    @property
    def multiple_of(self) -> int:
        """Every image size must be divisible by this."""
        return self.backbone.multiple_of

    def encode(self, moving: Tensor, fixed: Tensor) -> Latent:
        """The policy's Gaussian for a pair."""
        skips, top = self.backbone.encode(moving, fixed)
        return Latent(*self.head(top), skips)

    def field(self, latent: Latent, z: Tensor) -> Tensor:
        """What the decoder makes of a latent: (batch, 3, i, j, k) voxels, displacement or velocity."""
        return self.backbone.decode(latent.skips, z)

    def displacement(self, field: Tensor) -> Tensor:
        """The decoder's field, read as the settings say."""
        return fields.integrate(field, self.settings.squarings) if self.settings.output == "velocity" else field

    def forward(self, moving: Tensor, fixed: Tensor) -> Tensor:
        """One step at tau = 0: the displacement, (batch, 3, i, j, k) voxels."""
        latent = self.encode(moving, fixed)
        return self.displacement(self.field(latent, latent.mu))


def sample_latent(latent: Latent, tau: float, generator: torch.Generator | None = None) -> Tensor:
    """z = mu + tau * sigma * noise; the gradient reaches mu and sigma (reparameterised)."""
    if tau == 0:
        return latent.mu
    noise = torch.empty_like(latent.mu).normal_(generator=generator)
    return latent.mu + tau * latent.log_sigma.exp() * noise


def kl_to_standard_normal(latent: Latent) -> Tensor:
    """KL(N(mu, sigma^2) || N(0, I)), the mean over the N dimensions (METHOD.md, section B).

    1/2 (mu^2 + sigma^2 - 1 - log sigma^2), so that its weight does not depend on N.
    """
    return 0.5 * (latent.mu.square() + (2 * latent.log_sigma).exp() - 1 - 2 * latent.log_sigma).mean()


def log_likelihood(latent: Latent, z: Tensor, tau: float, s: float) -> Tensor:
    """LDVN log-likelihood of given latents (METHOD.md, section C, equation 4), one value per batch entry.

    -1/(2s) sum_i [((z_i - mu_i) / (tau sigma_i))^2 + log(2 pi tau^2 sigma_i^2)], z detached: the gradient reaches the
    policy alone. With s = sqrt(N) the sum over N dimensions has a spread of order one.

    Args:
        latent: mu, log sigma of (batch or 1, channels, ...).
        z: (batch, channels, ...).
        tau: temperature, above 0.
        s: see :meth:`PolicySettings.normalizer`.
    """
    if tau <= 0:
        raise ValueError("The likelihood needs a temperature tau above 0.")
    log_sigma = latent.log_sigma + math.log(tau)
    squared = ((z.detach() - latent.mu) * (-log_sigma).exp()).square()
    return -(squared + math.log(2 * math.pi) + 2 * log_sigma).flatten(1).sum(dim=1) / (2 * s)


def refine(
    model: RegistrationModel,
    moving_at: Callable[[Tensor], Tensor],
    fixed: Tensor,
    steps: int,
    on_step: Callable[[int, Tensor, Tensor], bool | None] | None = None,
) -> Tensor:
    """T steps at tau = 0, composed (METHOD.md, section D).

    Args:
        model: in eval mode; called under the caller's grad and autocast settings.
        moving_at: accumulated displacement (1, 3, i, j, k), voxels -> the original moving image warped by it,
            (1, 1, i, j, k); one interpolation however many steps.
        fixed: (1, 1, i, j, k).
        steps: T, at least 1.
        on_step: called with the step (from 1), the accumulated displacement and the moving image warped by it; True
            stops the refinement there.

    Returns:
        (1, 3, i, j, k), float32, voxels: u_t(x) = step(x) + u_(t-1)(x + step(x)).
    """
    total = torch.zeros(1, 3, *fixed.shape[2:], device=fixed.device)
    warped = moving_at(total)
    for step in range(1, steps + 1):
        total = fields.compose(total, model(warped, fixed).float())
        if step == steps and on_step is None:
            break
        warped = moving_at(total)
        if on_step is not None and on_step(step, total, warped):
            break
    return total
