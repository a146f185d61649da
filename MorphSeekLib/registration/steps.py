"""The network's steps on a pair, and the best of the displacements that they lead to."""

from __future__ import annotations

from collections.abc import Iterator
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
from .pair import Outcome, Pair
from .pictures import Pictures

LEAST_GAIN = 0.002
"""A step that raises the similarity by less does not help any more."""


@dataclass(frozen=True)
class NetworkSteps:
    """T steps of a network, composed.

    Attributes:
        network: in eval mode, on the pair's device.
        steps: T.
        stop_early: take no further step after one that raises the similarity by less than LEAST_GAIN.
        trusted: keep the last step even where the judge prefers another: the card says that on labeled pairs the steps
            were better than what images alone lead to.
    """

    network: RegistrationModel
    steps: int
    stop_early: bool = False
    trusted: bool = False

    @torch.no_grad()
    def run(self, pair: Pair, begin: Outcome, pictures: Pictures, job: Job) -> Outcome:
        """Take the steps, after what was found so far.

        Args:
            pair: aligned and prepared.
            begin: where to start.
            pictures: shown each step.
            job: told of every step.

        Returns:
            the one of all steps, none included, after which the images are most alike.
        """
        walk = _Walk(pair, begin, self.trusted)
        last = walk.taken + self.steps

        def on_step(step: int, total: Tensor, _: Tensor) -> bool:
            total, gain = walk.take(step, total)
            number = walk.taken + step
            stop = self.stop_early and gain < LEAST_GAIN
            message = f"Step {number} no longer helps: stopping here" if stop else f"Step {number} of {last}"
            pictures.show(len(walk.figures) - 1, pair, total)
            job.report("step", step / self.steps, message, number, last, **_figures(walk.figures[-1]))
            job.check()
            return stop

        with network_autocast(pair.device), interruptible(self.network, job):
            take_steps(self.network, walk.moving_at, pair.fixed_intensities, self.steps, on_step)
        return walk.outcome()


class _Walk:
    """Takes steps, and keeps the best of all displacements that they led to.

    Attributes:
        figures: after each stage and step, those of earlier calls included.
        taken: steps of earlier calls.
    """

    def __init__(self, pair: Pair, begin: Outcome, trusted: bool) -> None:
        self._pair, self._begin, self._trusted = pair, begin, trusted
        self._base = begin.total if bool(begin.total.any()) else None
        self.figures: list[StepSection] = list(begin.figures)
        self.taken = begin.figures[-1]["step"]
        self._answer, self._total, self._similarity = begin.answer, begin.total, begin.similarity
        self._last_similarity = begin.similarity

    def moving_at(self, total: Tensor) -> Tensor:
        """Warp the moving image by what was found before and the steps of this call."""
        return self._pair.moving_at(self._whole(total))

    def take(self, step: int, total: Tensor) -> tuple[Tensor, float]:
        """Note a step of this call; return the displacement after it, and by how much it raised the similarity."""
        total = self._whole(total)
        figures = self._pair.look("network", self.taken + step, total)
        self.figures.append(figures)
        similarity = figures["similarity"]
        gain = similarity - self._last_similarity
        if self._trusted or similarity > self._similarity:
            self._answer, self._total, self._similarity = len(self.figures) - 1, total, similarity
        self._last_similarity = similarity
        return total, gain

    def outcome(self) -> Outcome:
        """Return the best."""
        begin = self._begin
        rows: list[StepSection] = [{**row, "answer": n == self._answer} for n, row in enumerate(self.figures)]
        notices = begin.notices + guards.no_step_helped(rows, self._answer, len(begin.figures))
        found = begin.found if self._answer < len(begin.figures) else None
        return Outcome(self._total, rows, self._answer, self._similarity, found, begin.fitted, notices)

    def _whole(self, total: Tensor) -> Tensor:
        return total if self._base is None else fields.compose(self._base, total)


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
    return {name: value for name, value in row.items() if isinstance(value, float)}
