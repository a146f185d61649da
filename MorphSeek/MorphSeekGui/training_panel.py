"""The Fine-tune section: cases, settings, a training that may outlive Slicer, its curves and what it brought.

The panel holds no state of a training: all of it lies in the run's folder (training_run.py), so that a run that another
Slicer started looks the same here as one's own. A timer looks into the folder while a process works in it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path

import qt
import slicer
import slicer.util

from . import dependencies, models
from .details import CopyDetails
from .engine_client import EngineCancelled, EngineClient, EngineError
from .faults import Fault
from .messages import fault_sentence, sentence
from .register_panel import MODELS_FOLDER
from .scene import InputError, _
from .training_cases import export_cases, matching_cases
from .training_curves import CHARTS, TrainingCurves, fit, has_curve, shows_all
from .training_run import STAGES, RunError, RunStatus, TrainingRun, create_run, find_runs
from .widgets import SWITCH_STYLE, FolderButton, fit_height, ink

TRAININGS_FOLDER = "MorphSeek/TrainingsFolder"
_POLL_MS = 1000
_ENGINE_MS = 50  # how often the engine is asked what is new while it checks cases
_MOMENT = 0.05  # seconds of copying, after which the window may answer
_LISTED = 6  # labels that the summary names
_WIDEST_REMARK = 90  # pixels; a longer one is in its tool tip

# settings that a network needs to train well from scratch, where they are not its defaults
_RECIPES = {
    "voxelmorph": {
        "encoder": [16, 32, 64, 64],
        "decoder": [64, 64, 32],
        "extra": [32, 16],
        "norm": "instance",
        "flow_stride": 2,
        "forces": 3,
    }
}
_FIGURES = {
    "dice": (_("Dice"), "{:.3f}", 1),
    "hd95": (_("HD95, mm"), "{:.2f}", -1),
    "folded_percent": (_("Folded cells, %"), "{:.3f}", -1),
    "njd_percent": (_("NJD, % (central differences)"), "{:.3f}", -1),
    "sdlogj": (_("SDlogJ"), "{:.3f}", -1),
}


def trainings_folder() -> Path:
    """Where the runs' folders are kept."""
    return Path(slicer.util.settingsValue(TRAININGS_FOLDER, "") or Path.home() / "MorphSeek" / "Trainings")


def models_folder() -> Path:
    """Where finished models go."""
    return Path(slicer.util.settingsValue(MODELS_FOLDER, "") or Path.home() / "MorphSeek" / "Models")


