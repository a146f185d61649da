"""What the part Batch says: where a batch stands, and what became of a pair."""

from __future__ import annotations

import time
from collections.abc import Sequence

from .batch_run import BatchRow, BatchState
from .faults import Fault
from .messages import fault_sentence
from .quality import headline
from .remaining_time import duration
from .scene import _

# not everybody can tell the colors apart
ICONS = {"failed": "✕", "red": "■", "amber": "▲", "": "○", "green": "●", "waiting": "…"}


def verdict(row: BatchRow) -> str:
    """Return what became of a pair: a sign and words."""
    words = {"waiting": _("waiting"), "failed": _("Failed: {problem}").format(problem=row.problem)}
    return f"{ICONS[row.color]} {words.get(row.color) or headline(row.color or None)}"


def counts(rows: Sequence[BatchRow]) -> str:
    """Return how many pairs got which verdict."""
    colors = [row.color for row in rows]
    names = {
        "green": _("{n} green"),
        "amber": _("{n} amber"),
        "red": _("{n} red"),
        "": _("{n} not judged"),
        "failed": _("{n} failed"),
    }
    words = [f"{ICONS[color]} {name.format(n=colors.count(color))}" for color, name in names.items() if color in colors]
    return ", ".join(words)


def state_sentence(state: BatchState, rows: Sequence[BatchRow]) -> str:
    """Return where a batch stands."""
    tried = sum(row.state != "waiting" for row in rows)
    done = _("{done} of {count} pairs").format(done=tried, count=len(rows))
    if state.state == "failed":
        if state.status.message:
            return state.status.message
        if state.last_words:
            return fault_sentence(Fault.BATCH_NOT_BEGUN, reason=state.last_words)
        return fault_sentence(Fault.BATCH_NOT_BEGUN_SILENTLY)
    words = {
        "new": _("Not started yet."),
        "starting": _("Starting the engine"),
        "running": done,
        "stopping": _("Stopping; pairs that are done stay done. {done}").format(done=done),
        "stopped": _("Canceled after {done}; it can be continued.").format(done=done),
        "interrupted": _("Interrupted after {done}; it can be continued.").format(done=done),
        "done": _("Done: {done}.").format(done=done),
    }[state.state]
    left = state.status.seconds_left(time.time()) if state.state == "running" else None
    if left is not None:
        words += ", " + _("about {left} left").format(left=duration(max(1, round(left))))
    found = counts(rows)
    return f"{words}\n{found}" if found else words
