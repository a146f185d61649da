"""What the stages of a registration are called: the rows of a report's "steps", and those of a run under way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from MorphSeekLib.protocol.report import StepSection

from .scene import _


def stage_names(rows: Iterable[StepSection]) -> list[str]:
    """Return the name of each row."""
    names: list[str] = []
    seen: Counter[str] = Counter()
    for row in rows:
        stage = row["stage"]
        seen[stage] += 1
        if stage == "network":
            names.append(_("Step {n}").format(n=row["step"]))
        else:
            name = {"align": _("Aligned"), "search": _("Search"), "fit": _("Fitted"), "correct": _("Corrected")}[stage]
            names.append(name if seen[stage] == 1 else f"{name} ({seen[stage]})")
    return names


class LiveStages:
    """The rows of a run under way, of which its messages and pictures tell.

    The engine sends pictures by the number of their row; which stage that is follows from what it has said before.

    Args:
        rows: those of the registration that is continued; without one, the alignment.
    """

    def __init__(self, rows: Iterable[StepSection] = ()) -> None:
        self._rows: list[StepSection] = list(rows) or [{"stage": "align", "step": 0}]
        self._begun: set[str] = set()

    def hear(self, message: dict) -> None:
        """Take in a message: search, fit and correction are one row each."""
        phase = message.get("phase")
        if phase in ("search", "fit", "correct") and phase not in self._begun:
            self._begun.add(phase)
            self._rows.append({"stage": phase, "step": self._rows[-1]["step"]})

    def picture(self, row: int) -> None:
        """Take in the number of a picture: a row that is new is the network's next step."""
        while len(self._rows) <= row:
            self._rows.append({"stage": "network", "step": self._rows[-1]["step"] + 1})

    def names(self) -> list[str]:
        """Return the name of each row so far."""
        return stage_names(self._rows)
