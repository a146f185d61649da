"""The search for large motion, as a stage of a registration."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..measures.similarity import mind_ssc
from ..protocol.job import Job
from ..space.geometry import DenseTransform
from .fit import taken_over
from .pair import Outcome, Pair
from .pyramid import Pyramid
from .search import level_for, search


@dataclass(frozen=True)
class Search:
    """Looks for large motion over all displacements within reach."""

    def run(self, pair: Pair, begin: Outcome, job: Job) -> Outcome:
        """Search from the alignment on.

        Args:
            pair: aligned and prepared.
            begin: the alignment's outcome.
            job: checked often.

        Returns:
            what was found, or ``begin`` where the judge finds that more alike.
        """
        job.report("search", 0.0, "Searching for large motion")
        found = searched(pair.as_given, job)
        job.report("search", 1.0, "Searching for large motion")
        return taken_over(pair, begin, "search", found)


def searched(pyramid: Pyramid, job: Job) -> DenseTransform:
    """Return the displacement before the alignment that a search finds; the job is checked often."""
    level, passes = level_for(pyramid.crop.grid.shape)
    fixed, moving, _ = pyramid.images(level)
    counts = pyramid.counts_of_each(level)
    control = search(mind_ssc(fixed), mind_ssc(moving), passes, torch.get_num_threads(), job.check, counts)
    return pyramid.displacement(control, level)
