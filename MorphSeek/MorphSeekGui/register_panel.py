"""The section Register: choose, press, watch, cancel; go on from the result; look back at the stages.

The engine runs in its own process; a timer asks it what is new, so the window stays live. Until the result is there
only the volume that shows the stages is added to the scene, and it is removed again if the registration fails.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import qt
import slicer
import slicer.util
import vtk

from MorphSeekLib.protocol.options import RegistrationOptions
from MorphSeekLib.protocol.settings import to_dict
from MorphSeekLib.protocol.settings_file import RegistrationSettings
from MorphSeekLib.protocol.startup import AUTO, NO_MODEL, check_model_choice
from MorphSeekLib.protocol.verdict import folds

from . import dependencies, models, quality
from .batch_pairs import ScenePair
from .batch_run import Start
from .batch_section import BatchPanel
from .correct_section import CorrectPanel, summary
from .corrections import Corrections
from .engine_client import EngineCancelled, EngineError
from .estimate_section import EstimateSection
from .estimating import is_quick
from .expected_time import ExpectedTime
from .messages import sentence
from .panel import Panel
from .parameters import (
    MAX_STEPS,
    EstimatedError,
    Fit,
    Preset,
    chosen_options,
    has_named_model,
    other_options,
    shared_options,
    use_options,
)
from .registration import Job, Request, Run, into_same, prepare
from .remaining_time import RemainingTime, duration
from .saved_settings import SavedSettings
from .scene import Image, InputError, RegistrationNodes, _, put_into_folder, size_of
from .stages import LiveStages, stage_names
from .steps import Steps
from .views import SliceViews
from .widgets import FolderButton

POLL_MS = 50
TYPING_MS = 500
MODELS_FOLDER = "MorphSeek/ModelsFolder"
ENGINE_PYTHON = "MorphSeek/EnginePython"
THREADS = "MorphSeek/Threads"
TIMES = "MorphSeek/ExpectedTimes"
UNKNOWN_SIZE = "unknown-size"  # code of the engine's warning that a model does not know such images


class RegisterPanel(Panel):
    """See the module's text.

    Attributes:
        on_result: called with the nodes of each registration that succeeded.
        on_estimate: called with the nodes of a result whose error is estimated now.
    """

    FILE = "Register.ui"

    def __init__(self, parent, logic) -> None:
        super().__init__(parent, logic)
        self.on_result: list[Callable[[RegistrationNodes], None]] = []
        self.on_estimate: list[Callable[[RegistrationNodes], None]] = []
        self._parameters, self._gui_tag = None, None
        self._models: list[models.Model | models.Choice] = []
        self._more_models: list[str] = []
        self._devices: list[dict] = []
        self._run: Run | None = None
        self._hello = None
        self._time: RemainingTime | None = None  # while something runs that nobody has cancelled
        self._expected = ExpectedTime(slicer.util.settingsValue(TIMES, ""))
        self._estimates: dict[str, dict[str, float]] = {}  # the engine's, by what it was asked; {} where it had none
        self._asked = None  # what it is asked now, and the request
        self._learns: tuple[str, int, float | None] | None = None  # what the time of the run is of, and the estimate
        self._message = ""  # the engine's last
        self._which_model = ""  # what the engine said of the model that it chose
        self._steps: Steps | None = None
        self._live: LiveStages | None = None
        self._names: list[str] = []  # of the stages, by their rows in the report
        self._what_runs: tuple = ()
        self._before: SliceViews | None = None  # as they were before the run
        self._ending = ""  # what is said when the run was canceled
        self._last: tuple | None = None  # (what was registered, nodes)
        self._installing = False
        self._after_install: Callable[[], None] | None = None
        self._reason = ""  # why Register cannot be pressed
        self._timer = self.timer(self._poll, POLL_MS)
        self._python_timer = self.timer(self._ask_devices, TYPING_MS, once=True)  # once the path of a Python is typed
        self._status = self.message(self.ui.statusLabel, self.ui.copyDetailsButton, self._folders)
        self._of_steps = _with_help(self.ui.stepsLabel, self.ui.stepsSpinBox, self.ui.stopEarlyCheckBox)
        self._of_presets = _with_help(self.ui.presetLabel, self.ui.presetSelector)
        self._estimate = EstimateSection(self, self._show_estimate)
        self._correct = CorrectPanel(self.ui.correctSection, logic, self)
        self.batch = BatchPanel(self.ui.batchSection, logic, self)
        self._connect()
        self._saved = SavedSettings(self, self.chosen_settings, self._use_settings, self._fail)

    def _connect(self) -> None:
        ui = self.ui
        ui.registerButton.connect("clicked(bool)", self.register)
        ui.cancelButton.connect("clicked(bool)", self.cancel)
        ui.moreButton.connect("clicked(bool)", self.go_on)
        ui.noModelButton.connect("clicked(bool)", self.register_without_model)
        ui.installButton.connect("clicked(bool)", self.install)
        ui.browseModelButton.connect("clicked(bool)", self._browse)
        ui.refreshDevicesButton.connect("clicked(bool)", self._ask_devices)
        ui.modelSelector.connect("currentIndexChanged(int)", self._choose_model)
        ui.deviceSelector.connect("currentIndexChanged(int)", self._choose_device)
        ui.stepSlider.connect("valueChanged(int)", self._show_step)
        folder = slicer.util.settingsValue(MODELS_FOLDER, "")
        self._models_folder = FolderButton(ui.modelsFolderButton, folder, self._set_models_folder)
        ui.enginePythonEdit.currentPath = slicer.util.settingsValue(ENGINE_PYTHON, "")
        # the widget itself is silent about a path that does not exist, and when it is emptied
        line_edit = slicer.util.findChildren(ui.enginePythonEdit, className="QLineEdit")[0]
        line_edit.connect("textChanged(QString)", self._set_engine_python)
        ui.resetPythonButton.connect("clicked(bool)", lambda _on: setattr(ui.enginePythonEdit, "currentPath", ""))
        self._say_engine_python(ui.enginePythonEdit.currentPath)
        ui.threadsSpinBox.value = slicer.util.settingsValue(THREADS, 0, converter=int)
        ui.threadsSpinBox.connect("valueChanged(int)", self._set_threads)
        self._show_devices([{"name": "cpu", "label": _("Processor")}])

    # --------------------------------------------------------------------------------------- what Slicer and others say

    def setParameterNode(self, parameters) -> None:
        """Show this parameter node and write the choices into it; None while a scene is closed."""
        if self._parameters is not None:
            self._parameters.disconnectGui(self._gui_tag)
            self.removeObserver(self._parameters, vtk.vtkCommand.ModifiedEvent, self._update)
        self._parameters = parameters
        if parameters is not None:
            self._gui_tag = parameters.connectGui(self.ui)
            self.addObserver(parameters, vtk.vtkCommand.ModifiedEvent, self._update)
            self.refresh_models()
            self._update()

    def setMRMLScene(self, scene) -> None:
        """Take this scene; None at the application's end."""
        super().setMRMLScene(scene)
        self._correct.setMRMLScene(scene)
        self.batch.setMRMLScene(scene)

    def enter(self) -> None:
        """See what is installed, and ask the engine for its devices."""
        self._update_setup()
        if not self._devices and self._ready():
            self._ask_devices()
        self.batch.enter()

    def cleanup(self) -> None:
        """Cancel what runs, and end the engine."""
        if self._run is not None:
            self._run.cancel()
            self._run.job.discard()
            self._run = None
            self._undo()
        self._estimate.drop()
        self.setParameterNode(None)
        self._correct.cleanup()
        self.batch.cleanup()
        super().cleanup()
        self.logic.close_engine()

    def forget(self) -> None:
        """Cancel what runs, because the scene is being closed."""
        if self._run is not None:
            self._run.cancel()
            self._time = None
            self._ending = _("The scene was closed, so the registration was canceled.")
        self._steps, self._last, self._before = None, None, None
        self._estimate.drop()
        self._correct.forget()
        self.batch.forget()
        self.ui.resultWidget.visible = self.ui.noModelButton.visible = False
        self._status.say(self._ending if self._run is not None else "")

    def add_model(self, path) -> None:
        """List a model that is in no folder of models, say one that was just trained."""
        self._more_models.append(str(path))
        self.refresh_models()

    def refresh_models(self, chosen: str | None = None) -> None:
        """Read the list of models again; ``chosen`` becomes the current one."""
        if self._parameters is None:
            return
        chosen = chosen or self._parameters.model
        folder = slicer.util.settingsValue(MODELS_FOLDER, "")
        self._models = [*models.without_file(), *models.available(folder, [*self._more_models, chosen])]
        selector = self.ui.modelSelector
        blocked = selector.blockSignals(True)
        selector.clear()
        for model in self._models:
            selector.addItem(model.title)
        names = [m.name for m in self._models]
        selector.currentIndex = names.index(chosen) if chosen in names else 0 if names else -1
        selector.blockSignals(blocked)
        self._choose_model()

    # ----------------------------------------------------------------------------------------------------- run, and end

    def register(self) -> None:
        """Register what is chosen; first install the engine's packages if they are missing."""
        if not self._ready():
            self._after_install = self.register
            self.install()
            return
        p = self._parameters
        into = {"warped": p.outputVolume, "transform": p.outputTransform}
        self._start(chosen_options(p), p.model, None, into)

    def register_without_model(self) -> None:
        """Choose no model, and register."""
        self.refresh_models(NO_MODEL)
        self.register()

    def go_on(self) -> None:
        """Take one more step from the last result, or fit it longer where there were none; its nodes are updated."""
        if self._last is None:
            return
        what, nodes = self._last
        if what != self._what():
            self._fail(_("The inputs were changed since the last registration; press Register to start again."))
            return
        options, model = replace(chosen_options(self._parameters), search="off"), self._parameters.model
        if _model_of(nodes.report) is None:
            options, model = replace(options, steps=None, fit="on"), NO_MODEL
        elif not _took_steps(nodes.report):
            options = replace(options, steps=None, fit="on")
        else:
            options = replace(options, steps=1, stop_early=False)
        self._start(options, model, nodes.state, into_same(nodes))

    def correct(self, points: Corrections, fit: bool) -> bool:
        """Correct the last result by points; its nodes are updated.

        Args:
            points: of the last result.
            fit: go on with the fit around them, unless the model is better without.

        Returns:
            whether it was begun.
        """
        what, nodes = self._last
        if what != self._what():
            self._fail(_("The inputs were changed since the last registration; press Register to start again."))
            return False
        by_model = nodes.state is not None and _model_of(nodes.report) is not None
        model = self._parameters.model if by_model else NO_MODEL
        fitted = "off" if not fit else "on" if model == NO_MODEL else "auto"
        options = replace(chosen_options(self._parameters), search="off", steps=None, stop_early=False, fit=fitted)
        return self._start(options, model, nodes.state, into_same(nodes), points)

    def take_up(self, nodes: RegistrationNodes) -> None:
        """Take a result that came with a scene for the last one, so that it can be corrected, unless there is one of
        this session or another pair is chosen."""
        p = self._parameters
        free = self._last is None or self._last[1].state is None
        if (
            p is not None
            and self._run is None
            and free
            and (p.fixedVolume, p.movingVolume) == (nodes.fixed, nodes.moving)
        ):
            self._correct.forget()
            self._last = (self._what(), nodes)
            self._show_steps()
            self._update()

    def chosen_settings(self) -> RegistrationSettings:
        """Return the chosen model and options."""
        return RegistrationSettings("", self._parameters.model, shared_options(self._parameters))

    def chosen_start(self) -> Start:
        """Return the chosen device and threads."""
        return Start(self._parameters.device, self.ui.threadsSpinBox.value or None)

    def chosen_pair(self) -> ScenePair:
        """Return the chosen volumes, with what belongs to them."""
        p = self._parameters
        return ScenePair(p.fixedVolume, p.movingVolume, self._request(chosen_options(p), p.model))

    def show_loaded(self, nodes: RegistrationNodes) -> None:
        """Show a registration that was loaded from files."""
        slicer.util.setSliceViewerLayers(nodes.fixed, nodes.warped, foregroundOpacity=0.5, fit=True)
        for function in self.on_result:
            function(nodes)

    def show_earlier(self, nodes: RegistrationNodes) -> None:
        """Show a result that is in its nodes again, as before a later run changed them."""
        self._estimate.drop()
        if self._steps is not None:
            # without a state it came with a scene: all pictures are of what came later
            self._steps.keep_first(len(nodes.report.get("steps") or []) if nodes.state is not None else 0)
        self._show_result(nodes)
        self._update()

    def cancel(self) -> None:
        """Cancel the run; the scene is as before as soon as the engine has stopped."""
        if self._run is not None:
            self._run.cancel()
            self._time = None
            self._ending = _("Canceled; the scene is as it was.")
            self.ui.cancelButton.enabled = False
            self._status.say(_("Canceling ..."))

    def _start(
        self,
        options: RegistrationOptions,
        model: str,
        state: dict | None,
        into: dict,
        corrections: Corrections | None = None,
    ) -> bool:
        """Start a run of the engine; return whether it was started."""
        p = self._parameters
        if self._run is not None or p is None:
            return False
        self._status.say(_("Reading the volumes ..."))
        slicer.app.processEvents()
        if p.estimate is not EstimatedError.OFF and corrections is None:
            options = replace(options, trust="later")
        try:
            request = replace(
                self._request(options, model), show_steps=p.showSteps, state=state, corrections=corrections, into=into
            )
            job = prepare(p.fixedVolume, p.movingVolume, request)
            fresh = state is None and corrections is None
            if fresh:
                self._drop_steps()
            if self._steps is None or not self._steps.count:
                self._steps = Steps(p.fixedVolume, p.movingVolume)
            self._live = LiveStages(state["figures"] if state is not None else ())
            self._learns = None
            if fresh:
                estimate = self._estimates.get(self._question(), {}).get(p.preset.value)
                self._learns = self._choice(p.preset), self._voxels(), estimate
            self._stop_asking()
            self._estimate.drop()
            self._before, self._ending = SliceViews(slicer.mrmlScene), ""
            self._what_runs = self._what()
            self._run = Run(job, self.logic.client(), self._hear, self._picture)
        except (InputError, EngineError) as problem:
            self._fail(sentence(problem))
            return False
        self._time, self._message, self._which_model = RemainingTime(), "", ""
        self.ui.noModelButton.visible = False
        self._timer.start()
        self._show_running(True)
        return True

    def _request(self, options: RegistrationOptions, model: str) -> Request:
        """Return the request of a registration with all chosen nodes but the two volumes."""
        p = self._parameters
        return Request(
            options,
            model,
            p.device,
            self.ui.threadsSpinBox.value or None,
            initial_transform_node=p.initialTransform,
            fixed_mask_node=p.fixedMask,
            fixed_ignore_node=p.fixedIgnore,
            moving_mask_node=p.movingMask,
            moving_ignore_node=p.movingIgnore,
            fixed_labels_node=p.fixedLabels,
            moving_labels_node=p.movingLabels,
            fixed_landmarks_node=p.fixedLandmarks,
            moving_landmarks_node=p.movingLandmarks,
        )

    def _poll(self) -> None:
        client = self.logic.client()
        client.poll()
        if self._hello is not None and self._hello.done:
            self._finish_hello()
        if self._asked is not None and self._asked[1].done:
            self._finish_asking()
        if self._run is not None and self._run.poll():
            self._finish()
        else:
            self._say_how_far()
        if self._run is None and self._hello is None and self._asked is None:
            self._timer.stop()

    def _hear(self, message: dict) -> None:
        fraction = message.get("fraction") or 0.0
        self.ui.progressBar.value = round(1000 * fraction)
        self._message = message.get("message", "")
        if message.get("phase") == "load" and self._parameters is not None and self._parameters.model == AUTO:
            self._which_model = self._message
        if self._live is not None:
            self._live.hear(message)
        if self._time is not None:
            self._time.report(fraction)
            self._say_how_far()

    def _say_how_far(self) -> None:
        """Show what the engine does and the time, also while the engine is silent for a minute."""
        if self._time is not None and self._message:
            what = " ".join(filter(None, [self._message, self._time.text()]))
            first = "" if self._which_model == self._message else self._which_model
            self._status.say("\n".join(filter(None, [first, what])))

    def _picture(self, row: int, image: Image) -> None:
        """Show the moving volume after a stage over the fixed one."""
        if not slicer.mrmlScene.IsNodePresent(self._run.job.fixed):
            return
        first = self._steps.volume is None
        self._steps.add(row, image)
        self._live.picture(row)
        self._names = self._live.names()
        if first:
            slicer.util.setSliceViewerLayers(
                background=self._run.job.fixed, foreground=self._steps.volume, foregroundOpacity=0.5, fit=True
            )
        self._show_steps()

    def _finish(self) -> None:
        run, self._run, self._time = self._run, None, None
        self._show_running(False)
        nodes = None
        try:
            nodes = run.finish()
        except EngineCancelled:
            self._undo()
            self._status.say(self._ending)
        except (InputError, EngineError) as problem:
            self._undo()
            self._fail(self._ending or sentence(problem), getattr(problem, "details", ""))
        else:
            self._show_result(nodes)
            self._offer_estimate(run.job, nodes)
        self._correct.settle(nodes)
        self._update()

    def _show_result(self, nodes: RegistrationNodes) -> None:
        """Show the result of a run, what can be done with it, and what it cost."""
        ui, report = self.ui, nodes.report
        if self._steps is not None:
            self._steps.keep()
            put_into_folder(nodes, self._steps.nodes)
        self._last = (self._what_runs, nodes)
        if self._steps is None or not self._steps.count:
            slicer.util.setSliceViewerLayers(nodes.fixed, nodes.warped, foregroundOpacity=0.5, fit=True)
        self._status.say(_summary(report, self._which_model))
        rows = report.get("steps") or []
        self._names = stage_names(rows)
        self._show_steps()
        answer = next((n for n, row in enumerate(rows) if row.get("answer")), None)
        pictures = self._steps.rows if self._steps is not None else []
        ui.stepSlider.value = pictures.index(answer) if answer in pictures else ui.stepSlider.maximum
        ui.noModelButton.visible = _knows_no_such_images(report)
        if not _took_steps(report):
            ui.moreButton.text = _("Fit longer")
            ui.moreButton.toolTip = _("Go on fitting from this result; its nodes are updated.")
        else:
            ui.moreButton.text = _("One more step")
            ui.moreButton.toolTip = _("Take one more step from this result; its nodes are updated.")
        seconds = (report.get("seconds") or {}).get("total")
        if self._learns is not None and seconds is not None:
            choice, voxels, estimate = self._learns
            self._expected.learn(choice, voxels, seconds, estimate)
            qt.QSettings().setValue(TIMES, self._expected.to_text())
        for function in self.on_result:
            function(nodes)

    def _offer_estimate(self, job: Job, nodes: RegistrationNodes) -> None:
        """Estimate the error of a result now, or let the user ask for it, as was chosen when it was begun."""
        p, kept = self._parameters, job.params["options"]["trust"] == "later"
        if kept and p is not None and p.estimate is not EstimatedError.OFF:
            at_once = p.estimate is EstimatedError.ON or is_quick(nodes.report)
            self._estimate.offer(job.params["output"], nodes, at_once)

    def _show_estimate(self, nodes: RegistrationNodes) -> None:
        for function in self.on_estimate:
            function(nodes)

    def _undo(self) -> None:
        """Restore the scene and the views as before the run."""
        if self._before is not None:
            self._before.restore()
        if self._steps is not None:
            self._steps.undo()
        self._show_steps()

    def _drop_steps(self) -> None:
        """Leave the stages of the last registration to the user; the slider shows them no longer."""
        self._steps, self._last = None, None
        self._correct.forget()
        self.ui.resultWidget.visible = False

    # ----------------------------------------------------------------------------------------------- what it looks like

    def _update(self, _caller=None, _event=None) -> None:
        """Enable what can be pressed, and say why the rest cannot."""
        p, ui = self._parameters, self.ui
        running = self._run is not None
        model = self._model()
        if p is None or p.fixedVolume is None or p.movingVolume is None:
            reason = _("Choose a fixed and a moving volume.")
        elif p.fixedVolume is p.movingVolume:
            reason = _("The fixed and the moving volume are the same; choose two.")
        elif model is None or model.problem:
            reason = model.problem if model is not None else _("Choose a model.")
        else:
            reason = ""
        _disable(self._of_steps, self._why_no_steps())
        fits = p is None or p.fit is not Fit.OFF
        _disable(self._of_presets, "" if fits else _("Presets are for the fit, which is switched off."))
        self._show_expected_time()
        ui.registerButton.enabled = not reason and not running and not self._installing
        ui.registerButton.toolTip = reason or _("Register the moving volume to the fixed one.")
        same = self._last is not None and not running and self._last[0] == self._what()
        ui.moreButton.enabled = same and self._last[1].state is not None
        self._correct.show(self._last[1] if self._last is not None else None, same)
        if not running and not self._installing and self._last is None and ui.statusLabel.text in ("", self._reason):
            self._status.say(reason)
        self._reason = reason

    def _why_no_steps(self) -> str:
        """Return why the number of steps cannot be chosen; "" where it can."""
        if self._parameters is None or has_named_model(self._parameters):
            return ""
        if self._parameters.model == NO_MODEL:
            return _("Without a model there are no steps of a network.")
        return _("A model that is chosen by the images takes the steps it was trained with; choose one to change them.")

    def _show_expected_time(self) -> None:
        """Show how long each preset will take, as earlier runs tell, and where there are none the engine."""
        voxels = self._voxels() if self._parameters is not None else 0
        known = {preset: self._expected.seconds(self._choice(preset), voxels) for preset in Preset} if voxels else {}
        if None in known.values():
            estimates = self._ask_time(self._question())
            for preset in [preset for preset, seconds in known.items() if seconds is None]:
                if preset.value in estimates:
                    known[preset] = self._expected.corrected(estimates[preset.value])
        times = [(preset.label(), seconds) for preset, seconds in known.items()]
        if all(seconds is None for _preset, seconds in times):
            self.ui.expectedTimeLabel.text = _("no estimate yet")
            return
        self.ui.expectedTimeLabel.text = ", ".join(
            _("{preset}: no estimate yet").format(preset=preset)
            if seconds is None
            else _("{preset}: about {time}").format(preset=preset, time=duration(max(1, round(seconds))))
            for preset, seconds in times
        )

    def _ask_time(self, question: str) -> dict[str, float]:
        """Return the engine's estimates by preset, as soon as there are some: it is asked without waiting."""
        if question and question not in self._estimates and self._devices and self._run is None:
            if self._asked is not None and self._asked[0] != question:
                self._stop_asking()
            if self._asked is None:
                try:
                    self._asked = question, self.logic.client().request("expect", json.loads(question))
                except EngineError:
                    return {}
                self._timer.start()
        return self._estimates.get(question, {})

    def _question(self) -> str:
        """Return what the engine is asked for the time of each preset; "" where a volume cannot be used."""
        p = self._parameters
        try:
            size = size_of(p.fixedVolume)
        except InputError:
            return ""
        options = replace(chosen_options(p), preset=Preset.BEST.value)
        chosen = {"model": p.model, "device": p.device, "threads": self.ui.threadsSpinBox.value or None}
        return json.dumps({**chosen, "options": to_dict(options), "fixed": size})

    def _stop_asking(self) -> None:
        """Leave the engine to more important work."""
        if self._asked is not None:
            self.logic.client().cancel(self._asked[1])
            self._asked = None

    def _finish_asking(self) -> None:
        (question, request), self._asked = self._asked, None
        try:
            self._estimates[question] = request.value()["seconds"]
        except EngineCancelled:
            return
        except EngineError:
            self._estimates[question] = {}
        self._show_expected_time()

    def _choice(self, preset: Preset) -> str:
        """Return what the time of a registration depends on, but for the size of the volumes."""
        p = self._parameters
        options = replace(chosen_options(p), preset=preset.value)
        return f"{p.model}, {p.device}, {self.ui.threadsSpinBox.value} threads, {options}"

    def _voxels(self) -> int:
        """Return how many voxels the two volumes have; 0 where one is missing."""
        images = [
            node.GetImageData() if node is not None else None
            for node in (self._parameters.fixedVolume, self._parameters.movingVolume)
        ]
        return 0 if None in images else sum(image.GetNumberOfPoints() for image in images)

    def _what(self) -> tuple:
        """Return what must be unchanged for going on from the result."""
        p = self._parameters
        nodes = (p.fixedVolume, p.movingVolume, p.fixedLabels, p.movingLabels, p.initialTransform)
        nodes += (p.fixedMask, p.fixedIgnore, p.movingMask, p.movingIgnore)
        return (*[node.GetID() if node is not None else None for node in nodes], p.model)

    def _show_running(self, running: bool) -> None:
        ui = self.ui
        ui.settingsWidget.enabled = not running
        ui.cancelButton.visible = ui.cancelButton.enabled = running
        ui.progressBar.visible = running
        ui.progressBar.value = 0
        self._update()

    def _show_steps(self) -> None:
        count = self._steps.count if self._steps is not None else 0
        slider = self.ui.stepSlider
        blocked = slider.blockSignals(True)
        slider.maximum = max(0, count - 1)
        slider.value = slider.maximum
        slider.blockSignals(blocked)
        slider.enabled = count > 1
        self.ui.resultWidget.visible = count > 0 or self._last is not None
        self.ui.moreButton.visible = self.ui.correctSection.visible = self._last is not None
        self.ui.stepLabel.text = self._step_text(slider.value) if count else ""

    def _show_step(self, item: int) -> None:
        if self._steps is not None and self._steps.count:
            self._steps.show(item)
            self.ui.stepLabel.text = self._step_text(item)

    def _step_text(self, item: int) -> str:
        """Return the name of the stage with this position in the sequence."""
        row = self._steps.rows[item]
        return self._names[row] if row < len(self._names) else ""

    def _fail(self, text: str, details: str = "") -> None:
        """Show what went wrong; the details are in the tool tip and in Slicer's console."""
        self._status.fail(text, details.splitlines() or self.logic.client().log, details)
        if details:
            print(details)

    @staticmethod
    def _folders() -> dict[str, str]:
        return {"models": slicer.util.settingsValue(MODELS_FOLDER, "")}

    # ----------------------------------------------------------------------------------------------- models and devices

    def _model(self) -> models.Model | models.Choice | None:
        index = self.ui.modelSelector.currentIndex
        return self._models[index] if 0 <= index < len(self._models) else None

    def _choose_model(self) -> None:
        model = self._model()
        self.ui.cardLabel.text = models.describe(model) if model is not None else _("No model is installed.")
        if model is not None and self._parameters is not None:
            if self._parameters.model != model.name and "preprocessing" in model.card:
                self._parameters.steps = min(MAX_STEPS, max(1, model.card["preprocessing"].get("steps", 2)))
            self._parameters.model = model.name
        self._update()

    def _use_settings(self, settings: RegistrationSettings | None) -> None:
        """Choose what saved settings say; None forgets those of their options that no widget shows.

        Raises:
            MorphSeekError: their model is not there.
        """
        p = self._parameters
        if settings is None:
            p.otherOptions = ""
            return
        check_model_choice(settings.model)
        p.model = NO_MODEL  # so that another one sets the steps it was trained with
        self.refresh_models(settings.model)
        use_options(p, settings.options)
        counts = other_options(p).get("fit_iterations")
        words = _("The settings '{name}' are chosen.").format(name=settings.name)
        if counts:
            words += " " + _("Iterations of the fit: {n}.").format(n="/".join(map(str, counts)))
        self._status.say(words)

    def _browse(self) -> None:
        path = qt.QFileDialog.getOpenFileName(
            self.widget, _("Choose a model"), "", _("MorphSeek models (*.safetensors)")
        )
        if path:
            self.refresh_models(path)

    def _set_models_folder(self, folder: str) -> None:
        qt.QSettings().setValue(MODELS_FOLDER, folder)
        self.refresh_models()

    def _set_engine_python(self, path: str) -> None:
        """Run the engine by another Python from now on, if the path is of a program; empty for Slicer's own."""
        path = path.strip()
        if self._say_engine_python(path) or path == self.logic.engine_python():
            return
        qt.QSettings().setValue(ENGINE_PYTHON, path)
        self._hello, self._devices = None, []
        self._update_setup()
        self._python_timer.start()

    def _say_engine_python(self, path: str) -> str:
        """Say below the line why a path cannot be used; return that sentence, "" for one that can."""
        if not path:
            problem = ""
        elif not Path(path).exists():
            problem = _("There is no file {path}.").format(path=path)
        elif Path(path).is_dir():
            problem = _("{path} is a folder; choose the Python program in it.").format(path=path)
        elif not os.access(path, os.X_OK):
            problem = _("{path} is not a program that can be run; choose a Python.").format(path=path)
        else:
            problem = ""
        if problem:
            used = self.logic.engine_python()
            problem += " " + (
                _("The engine still runs with {python}.").format(python=used)
                if used and used != path
                else _("Choose another one, or press Reset for Slicer's own Python.")
            )
        self.ui.enginePythonLabel.text = problem
        self.ui.enginePythonLabel.visible = bool(problem)
        self.ui.resetPythonButton.enabled = bool(path)
        return problem

    def _set_threads(self, threads: int) -> None:
        qt.QSettings().setValue(THREADS, threads)
        self._update()

    def _ask_devices(self) -> None:
        """Ask the engine, without waiting; the answer fills the list."""
        if self._run is not None or self._hello is not None or not self._ready():
            return
        try:
            self._hello = self.logic.client().request("hello")
        except EngineError as problem:
            self._fail(sentence(problem))
            return
        self._timer.start()

    def _finish_hello(self) -> None:
        hello, self._hello = self._hello, None
        try:
            self._devices = hello.value()["devices"]
        except EngineError as problem:
            self._fail(sentence(problem), problem.details)
            return
        self._show_devices(self._devices)
        self._update()

    def _show_devices(self, devices: list[dict]) -> None:
        selector = self.ui.deviceSelector
        wanted = self._parameters.device if self._parameters is not None else "auto"
        blocked = selector.blockSignals(True)
        selector.clear()
        selector.addItem(_("Automatic"), "auto")
        for device in devices:
            label = device["label"]
            if "free_bytes" in device:
                label = _("{label}, {n:.1f} GB free").format(label=label, n=device["free_bytes"] / 1e9)
            selector.addItem(label, device["name"])
        selector.currentIndex = max(0, selector.findData(wanted))
        selector.blockSignals(blocked)
        self._choose_device()

    def _choose_device(self) -> None:
        if self._parameters is not None:
            self._parameters.device = self.ui.deviceSelector.currentData or "auto"

    # --------------------------------------------------------------------------------------------------- the first time

    def _ready(self) -> bool:
        """Return whether the engine can start: its packages are there, or it has a Python of its own."""
        return bool(self.logic.engine_python()) or not dependencies.missing()

    def _update_setup(self) -> None:
        missing = [] if self.logic.engine_python() else dependencies.missing()
        self.ui.setupFrame.visible = bool(missing) or self._installing
        if missing and not self._installing:
            self.ui.setupLabel.text = _(
                "MorphSeek's engine needs Python packages that Slicer does not have yet: {names}. They are installed "
                "once, with your consent; nothing that Slicer brings is replaced. PyTorch is large: some gigabytes "
                "with GPU support."
            ).format(names=", ".join(missing))

    def install(self) -> None:
        """Ask the user, then install what is missing and show the log."""
        missing = dependencies.missing()
        if self._installing:
            return
        faster = [_("{name} (optional: faster on the processor)").format(name=name) for name in dependencies.optional()]
        question = _("Install these Python packages for MorphSeek?\n\n{names}").format(
            names="\n".join([*missing, *faster])
        )
        if missing and not slicer.util.confirmOkCancelDisplay(question, "MorphSeek"):
            self._installed(dependencies.Declined())
            return
        self._installing = True
        self.ui.installButton.enabled = False
        self.ui.installLog.visible = True
        self.ui.installLog.clear()
        self._update()
        self._status.say(_("Installing ..."))
        dependencies.install(self.ui.installLog.appendPlainText, self._installed)

    def _installed(self, problem: Exception | None) -> None:
        self._installing = False
        self.ui.installButton.enabled = True
        self._update_setup()
        then, self._after_install = self._after_install, None
        if isinstance(problem, dependencies.Declined):
            self._status.say(_("Nothing was installed. MorphSeek can register as soon as its packages are installed."))
        elif problem is not None:
            self._fail(sentence(problem))
        else:
            self._status.say(_("All packages are installed."))
            self.logic.close_engine()
            if then is not None:
                then()
            else:
                self._ask_devices()
        self._update()


