"""The network's steps on a pair, and the best of the displacements that they lead to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..networks.devices import network_autocast
from ..networks.policy import RegistrationModel, take_steps
from ..protocol.job import Job
from ..protocol.report import StepSection
from ..space import fields
from . import guards
from .pair import Outcome, Pair, State

LEAST_GAIN = 0.002
"""A step that raises the similarity by less does not help any more."""


@dataclass(frozen=True)
class NetworkSteps:
    """T steps of a network, composed.

    Attributes:
        network: in eval mode, on the pair's device.
        steps: T.
        stop_early: take no further step after one that raises the similarity by less than LEAST_GAIN.
    """

    network: RegistrationModel
    steps: int
    stop_early: bool = False

    @torch.no_grad()
    def run(self, pair: Pair, state: State | None, show: Callable[[int, Tensor], None], job: Job) -> Outcome:
        """Take the steps, after those of an earlier call.

        Args:
            pair: aligned and prepared.
            state: where the earlier call ended; None without one.
            show: given each step's number and the displacement after it, (1, 3, i, j, k) voxels of the working grid.
            job: told of every step.

        Returns:
            the one of all steps, none included, after which the images are most alike.
        """
        walk = _Walk(pair, state)
        last = walk.taken + self.steps

        def on_step(step: int, total: Tensor, warped: Tensor) -> bool:
            total, gain = walk.take(step, total, warped)
            number = walk.taken + step
            stop = self.stop_early and gain < LEAST_GAIN
            message = f"Step {number} no longer helps: stopping here" if stop else f"Step {number} of {last}"
            show(number, total)
            job.report("step", step / self.steps, message, number, last, **_figures(walk.figures[-1]))
            job.check()
            return stop

        with network_autocast(pair.device), interruptible(self.network, job):
            moving_at = walk.moving_at
            take_steps(self.network, moving_at, pair.fixed_intensities, self.steps, on_step)
        return walk.outcome()


class _Walk:
    """Takes steps, and keeps the best of all displacements that they led to.

    Attributes:
        figures: after each step, those of earlier calls included.
        taken: steps of earlier calls.
        answer: index of the best.
        total, similarity: there.
        before: the displacement from which the step to the best one was taken; None when no step of this call was.
    """

    def __init__(self, pair: Pair, state: State | None) -> None:
        self.pair = pair
        self.base = None if state is None else state.total.to(pair.device)
        self.total = pair.nothing() if self.base is None else self.base
        self.similarity = pair.similarity(self.total)
        guards.check_finite(self.similarity, "The alignment")
        self.figures: list[StepSection] = [{"step": 0, "similarity": self.similarity}]
        if state is not None:
            self.figures = list(state.figures)
        self.taken = len(self.figures) - 1
        self.answer = next((n for n, row in enumerate(self.figures) if row.get("answer")), self.taken)
        self.before: Tensor | None = None
        self._last, self._last_similarity = self.total, self.similarity

    def moving_at(self, total: Tensor) -> Tensor:
        """Warp the moving image by the steps of earlier calls and of this one."""
        return self.pair.moving_at(self._whole(total))

    def take(self, step: int, total: Tensor, warped: Tensor) -> tuple[Tensor, float]:
        """Note a step of this call; return the displacement after it, and by how much it raised the similarity."""
        total = self._whole(total)
        figures = self.pair.look(self.taken + step, total, warped)
        self.figures.append(figures)
        similarity = figures["similarity"]
        gain = similarity - self._last_similarity
        if similarity > self.similarity:
            self.answer, self.total, self.similarity, self.before = self.taken + step, total, similarity, self._last
        self._last, self._last_similarity = total, similarity
        return total, gain

    def outcome(self) -> Outcome:
        """Return the best."""
        figures: list[StepSection] = [{**row, "answer": n == self.answer} for n, row in enumerate(self.figures)]
        notices = guards.no_step_helped(figures, self.answer, self.taken)
        transform = self.pair.delivered(self.total, self.pair.grid)
        return Outcome(self.total, transform, figures, self.answer, self.similarity, self.before, None, notices)

    def _whole(self, total: Tensor) -> Tensor:
        return total if self.base is None else fields.compose(self.base, total)


@contextmanager
def interruptible(network: RegistrationModel, job: Job) -> Iterator[None]:
    """Ask for cancellation before every layer: one forward pass of a large volume takes seconds on a CPU."""
    leaves = [m for m in network.modules() if not list(m.children())]
    handles = [m.register_forward_pre_hook(lambda *_: job.check()) for m in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _figures(row: StepSection) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "step" and isinstance(value, (int, float))}
