"""The one stream by which long jobs report: the command line draws it, TensorBoard logs it, Slicer plots it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

from .errors import Cancelled


@dataclass(frozen=True)
class Event:
    """A moment of a job.

    Attributes:
        phase: "read", "load", "align", "step", "resample", "metrics", "write", "train", "validate".
        fraction: share of the whole job that is done, 0 to 1.
        message: a sentence for a person.
        step, steps: where the phase counts (refinement steps, training iterations).
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
        message: one sentence for a person: what was found, in numbers, and what to do.
    """

    code: str
    message: str


OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """For callers who do not listen."""


def never() -> bool:
    """For callers who cannot cancel."""
    return False


def checkpoint_for(cancelled: Callable[[], bool]) -> Callable[[], None]:
    """A function to call often; it raises :class:`MorphSeekLib.protocol.errors.Cancelled` once the person wants to
    stop."""

    def checkpoint() -> None:
        if cancelled():
            raise Cancelled

    return checkpoint


def part(on_event: OnEvent, begin: float, share: float, prefix: str = "") -> OnEvent:
    """Listener for a part of a job, which tells its events with the fractions of the whole."""
    return lambda event: on_event(
        dataclasses.replace(event, fraction=begin + share * event.fraction, message=prefix + event.message)
    )
