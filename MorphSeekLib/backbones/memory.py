"""How a backbone uses memory: less of it for more time in training, and in the layout that convolutions are fast on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, channels_last_3d, is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint

Module = TypeVar("Module", bound=nn.Module)


def run(block: Callable[..., Tensor], *inputs: Tensor, save: bool) -> Tensor:
    """Return ``block(*inputs)``; to ``save`` memory in training, its inner values are computed again for the gradient.

    Backbones with a setting ``recompute`` run their blocks through it.
    """
    if save and is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


def channels_last(module: Module) -> Module:
    """Store a network's weights channels last; 3D convolutions on CPUs take a third less time, in float32 too."""
    return module.to(memory_format=channels_last_3d)  # type: ignore[call-overload]  # torch's stubs do not know it
