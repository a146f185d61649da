"""The part *Apply to other nodes* of the section Inspect."""

from __future__ import annotations

import slicer

from MorphSeekLib.protocol.messages import Progress

from . import applying
from .applying import Application
from .engine_client import EngineCancelled, EngineClient, EngineError, Request
from .messages import sentence
from .panel import Panel
from .scene import InputError, RegistrationNodes, _

_POLL_MS = 100


class ApplySection:
    """Applies the registration that is looked at to the node that is chosen.

    Args:
        panel: the section Inspect.
        result: returns its registration, or None.
    """

    def __init__(self, panel: Panel, result) -> None:
        self.ui, self._logic, self._result = panel.ui, panel.logic, result
        self._run: tuple[Application, EngineClient, Request] | None = None
        self._timer = panel.timer(self._poll, _POLL_MS)
        self._message = panel.message(self.ui.applyLabel, self.ui.copyApplyDetailsButton)
        self.ui.applyButton.connect("clicked(bool)", lambda _on: self.apply())
        self.ui.cancelApplyButton.connect("clicked(bool)", lambda _on: self.cancel())
        self.ui.applyNodeSelector.connect("currentNodeChanged(vtkMRMLNode*)", self._choose)
        self._choose(None)
        self._show_running(False)

    def apply(self) -> None:
        """Move the chosen node; a volume by the engine, without waiting."""
        nodes: RegistrationNodes | None = self._result()
        node, ui = self.ui.applyNodeSelector.currentNode(), self.ui
        self._message.say("")
        if nodes is None or self._run is not None:
            return
        backward = ui.applyDirectionSelector.currentIndex == 1
        try:
            if not applying.is_volume(node):
                self._say(applying.move(nodes, node, backward), ())
                return
            kinds = ("linear", "nearest", "bspline")
            job = applying.prepare(nodes, node, backward, kinds[ui.interpolationSelector.currentIndex])
        except InputError as problem:
            self._message.fail(sentence(problem))
            return
        try:
            client = self._logic.client()
            self._run = job, client, client.request("apply", job.params, self._hear)
        except EngineError as problem:
            job.discard()
            self._fail(problem)
            return
        self._show_running(True)
        self._timer.start()

    def cancel(self) -> None:
        """Ask the engine to stop."""
        if self._run is not None:
            _job, client, request = self._run
            client.cancel(request)

    def close(self) -> None:
        """Cancel what runs and forget it."""
        self.cancel()
        self._end()

    def _hear(self, progress: Progress) -> None:
        self.ui.applyProgressBar.value = round(100 * progress.get("fraction", 0))

    def _poll(self) -> None:
        job, client, request = self._run
        client.poll()
        if not request.done:
            return
        self._timer.stop()
        self._run = None
        self._show_running(False)
        try:
            answer = request.value()
            if not slicer.mrmlScene.IsNodePresent(job.node):
                raise InputError(_("The volume was removed from the scene meanwhile; choose another one."))
            self._say(job.finish(answer), answer.get("warnings") or ())
        except EngineCancelled:
            self._message.say(_("Canceled; the scene is as it was."))
        except (InputError, EngineError) as problem:
            self._fail(problem)
        finally:
            job.discard()

    def _say(self, new, warnings) -> None:
        lines = [_("Made '{node}'.").format(node=new.GetName()), *(f"⚠ {one['message']}" for one in warnings)]
        self._message.say("\n".join(lines))

    def _fail(self, problem: Exception) -> None:
        details = getattr(problem, "details", "")
        self._message.fail(sentence(problem), details.splitlines(), details)

    def _end(self) -> None:
        self._timer.stop()
        if self._run is not None:
            self._run[0].discard()
            self._run = None
        self._show_running(False)

    def _show_running(self, running: bool) -> None:
        ui = self.ui
        ui.applyButton.enabled = not running
        ui.cancelApplyButton.visible = ui.applyProgressBar.visible = running
        ui.applyProgressBar.value = 0

    def _choose(self, node) -> None:
        """Offer an interpolation where there is something to interpolate."""
        image = applying.is_volume(node) and not isinstance(node, slicer.vtkMRMLLabelMapVolumeNode)
        self.ui.interpolationLabel.visible = self.ui.interpolationSelector.visible = image
        self.ui.applyButton.enabled = node is not None and self._run is None
