"""How a backbone uses memory: less of it for more time in training, and in the layout that convolutions are fast on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, channels_last_3d, is_grad_enabled, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

_SLOW = 20480
"""Channels times voxels of a plane (i, j) up to which torch convolves a single image slowly."""

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


class Conv3d(nn.Conv3d):
    """A convolution that is fast on one small image too.

    For one image of few voxels torch takes a path on the CPU, in float32, that is several times as slow as the one for
    a batch of two. So the image is cut in halves along its first axis, which overlap by what the kernel reaches over.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the same as any 3D convolution."""
        if not self._is_slow(input):
            return super().forward(input)
        count, stride = input.shape[2], self.stride[0]
        padded = functional.pad(input, (0, 0, 0, 0, 1, 1))
        length = count // 2 + 3 - stride
        halves = torch.cat([padded[:, :, :length], padded[:, :, count // 2 : count // 2 + length]])
        first, second = functional.conv3d(halves, self.weight, self.bias, self.stride, (0, 1, 1)).split(1)
        return torch.cat([first, second], dim=2)

    def _is_slow(self, input: Tensor) -> bool:
        """Return whether torch would take the slow path; see use_mkldnn in ATen's Convolution.cpp."""
        if input.device.type != "cpu" or input.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return False
        usual = self.kernel_size == (3, 3, 3) and self.padding == (1, 1, 1) and self.dilation == (1, 1, 1)
        even = self.stride in ((1, 1, 1), (2, 2, 2)) and input.ndim == 5 and input.shape[2] % (2 * self.stride[0]) == 0
        small = usual and even and self.groups == 1 and len(input) == 1 and input[0, ..., 0].numel() <= _SLOW
        return small and torch.backends.mkldnn.is_available() and input.shape[2] >= 4
