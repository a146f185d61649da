"""How long a job has run and how long it still takes, in words that move between two of its reports."""

from __future__ import annotations

import time
from collections.abc import Callable

from .scene import _

_QUIET = 2.0  # seconds at the beginning that need no words
_EARLIEST = 0.1  # share that must be done before the rest can be estimated


class RemainingTime:
    """Made when a job starts.

    Args:
        clock: seconds from any beginning.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._started = clock, clock()
        self._fraction = 0.0
        self._ends: float | None = None

    def report(self, fraction: float) -> None:
        """Take in which share of the job is done; a share that was reported before says nothing new."""
        if fraction == self._fraction:
            return
        self._fraction, now = fraction, self._clock()
        known = _EARLIEST < fraction < 1
        self._ends = now + (now - self._started) * (1 - fraction) / fraction if known else None

    def text(self) -> str:
        """Say the time since the start, and about how much is left until that turns out to be wrong."""
        now = self._clock()
        if now - self._started < _QUIET:
            return ""
        left = self._ends - now if self._ends is not None else 0.0
        if left < 1:
            return _("({elapsed} so far)").format(elapsed=duration(now - self._started))
        return _("({elapsed} so far, about {left} left)").format(
            elapsed=duration(now - self._started), left=duration(left)
        )


def duration(seconds: float) -> str:
    """Return a time in words."""
    if seconds < 100:
        return _("{n} s").format(n=int(seconds))
    return _("{minutes} min {seconds} s").format(minutes=int(seconds) // 60, seconds=int(seconds) % 60)
