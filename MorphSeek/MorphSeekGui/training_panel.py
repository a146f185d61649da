"""The section Fine-tune: cases, choices, a training that may outlive Slicer, its curves, its figures before and after.

The panel holds no state of a training: all of it is in the run's folder (training_run.py), so a run that another Slicer
started looks the same here. A timer looks into the folder while a process works in it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import qt
import slicer
import slicer.util

from MorphSeekLib.protocol.messages import Answer, Progress
from MorphSeekLib.protocol.options import SIMILARITIES, TrainingOptions
from MorphSeekLib.protocol.run_folder import CASES, STAGES
from MorphSeekLib.protocol.startup import MAX_STEPS

from . import models
from .engine_client import EngineCancelled, EngineClient, EngineError
from .folder_process import RunError
from .messages import sentence
from .panel import Panel
from .register_panel import MODELS_FOLDER
from .scene import InputError, _
from .training_cases import export_cases, matching_cases
from .training_plot import CurveView
from .training_run import TrainingRun, create_run, find_runs
from .training_texts import distinct_names, figures_table, file_name, size_text, status_sentence
from .widgets import FolderButton, fit_height, ink

TRAININGS_FOLDER = "MorphSeek/TrainingsFolder"
_POLL_MS = 1000
_ENGINE_MS = 50  # how often the engine is asked what is new while it checks cases
_MOMENT = 0.05  # seconds of copying, after which the window may answer
_LISTED = 6  # labels that the summary names
_WIDEST_REMARK = 90  # pixels; a longer one is in its tool tip

# option -> the box of numbers that chooses it
_BOXES = {
    "spacing": "spacingBox",
    "steps": "stepsBox",
    "learning_rate": "rateBox",
    "seed": "seedBox",
    "smoothness": "smoothnessBox",
    "folding": "foldingBox",
}
_FINETUNE_BOXES = {
    "finetune_smoothness": "smoothnessFinetuneBox",
    "dice": "diceBox",
    "features": "featuresBox",
    "augmentation": "augmentationBox",
    "policy": "policyBox",
    "trajectories": "trajectoriesBox",
    "reward_dice": "rewardDiceBox",
    "reward_folding": "rewardFoldingBox",
}


def trainings_folder() -> Path:
    """Return where the folders of the runs are kept."""
    return Path(slicer.util.settingsValue(TRAININGS_FOLDER, "") or Path.home() / "MorphSeek" / "Trainings")


def models_folder() -> Path:
    """Return where finished models go."""
    return Path(slicer.util.settingsValue(MODELS_FOLDER, "") or Path.home() / "MorphSeek" / "Models")


class TrainingPanel(Panel):
    """See the module's text.

    Attributes:
        on_model: functions called with the path of a model when a training has made one.
    """

    FILE = "Training.ui"

    def __init__(self, parent, logic) -> None:
        super().__init__(parent, logic)
        self.on_model: list[Callable[[Path], None]] = []
        self.run: TrainingRun | None = None
        self._runs: list[TrainingRun] = []
        self._alive = False
        self._curves = CurveView(self.ui.curveBox, self.ui.plotButton, self._figures)
        self._client: EngineClient | None = None
        self._hello = None
        self._request = None
        self._export: Iterator[str] | None = None
        self._exported: tempfile.TemporaryDirectory | None = None
        self._scene_cases: list[tuple[str, str]] = []  # node IDs
        self._needs_labels = True
        self._report: dict | None = None  # of the check, while it is true of what is chosen
        self._status = self.message(self.ui.statusLabel, self.ui.copyDetailsButton, _folders)
        self._checked = self.message(self.ui.casesSummary, self.ui.copyCheckDetailsButton, _folders)
        self._timer = self.timer(self.refresh, _POLL_MS)
        self._check_timer = self.timer(self._go_on_checking, _ENGINE_MS)
        self._folder = FolderButton(self.ui.casesFolder, on_choice=self._forget_check)
        self._show_options()
        self._connect()
        self.ui.checkProgress.visible = False
        self.ui.casesTable.visible = False
        self._set_up_cases_table()
        self.ui.figuresText.visible = False
        self._show_source()
        self._show_stages()

    def _show_options(self) -> None:
        """Show the defaults of the engine in the boxes."""
        ui = self.ui
        ui.stepsBox.maximum = MAX_STEPS
        for name, box in (_BOXES | _FINETUNE_BOXES).items():
            if getattr(TrainingOptions, name) is not None:  # the check of the cases suggests the spacing
                getattr(ui, box).value = getattr(TrainingOptions, name)
        for name in SIMILARITIES:
            ui.similarityBox.addItem(name)
        ui.similarityBox.setCurrentText(TrainingOptions.similarity)
        self._show_budget()

    def _set_up_cases_table(self) -> None:
        """Fit all columns into the panel: the name of the case, often a long path, takes what the others leave."""
        table = self.ui.casesTable
        table.verticalHeader().visible = False
        table.verticalHeader().defaultSectionSize = 24
        table.setWordWrap(False)
        header = table.horizontalHeader()
        header.setMinimumSectionSize(30)
        modes = qt.QHeaderView.Stretch, qt.QHeaderView.Interactive, *[qt.QHeaderView.ResizeToContents] * 3
        for column, mode in enumerate(modes):
            header.setSectionResizeMode(column, mode)

    def _connect(self) -> None:
        ui = self.ui
        ui.sourceBox.connect("currentIndexChanged(int)", self._show_source)
        ui.caseVolume.connect("currentNodeChanged(vtkMRMLNode*)", self._show_scene_buttons)
        ui.caseLabels.connect("currentNodeChanged(vtkMRMLNode*)", self._show_scene_buttons)
        ui.sceneCases.connect("currentRowChanged(int)", self._show_scene_buttons)
        ui.addCase.connect("clicked(bool)", self.add_case)
        ui.addMatching.connect("clicked(bool)", self.add_matching)
        ui.removeCase.connect("clicked(bool)", self.remove_case)
        ui.checkButton.connect("clicked(bool)", self.check)
        ui.startBox.connect("currentIndexChanged(int)", self._show_stages)
        ui.featuresCheck.connect("toggled(bool)", self._stages_changed)
        ui.warmupCheck.connect("toggled(bool)", self._show_stages)
        ui.finetuneCheck.connect("toggled(bool)", self._stages_changed)
        ui.budgetUnit.connect("currentIndexChanged(int)", self._show_budget)
        ui.nameEdit.connect("textChanged(QString)", self._show_start)
        ui.keepCheck.connect("toggled(bool)", self._keep)
        ui.startButton.connect("clicked(bool)", self.start)
        ui.runsBox.connect("currentIndexChanged(int)", self._choose_run)
        ui.stopButton.connect("clicked(bool)", self.stop)
        ui.resumeButton.connect("clicked(bool)", self.resume)
        ui.folderButton.connect("clicked(bool)", self.open_folder)

    # -------------------------------------------------------------------------------------- what the module calls

    def setMRMLScene(self, scene) -> None:
        """Take the nodes from this scene, and put the plots into it."""
        super().setMRMLScene(scene)
        self._curves.use_scene(scene)

    def enter(self) -> None:
        """Show the models to start from, and the runs."""
        self._fill_start_box()
        self.find_runs()

    def cleanup(self) -> None:
        """End everything; a training goes on if it was asked to, and else stops and keeps its state."""
        super().cleanup()
        self._end_check()
        self._drop_export()
        for run in self._runs:
            run.release()
        self._runs = []
        self.run = None
        self._curves.remove()

    # ---------------------------------------------------------------------------------------------------- cases

    def add_case(self, *_args) -> None:
        """Add the chosen volume and labels as a case."""
        self._add_cases([(self.ui.caseVolume.currentNode(), self.ui.caseLabels.currentNode())])

    def add_matching(self, *_args) -> None:
        """Add every volume with labels of its name as a case."""
        labels = slicer.util.getNodesByClass("vtkMRMLSegmentationNode")
        labels += slicer.util.getNodesByClass("vtkMRMLLabelMapVolumeNode")
        volumes = [
            node
            for node in slicer.util.getNodesByClass("vtkMRMLScalarVolumeNode")
            if node.GetClassName() == "vtkMRMLScalarVolumeNode" and not node.GetHideFromEditors()
        ]
        found = matching_cases(volumes, labels)
        if not found:
            self._fail_check(_("No volume has labels of its name; choose a volume and its labels and press Add."))
            return
        self._add_cases(found)

    def _add_cases(self, pairs: list[tuple]) -> None:
        for volume, labels in pairs:
            if any(volume.GetID() == known for known, _labels in self._scene_cases):
                continue
            self._scene_cases.append((volume.GetID(), labels.GetID()))
            self.ui.sceneCases.addItem(f"{volume.GetName()}  +  {labels.GetName()}")
        self._forget_check()

    def remove_case(self, *_args) -> None:
        """Take the chosen case off the list."""
        row = self.ui.sceneCases.currentRow
        if row >= 0:
            self.ui.sceneCases.takeItem(row)
            del self._scene_cases[row]
            self._forget_check()

    def _show_source(self, *_args) -> None:
        from_scene = self.ui.sourceBox.currentIndex == 1
        self.ui.folderPage.visible, self.ui.scenePage.visible = not from_scene, from_scene
        self._forget_check()

    def _show_scene_buttons(self, *_args) -> None:
        chosen = self.ui.caseVolume.currentNode() is not None and self.ui.caseLabels.currentNode() is not None
        self.ui.addCase.enabled = chosen
        self.ui.removeCase.enabled = self.ui.sceneCases.currentRow >= 0

    # ---------------------------------------------------------------------------------------------------- check

    def check(self, *_args) -> None:
        """Check the cases; pressed again meanwhile, cancel it."""
        if self._checking():
            self._end_check()
            self._checked.say(_("The check was canceled."))
            return
        self._forget_check()
        self._export_warnings = []
        self.ui.checkButton.text = _("Cancel")
        self.ui.checkProgress.maximum = 0  # busy, until there is something to count
        self.ui.checkProgress.visible = True
        try:
            if self.ui.sourceBox.currentIndex == 1:
                cases = [tuple(self.scene.GetNodeByID(i) for i in ids) for ids in self._scene_cases]
                if not cases or any(None in case for case in cases):
                    raise InputError(
                        _("A case was removed from the scene; remove it from the list, too.")
                        if cases
                        else _("The list has no case yet; choose a volume and its labels and press Add.")
                    )
                trainings = trainings_folder()
                trainings.mkdir(parents=True, exist_ok=True)
                self._exported = tempfile.TemporaryDirectory(prefix=".cases-", dir=trainings)
                self._export = export_cases(cases, Path(self._exported.name), self._export_warnings.append)
                self.ui.checkProgress.maximum = 1000
                self._check_timer.setInterval(0)
                self._checked.say(_("Copying the cases from the scene"))
            elif not self._folder.folder:
                raise InputError(_("Choose the folder with the cases first."))
            else:
                self._ask_engine(self._folder.folder)
        except (InputError, EngineError, OSError) as problem:
            self._end_check()
            self._drop_export()
            self._fail_check(sentence(problem))
            return
        self._check_timer.start()

    def _ask_engine(self, dataset: str) -> None:
        self.engine_python()  # refuses where there is no engine yet
        client = self.logic.client()
        if client is not self._client or self._hello is None or self._hello.error is not None:
            self._hello = None  # a client of another engine than before has other answers
        self._client = client
        self._checked.say(
            _("Waiting for the engine, which is still at work") if client.busy else _("Starting the engine")
        )
        if self._hello is None:
            self._hello = client.request("hello")
        self._check_timer.setInterval(_ENGINE_MS)
        params = {"dataset": str(dataset), "labels": self._needs_labels}
        self._request = self._client.request("check", params, self._on_check_progress)

    def _on_check_progress(self, progress: Progress) -> None:
        self.ui.checkProgress.maximum = max(1, progress["steps"])
        self.ui.checkProgress.value = progress["step"]
        self._checked.say(progress["message"])

    def _go_on_checking(self) -> None:
        try:
            if self._export is not None:
                if self._copy_for_a_moment():
                    return
                self._ask_engine(self._exported.name)
            self._client.poll()
            if not self._request.done:
                return
            report = self._request.value()
        except EngineCancelled:
            return
        except (InputError, EngineError, OSError) as problem:
            self._end_check()
            self._drop_export()
            self._fail_check(sentence(problem))
            return
        self._end_check()
        self._offer(self.ui.backboneBox, self._hello.result.get("backbones", []))
        self._offer(self.ui.deviceBox, ["auto", *(d["name"] for d in self._hello.result.get("devices", []))])
        self._show_report(report)

    def _copy_for_a_moment(self) -> bool:
        """Write pieces of the cases of the scene for some hundredths of a second; return whether there are more."""
        until = time.monotonic() + _MOMENT
        for copied in self._export:
            if time.monotonic() > until:
                self.ui.checkProgress.value = round(1000 * copied.share)
                self._checked.say(_("Copying {name}").format(name=copied.name))
                return True
        self._export = None
        return False

    def _offer(self, box, names: list[str]) -> None:
        """Add what the engine has to a box; what was chosen stays chosen."""
        chosen = box.currentText
        for name in names:
            if box.findText(name) < 0:
                box.addItem(name)
        box.setCurrentText(chosen)

    def _checking(self) -> bool:
        return self._export is not None or self._request is not None

    def _end_check(self) -> None:
        self._check_timer.stop()
        if self._request is not None and not self._request.done:
            self._client.cancel(self._request)
        if self._export is not None:
            self._export.close()  # with the file that is half written
        self._export = self._request = None
        self.ui.checkButton.text = _("Check the cases")
        self.ui.checkProgress.visible = False

    def _forget_check(self, *_args) -> None:
        """Drop the findings: what was checked is not what is chosen any more."""
        if self._checking():
            self._end_check()
        self._drop_export()
        self._report = None
        self.ui.casesTable.visible = False
        self._checked.say(_("The cases are checked before a training can start."))
        self._show_scene_buttons()
        self._show_start()

    def _drop_export(self) -> None:
        if self._exported is not None:
            self._exported.cleanup()
            self._exported = None

    def _show_report(self, report: Answer) -> None:
        self._report = report
        table = self.ui.casesTable
        table.setRowCount(len(report["cases"]))
        names = distinct_names([case["name"] for case in report["cases"]])
        for row, case in enumerate(report["cases"]):
            remarks = " ".join(case["problems"] + case["warnings"]) or _("good")
            labels = ", ".join(map(str, case["labels"]))
            count = str(len(case["labels"]))
            texts = [names[row], remarks, count, size_text(case["shape"]), size_text(case["spacing"])]
            tips = [case["name"], remarks, labels, *texts[3:]]
            for column, (text, tip) in enumerate(zip(texts, tips, strict=True)):
                item = qt.QTableWidgetItem(text)
                item.setToolTip(tip)
                if case["problems"]:
                    item.setForeground(qt.QBrush(qt.QColor(ink(self.widget, "bad"))))
                elif case["warnings"] and column == 1:
                    item.setForeground(qt.QBrush(qt.QColor(ink(self.widget, "warning"))))
                table.setItem(row, column, item)
        table.resizeColumnToContents(1)
        table.setColumnWidth(1, min(table.columnWidth(1), _WIDEST_REMARK))
        fit_height(table, 226)
        table.visible = True
        left_out = sum(bool(case["problems"]) for case in report["cases"])
        if report["problems"]:
            self._fail_check(" ".join(report["problems"]))
        else:
            names = [report["names"].get(str(label), str(label)) for label in report["common"]]
            text = _(
                "Cases to train on: {training}. Pairs to validate on: {validation}. Held-out pairs for the figures "
                "before and after: {test}. Labels in common: {labels}."
            ).format(
                training=report["training"],
                validation=report["validation_pairs"],
                test=report["test_pairs"],
                labels=", ".join(names[:_LISTED]) or _("none"),
            )
            if len(names) > _LISTED:
                text += " " + _("And {count} more; the tool tip lists all.").format(count=len(names) - _LISTED)
            if report["unlabeled"]:
                text += " " + _("Cases without labels besides: {count}.").format(count=report["unlabeled"])
            if left_out:
                text += " " + _("Left out because of problems: {count}.").format(count=left_out)
            self._checked.say(" ".join([text, *self._export_warnings, *report["warnings"]]))
            self.ui.casesSummary.toolTip = ", ".join(names)
            if report["spacing"]:
                self.ui.spacingBox.value = report["spacing"]
        self._show_start()

    def _fail_check(self, text: str) -> None:
        self._checked.fail(text, self.logic.client().log)

    # -------------------------------------------------------------------------------------------------- settings

    def _fill_start_box(self) -> None:
        box = self.ui.startBox
        chosen = box.currentData
        blocked = box.blockSignals(True)
        box.clear()
        box.addItem(_("from scratch"), "")
        for model in models.available(models_folder()):
            if not model.problem:
                box.addItem(model.path.stem, str(model.path))
                box.setItemData(box.count - 1, model.title, qt.Qt.ToolTipRole)
        box.setCurrentIndex(max(0, box.findData(chosen)))
        box.blockSignals(blocked)
        self._show_stages()

    def _stages_changed(self, *_args) -> None:
        """Drop the findings of the check where labels are needed in every case now, or no longer."""
        before = self._needs_labels
        self._show_stages()
        if self._needs_labels != before:
            self._forget_check()

    def _show_stages(self, *_args) -> None:
        from_scratch = not self.ui.startBox.currentData
        self.ui.featuresCheck.enabled = from_scratch
        features = self._chosen("features")
        for name in ("warmupCheck", "finetuneCheck"):
            getattr(self.ui, name).enabled = not features
        finetune = self._chosen("finetune")
        self._needs_labels = features or finetune
        self.ui.finalCheck.enabled = features or finetune
        self.ui.spacingBox.enabled = from_scratch
        self.ui.backboneBox.enabled = from_scratch and not features
        for name in (*_FINETUNE_BOXES.values(), "klBox"):
            getattr(self.ui, name).enabled = finetune
        self._show_start()

    def _chosen(self, stage: str) -> bool:
        """Return whether a stage is checked, and may be."""
        box = getattr(self.ui, f"{stage}Check")
        return bool(box.checked and box.enabled)

    def _show_budget(self, *_args) -> None:
        self.ui.budgetBox.value = TrainingOptions.minutes if self._in_minutes() else TrainingOptions.iterations

    def _in_minutes(self) -> bool:
        return self.ui.budgetUnit.currentIndex == 0

    def _show_start(self, *_args) -> None:
        reason = self._why_not()
        self.ui.startButton.enabled = not reason
        self.ui.startButton.toolTip = reason or _("Start the training.")

    def _why_not(self) -> str:
        if self._report is None:
            return _("Check the cases first.")
        if self._report["problems"]:
            return _("The cases cannot be used; see above.")
        if not self.ui.nameEdit.text.strip():
            return _("Give the new model a name.")
        if not any(self._chosen(stage) for stage in STAGES if stage != "final"):
            return _("Choose a stage.")
        return ""

    def options(self) -> TrainingOptions:
        """Return what is chosen."""
        ui = self.ui
        name, budget = ui.nameEdit.text.strip(), ui.budgetBox.value
        return TrainingOptions(
            name=name,
            dataset=CASES if self._exported is not None else self._folder.folder,
            model=str(models_folder() / f"{file_name(name)}.safetensors"),
            init=ui.startBox.currentData or None,
            stages=tuple(stage for stage in STAGES if self._chosen(stage)),
            backbone=ui.backboneBox.currentText,
            minutes=budget if self._in_minutes() else None,
            iterations=TrainingOptions.iterations if self._in_minutes() else int(budget),
            similarity=ui.similarityBox.currentText,
            kl_target=ui.klBox.value or None,
            device=ui.deviceBox.currentText.strip() or TrainingOptions.device,
            leave_out=tuple(case["name"] for case in self._report["cases"] if case["problems"]),
            **{option: getattr(ui, box).value for option, box in (_BOXES | _FINETUNE_BOXES).items()},
        )

    # ---------------------------------------------------------------------------------------------------- the run

    def start(self, *_args) -> None:
        """Create a run of what is chosen, and start it."""
        options = self.options()
        if Path(options.model).exists():
            self._fail(_("There is a model named '{name}' already; choose another name.").format(name=options.name))
            return
        try:
            run = create_run(trainings_folder(), options)
        except RunError as problem:
            self._fail(sentence(problem))
            return
        try:
            if self._exported is not None:
                Path(self._exported.name).chmod(0o755)
                os.replace(self._exported.name, run.folder / CASES)  # beside it, so that nothing is copied
            run.start(
                bool(self.ui.keepCheck.checked), self.engine_python(), environment=self.logic.engine_environment()
            )
        except (InputError, RunError, OSError) as problem:
            if (run.folder / CASES).exists():
                os.replace(run.folder / CASES, self._exported.name)
            shutil.rmtree(run.folder, ignore_errors=True)
            self._fail(sentence(problem))
            return
        self._runs.insert(0, run)
        self._list_runs(run)
        self.ui.runsSection.collapsed = False
        self._forget_check()

    def stop(self, *_args) -> None:
        """Ask the run to stop; pressed a second time, end its process at once."""
        if self.run is None:
            return
        try:
            if self.run.status().state == "stopping":
                self.run.kill()
            else:
                self.run.stop()
        except (InputError, RunError, OSError) as problem:
            self._fail(sentence(problem))
            return
        self.refresh()

    def resume(self, *_args) -> None:
        """Go on where the run stopped."""
        if self.run is None:
            return
        try:
            self.run.start(
                bool(self.ui.keepCheck.checked), self.engine_python(), environment=self.logic.engine_environment()
            )
        except (InputError, RunError, OSError) as problem:
            self._fail(sentence(problem))
            return
        self.refresh()

    def open_folder(self, *_args) -> None:
        """Open the folder of the run in the file manager."""
        qt.QDesktopServices.openUrl(qt.QUrl.fromLocalFile(str(self.run.folder)))

    def find_runs(self) -> None:
        """List all runs; the chosen one stays chosen, else one that runs, else the newest."""
        known = {run.folder: run for run in self._runs}
        self._runs = [known.get(run.folder, run) for run in find_runs(trainings_folder(), models_folder())]
        chosen = self.run if self.run in self._runs else None
        if chosen is None:
            chosen = next((run for run in self._runs if run.is_running()), None)
        self._list_runs(chosen or (self._runs[0] if self._runs else None))

    def _list_runs(self, chosen: TrainingRun | None) -> None:
        box = self.ui.runsBox
        blocked = box.blockSignals(True)
        box.clear()
        for run in self._runs:
            box.addItem(f"{run.name}  ({run.folder.name})")
        if chosen is not None:
            box.setCurrentIndex(self._runs.index(chosen))
        box.blockSignals(blocked)
        self._choose_run()

    def _choose_run(self, *_args) -> None:
        index = self.ui.runsBox.currentIndex
        run = self._runs[index] if 0 <= index < len(self._runs) else None
        if run is not self.run:
            self.run, self._alive = run, False
        if run is not None:
            blocked = self.ui.keepCheck.blockSignals(True)
            self.ui.keepCheck.checked = run.kept or (self.ui.keepCheck.checked and not run.is_running())
            self.ui.keepCheck.blockSignals(blocked)
        self.refresh()

    def _keep(self, on: bool) -> None:
        if self.run is not None and self.run.is_running():
            self.run.keep(on)

    def refresh(self) -> None:
        """Show where the chosen run stands; the timer goes on as long as a process works on it."""
        ui = self.ui
        if self.run is None:
            self._timer.stop()
            for button in (ui.stopButton, ui.resumeButton, ui.folderButton):
                button.enabled = False
            return
        status = self.run.status()
        ui.stopButton.enabled = status.alive
        ui.stopButton.text = _("Stop at once") if status.state == "stopping" else _("Stop")
        ui.resumeButton.enabled = status.resumable
        ui.folderButton.enabled = True
        ui.progressBar.value = round(1000 * status.fraction)
        if status.state == "failed":
            self._fail(status_sentence(status))
        else:
            self._status.say(status_sentence(status))
        self._curves.refresh()
        inks = ink(self.widget, "good"), ink(self.widget, "warning")
        ui.figuresText.text = figures_table(status.held_out, *inks) if status.held_out else ""
        ui.figuresText.visible = bool(status.held_out)
        log = "\n".join(self.run.log())
        if ui.logText.plainText != log:
            ui.logText.plainText = log
            ui.logText.verticalScrollBar().value = ui.logText.verticalScrollBar().maximum
        if status.alive:
            self._timer.start()
        else:
            self._timer.stop()
            if self._alive and status.state == "done":
                if not slicer.util.settingsValue(MODELS_FOLDER, ""):  # so that it is found there from now on
                    qt.QSettings().setValue(MODELS_FOLDER, str(Path(status.model).parent))
                self._fill_start_box()
                for listener in self.on_model:
                    listener(Path(status.model))
        self._alive = status.alive

    def _fail(self, text: str) -> None:
        self._status.fail(text, self.run.log() if self.run is not None else ())

    def _figures(self) -> tuple[str, list[dict[str, float]]]:
        """Return the title and the figures of the last stage that has any."""
        titles = {
            "features": _("features"),
            "warmup": _("warm-up"),
            "finetune": _("fine-tuning"),
            "final": _("all cases"),
        }
        found = {stage: self.run.curves(stage) for stage in STAGES} if self.run is not None else {}
        stage = next((stage for stage in reversed(STAGES) if found.get(stage)), None)
        return (f"{self.run.name}, {titles[stage]}", found[stage]) if stage is not None else ("", [])


def _folders() -> dict[str, str]:
    names = {"models": MODELS_FOLDER, "trainings": TRAININGS_FOLDER}
    return {what: slicer.util.settingsValue(name, "") for what, name in names.items()}
