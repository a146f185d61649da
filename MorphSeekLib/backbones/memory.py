"""Less memory in training for more time: what backbones with a setting ``checkpointing`` run their blocks through."""

from __future__ import annotations

from torch import Tensor, is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint


def run(module: nn.Module, *inputs: Tensor, save: bool) -> Tensor:
    """``module(*inputs)``; to ``save`` memory in training, its inner values are computed anew for the gradient."""
    if save and is_grad_enabled():
        return checkpoint(module, *inputs, use_reentrant=False)
    return module(*inputs)
