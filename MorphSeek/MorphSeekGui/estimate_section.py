"""The lines below a result of the section Register that estimate its error in the background."""

from __future__ import annotations

from collections.abc import Callable

from MorphSeekLib.protocol.messages import Progress

from . import estimating, quality
from .engine_client import EngineCancelled, EngineClient, EngineError, Request
from .estimating import Estimating
from .messages import sentence
from .panel import Panel
from .remaining_time import RemainingTime, duration
from .scene import InputError, RegistrationNodes, _

_POLL_MS = 100


class EstimateSection:
    """Estimates the error of the last result while the user looks at it.

    Args:
        panel: the section Register.
        shown: called with the nodes of a result that has an estimated error now.
    """

    def __init__(self, panel: Panel, shown: Callable[[RegistrationNodes], None]) -> None:
        self.ui, self._logic, self._shown = panel.ui, panel.logic, shown
        self._offered: tuple[str, RegistrationNodes] | None = None  # whose images the engine keeps
        self._run: tuple[Estimating, EngineClient, Request] | None = None
        self._time = RemainingTime()
        self._words = ""
        self._timer = panel.timer(self._poll, _POLL_MS)
        self._message = panel.message(self.ui.estimateLabel, self.ui.copyEstimateDetailsButton)
        self.ui.estimateButton.connect("clicked(bool)", lambda _on: self.start())
        self.ui.cancelEstimateButton.connect("clicked(bool)", lambda _on: self.cancel())
        self._show("")

    def offer(self, of: str, nodes: RegistrationNodes, at_once: bool) -> None:
        """Offer the estimate of a result.

        Args:
            of: the output folder of the registration.
            nodes: its result.
            at_once: start it.
        """
        self.drop()
        self._offered = of, nodes
        if at_once:
            self.start()
        else:
            self._show("")

    def start(self) -> None:
        """Ask the engine, without waiting."""
        if self._offered is None or self._run is not None:
            return
        job = Estimating(*self._offered)
        try:
            client = self._logic.client()
            self._run = job, client, client.request("estimate", job.params, self._hear)
        except EngineError as problem:
            job.discard()
            self._fail(problem)
            return
        self._time, self._words = RemainingTime(), _("Estimating the error ...")
        self._show(self._words)
        self._timer.start()

    def cancel(self) -> None:
        """Ask the engine to stop; the result stays, and can be estimated later."""
        if self._run is not None:
            _job, client, request = self._run
            client.cancel(request)
            self.ui.cancelEstimateButton.enabled = False

    def drop(self) -> None:
        """Cancel what runs and offer nothing: the result is another one, or none."""
        self._timer.stop()
        if self._run is not None:
            job, client, request = self._run
            request.on_progress = None
            client.cancel(request)
            job.discard()
        if self._offered is not None:
            self._logic.client().forget(self._offered[0])
        self._offered = self._run = None
        self._show("")

    def _hear(self, progress: Progress) -> None:
        fraction = progress.get("fraction") or 0.0
        self.ui.estimateProgressBar.value = round(1000 * fraction)
        self._time.report(fraction)

    def _poll(self) -> None:
        job, client, request = self._run
        client.poll()
        if not request.done:
            self._message.say(" ".join(filter(None, [self._words, self._time.text()])))
            return
        self._timer.stop()
        self._run = None
        try:
            job.finish(request.value())
        except EngineCancelled:
            self._show(_("Canceled; the result is as it was."))
        except (InputError, EngineError) as problem:
            self._fail(problem)
        else:
            self._offered = None
            self._show("\n".join([*quality.estimated_error(job.nodes.report), _("Where: see Inspect.")]))
            self._shown(job.nodes)
        finally:
            job.discard()

    def _fail(self, problem: Exception) -> None:
        self._offered = None
        self._show("")
        details = getattr(problem, "details", "")
        self._message.fail(sentence(problem), details.splitlines(), details)
        self.ui.estimateLabel.visible = True

    def _show(self, words: str) -> None:
        """Show what can be done now, and a text that is no error."""
        ui, running = self.ui, self._run is not None
        self._message.say(words)
        ui.estimateLabel.visible = bool(words)
        ui.estimateProgressBar.visible = ui.cancelEstimateButton.visible = running
        ui.cancelEstimateButton.enabled = running
        ui.estimateProgressBar.value = 0
        ui.estimateButton.visible = self._offered is not None and not running
        if self._offered is not None:
            seconds = estimating.expected_seconds(self._offered[1].report)
            ui.estimateButton.text = (
                _("Estimate the error")
                if not seconds
                else _("Estimate the error (about {time})").format(time=duration(max(1, round(seconds))))
            )
