"""The latent Gaussian policy around any backbone (Docs/method.md, section A), and the steps of a network (section D).

Two 1x1x1 convolutions read the backbone's top feature f and put a Gaussian in its place:
mu = tanh(W_mu f) * lambda_scale, log sigma = clip(W_sigma f, sigma_min, sigma_max), z = mu + tau * sigma * noise.
tau = 0 gives z = mu: the deterministic network of warm-up and inference. Weights that were trained without a policy
take mu = W_mu f instead, which begins as mu = f: the head then changes nothing until it is trained.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backbones import build_backbone
from ..backbones.segmenter import Segmenter
from ..protocol.card import ParameterCounts
from ..protocol.settings import current_names, to_dict
from ..space import fields

OUTPUTS = ("displacement", "velocity")
MEANS = ("tanh", "linear")


@dataclass(frozen=True)
class PolicySettings:
    """The head.

    Attributes:
        mean: "tanh" (the paper), or "linear": mu = W_mu f, at first f itself, for weights trained without a policy.
        lambda_scale: "tanh": mu lies in (-lambda_scale, lambda_scale).
        log_sigma_min, log_sigma_max: the clip of log sigma.
        s: normalizer of the log-likelihood: "sqrt_n" (LDVN), or a number (1 and N are the paper's two failures).
    """

    mean: str = "tanh"
    lambda_scale: float = 5.0
    log_sigma_min: float = -5.0
    log_sigma_max: float = 1.0
    s: str = "sqrt_n"

    def __post_init__(self) -> None:
        if self.mean not in MEANS:
            raise ValueError(f"mean is '{self.mean}'; it must be one of {', '.join(MEANS)}")
        if self.log_sigma_min >= self.log_sigma_max:
            raise ValueError("log_sigma_min must be below log_sigma_max")
        likelihood_normalizer(self.s, 1)


@dataclass(frozen=True)
class ModelSettings:
    """What a model needs to be rebuilt.

    Attributes:
        backbone: name in :data:`MorphSeekLib.backbones.BACKBONES`.
        backbone_settings: its settings.
        policy: the head's.
        output: how the backbone's field is read: "displacement", or "velocity" (stationary; integrated by scaling and
            squaring, which makes each step diffeomorphic up to discretization).
        squarings: for "velocity".
        finder: settings of a :class:`MorphSeekLib.backbones.segmenter.Segmenter` beside the backbone, whose
            probabilities of labels a fit compares; None: there is none, or it is the backbone.
    """

    backbone: str = "voxelmorph"
    backbone_settings: dict[str, Any] = field(default_factory=dict)
    policy: PolicySettings = field(default_factory=PolicySettings)
    output: str = "displacement"
    squarings: int = 7
    finder: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "backbone_settings", current_names(self.backbone_settings))
        if self.output not in OUTPUTS:
            raise ValueError(f"output is '{self.output}'; it must be one of {', '.join(OUTPUTS)}")


class Latent(NamedTuple):
    """What the encoder says of a pair: the policy's Gaussian, and the skips for the decoder."""

    mu: Tensor
    log_sigma: Tensor
    skips: list[Tensor]


class GaussianHead(nn.Module):
    """Top feature -> mu, log sigma; both (batch, channels, ...), float32."""

    def __init__(self, channels: int, settings: PolicySettings) -> None:
        super().__init__()
        self.settings = settings
        self.mu = nn.Conv3d(channels, channels, 1)
        self.log_sigma = nn.Conv3d(channels, channels, 1)
        # start at the plain backbone, or near it (small features pass tanh almost unchanged), and at sigma = e^-2
        linear = settings.mean == "linear"
        with torch.no_grad():
            nn.init.normal_(self.mu.weight, 0.0, 0.0 if linear else 0.01 / math.sqrt(channels))
            self.mu.weight += torch.eye(channels).view_as(self.mu.weight) / (1.0 if linear else settings.lambda_scale)
            nn.init.normal_(self.log_sigma.weight, 0.0, 0.01 / math.sqrt(channels))
            for layer, value in ((self.mu, 0.0), (self.log_sigma, -2.0)):
                if layer.bias is not None:
                    nn.init.constant_(layer.bias, value)

    def forward(self, top: Tensor) -> tuple[Tensor, Tensor]:
        mu = self.mu(top).float()
        if self.settings.mean == "tanh":
            mu = torch.tanh(mu) * self.settings.lambda_scale
        log_sigma = self.log_sigma(top).float().clamp(self.settings.log_sigma_min, self.settings.log_sigma_max)
        return mu, log_sigma


