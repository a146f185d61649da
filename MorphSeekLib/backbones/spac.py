"""SPAC: the stochastic planner and actor of Luo et al. (2021), which registers in up to twenty small steps.

A planner of strided convolutions sees the fixed image and the moving one as it stands, and outputs a Gaussian over 64
numbers, the plan for the whole image. An actor turns a plan and the planner's features into one small step. The mean of
the plan is the top feature, a single cell, so that steps at tau = 0 are the official inference. The reinforcement
learning that trains planner and actor is :mod:`MorphSeekLib.training.sac`.

The planner's last convolution spans its whole coarsest grid: a network is made for one size. Images of other sizes are
resampled to it and the step back, first center to last center, which keeps its meaning exactly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..space import fields
from .backbone import Backbone, register
from .memory import channels_last

SLOPE = 0.1
LOG_VARIANCE = (-10.0, 2.0)


@dataclass(frozen=True)
class SPACSettings:
    """Widths and variants; the defaults are the official ones but for ``rectified_plan``.

    Attributes:
        encoder: channels of the planner's levels, each of half the size of the one before.
        decoder: channels of the actor's, from the coarsest grid up to the full size; one more than the planner's.
        plan: numbers of a plan.
        size: of the images that the network is made for; divisible by 2 to the number of the planner's levels.
        max_step: limit of a step along each axis, voxels of that size.
        rectified_plan: send mean and logarithm of the variance through a LeakyReLU, as the official code does, so that
            plans lean to the positive side. Official weights need it.
    """

    encoder: tuple[int, ...] = (16, 32, 32, 64, 64)
    decoder: tuple[int, ...] = (64, 64, 64, 32, 16, 16)
    plan: int = 64
    size: tuple[int, int, int] = (128, 128, 128)
    max_step: float = 3.0
    rectified_plan: bool = False

    def __post_init__(self) -> None:
        if len(self.decoder) != len(self.encoder) + 1:
            raise ValueError(f"decoder needs {len(self.encoder) + 1} widths for {len(self.encoder)} encoder levels")
        factor = 2 ** len(self.encoder)
        if any(n < factor or n % factor for n in self.size):
            raise ValueError(f"size is {self.size}; with {len(self.encoder)} levels it must be multiples of {factor}")
        if self.max_step <= 0 or self.plan < 1:
            raise ValueError("max_step and plan must be above 0")

    @property
    def coarsest(self) -> tuple[int, int, int]:
        """The planner's last grid, which its last convolution spans."""
        i, j, k = (n // 2 ** len(self.encoder) for n in self.size)
        return i, j, k


OFFICIAL = SPACSettings(rectified_plan=True)


class Plan(NamedTuple):
    """The planner's output for a pair: a Gaussian over plans (batch, plan, 1, 1, 1), and its features, fine first."""

    mean: Tensor
    log_variance: Tensor
    features: list[Tensor]


def conv(
    inputs: int, outputs: int, kernel: int | tuple[int, int, int] = 3, stride: int = 1, padding: int = 1
) -> nn.Conv3d:
    """Make a convolution without bias, initialized after He et al. (2015), so that signals keep their size.

    With the official code's initialization, PyTorch's own, a plan loses its influence over the many layers.
    """
    layer = nn.Conv3d(inputs, outputs, kernel, stride, padding, bias=False)
    nn.init.kaiming_normal_(layer.weight, SLOPE)
    return layer


def convs(first: nn.Conv3d) -> nn.Sequential:
    """Return a convolution and a 3x3x3 one of the same width, each with its activation."""
    leaky, width = nn.LeakyReLU(SLOPE, inplace=True), first.out_channels
    return nn.Sequential(first, leaky, conv(width, width), leaky)


class Planner(nn.Module):
    """A pair (batch, 2, i, j, k), the fixed image first, -> the plan."""

    def __init__(self, settings: SPACSettings) -> None:
        super().__init__()
        self.rectified = settings.rectified_plan
        widths = (2, *settings.encoder)
        self.down = nn.ModuleList(convs(conv(a, b, 4, 2)) for a, b in zip(widths, settings.encoder, strict=False))
        self.out = conv(widths[-1], 2 * settings.plan, settings.coarsest, padding=0)
        with torch.no_grad():  # start at plans near zero, with a deviation of about e^-2
            self.out.weight.mul_(0.1)

    def forward(self, pair: Tensor) -> Plan:
        features, x = [], pair
        for block in self.down:
            x = block(x)
            features.append(x)
        said = self.out(x)
        said = said.to(torch.promote_types(said.dtype, torch.float32))
        mean, raw = (F.leaky_relu(said, SLOPE) if self.rectified else said).chunk(2, dim=1)
        low, high = LOG_VARIANCE
        return Plan(mean, low + 0.5 * (high - low) * (torch.tanh(raw) + 1), features)


class Actor(nn.Module):
    """A plan (batch, plan, 1, 1, 1) and the planner's features -> the step, not yet limited, float32 or better."""

    def __init__(self, settings: SPACSettings) -> None:
        super().__init__()
        skips = (0, *reversed(settings.encoder))
        widths = (settings.plan, *settings.decoder)
        self.up = nn.ModuleList(
            convs(conv(a + skip, b)) for a, skip, b in zip(widths, skips, settings.decoder, strict=False)
        )
        self.out = conv(widths[-1], 3)
        nn.init.normal_(self.out.weight, 0.0, 1e-5)

    def forward(self, plan: Tensor, features: list[Tensor]) -> Tensor:
        x = self.up[0](plan.expand(-1, -1, *features[-1].shape[2:]))
        for block, feature in zip(self.up[1:], reversed(features), strict=True):
            x = torch.cat([x, feature.to(x.dtype)], dim=1)
            x = block(F.interpolate(x, scale_factor=2, mode="nearest"))
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would round the field to a hundredth of itself
            return self.out(x.to(self.out.weight.dtype))


@register("spac", SPACSettings)
class SPAC(Backbone):
    """See the module's docstring. Sizes divisible by ``multiple_of`` are accepted; all but ``size`` are resampled."""

    def __init__(self, settings: SPACSettings) -> None:
        super().__init__(settings)
        self.top_channels = settings.plan
        self.multiple_of = 2 ** len(settings.encoder)
        self.planner, self.actor = Planner(settings), Actor(settings)
        channels_last(self)

    def pair(self, moving: Tensor, fixed: Tensor) -> Tensor:
        """Return (batch, 2, *size): what the planner sees, the fixed image first."""
        both = torch.cat([fixed, moving], dim=1)
        if both.shape[2:] == self.settings.size:
            return both
        return F.interpolate(both, size=self.settings.size, mode="trilinear", align_corners=True)

    def encode(self, moving: Tensor, fixed: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the pair and the planner's features, from fine to coarse, and the mean of the plan."""
        plan = self.planner(self.pair(moving, fixed))
        return [torch.cat([moving, fixed], dim=1), *plan.features], plan.mean

    def decode(self, skips: list[Tensor], top: Tensor) -> Tensor:
        """Return the step, (batch, 3, i, j, k), float32 or better, in voxels of the images' grid."""
        step = self.actor(top, skips[1:]).clamp(-self.settings.max_step, self.settings.max_step)
        return fields.resize(step, skips[0].shape[2:])


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the official weights as ours. The official code saves planner and actor apart; here they are in one dict,
    their keys behind ``planner.`` and ``actor.``; critics are dropped."""
    renamed = {}
    for name, value in state.items():
        if name.startswith("critic"):
            continue
        name = re.sub(r"\.(down|up)(\d+)(?:\.conv)?\.(\d+)\.", _block, name)
        renamed[name.replace(".single_conv.0", "")] = value
    return renamed


def _block(found: re.Match) -> str:
    """Rename a block: the official code counts from 1, and ours counts the activations within a block too."""
    kind, level, place = found[1], int(found[2]) - 1, 2 * int(found[3])
    return f".{kind}.{level}.{place}."


def settings_of(state: dict[str, Tensor], arguments: Mapping[str, object]) -> SPACSettings:
    """Return the settings that weights under our names imply; the official ones where they imply none."""

    def widths(part: str) -> tuple[int, ...]:
        keys = sorted(name for name in state if re.fullmatch(rf"{part}\.\d+\.0\.weight", name))
        return tuple(state[name].shape[0] for name in keys)

    encoder, decoder, last = widths("planner.down"), widths("actor.up"), state.get("planner.out.weight")
    if last is None or last.ndim != 5 or not encoder or len(decoder) != len(encoder) + 1:
        return OFFICIAL
    size = tuple(n * 2 ** len(encoder) for n in last.shape[2:])
    return SPACSettings(encoder, decoder, last.shape[0] // 2, size, rectified_plan=True)
