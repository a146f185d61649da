"""How long a registration will take, from how long earlier ones took on this machine, or the engine's estimate."""

from __future__ import annotations

import json
import statistics

_KEPT = 5  # runs of each choice
_MOST_CHOICES = 100
_ESTIMATES = "estimates"  # stands for a choice; its runs are (estimate, seconds)
_ALIKE = 4.0  # times more or fewer voxels, and the time is not proportional to them any more


class ExpectedTime:
    """Times of earlier runs, by what was chosen.

    Args:
        text: from :meth:`to_text`, of an earlier session; unusable text counts as none.
    """

    def __init__(self, text: str = "") -> None:
        self._runs: dict[str, list[tuple[float, float]]] = {}  # choice -> (voxels, seconds), the last one at the end
        try:
            for choice, runs in json.loads(text or "{}").items():
                self._runs[choice] = [(float(voxels), float(seconds)) for voxels, seconds in runs if voxels > 0]
        except (ValueError, TypeError, AttributeError):
            self._runs = {}

    def learn(self, choice: str, voxels: int, seconds: float, estimate: float | None = None) -> None:
        """Take in a run that ended.

        Args:
            choice: whatever else than the size of the volumes changes the time.
            voxels: of the two volumes together.
            seconds: how long it took.
            estimate: the engine's, before it.
        """
        self._keep(choice, voxels, seconds)
        if estimate:
            self._keep(_ESTIMATES, estimate, seconds)

    def _keep(self, choice: str, voxels: float, seconds: float) -> None:
        runs = self._runs.pop(choice, [])  # it comes to the end: what was not used for long is forgotten first
        self._runs[choice] = [*runs, (float(voxels), seconds)][-_KEPT:]
        while len(self._runs) > _MOST_CHOICES:
            del self._runs[next(iter(self._runs))]

    def seconds(self, choice: str, voxels: float) -> float | None:
        """Return the time to expect; None where no earlier run was alike.

        It is the median over the runs with about as many voxels, each in proportion to them.
        """
        alike = [
            seconds * voxels / there
            for there, seconds in self._runs.get(choice, [])
            if 1 / _ALIKE <= voxels / there <= _ALIKE
        ]
        return statistics.median(alike) if alike else None

    def corrected(self, estimate: float) -> float:
        """Return an estimate of the engine, corrected by how its estimates of about that length turned out."""
        return self.seconds(_ESTIMATES, estimate) or estimate

    def to_text(self) -> str:
        """Return the times as a text for the settings of the application."""
        return json.dumps(self._runs)