def _with_help(*widgets) -> list[tuple]:
    """Return widgets that may be disabled, each with its tool tip."""
    return [(widget, widget.toolTip) for widget in widgets]


def _disable(widgets: list[tuple], reason: str) -> None:
    """Disable widgets of :func:`_with_help` and say why in their tool tips; enable them where there is no reason."""
    for widget, help_text in widgets:
        widget.enabled = not reason
        widget.toolTip = reason or help_text


def _took_steps(report: dict) -> bool:
    """Return whether a network moved the image; without a model, or by one of features, none did."""
    return any(row.get("stage") == "network" for row in report.get("steps") or [])


def _model_of(report: dict) -> dict | None:
    """Return what a report says of the model; None without one."""
    return report.get("model")


def _knows_no_such_images(report: dict) -> bool:
    """Return whether the model of a registration was not trained on images of this size."""
    codes = {warning.get("code") for warning in report.get("warnings") or []}
    return _model_of(report) is not None and UNKNOWN_SIZE in codes


def _summary(report: dict, which_model: str) -> str:
    """Return the result in a few lines.

    Args:
        report: of the engine.
        which_model: what the engine said of the model where it chose one.
    """
    model, similarity, dice = _model_of(report), report.get("similarity"), report.get("dice")
    named = _("No model.") if model is None else _("Model: {title}.").format(title=model["title"] or model["name"])
    lines = [which_model or named, quality.masks_sentence(report), quality.beside_sentence(report)]
    if similarity:
        before, after = similarity["aligned"], similarity["warped"]
        lines.append(_("Similarity {before:.3f} to {after:.3f} (1 is best).").format(before=before, after=after))
    if dice:
        mean = dice["mean"]
        lines.append(
            _("Dice {before:.3f} to {after:.3f}, mean of {n} labels.").format(
                before=mean["aligned"], after=mean["warped"], n=len(dice["labels"])
            )
        )
    if landmarks := report.get("landmarks"):
        mean = landmarks["mean"]
        lines.append(
            _("Landmarks {before:.2f} to {after:.2f} mm apart, mean of {n}.").format(
                before=mean["aligned"], after=mean["warped"], n=len(landmarks["points"])
            )
        )
    lines += summary(report)
    found = folds(report)
    if found is not None:
        lines.append(quality.folds_sentence(found))
    seconds = (report.get("seconds") or {}).get("total")
    if seconds is not None:
        lines.append(_("{n:.1f} s on {device}.").format(n=seconds, device=report.get("device", "?")))
    lines += [f"⚠ {warning['message']}" for warning in report.get("warnings") or []]
    if _knows_no_such_images(report):
        lines.append(_("'No model (any anatomy)' registers them without what a model has learned."))
    return "\n".join(filter(None, lines))
