"""The fit of the pair at hand, without labels, from the answer of the stages before it on.

What is compared, and how it is lowered, stands in :mod:`.objective` and :mod:`.descent`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..protocol.job import Job
from ..protocol.options import RegistrationOptions
from ..protocol.report import FitSection, LevelSection, Stage, StepSection
from ..space.geometry import DenseTransform, dense_from_voxels, voxel_displacement
from . import guards
from .descent import descend, kernels_used
from .objective import Level
from .pair import Outcome, Pair, State
from .plans import (
    CORRELATION,
    CORRELATION_FROM_NEAR,
    CORRELATION_OPPOSITE,
    FEATURES,
    FEW_VOXELS,
    FINER,
    LEARNED,
    Plan,
)

DEFINITION = (
    "objective: minus the sum of squared correlations over blocks of 2x2x2 voxels, or the weighted sum of squared "
    "differences of features, or both; + regularization * 8/9 * sum |du/2|^2 + folding * sum relu(0.05 - det), over "
    "control points; in voxels of the level, before each iteration; lower is better"
)


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
        found = displacement_of(pair, begin) if begin.found is not None or begin.answer > 0 else None
        plans = plans_for(pair, begin, self.options)
        fitted, sections = descended(pair, plans, found, job)
        section: FitSection = {
            "similarity": pair.similarity,
            "share": pair.share if found is not None else 1.0,
            "features_beside": pair.learned is not None and pair.similarity != "features",
            "opposite_contrast": pair.opposite,
            "iterations": [count for plan in plans for count in plan.iterations],
            "levels": sections,
            "kernels": kernels_used(pair.device),
            "definition": DEFINITION,
        }
        after = taken_over(pair, begin, "fit", fitted)
        after.fitted, after.before = section, begin
        return after


def descended(
    pair: Pair, plans: Sequence[Plan], found: DenseTransform | None, job: Job, swapped: bool = False
) -> tuple[DenseTransform, list[LevelSection]]:
    """Fit a pair by plans, one after the other.

    Args:
        pair: aligned and prepared.
        plans: at least one.
        found: where to start, a displacement before the alignment; None: nothing moves.
        job: told of every iteration.
        swapped: fit the fixed image to the aligned moving one in place of the other way round.

    Returns:
        the displacement, or the mean of what it started from and of that by the pair's share, and what the report says
        of each level.
    """
    images = [pyramid.swapped() if swapped else pyramid for pyramid in (pair.pyramid, pair.as_given)]
    pyramid, as_given = (one.after(found) for one in images)
    levels = []
    for plan in plans:
        seen = pyramid if plan.similarity == "lncc" else as_given
        levels.append([pair.level(seen, n, plan, swapped) for n in plan.levels])
    progress, begin = _Progress(levels, plans, job), found
    if pair.share < 1:
        found = None
    sections: list[LevelSection] = []
    for number, plan in enumerate(plans):
        control = None if found is None else pyramid.control(found, plan.levels[0])
        ends = descend(
            levels[number], plan.iterations, control, plan.rate, torch.get_num_threads(), progress.ticks(number)
        )
        found = pyramid.displacement(ends[-1].control, plan.levels[-1])
        sections += [
            {
                **pyramid.grid(n).describe(),
                "similarity": plan.similarity,
                "regularization": plan.regularization,
                "folding": plan.folding,
                "objective": end.objectives.tolist(),
            }
            for n, end in zip(plan.levels, ends, strict=True)
        ]
    assert found is not None  # there is at least one plan
    return found if begin is None else between(begin, found, pair.share), sections


def between(one: DenseTransform, other: DenseTransform, share: float) -> DenseTransform:
    """Return the mean of two displacements, of which the other counts by its share from 0 to 1, on the nodes of the
    finer one."""
    if share == 1:
        return other
    grid = min(one.grid, other.grid, key=lambda grid: float(np.prod(grid.spacing)))
    return DenseTransform((1 - share) * one.displacement_at(grid) + share * other.displacement_at(grid), grid)


def plans_for(pair: Pair, begin: Outcome, options: RegistrationOptions) -> list[Plan]:
    """Return how a pair is fitted, one plan after the other.

    Where the contrast is opposite, features come before correlation, which would first bring the outlines together.
    Iterations that were asked for stand on as many of the finest levels of the last plan.
    """
    preset, searched = options.preset, begin.figures[begin.answer]["stage"] == "search"
    if pair.similarity == "features":
        plans = [pair.fewer(LEARNED[preset])]
    elif pair.similarity != "lncc":
        plans = [replace(FEATURES[preset], similarity=pair.similarity)]
    elif pair.opposite:
        plans = [FEATURES["fast"], CORRELATION_OPPOSITE[preset]]
    elif searched:
        plans = [CORRELATION_FROM_NEAR[preset]]
    else:
        plans = [CORRELATION[preset]]
    if pair.similarity == "lncc" and not searched and preset == "best" and pair.crop.image.numel() < FEW_VOXELS:
        last = plans[-1]
        plans[-1] = replace(last, levels=(*last.levels, -1), iterations=(*last.iterations, FINER))
    counts, finest = options.fit_iterations, plans[-1].levels[-1]
    if counts is not None:
        levels = tuple(range(finest + len(counts) - 1, finest - 1, -1))
        plans[-1] = replace(plans[-1], levels=levels, iterations=counts)
    return plans


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
        levels, plans: of the fit.
        job: told of each.
    """

    def __init__(self, levels: Sequence[Sequence[Level]], plans: Sequence[Plan], job: Job) -> None:
        self._costs = [[level.fixed[0, 0].numel() for level in own] for own in levels]
        costs = [cost for own in self._costs for cost in own]
        counts = [count for plan in plans for count in plan.iterations]
        self._whole = max(1, sum(cost * count for cost, count in zip(costs, counts, strict=True)))
        self._job, self._count, self._done, self._spent = job, sum(counts), 0, 0

    def ticks(self, plan: int) -> Callable[[int], None]:
        """Return what a plan's descent tells that an iteration on a level is done."""

        def tick(level: int) -> None:
            self._done += 1
            self._spent += self._costs[plan][level]
            words = f"Fitting this pair, iteration {self._done} of {self._count}"
            self._job.report("fit", self._spent / self._whole, words, self._done, self._count)
            self._job.check()

        return tick


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
