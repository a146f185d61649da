"""The moving image at full resolution after each stage, for the live view."""

from __future__ import annotations

from torch import Tensor

from ..protocol.job import Job
from ..space.geometry import DenseTransform, Volume
from .pair import Outcome, Pair


class Pictures:
    """Warps and shows pictures; none is warped twice.

    Args:
        job: given each picture, where somebody looks.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._aligned: Volume | None = None
        self._shown: tuple[int, Volume] | None = None

    def show_aligned(self, pair: Pair) -> None:
        """Show the images after their alignment, as row 0."""
        if self._job.is_watched:
            self._job.show(0, self.aligned(pair))

    def show(self, row: int, pair: Pair, total: Tensor) -> None:
        """Show a step's displacement, (1, 3, i, j, k) voxels of the working grid, as the row of the report's steps."""
        if self._job.is_watched:
            self._shown = row, pair.warped(pair.whole(total))
            self._job.show(*self._shown)

    def aligned(self, pair: Pair) -> Volume:
        """Return the moving image after the alignment alone."""
        if self._aligned is None:
            self._aligned = pair.warped(pair.alignment.transform)
        return self._aligned

    def answer(self, pair: Pair, outcome: Outcome, transform: DenseTransform) -> Volume:
        """Return the moving image warped by the answer's transform, and show it where no step did."""
        warped = pair.warped(transform)
        if self._shown is None or self._shown[0] != outcome.answer or outcome.found is not None:
            self._job.show(outcome.answer, warped)
        return warped