class TrainingPanel:
    """See the module's text.

    Attributes:
        widget: the section's content.
        on_checkpoint: functions called with the path of a checkpoint when a training has made one.
    """

    def __init__(self, parent, logic) -> None:
        self.logic = logic
        self.parent = parent
        self.widget = slicer.util.loadUI(str(Path(__file__).resolve().parents[1] / "Resources/UI/Training.ui"))
        parent.layout().addWidget(self.widget)
        self.ui = slicer.util.childWidgetVariables(self.widget)
        self.on_checkpoint: list[Callable[[Path], None]] = []
        self.run: TrainingRun | None = None
        self._runs: list[TrainingRun] = []
        self._alive = False
        self._curves: TrainingCurves | None = None
        self._layout_before = 0
        self._scene = None
        self._client: EngineClient | None = None
        self._hello = None
        self._request = None
        self._export: Iterator[str] | None = None
        self._exported: tempfile.TemporaryDirectory | None = None
        self._scene_cases: list[tuple[str, str]] = []  # node IDs
        self._report: dict | None = None  # of the check, while it is true of what is chosen
        self._details = CopyDetails(self.ui.copyDetailsButton, logic, _folders)
        self._check_details = CopyDetails(self.ui.copyCheckDetailsButton, logic, _folders)
        self._timer, self._check_timer = qt.QTimer(self.widget), qt.QTimer(self.widget)
        self._folder = FolderButton(self.ui.casesFolder, on_choice=self._forget_check)
        self._timer.setInterval(_POLL_MS)
        self._check_timer.setInterval(_ENGINE_MS)
        self._connect()
        self.ui.checkProgress.visible = False
        self.ui.casesTable.visible = False
        self.ui.plotButton.enabled = False
        self.ui.plotButton.styleSheet = SWITCH_STYLE
        self._set_up_cases_table()
        self.ui.figuresText.visible = False
        self._show_source()
        self._show_stages()

    def _set_up_cases_table(self) -> None:
        """All columns fit into the panel: the case's name, often a long path, takes what the others leave."""
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
        self._timer.connect("timeout()", self.refresh)
        self._check_timer.connect("timeout()", self._go_on_checking)
        ui.sourceBox.connect("currentIndexChanged(int)", self._show_source)
        ui.caseVolume.connect("currentNodeChanged(vtkMRMLNode*)", self._show_scene_buttons)
        ui.caseLabels.connect("currentNodeChanged(vtkMRMLNode*)", self._show_scene_buttons)
        ui.sceneCases.connect("currentRowChanged(int)", self._show_scene_buttons)
        ui.addCase.connect("clicked(bool)", self.add_case)
        ui.addMatching.connect("clicked(bool)", self.add_matching)
        ui.removeCase.connect("clicked(bool)", self.remove_case)
        ui.checkButton.connect("clicked(bool)", self.check)
        ui.startBox.connect("currentIndexChanged(int)", self._show_stages)
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
        ui.curveBox.connect("currentIndexChanged(int)", self._choose_curve)
        ui.plotButton.connect("toggled(bool)", self.plot)

    # -------------------------------------------------------------------------------------- what the module calls

    def setMRMLScene(self, scene) -> None:
        """The scene that nodes are taken from and plots are put into."""
        self._scene = scene
        self.widget.setMRMLScene(scene)
        self._curves = TrainingCurves(scene) if scene is not None else None

    def enter(self) -> None:
        """Show what there is to start from, and what runs."""
        self._fill_start_box()
        self.find_runs()

    def exit(self) -> None:
        """The training goes on, and is looked after, while the person is elsewhere."""

    def cleanup(self) -> None:
        """Let go of everything: a training goes on if it was asked to, and else stops and keeps its state."""
        self._timer.stop()
        self._check_timer.stop()
        self._end_check()
        self._details.close()
        self._check_details.close()
        self._drop_export()
        for run in self._runs:
            run.release()
        self._runs = []
        self.run = None
        if self._curves is not None:
            self._curves.remove()

    # ---------------------------------------------------------------------------------------------------- cases

    def add_case(self, *_args) -> None:
        """The chosen volume and labels become a case."""
        self._add_cases([(self.ui.caseVolume.currentNode(), self.ui.caseLabels.currentNode())])

    def add_matching(self, *_args) -> None:
        """Every volume with labels of its name becomes a case."""
        labels = slicer.util.getNodesByClass("vtkMRMLSegmentationNode")
        labels += slicer.util.getNodesByClass("vtkMRMLLabelMapVolumeNode")
        volumes = [
            node
            for node in slicer.util.getNodesByClass("vtkMRMLScalarVolumeNode")
            if node.GetClassName() == "vtkMRMLScalarVolumeNode" and not node.GetHideFromEditors()
        ]
        found = matching_cases(volumes, labels)
        if not found:
            self._say(_("No volume has labels of its name; choose a volume and its labels and press Add."), bad=True)
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
        """Check the cases; pressed again meanwhile, give it up."""
        if self._checking():
            self._end_check()
            self._say(_("The check was cancelled."))
            return
        self._forget_check()
        self._export_warnings = []
        self.ui.checkButton.text = _("Cancel")
        self.ui.checkProgress.maximum = 0  # busy, until there is something to count
        self.ui.checkProgress.visible = True
        try:
            if self.ui.sourceBox.currentIndex == 1:
                cases = [tuple(self._scene.GetNodeByID(i) for i in ids) for ids in self._scene_cases]
                if not cases or any(None in case for case in cases):
                    raise InputError(
                        _("A case has left the scene; remove it from the list.")
                        if cases
                        else _("The list has no case yet; choose a volume and its labels and press Add.")
                    )
                trainings = trainings_folder()
                trainings.mkdir(parents=True, exist_ok=True)
                self._exported = tempfile.TemporaryDirectory(prefix=".cases-", dir=trainings)
                self._export = export_cases(cases, Path(self._exported.name), self._export_warnings.append)
                self.ui.checkProgress.maximum = 1000
                self._check_timer.setInterval(0)
                self._say(_("Copying the cases from the scene"))
            elif not self._folder.folder:
                raise InputError(_("Choose the folder with the cases first."))
            else:
                self._ask_engine(self._folder.folder)
        except (InputError, EngineError, OSError) as problem:
            self._end_check()
            self._drop_export()
            self._say(sentence(problem), bad=True)
            return
        self._check_timer.start()

    def _ask_engine(self, dataset: str) -> None:
        self._python()  # refuses where there is no engine yet
        client = self.logic.client()
        if client is not self._client or self._hello is None or self._hello.error is not None:
            self._hello = None  # a client of another engine than before has other answers
        self._client = client
        self._say(_("Waiting for the engine, which is still at work") if client.busy else _("Starting the engine"))
        if self._hello is None:
            self._hello = client.request("hello")
        self._check_timer.setInterval(_ENGINE_MS)
        params = {"dataset": str(dataset), "labels": bool(self.ui.finetuneCheck.checked)}
        self._request = self._client.request("check", params, self._on_check_progress)

    def _python(self) -> str | None:
        """The Python that runs the engine, None for Slicer's own.

        Raises:
            InputError: that has no engine yet.
        """
        python = self.logic.engine_python() or None
        if python is None and dependencies.missing():
            raise InputError(_("The engine is not installed yet; press Install in the section Register."))
        return python

    def _on_check_progress(self, progress: dict) -> None:
        self.ui.checkProgress.maximum = max(1, progress["steps"])
        self.ui.checkProgress.value = progress["step"]
        self._say(progress["message"])

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
            self._say(sentence(problem), bad=True)
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
                self._say(_("Copying {name}").format(name=copied.name))
                return True
        self._export = None
        return False

    def _offer(self, box, names: list[str]) -> None:
        """Put what the engine has into a box; what was chosen stays."""
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
        """What was checked is not what is chosen any more."""
        if self._checking():
            self._end_check()
        self._drop_export()
        self._report = None
        self.ui.casesTable.visible = False
        self._say(_("The cases are checked before a training can start."))
        self._show_scene_buttons()
        self._show_start()

    def _drop_export(self) -> None:
        if self._exported is not None:
            self._exported.cleanup()
            self._exported = None

    def _show_report(self, report: dict) -> None:
        self._report = report
        table = self.ui.casesTable
        table.setRowCount(len(report["cases"]))
        names = distinct_names([case["name"] for case in report["cases"]])
        for row, case in enumerate(report["cases"]):
            remarks = " ".join(case["problems"] + case["warnings"]) or _("good")
            labels = ", ".join(map(str, case["labels"]))
            count = str(len(case["labels"]))
            texts = [names[row], remarks, count, _by(case["shape"]), _by(case["spacing"])]
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
            self._say(" ".join(report["problems"]), bad=True)
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
                text += " " + _("And {count} more; the tool tip has them all.").format(count=len(names) - _LISTED)
            self.ui.casesSummary.toolTip = ", ".join(names)
            if left_out:
                text += " " + _("Left out because of problems: {count}.").format(count=left_out)
            self._say(" ".join([text, *self._export_warnings, *report["warnings"]]))
            if report["spacing"]:
                self.ui.spacingBox.value = report["spacing"]
        self._show_start()

    def _say(self, text: str, bad: bool = False) -> None:
        self.ui.casesSummary.text = text
        self.ui.casesSummary.styleSheet = f"color: {ink(self.widget, 'bad')}" if bad else ""
        if bad:
            self._check_details.offer(text, self.logic.client().log)
        else:
            self._check_details.withdraw()

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
        """Fine-tuning needs labels in every case, warm-up does not: the check says something else."""
        self._forget_check()
        self._show_stages()

    def _show_stages(self, *_args) -> None:
        from_scratch = not self.ui.startBox.currentData
        if from_scratch and not self.ui.warmupCheck.checked:
            self.ui.warmupCheck.checked = True  # a fresh network has nothing to fine-tune
        self.ui.warmupCheck.enabled = not from_scratch
        for name in ("backboneBox", "spacingBox"):
            getattr(self.ui, name).enabled = from_scratch
        finetune = self.ui.finetuneCheck.checked
        for name in (
            "trajectoriesBox",
            "smoothnessFinetuneBox",
            "diceBox",
            "policyBox",
            "rewardDiceBox",
            "rewardFoldingBox",
            "klBox",
        ):
            getattr(self.ui, name).enabled = finetune
        self._show_start()

    def _show_budget(self, *_args) -> None:
        in_minutes = self.ui.budgetUnit.currentIndex == 0
        self.ui.budgetBox.value = 60 if in_minutes else 800

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
        if not (self.ui.warmupCheck.checked or self.ui.finetuneCheck.checked):
            return _("Choose a stage.")
        return ""

    def settings(self) -> dict:
        """run.json, as MorphSeekLib/app/runs.py: RunSettings reads it."""
        ui = self.ui
        in_minutes = ui.budgetUnit.currentIndex == 0
        iterations = 800 if in_minutes else int(ui.budgetBox.value)
        run = {
            "iterations": iterations,
            "steps": ui.stepsBox.value,
            "seed": ui.seedBox.value,
            "validate_every": max(1, iterations // 10),
            "save_every": 25,
        }
        rate = ui.rateBox.value
        loss = {
            "similarity": ui.similarityBox.currentText,
            "regularization": ui.smoothnessBox.value,
            "folding": ui.foldingBox.value,
        }
        start = ui.startBox.currentData
        warmup = {"loss": loss, "training": run | {"learning_rate": 3 * rate}}
        if not start:
            backbone = ui.backboneBox.currentText
            warmup["model"] = {"backbone": backbone, "backbone_settings": _RECIPES.get(backbone, {})}
            warmup["preprocessing"] = {"spacing": [ui.spacingBox.value] * 3, "align": "center"}
        finetune = {
            "loss": loss | {"regularization": ui.smoothnessFinetuneBox.value, "dice": ui.diceBox.value},
            "policy": {"trajectories": ui.trajectoriesBox.value, "weight": ui.policyBox.value},
            "reward": {"weights": {"dice": ui.rewardDiceBox.value, "folding": ui.rewardFoldingBox.value}},
            "training": run | {"learning_rate": rate} | ({"kl_target": ui.klBox.value} if ui.klBox.value else {}),
        }
        name = ui.nameEdit.text.strip()
        return {
            "name": name,
            "dataset": "cases" if self._exported is not None else self._folder.folder,
            "model": str(models_folder() / f"{_file_name(name)}.safetensors"),
            "init": start or None,
            "warmup": warmup if ui.warmupCheck.checked else None,
            "finetune": finetune if ui.finetuneCheck.checked else None,
            "minutes": ui.budgetBox.value if in_minutes else None,
            "device": ui.deviceBox.currentText.strip() or "auto",
            "leave_out": [case["name"] for case in self._report["cases"] if case["problems"]],
        }

    # ---------------------------------------------------------------------------------------------------- the run

    def start(self, *_args) -> None:
        """Make a run of what is chosen, and start it."""
        settings = self.settings()
        if Path(settings["model"]).exists():
            self._say_status(
                _("There is a model named '{name}' already; choose another name.").format(name=settings["name"]), True
            )
            return
        try:
            run = create_run(trainings_folder(), settings)
        except RunError as problem:
            self._say_status(sentence(problem), True)
            return
        try:
            if self._exported is not None:
                Path(self._exported.name).chmod(0o755)
                os.replace(self._exported.name, run.folder / "cases")  # beside it, so that nothing is copied
            run.start(bool(self.ui.keepCheck.checked), self._python(), environment=self.logic.engine_environment())
        except (InputError, RunError, OSError) as problem:
            if (run.folder / "cases").exists():
                os.replace(run.folder / "cases", self._exported.name)
            shutil.rmtree(run.folder, ignore_errors=True)
            self._say_status(sentence(problem), True)
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
            self._say_status(sentence(problem), True)
            return
        self.refresh()

    def resume(self, *_args) -> None:
        """Go on where the run stood."""
        if self.run is None:
            return
        try:
            self.run.start(bool(self.ui.keepCheck.checked), self._python(), environment=self.logic.engine_environment())
        except (InputError, RunError, OSError) as problem:
            self._say_status(sentence(problem), True)
            return
        self.refresh()

    def open_folder(self, *_args) -> None:
        """The run's folder, in the file manager."""
        qt.QDesktopServices.openUrl(qt.QUrl.fromLocalFile(str(self.run.folder)))

    def find_runs(self) -> None:
        """List all runs; the chosen one stays chosen, else one that runs, else the newest."""
        known = {run.folder: run for run in self._runs}
        self._runs = [known.get(run.folder, run) for run in find_runs(trainings_folder())]
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
        self._say_status(_sentence(status), status.state == "failed")
        self._show_curves()
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
                for listener in self.on_checkpoint:
                    listener(Path(status.model))
        self._alive = status.alive

    def _say_status(self, text: str, bad: bool = False) -> None:
        self.ui.statusLabel.text = text
        self.ui.statusLabel.styleSheet = f"color: {ink(self.widget, 'bad')}" if bad else ""
        if bad:
            self._details.offer(text, self.run.log() if self.run is not None else ())
        else:
            self._details.withdraw()

    # ----------------------------------------------------------------------------------------------------- curves

    def _show_curves(self) -> None:
        """Whether there is something to plot; and, where the plot is shown, the latest figures in it."""
        rows = self._rows()[1]
        self.ui.plotButton.enabled = self.ui.plotButton.checked or has_curve(self._curve(), rows)
        if self.ui.plotButton.checked:
            self._update_curves()

    def _rows(self) -> tuple[str, list[dict[str, float]]]:
        """Title and figures of the last stage that has any."""
        titles = {"warmup": _("warm-up"), "finetune": _("fine-tuning")}
        found = {stage: self.run.curves(stage) for stage in STAGES} if self.run is not None else {}
        stage = next((stage for stage in reversed(STAGES) if found.get(stage)), None)
        return (f"{self.run.name}, {titles[stage]}", found[stage]) if stage is not None else ("", [])

    def _update_curves(self) -> None:
        """Draw the latest figures; the axes follow, unless the user has zoomed in on a part."""
        title, rows = self._rows()
        before = self._curves.chart(self._curve())
        follow = before is None or shows_all(before)
        if rows:
            self._curves.update(title, rows)
        else:
            self._curves.clear()
        chart = self._curves.chart(self._curve())
        if before is None:
            self._show_chart()  # its first figures have just come
        elif follow and chart is not None:
            fit(chart)

    def _curve(self) -> str:
        return list(CHARTS)[self.ui.curveBox.currentIndex]

    def plot(self, on: bool) -> None:
        """The chosen curve in a layout with a plot view, live; off, the charts go and the layout is as before."""
        if on:
            self._layout_before = slicer.app.layoutManager().layout
            self._choose_curve()
        else:
            self._curves.remove()
            slicer.app.layoutManager().setLayout(self._layout_before)
            self._show_curves()

    def _choose_curve(self, *_args) -> None:
        self._show_curves()
        self._show_chart()

    def _show_chart(self) -> None:
        chart = self._curves.chart(self._curve())
        if self.ui.plotButton.checked and chart is not None:
            slicer.modules.plots.logic().ShowChartInLayout(chart)
            fit(chart)


def figures_table(held_out: dict, better_ink: str, worse_ink: str) -> str:
    """Return the figures before and after as rich text; what got better and what got worse has a color of its own."""
    start, result = held_out.get("start"), held_out["mean"]
    lines = []
    for name, (title, form, better) in _FIGURES.items():
        if name not in result:  # a model of an earlier version has no folded cells
            continue
        values = result.get(f"{name}_aligned"), (start or {}).get(name), result[name]
        aligned, before, after = ("-" if value is None else form.format(value) for value in values)
        if "-" not in (before, after) and before != after:
            color = better_ink if (result[name] - start[name]) * better > 0 else worse_ink
            after = f'<b style="color: {color}">{after}</b>'
        tip = escape(held_out["definitions"].get(name, ""))
        cells = (aligned, before, after)
        lines.append(
            f'<tr><td title="{tip}">{title}</td>' + "".join(f'<td align="right">{cell}</td>' for cell in cells)
        )
    head = [_("{count} held-out pairs").format(count=held_out["pairs"]), _("aligned"), _("before"), _("after")]
    return (
        '<table cellpadding="3"><tr>'
        + "".join(f"<th>{h}</th>" for h in head)
        + "</tr>"
        + "</tr>".join(lines)
        + "</tr></table>"
    )


def _folders() -> dict[str, str]:
    names = {"models": MODELS_FOLDER, "trainings": TRAININGS_FOLDER}
    return {what: slicer.util.settingsValue(name, "") for what, name in names.items()}


def _sentence(status: RunStatus) -> str:
    if status.state == "stopping":
        return _("Stopping: the iteration under way is finished first. {message}").format(message=status.message)
    if status.state == "done":
        return _("Done. The model '{name}' is in the list of models.").format(name=Path(status.model).stem)
    if status.state == "failed" and not status.message:
        if status.last_words:
            return fault_sentence(Fault.RUN_NOT_BEGUN, reason=status.last_words)
        return fault_sentence(Fault.RUN_NOT_BEGUN_SILENTLY)
    states = {
        "new": _("Not started yet."),
        "starting": _("Starting the engine"),
        "stopped": _("Stopped; it can be resumed."),
        "interrupted": _("It was interrupted; Resume goes on from the last state it saved."),
    }
    if status.state in states:
        return states[status.state]
    stages = {"warmup": _("Warm-up"), "finetune": _("Fine-tuning"), "evaluate": _("Figures")}
    if status.state == "running" and status.stage in stages:
        return f"{stages[status.stage]}: {status.message}"
    return status.message


def distinct_names(names: list[str], kept: int = 8) -> list[str]:
    """Shorten paths to what tells them apart: without their common folder, and without a long beginning in common."""
    prefix = os.path.commonprefix(names)  # noqa: RUF071 - by characters is meant
    folder = prefix.rfind("/") + 1
    if len(names) < 2 or len(prefix) - folder <= kept:
        return [name[folder:] for name in names]
    return [f"\N{HORIZONTAL ELLIPSIS}{name[len(prefix) - kept // 2 :]}" for name in names]


def _by(numbers: list) -> str:
    return " x ".join(f"{n:g}" for n in numbers)


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name).strip("-.") or "model"
