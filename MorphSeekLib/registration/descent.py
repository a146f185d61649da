"""Descend on a fit's objective from coarse to fine, by Adam on the control points of each level."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..io.compiled import kernels
from .objective import EPSILON, SHOWN, WANTED, Level, Maps, Objective, finer

RATE, DECAYS = 0.1, (0.8, 0.9)
"""Adam's steps in voxels of the level, and how it forgets."""
_OFF = 1e-3  # voxels that zero is off: on a voxel's center itself, linear interpolation has two slopes
_SAME_EXTENT = 0.7  # of what either image shows, both show where they show the same thing
_HELD = 5  # iterations between two looks at what is to be held
_AROUND = 2  # blocks around what is shown that count too

OnIteration = Callable[[int], None]
_Slab = tuple[int, int]  # its first plane of blocks, and the one after its last


@dataclass(frozen=True)
class Descent:
    """Where a level's iterations ended.

    Attributes:
        control: (1, 3, a, b, c), voxels of the level.
        objectives: (n,), before each iteration.
    """

    control: Tensor
    objectives: Tensor


class _Stepper(Protocol):
    """Takes iterations on a level; ``control`` is where it stands."""

    control: Tensor

    def step(self) -> Tensor | float:
        """Take an iteration; return the objective before it."""


def descend(
    levels: Sequence[Level],
    iterations: Sequence[int],
    start: Tensor | None = None,
    rate: float = RATE,
    threads: int = 1,
    on_iteration: OnIteration = lambda _: None,
    hold: Callable[[int, Tensor], None] | None = None,
) -> list[Descent]:
    """Fit from coarse to fine.

    Args:
        levels: each with twice as many voxels along each axis as the one before.
        iterations: on each of them.
        start: (1, 3, a, b, c) control points of the first level; None: zero.
        rate: Adam's, in voxels of each level.
        threads: of the compiled kernels, where they are used.
        on_iteration: given the level's number after each iteration; may raise to cancel.
        hold: given the level's number and its control points, which it may move, at the start of each level, after some
            iterations, and at the end.

    Returns:
        where each level ended; the last one's control points are the answer.

    Raises:
        ValueError: a level has not twice as many voxels along each axis as the one before.
    """
    first = levels[0]
    control = first.fixed.new_full((1, 3, *first.points), _OFF) if start is None else start
    ends = []
    for number, (level, count) in enumerate(zip(levels, iterations, strict=True)):
        if number:
            control = finer(control)
        if tuple(control.shape[2:]) != level.points:  # the kernels would write beside it
            raise ValueError(f"level {number} has {level.points} control points, not {tuple(control.shape[2:])}")
        objectives = []
        if count:
            stepper = stepper_for(level, control, rate, threads)
            for taken in range(count):
                if hold is not None and taken % _HELD == 0:
                    hold(number, stepper.control)
                objectives.append(stepper.step())
                on_iteration(number)
            control = stepper.control
        if hold is not None:
            hold(number, control)
        values = [torch.as_tensor(value, dtype=torch.float32, device=control.device) for value in objectives]
        ends.append(Descent(control, torch.stack(values) if values else control.new_zeros(0)))
    return ends


def stepper_for(level: Level, control: Tensor, rate: float, threads: int) -> _Stepper:
    """Return what takes the iterations: compiled kernels on the CPU where numba is there, else torch."""
    compilable = control.device.type == "cpu" and control.dtype == torch.float32
    module = kernels("registration.kernels") if compilable else None
    if module is not None:
        return CompiledStepper(module, level, control, rate, threads)
    return TorchStepper(level, control, rate)


def kernels_used(device: torch.device) -> str:
    """Return what computes a fit on a device, for the report."""
    if device.type != "cpu" or kernels("registration.kernels") is None:
        return f"torch {torch.__version__}"
    import numba

    return f"numba {numba.__version__}"


class TorchStepper:
    """Adam on a level by torch, on any device; nothing waits for it."""

    def __init__(self, level: Level, control: Tensor, rate: float) -> None:
        self.control = control.clone()
        self._objective, self._rate = Objective(level), rate
        self._first, self._second = torch.zeros_like(control), torch.zeros_like(control)
        self._taken = 0

    def step(self) -> Tensor:
        """Take an iteration; return the objective before it."""
        value, gradient = self._objective(self.control)
        self._taken += 1
        decay, decay2 = DECAYS
        self._first.mul_(decay).add_(gradient, alpha=1 - decay)
        self._second.mul_(decay2).addcmul_(gradient, gradient, value=1 - decay2)
        scale = (self._second / (1 - decay2**self._taken)).sqrt_().add_(1e-8)
        self.control.addcdiv_(self._first, scale, value=-self._rate / (1 - decay**self._taken))
        return value


