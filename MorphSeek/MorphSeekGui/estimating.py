"""The estimated error of the last registration, asked of the engine as a request of its own.

The registration is prepared with the option ``trust`` "later"; the engine then keeps its images until the estimate is
made or another registration begins.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field

import slicer

from MorphSeekLib.protocol.messages import Answer, Params
from MorphSeekLib.protocol.report import SavedReport

from . import scene
from .scene import REPORT, InputError, RegistrationNodes, _

TIMES_THE_STAGES = 1.5  # as long as search, steps and fit an estimate takes (Docs/trust.md, what was measured)


@dataclass
class Estimating:
    """An estimate that is ready for the worker, in a private folder that :meth:`discard` removes.

    Args:
        of: the output folder of the registration, as the worker was given it.
        nodes: of the registration.
    """

    of: str
    nodes: RegistrationNodes
    folder: tempfile.TemporaryDirectory = field(init=False)

    def __post_init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="morphseek-", ignore_cleanup_errors=True)

    @property
    def params(self) -> Params:
        """What the worker's "estimate" takes."""
        return {"of": self.of, "output": self.folder.name}

    def finish(self, answer: Answer) -> None:
        """Make nodes of the worker's answer; the folder is removed in any case.

        Raises:
            InputError: the result changed or left the scene meanwhile.
        """
        try:
            transform = self.nodes.transform
            there = slicer.mrmlScene.IsNodePresent(transform) and slicer.mrmlScene.IsNodePresent(self.nodes.warped)
            if not there or transform.GetAttribute(REPORT) != json.dumps(self.nodes.report):
                raise InputError(_("The result was changed or removed meanwhile, so its error is not shown."))
            scene.add_estimate(self.nodes, scene.read_estimate(answer))
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove the folder with the arrays; twice does no harm."""
        self.folder.cleanup()


def expected_seconds(report: SavedReport) -> float | None:
    """Return about how long the estimate of a registration will take; None where its times are not known."""
    seconds = report.get("seconds") or {}
    if not (seconds.get("network") or seconds.get("fit")):
        return None  # an estimate fits, and nothing tells how long that takes
    return TIMES_THE_STAGES * sum(seconds.get(stage) or 0.0 for stage in ("search", "network", "fit"))


def is_quick(report: SavedReport) -> bool:
    """Return whether the estimate is expected to take less than the registration took."""
    expected, total = expected_seconds(report), (report.get("seconds") or {}).get("total")
    return expected is not None and total is not None and expected < total