class RegistrationModel(nn.Module):
    """Backbone + policy head. Images are (batch, 1, i, j, k) on one grid, normalized as the model's card says."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.settings = settings
        self.backbone = build_backbone(settings.backbone, settings.backbone_settings)
        self.head = GaussianHead(self.backbone.top_channels, settings.policy)
        self.finder = None
        if settings.finder is not None:  # trained by itself
            self.finder = build_backbone("segmenter", settings.finder).requires_grad_(False)

    @property
    def multiple_of(self) -> int:
        """Every image size must be divisible by this."""
        own = self.backbone.multiple_of
        return own if self.finder is None else math.lcm(own, self.finder.multiple_of)

    def parameter_counts(self) -> ParameterCounts:
        """Count the parameters of the parts; give the head's as percent of the backbone's."""
        backbone, head = (sum(p.numel() for p in part.parameters()) for part in (self.backbone, self.head))
        counts: ParameterCounts = {"backbone": backbone, "policy_head": head}
        counts["policy_head_percent"] = round(100 * head / backbone, 2)
        if self.finder is not None:
            counts["finder"] = sum(p.numel() for p in self.finder.parameters())
        return counts

    def with_features(self, count: int) -> RegistrationModel | None:
        """Return this model with a backbone that learns at least ``count`` features, itself if it does; None where its
        kind cannot: see :meth:`MorphSeekLib.backbones.backbone.Backbone.with_features`."""
        backbone = self.backbone.with_features(count)
        if backbone is None or backbone is self.backbone:
            return None if backbone is None else self
        model = RegistrationModel(dataclasses.replace(self.settings, backbone_settings=to_dict(backbone.settings)))
        model.backbone, model.head, model.finder = backbone, self.head, self.finder
        return model.train(self.training)

    def with_finder(self, finder: Segmenter) -> RegistrationModel:
        """Return a model of the same backbone and head with this network beside them."""
        model = RegistrationModel(dataclasses.replace(self.settings, finder=to_dict(finder.settings)))
        model.backbone, model.head = self.backbone, self.head
        model.finder = finder.requires_grad_(False)
        return model.train(self.training)

    def features(self, fixed: Tensor) -> list[Tensor] | None:
        """Return what a siamese backbone sees in the fixed image alone, for :meth:`encode`; None where images are
        fused."""
        return self.backbone.image_features(fixed)

    def found(self, image: Tensor) -> Tensor | None:
        """Return the probability of each label in one image alone, (batch, labels, i, j, k) without the background;
        None where the model has not learned labels that way."""
        finder = self.backbone if self.finder is None else self.finder
        probabilities = finder.image_features(image) if isinstance(finder, Segmenter) else None
        return None if probabilities is None else probabilities[0][:, 1:].float()

    def encode(self, moving: Tensor, fixed: Tensor, fixed_features: list[Tensor] | None = None) -> Latent:
        """Return the policy's Gaussian for a pair; ``fixed_features``, where known, spare encoding the fixed image
        again."""
        if fixed_features is None:
            skips, top = self.backbone.encode(moving, fixed)
        else:
            skips, top = self.backbone.encode_with(moving, fixed_features)
        mu, log_sigma = self.head(top)
        return Latent(mu, log_sigma, skips)

    def field(self, latent: Latent, z: Tensor) -> Tensor:
        """Return what the decoder makes of a latent: (batch, 3, i, j, k) voxels, displacement or velocity."""
        return self.backbone.decode(latent.skips, z)

    def displacement(self, field: Tensor) -> Tensor:
        """Return the decoder's field, read as the settings say."""
        return fields.integrate(field, self.settings.squarings) if self.settings.output == "velocity" else field

    def forward(self, moving: Tensor, fixed: Tensor, fixed_features: list[Tensor] | None = None) -> Tensor:
        """Return one step at tau = 0: the displacement, (batch, 3, i, j, k) voxels; arguments as for :meth:`encode`."""
        latent = self.encode(moving, fixed, fixed_features)
        return self.displacement(self.field(latent, latent.mu))


