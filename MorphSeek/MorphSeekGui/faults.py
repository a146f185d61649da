"""What can go wrong with the engine's process, a training run and a batch, as codes.

The process and the run know no Slicer, so they cannot translate: they raise a :class:`Fault`, whose value is the
English sentence for scripts and logs. The panel shows :func:`MorphSeekGui.messages.sentence`, in the user's language.
"""

from __future__ import annotations

from enum import Enum


class Fault(Enum):
    """A code; its value is the sentence, whose braces take what was raised with it."""

    ENGINE_NOT_STARTED = (
        "The engine could not be started with '{program}' ({reason}); check that this Python exists and may be run."
    )
    ENGINE_KILLED = (
        "The engine was killed, most likely because memory ran out; close other programs, or register smaller or "
        "cropped images."
    )
    ENGINE_DIED = "The engine stopped unexpectedly (exit code {exit_code}); its log says: {reason}"
    ENGINE_DIED_SILENTLY = (
        "The engine stopped unexpectedly (exit code {exit_code}) and its log is empty; please report this."
    )
    ENGINE_CLOSED = "The engine was closed before it had finished."
    ENGINE_SAID_NOTHING = "The engine failed without saying why; please report this."
    CANCELLED = "Canceled."
    RUN_ALREADY = "The training '{name}' is running already."
    RUN_NOT_STARTED = (
        "The training could not be started with '{program}' ({reason}); check that this Python exists and may be run, "
        "and that the run's folder can be written."
    )
    RUN_NOT_BEGUN = "The training could not begin; its log says: {reason}"
    RUN_NOT_BEGUN_SILENTLY = "The training could not begin and its log is empty; please report this."
    RUN_ELSEWHERE = "The training runs on {host}; end it there."
    RUN_FOLDER = (
        "The folder {folder} cannot be written ({reason}); choose another one for the runs, or free some space."
    )

    BATCH_ALREADY = "The batch '{name}' is running already."
    BATCH_NOT_STARTED = (
        "The batch could not be started with '{program}' ({reason}); check that this Python exists and may be run, and "
        "that the batch's folder can be written."
    )
    BATCH_NOT_BEGUN = "The batch could not begin; its log says: {reason}"
    BATCH_NOT_BEGUN_SILENTLY = "The batch could not begin and its log is empty; please report this."
    BATCH_FOLDER = (
        "The folder {folder} cannot be written ({reason}); choose another one for the results, or free some space."
    )
    BATCH_NO_PAIRS = "There is no pair to register; add one first."


class FaultError(Exception):
    """A sentence of the engine's own, or a fault and what its sentence names.

    Attributes:
        fault: the code; None when the engine said the sentence.
        values: what the braces of the fault's sentence take.
    """

    def __init__(self, told: Fault | str, **values: object) -> None:
        self.fault = told if isinstance(told, Fault) else None
        self.values = values
        super().__init__(told.value.format(**values) if isinstance(told, Fault) else told)
