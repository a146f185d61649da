"""The sentences of :mod:`MorphSeekGui.faults` in the user's language.

Slicer's translators find only texts that stand in a call of ``_``, so each sentence is here once more;
Testing/module/test_messages.py says where the two differ.
"""

from __future__ import annotations

from .faults import Fault, FaultError
from .scene import _


def sentence(problem: Exception) -> str:
    """Return what went wrong in the user's language; what the engine itself said stays in English."""
    if isinstance(problem, FaultError) and problem.fault is not None:
        return fault_sentence(problem.fault, **problem.values)
    return str(problem)


def fault_sentence(fault: Fault, **values: object) -> str:
    """Return a fault's sentence in the user's language."""
    return _translated()[fault].format(**values)


def _translated() -> dict[Fault, str]:
    return {
        Fault.ENGINE_NOT_STARTED: _(
            "The engine could not be started with '{program}' ({reason}); check that this Python exists and may be run."
        ),
        Fault.ENGINE_KILLED: _(
            "The engine was killed, most likely because memory ran out; close other programs, or register smaller or "
            "cropped images."
        ),
        Fault.ENGINE_DIED: _("The engine stopped unexpectedly (exit code {exit_code}); its log says: {reason}"),
        Fault.ENGINE_DIED_SILENTLY: _(
            "The engine stopped unexpectedly (exit code {exit_code}) and its log is empty; please report this."
        ),
        Fault.ENGINE_CLOSED: _("The engine was closed before it had finished."),
        Fault.ENGINE_SAID_NOTHING: _("The engine failed without saying why; please report this."),
        Fault.CANCELLED: _("Canceled."),
        Fault.RUN_ALREADY: _("The training '{name}' is running already."),
        Fault.RUN_NOT_STARTED: _(
            "The training could not be started with '{program}' ({reason}); check that this Python exists and may be "
            "run, and that the run's folder can be written."
        ),
        Fault.RUN_NOT_BEGUN: _("The training could not begin; its log says: {reason}"),
        Fault.RUN_NOT_BEGUN_SILENTLY: _("The training could not begin and its log is empty; please report this."),
        Fault.RUN_ELSEWHERE: _("The training runs on {host}; end it there."),
        Fault.RUN_FOLDER: _(
            "The folder {folder} cannot be written ({reason}); choose another one for the runs, or free some space."
        ),
        Fault.BATCH_ALREADY: _("The batch '{name}' is running already."),
        Fault.BATCH_NOT_STARTED: _(
            "The batch could not be started with '{program}' ({reason}); check that this Python exists and may be run, "
            "and that the batch's folder can be written."
        ),
        Fault.BATCH_NOT_BEGUN: _("The batch could not begin; its log says: {reason}"),
        Fault.BATCH_NOT_BEGUN_SILENTLY: _("The batch could not begin and its log is empty; please report this."),
        Fault.BATCH_FOLDER: _(
            "The folder {folder} cannot be written ({reason}); choose another one for the results, or free some space."
        ),
        Fault.BATCH_NO_PAIRS: _("There is no pair to register; add one first."),
    }