def likelihood_normalizer(s: str, n: int) -> float:
    """Return the s that a log-likelihood over N dimensions is divided by: "sqrt_n" (LDVN) or a number.

    Raises:
        ValueError: neither, or not positive.
    """
    try:
        value = math.sqrt(n) if s == "sqrt_n" else float(s)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise ValueError(f"s is '{s}'; it must be 'sqrt_n' or a positive number")
    return value


def draw(
    mu: Tensor,
    log_sigma: Tensor,
    tau: float,
    count: int,
    antithetic: bool = False,
    smooth: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw samples z = mu + tau sigma epsilon, detached.

    Args:
        mu, log_sigma: (1, channels, ...).
        count: how many; even for ``antithetic``, which draws noise in pairs of opposite sign.
        smooth: noise is one value in blocks of this many cells along each axis.
        generator: of the CPU, where the noise is drawn, so that one seed gives the same samples on every device.

    Returns:
        (count, channels, ...).
    """
    grid = mu.shape[2:]
    blocks = [-(-n // smooth) for n in grid]
    noise = torch.randn(count // 2 if antithetic else count, mu.shape[1], *blocks, generator=generator).to(mu)
    for axis, n in enumerate(grid, start=2):
        if smooth > 1:
            noise = noise.repeat_interleave(smooth, dim=axis).narrow(axis, 0, n)
    if antithetic:
        noise = torch.cat([noise, -noise])
    return mu.detach() + tau * log_sigma.detach().exp() * noise


def kl_to_standard_normal(latent: Latent) -> Tensor:
    """Return KL(N(mu, sigma^2) || N(0, I)), the mean over the N dimensions (Docs/method.md, section B).

    1/2 (mu^2 + sigma^2 - 1 - log sigma^2), so that its weight does not depend on N.
    """
    return 0.5 * (latent.mu.square() + (2 * latent.log_sigma).exp() - 1 - 2 * latent.log_sigma).mean()


def take_steps(
    model: RegistrationModel,
    moving_at: Callable[[Tensor], Tensor],
    fixed: Tensor,
    steps: int,
    on_step: Callable[[int, Tensor, Tensor], bool | None] | None = None,
) -> Tensor:
    """Take T steps at tau = 0 and compose them (Docs/method.md, section D).

    Args:
        model: in eval mode; called under the caller's grad and autocast settings.
        moving_at: accumulated displacement (1, 3, i, j, k), voxels -> the original moving image warped by it,
            (1, 1, i, j, k); one interpolation however many steps.
        fixed: (1, 1, i, j, k).
        steps: T, at least 1.
        on_step: called with the step (from 1), the accumulated displacement and the moving image warped by it; True
            stops there.

    Returns:
        (1, 3, i, j, k), float32, voxels: u_t(x) = step(x) + u_(t-1)(x + step(x)).
    """
    total = torch.zeros(1, 3, *fixed.shape[2:], device=fixed.device)
    warped = moving_at(total)
    fixed_features = model.features(fixed)
    for step in range(1, steps + 1):
        total = fields.compose(total, model(warped, fixed, fixed_features).float())
        if step == steps and on_step is None:
            break
        warped = moving_at(total)
        if on_step is not None and on_step(step, total, warped):
            break
    return total
