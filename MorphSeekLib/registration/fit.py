"""The fit of the pair at hand, without labels, from the answer of the stages before it on.

What is compared, and how it is lowered, stands in :mod:`.objective` and :mod:`.descent`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..protocol.job import Job
from ..protocol.options import RegistrationOptions
from ..protocol.report import FitSection, Stage, StepSection
from ..space.geometry import DenseTransform, dense_from_voxels, voxel_displacement
from . import guards
from .descent import descend, kernels_used
from .objective import Level
from .pair import Outcome, Pair, State

DEFINITION = (
    "objective: minus the sum of squared correlations over blocks of 2x2x2 voxels, or the weighted sum of squared "
    "differences of features; + regularization * 8/9 * sum |du/2|^2 + folding * sum relu(0.05 - det), over control "
    "points; in voxels of the level, before each iteration; lower is better"
)


@dataclass(frozen=True)
class Plan:
    """How a similarity is fitted.

    Attributes:
        levels: coarse to fine, as for :meth:`.pyramid.Pyramid.images`.
        iterations: on each.
        rate: of Adam, voxels of the level.
        regularization, folding: weights of :class:`.objective.Level`.
    """

    levels: tuple[int, ...]
    iterations: tuple[int, ...]
    rate: float
    regularization: float
    folding: float


PLANS = {
    ("lncc", "best"): Plan((2, 1, 0), (60, 60, 30), 0.1, 0.1, 800.0),
    ("lncc", "fast"): Plan((2, 1, 0), (40, 30, 10), 0.1, 0.1, 800.0),
    ("features", "best"): Plan((1, 0), (40, 20), 0.2, 0.4, 240.0),
    ("features", "fast"): Plan((2, 1), (40, 20), 0.2, 0.4, 240.0),
}
"""By what is compared, block correlation or features, and by preset."""
AFTER_SEARCH = {"best": ((1, 0), (60, 40)), "fast": ((1, 0), (40, 15))}
"""Levels and iterations by correlation where a search has found the large motion; coarser ones undo some of it."""
FINER = 5
"""Iterations more on voxels of half the length, by the best preset ..."""
FEW_VOXELS = 1_500_000
"""... on a crop of fewer voxels."""


@dataclass(frozen=True)
class Fit:
    """The iterations on one pair."""

    options: RegistrationOptions

    def run(self, pair: Pair, begin: Outcome, job: Job) -> Outcome:
        """Fit the pair from an outcome on.

        Args:
            pair: aligned and prepared.
            begin: where to start.
            job: told of every iteration.

        Returns:
            the fitted one, or ``begin`` where the judge finds it more alike.
        """
        plan = plan_for(pair, begin, self.options)
        pyramid = pair.pyramid
        levels = [pyramid.level(n, pair.similarity, plan.regularization, plan.folding) for n in plan.levels]
        start = None
        if begin.found is not None or begin.answer > 0:
            start = pyramid.control(displacement_of(pair, begin), plan.levels[0])
        progress = _Progress(levels, plan.iterations, job)
        ends = descend(levels, plan.iterations, start, plan.rate, torch.get_num_threads(), progress.tick)
        found = pyramid.displacement(ends[-1].control, plan.levels[-1])
        section: FitSection = {
            "similarity": pair.similarity,
            "opposite_contrast": pair.opposite,
            "iterations": list(plan.iterations),
            "regularization": plan.regularization,
            "folding": plan.folding,
            "levels": [
                {**pyramid.grid(n).describe(), "objective": end.objectives.tolist()}
                for n, end in zip(plan.levels, ends, strict=True)
            ],
            "kernels": kernels_used(pair.device),
            "definition": DEFINITION,
        }
        after = taken_over(pair, begin, "fit", found)
        after.fitted = section
        return after


def plan_for(pair: Pair, begin: Outcome, options: RegistrationOptions) -> Plan:
    """Return how a pair is fitted; iterations that were asked for stand on as many of the finest levels."""
    preset, by_correlation = options.preset, pair.similarity == "lncc"
    plan = PLANS["lncc" if by_correlation else "features", preset]
    if by_correlation and begin.figures[begin.answer]["stage"] == "search":
        levels, iterations = AFTER_SEARCH[preset]
        plan = replace(plan, levels=levels, iterations=iterations)
    elif by_correlation and preset == "best" and pair.crop.image.numel() < FEW_VOXELS:
        plan = replace(plan, levels=(*plan.levels, -1), iterations=(*plan.iterations, FINER))
    counts = options.fit_iterations
    if counts is None:
        return plan
    finest = plan.levels[-1]
    return replace(plan, levels=tuple(range(finest + len(counts) - 1, finest - 1, -1)), iterations=counts)


def displacement_of(pair: Pair, outcome: Outcome) -> DenseTransform:
    """Return an outcome's displacement before the alignment."""
    return dense_from_voxels(outcome.total, pair.grid) if outcome.found is None else outcome.found


def taken_over(pair: Pair, begin: Outcome, stage: Stage, found: DenseTransform) -> Outcome:
    """Return the outcome after a stage that found a displacement; the one before where the judge prefers it."""
    total = voxel_displacement(found, pair.grid, pair.device)
    figures = pair.look(stage, begin.figures[-1]["step"], total, found)
    rows: list[StepSection] = [{**row, "answer": False} for row in begin.figures]
    helped = figures["similarity"] >= begin.similarity
    rows.append({**figures, "answer": helped})
    if helped:
        return Outcome(total, rows, len(rows) - 1, figures["similarity"], found, begin.fitted, begin.notices)
    rows[begin.answer]["answer"] = True
    notices = begin.notices + guards.stage_fell(stage, begin.similarity, figures["similarity"])
    return Outcome(begin.total, rows, begin.answer, begin.similarity, begin.found, begin.fitted, notices)


class _Progress:
    """Counts iterations; those on finer levels cost more.

    Args:
        levels, iterations: of the fit.
        job: told of each.
    """

    def __init__(self, levels: Sequence[Level], iterations: Sequence[int], job: Job) -> None:
        self._costs = [level.fixed[0, 0].numel() for level in levels]
        self._whole = sum(cost * count for cost, count in zip(self._costs, iterations, strict=True))
        self._job, self._count, self._done, self._spent = job, sum(iterations), 0, 0

    def tick(self, level: int) -> None:
        """Tell that an iteration is done."""
        self._done += 1
        self._spent += self._costs[level]
        words = f"Fitting this pair, iteration {self._done} of {self._count}"
        self._job.report("fit", self._spent / self._whole, words, self._done, self._count)
        self._job.check()


def start_of(pair: Pair, state: State | None) -> Outcome:
    """Return the outcome of the alignment alone, or that of an earlier call to go on from."""
    if state is None:
        at = pair.nothing()
        figures = pair.look("align", 0, at)
        return Outcome(at, [{**figures, "answer": True}], 0, figures["similarity"])
    at = state.total.to(pair.device)
    answer = next((n for n, row in enumerate(state.figures) if row.get("answer")), len(state.figures) - 1)
    similarity = float(pair.alike(dense_from_voxels(at, pair.grid)))
    return Outcome(at, list(state.figures), answer, similarity)