class CompiledStepper:
    """Adam on a level by :mod:`.kernels`, in slabs of planes that run side by side.

    The sums of two slabs are added in the slabs' order, so that a number of threads always gives the same answer.
    """

    def __init__(self, module: ModuleType, level: Level, control: Tensor, rate: float, threads: int) -> None:
        self._kernels = module
        self.control = control.clone()
        self._level, self._rate, self._taken = level, rate, 0
        self._u = self.control[0].numpy()
        ranges = _ranges(level.counted)
        self._blocks = ranges.numpy(), level.counted.to(torch.uint8).contiguous().numpy()
        self._state = np.zeros((4, *control.shape[1:]), np.float32)
        a, b, c = level.points
        self._slabs = _slabs(ranges, threads)
        self._pool = ThreadPoolExecutor(len(self._slabs)) if len(self._slabs) > 1 else None
        maps = level.beside if level.features is None else Maps(level.fixed, level.moving, level.features)
        self._maps = None if maps is None else (_last(maps.moving), _last(maps.fixed))
        self._maps_weight = np.float32(0 if maps is None else maps.weight)
        if level.features is None:
            objective = Objective(level)
            self._images = level.moving[0, 0].contiguous().numpy(), level.fixed[0, 0].contiguous().numpy()
            windows = *objective.fixed_sums, objective.shares
            self._windows = tuple(x[0, 0].contiguous().numpy() for x in windows)
            self._warped = torch.zeros(2 * a, 2 * b, 2 * c).numpy()
            self._sums, self._weights = (torch.zeros(a, 3, b, c).numpy() for _ in range(2))

    def step(self) -> float:
        """Take an iteration; return the objective before it."""
        self._taken += 1
        value = self._pulled()
        self._each(self._move)
        return value

    def energy(self) -> tuple[float, Tensor]:
        """Return the objective and its gradient, as :class:`.objective.Objective` does."""
        value = self._pulled()
        even, odd = self._state[:2]
        gradient = torch.from_numpy(even + odd)[None]
        even[:], odd[:] = 0, 0
        return value, gradient

    def _pulled(self) -> float:
        """Return the objective, and add its gradient to what the next step follows."""
        value = 0.0
        if self._level.features is None:
            self._each(self._warp)
            value -= self._each(self._correlate)
        return value + self._each(self._pull)

    def _each(self, work: Callable[[int, _Slab], float]) -> float:
        """Do the work on every slab, given its number and planes; return the sum of what it returns."""
        if self._pool is None:
            return sum(work(n, slab) for n, slab in enumerate(self._slabs))
        return sum(self._pool.map(work, range(len(self._slabs)), self._slabs))

    def _warp(self, _: int, slab: _Slab) -> float:
        self._kernels.warp_blocks(self._u, self._images, self._blocks, self._warped, self._sums, slab)
        return 0.0

    def _correlate(self, _: int, slab: _Slab) -> float:
        epsilon = np.float32(EPSILON)
        return self._kernels.correlate(self._sums, *self._windows, epsilon, self._weights, slab)

    def _pull(self, number: int, slab: _Slab) -> float:
        level, gradient = self._level, self._state[number % 2]
        value = 0.0
        if level.features is None:
            self._kernels.pull(self._u, self._images, self._blocks, self._warped, self._weights, gradient, slab)
        if self._maps is not None:
            value += self._kernels.pull_features(self._u, self._maps, self._blocks, self._maps_weight, gradient, slab)
        diffusion, folding = np.float32(level.diffusion * 2 / 9), np.float32(level.folding)
        return value + self._kernels.regularize(self._u, diffusion, folding, np.float32(WANTED), gradient, slab)

    def _move(self, _: int, slab: _Slab) -> float:
        self._kernels.adam(self._u, self._state, self._rate, DECAYS, self._taken, slab)
        return 0.0


def _last(features: Tensor) -> np.ndarray:
    """Return (1, channels, i, j, k) as an array (i, j, k, channels)."""
    return features[0].movedim(0, 3).contiguous().numpy()


def _slabs(ranges: Tensor, threads: int) -> list[_Slab]:
    """Cut the planes into one slab for each thread, of about the same number of blocks, none thinner than two."""
    work = (ranges[..., 1] - ranges[..., 0]).clamp(min=0).sum(dim=1).double() + 0.05 * ranges.shape[1]
    planes = len(work)
    done = work.cumsum(0) / work.sum()
    cuts = [0]
    for n in range(1, min(threads, planes // 2)):
        cut = int((done < n / threads).sum())
        if cut - cuts[-1] >= 2 and planes - cut >= 2:
            cuts.append(cut)
    return list(zip(cuts, [*cuts[1:], planes], strict=True))


def halved(image: Tensor) -> Tensor:
    """Return the means over 2x2x2 voxels of (n, channels, i, j, k)."""
    return F.avg_pool3d(image, 2)


def counted_blocks(fixed: Tensor, moving: Tensor, seen: Tensor) -> Tensor:
    """Return the blocks that count: where both images are seen, and one of them shows something or is near to it.

    Where one image shows much that the other does not, such as a whole head and a brain without its skull, only what
    both show counts: the rim of the one would else be drawn to the rim of the other.

    Args:
        fixed, moving: (1, 1, 2 a, 2 b, 2 c) in [0, 1], aligned.
        seen: (1, 1, 2 a, 2 b, 2 c) bool, where both are.

    Returns:
        (a, b, c) bool.
    """
    whole = whole_blocks(seen)
    one, other = (F.max_pool3d(image, 2)[0, 0] > SHOWN for image in (fixed, moving))
    both, either = one & other & whole, (one | other) & whole
    near = F.max_pool3d(either.float()[None, None], 2 * _AROUND + 1, stride=1, padding=_AROUND)[0, 0] > 0
    return torch.where(both.sum() < _SAME_EXTENT * either.sum(), both, near & whole)


def whole_blocks(voxels: Tensor) -> Tensor:
    """Return of which blocks all eight voxels are true, (a, b, c), of (1, 1, 2 a, 2 b, 2 c) bool."""
    return F.avg_pool3d(voxels.float(), 2)[0, 0] > 0.99


def _ranges(counted: Tensor) -> Tensor:
    """Return (a, b, 2) int32: the first block of each row that counts and the one after the last; equal for none."""
    n = counted.shape[2]
    index = torch.arange(n, dtype=torch.int32)
    low = torch.where(counted, index, n).amin(dim=2)
    high = torch.where(counted, index + 1, 0).amax(dim=2)
    return torch.stack([torch.minimum(low, high), high], dim=2).to(torch.int32)
