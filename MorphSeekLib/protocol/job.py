"""The one stream by which long work reports, and the one way to cancel it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .errors import Cancelled


@dataclass(frozen=True)
class Event:
    """A moment of a job.

    Attributes:
        phase: "read", "load", "align", "step", "fit", "resample", "metrics", "write", "train", "validate".
        fraction: share of the whole job that is done, 0 to 1.
        message: a sentence for the user.
        step, steps: where the phase counts (steps of the network, training iterations).
        metrics: figures of this moment, by name.
    """

    phase: str
    fraction: float
    message: str = ""
    step: int = 0
    steps: int = 0
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Notice:
    """A warning that goes with a result: into report.json ("warnings"), the report, the command line and the panel.

    Attributes:
        code: short and stable, for programs, such as "nifti-forms".
        message: one sentence for the user: what was found, in numbers, and what to do.
    """

    code: str
    message: str


class Job:
    """A piece of work with progress and cancel; the one argument that long functions pass on.

    Args:
        on_event: told of every event; None when nobody listens.
        cancelled: asked often; True ends the work. None when it cannot be cancelled.
        on_picture: given a step's number and the volume after it, from 0 (aligned) on; None when nobody looks.
    """

    def __init__(
        self,
        on_event: Callable[[Event], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
        on_picture: Callable[[int, Any], None] | None = None,
    ) -> None:
        self._on_event = on_event
        self._cancelled = cancelled
        self._on_picture = on_picture

    def report(
        self, phase: str, fraction: float, message: str = "", step: int = 0, steps: int = 0, **metrics: float
    ) -> None:
        """Tell how far the work is; arguments as in :class:`Event`."""
        self.tell(Event(phase, fraction, message, step, steps, metrics))

    def tell(self, event: Event) -> None:
        """Pass on an event."""
        if self._on_event is not None:
            self._on_event(event)

    def check(self) -> None:
        """End the work if the user wants to.

        Raises:
            Cancelled: the user does.
        """
        if self.is_cancelled:
            raise Cancelled

    @property
    def is_cancelled(self) -> bool:
        """Whether the user wants to end the work; for a library's callback, which cannot raise."""
        return self._cancelled is not None and self._cancelled()

    @property
    def is_watched(self) -> bool:
        """Whether anybody looks at pictures, which take time to make."""
        return self._on_picture is not None

    def show(self, step: int, picture: Any) -> None:
        """Show the volume after a step."""
        if self._on_picture is not None:
            self._on_picture(step, picture)

    def part(self, begin: float, end: float, prefix: str = "") -> Job:
        """Return the job of a part of the work, whose fractions 0 to 1 are ``begin`` to ``end`` of this one's."""

        def tell(event: Event) -> None:
            fraction = (1 - event.fraction) * begin + event.fraction * end  # exact at both ends
            self.tell(dataclasses.replace(event, fraction=fraction, message=prefix + event.message))

        return Job(tell, self._cancelled, self._on_picture)

    def heard_by(self, on_event: Callable[[Event], None] | None) -> Job:
        """Return a job that another listener hears in place of this one's; it is cancelled with this one."""
        return Job(on_event, self._cancelled)

    def until(self, cancelled: Callable[[], bool]) -> Job:
        """Return the same job, which another condition cancels too."""
        first = self._cancelled
        both = cancelled if first is None else lambda: first() or cancelled()
        return Job(self._on_event, both, self._on_picture)


SILENT = Job()
"""For callers who do not listen and cannot cancel."""
