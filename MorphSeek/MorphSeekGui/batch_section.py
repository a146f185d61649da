"""The part *Batch* of the section Register: many pairs, in a process that may outlive Slicer; a click looks at one.

The panel holds no state of a batch: all of it is in the batch's folder (batch_run.py), so a batch that another Slicer
or the command line started looks the same here. A timer looks into the folder while a process works in it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import qt
import slicer
import slicer.util

from MorphSeekLib.protocol.errors import MorphSeekError
from MorphSeekLib.protocol.settings_file import RegistrationSettings

from . import scene
from .batch_pairs import Copied, PairWriter, ScenePair, Source
from .batch_results import Loading, prepare_loading, result_of
from .batch_run import (
    BatchRow,
    BatchRun,
    BatchState,
    Start,
    create_batch,
    discard,
    find_batches,
    folder_rows,
    is_batch,
    table_rows,
    worst_first,
    write_pairs,
)
from .batch_texts import state_sentence, verdict
from .engine_client import EngineCancelled, EngineClient, EngineError, Request
from .folder_process import RunError
from .messages import sentence
from .panel import Panel
from .registration import Request as Choices
from .scene import InputError, RegistrationNodes, _
from .training_cases import matching_cases
from .widgets import FolderButton, fit_height, spread, table_cell

BATCHES_FOLDER = "MorphSeek/BatchesFolder"  # setting: where new batches go
BATCHES = "MorphSeek/Batches"  # setting: folders of batches elsewhere, as JSON
_POLL_MS, _LOAD_MS = 1000, 100
_MOMENT = 0.05  # seconds of copying, after which the window may answer
_REMEMBERED = 50  # batches elsewhere
_WIDEST_NAME = 150  # pixels
_SCENE, _TABLE, _FOLDER = range(3)  # of the list of sources
# background and text of a verdict
_COLORS = {
    "green": ("#1a9850", "#ffffff"),
    "amber": ("#f5b83d", "#000000"),
    "red": ("#c62828", "#ffffff"),
    "failed": ("#5f1a1a", "#ffffff"),
}


class Chooser(Protocol):
    """What the part needs of the section Register."""

    def chosen_settings(self) -> RegistrationSettings:
        """Return model and options."""

    def chosen_start(self) -> Start:
        """Return device and threads."""

    def chosen_pair(self) -> ScenePair:
        """Return the volumes that are chosen, with what belongs to them."""

    def show_loaded(self, nodes: RegistrationNodes) -> None:
        """Show a registration that was loaded."""


def batches_folder() -> Path:
    """Return where new batches go."""
    return Path(slicer.util.settingsValue(BATCHES_FOLDER, "") or Path.home() / "MorphSeek" / "Batches")


class BatchPanel(Panel):
    """See the module's text.

    Args:
        parent: the collapsible part.
        logic: the module's logic.
        chooser: the section Register.
    """

    FILE = "Batch.ui"

    def __init__(self, parent, logic, chooser: Chooser) -> None:
        super().__init__(parent, logic)
        self._chooser = chooser
        self.run: BatchRun | None = None
        self._runs: list[BatchRun] = []
        self._pairs: list[ScenePair] = []
        self._copying: tuple[BatchRun, PairWriter, Iterator[Copied]] | None = None
        self._sources: dict[tuple[Path, str], tuple[Source, Source]] = {}  # of the pairs that this session wrote
        self._rows: list[BatchRow] = []  # as the table shows them
        self._shown: tuple = ()  # what they were read from
        self._loading: tuple[Loading, EngineClient, Request] | None = None
        self._start_message = self.message(self.ui.startBatchLabel, self.ui.copyStartDetailsButton)
        self._message = self.message(self.ui.batchLabel, self.ui.copyBatchDetailsButton)
        self._said = ""  # of a pair, in place of where the batch stands
        self._timer = self.timer(self.refresh, _POLL_MS)
        self._copy_timer = self.timer(self._copy, 0)
        self._load_timer = self.timer(self._poll_loading, _LOAD_MS)
        self._images = FolderButton(self.ui.batchImagesButton)
        self._root = FolderButton(self.ui.batchesFolderButton, str(batches_folder()), self._choose_root)
        self._set_up_tables()
        self._connect()
        self._tell("")
        self._show_source()
        self._show_pairs()

    def _set_up_tables(self) -> None:
        for table, wide in ((self.ui.pairsTable, 1), (self.ui.rowsTable, 1)):
            table.verticalHeader().defaultSectionSize = 24
            spread(table, wide)
        header = self.ui.rowsTable.horizontalHeader()
        header.setSectionResizeMode(0, qt.QHeaderView.Interactive)
        self.ui.pairsTable.horizontalHeader().setSectionResizeMode(0, qt.QHeaderView.Stretch)

    def _connect(self) -> None:
        ui = self.ui
        ui.batchSourceBox.connect("currentIndexChanged(int)", self._show_source)
        ui.addPairButton.connect("clicked(bool)", self.add_pair)
        ui.addAllButton.connect("clicked(bool)", self.add_all)
        ui.removePairButton.connect("clicked(bool)", self.remove_pair)
        ui.pairsTable.connect("itemSelectionChanged()", self._show_remove)
        ui.startBatchButton.connect("clicked(bool)", self.start)
        ui.batchesBox.connect("currentIndexChanged(int)", self._choose_run)
        ui.openBatchButton.connect("clicked(bool)", self._browse)
        ui.keepBatchCheck.connect("toggled(bool)", self._keep)
        ui.stopBatchButton.connect("clicked(bool)", self.stop)
        ui.resumeBatchButton.connect("clicked(bool)", self.resume)
        ui.batchReportButton.connect("clicked(bool)", self.open_report)
        ui.batchFolderButton.connect("clicked(bool)", self.open_folder)
        ui.rowsTable.connect("cellClicked(int,int)", self.load)

    # -------------------------------------------------------------------------------------- what the module calls

    def enter(self) -> None:
        """List the batches."""
        self.find_runs()

    def forget(self) -> None:
        """Forget the nodes of a scene that is being closed; batches go on."""
        self._end_copying()
        self._end_loading()
        self._pairs, self._sources = [], {}
        self._show_pairs()

    def cleanup(self) -> None:
        """End everything; a batch goes on if it was asked to, and else stops and keeps what is done."""
        super().cleanup()
        self._end_copying()
        self._end_loading()
        for run in self._runs:
            run.release()
        self._runs, self.run = [], None

    # ------------------------------------------------------------------------------------------------------ pairs

    def add_pair(self, *_args) -> None:
        """Add the pair that is chosen in the section Register."""
        pair = self._chooser.chosen_pair()
        if pair.fixed is None or pair.moving is None or pair.fixed is pair.moving:
            self._refuse(_("Choose a fixed and another moving volume above first."))
            return
        self._add([pair])

    def add_all(self, *_args) -> None:
        """Add every other volume of the scene, registered to the chosen fixed volume."""
        chosen = self._chooser.chosen_pair()
        if chosen.fixed is None:
            self._refuse(_("Choose a fixed volume above first."))
            return
        made = scene.made_by_registrations(self.scene)
        volumes = [
            node
            for node in slicer.util.getNodesByClass("vtkMRMLScalarVolumeNode")
            if node.GetClassName() == "vtkMRMLScalarVolumeNode" and not node.GetHideFromEditors()
            if node is not chosen.fixed and node.GetID() not in made and node.GetImageData() is not None
        ]
        if not volumes:
            self._refuse(_("The scene has no other volume; load those to be registered."))
            return
        labels = [
            node
            for kind in ("vtkMRMLSegmentationNode", "vtkMRMLLabelMapVolumeNode")
            for node in slicer.util.getNodesByClass(kind)
            if node.GetID() not in made
        ]
        known = {volume.GetID(): own for volume, own in matching_cases([*volumes, chosen.fixed], labels)}
        fixed_labels = chosen.request.fixed_labels_node or known.get(chosen.fixed.GetID())
        shared = replace(chosen.request, fixed_labels_node=fixed_labels, moving_landmarks_node=None)
        shared = replace(shared, moving_mask_node=None, moving_ignore_node=None, initial_transform_node=None)
        shared = replace(shared, fixed_landmarks_node=None)
        self._add(
            [
                ScenePair(chosen.fixed, volume, replace(shared, moving_labels_node=known.get(volume.GetID())))
                for volume in volumes
            ]
        )

    def _add(self, pairs: list[ScenePair]) -> None:
        known = {(pair.fixed.GetID(), pair.moving.GetID()) for pair in self._pairs}
        self._pairs += [pair for pair in pairs if (pair.fixed.GetID(), pair.moving.GetID()) not in known]
        self._tell("")
        self._show_pairs()

    def remove_pair(self, *_args) -> None:
        """Take the chosen pair off the list."""
        row = self.ui.pairsTable.currentRow()
        if 0 <= row < len(self._pairs):
            del self._pairs[row]
            self._show_pairs()

    def _show_pairs(self) -> None:
        table = self.ui.pairsTable
        table.setRowCount(len(self._pairs))
        for row, pair in enumerate(self._pairs):
            also = _also(pair.request)
            for column, text in enumerate((pair.fixed.GetName(), pair.moving.GetName(), also)):
                table_cell(table, row, column, text, tip=text)
        fit_height(table, 150)
        table.visible = bool(self._pairs)
        self._show_remove()

    def _show_remove(self) -> None:
        self.ui.removePairButton.enabled = bool(self._pairs) and self.ui.pairsTable.currentRow() >= 0

    def _show_source(self, *_args) -> None:
        source = self.ui.batchSourceBox.currentIndex
        pages = {_SCENE: self.ui.batchScenePage, _TABLE: self.ui.batchTablePage, _FOLDER: self.ui.batchFolderPage}
        for number, page in pages.items():
            page.visible = number == source

    def _choose_root(self, folder: str) -> None:
        qt.QSettings().setValue(BATCHES_FOLDER, folder)
        self.find_runs()

    # ------------------------------------------------------------------------------------------------------ start

    def start(self, *_args) -> None:
        """Start a batch of what is chosen; pressed again while pairs are copied, cancel it."""
        if self._copying is not None:
            self._end_copying()
            self._tell(_("Canceled; nothing was started."))
            return
        settings, start = self._chooser.chosen_settings(), self._chooser.chosen_start()
        start = replace(start, workers=self.ui.workersSpinBox.value)
        source = self.ui.batchSourceBox.currentIndex
        run = None
        try:
            self.engine_python()  # refuses where there is no engine yet
            if source == _SCENE and not self._pairs:
                raise InputError(_("The list has no pair yet; choose two volumes above and press 'Add pair'."))
            rows = [] if source == _SCENE else self._rows_of(source)
            run = create_batch(batches_folder(), self.ui.batchNameEdit.text.strip(), settings, start)
            if source != _SCENE:
                write_pairs(run, rows)
                self._launch(run)
                return
        except (InputError, MorphSeekError, RunError, OSError) as problem:
            self._give_up(run, problem)
            return
        pairs = [
            replace(pair, request=replace(pair.request, options=settings.options, model=settings.model))
            for pair in self._pairs
        ]
        writer = PairWriter(run.folder, settings)
        self._copying = run, writer, writer.write(pairs)
        self._show_copying(True)
        self._copy_timer.start()

    def _rows_of(self, source: int) -> list[dict[str, str]]:
        """Return the rows of a table, or of a folder.

        Raises:
            InputError, MorphSeekError: they cannot be read.
        """
        ui = self.ui
        if source == _TABLE:
            if not ui.batchTableEdit.currentPath.strip():
                raise InputError(_("Choose the table with the pairs first."))
            return table_rows(Path(ui.batchTableEdit.currentPath.strip()))
        template, pattern = ui.batchTemplateEdit.currentPath.strip(), ui.batchPatternEdit.text.strip()
        if not template or not Path(template).exists():
            raise InputError(
                _("There is no file {path}; choose the fixed image.").format(path=template)
                if template
                else _("Choose the fixed image first.")
            )
        if not self._images.folder or not pattern:
            raise InputError(_("Choose the folder with the other images, and which of its files are meant."))
        return folder_rows(Path(template), Path(self._images.folder), pattern)

    def _copy(self) -> None:
        """Write pieces of the pairs of the scene for some hundredths of a second."""
        run, writer, pieces = self._copying
        until = time.monotonic() + _MOMENT
        try:
            for copied in pieces:
                if time.monotonic() > until:
                    self.ui.copyProgressBar.value = round(1000 * copied.share)
                    self._tell(_("Copying {name}").format(name=copied.name))
                    return
            found = writer.exported
            if found.problems:
                place, problem = next(iter(found.problems.items()))
                moving = self._pairs[place].moving.GetName()
                raise InputError(_("Pair {n}, '{name}': {problem}").format(n=place + 1, name=moving, problem=problem))
            write_pairs(run, found.rows)
        except (InputError, RunError) as problem:
            self._end_copying()
            self._give_up(None, problem)
            return
        self._copying = None
        self._show_copying(False)
        self._sources |= {(run.folder, name): both for name, both in found.sources.items()}
        self._launch(run)

    def _end_copying(self) -> None:
        """Cancel the copying, and remove what was written."""
        self._copy_timer.stop()
        if self._copying is not None:
            discard(self._copying[0])
            self._copying = None
        self._show_copying(False)

    def _show_copying(self, on: bool) -> None:
        if not on:
            self._copy_timer.stop()
        self.ui.copyProgressBar.visible = on
        self.ui.startBatchButton.text = _("Cancel the start") if on else _("Start the batch")

    def _launch(self, run: BatchRun) -> None:
        """Start the process of a batch that is whole."""
        try:
            self._start_process(run)
        except (InputError, RunError, OSError) as problem:
            self._give_up(run, problem)
            return
        self._tell("")
        self._runs.insert(0, run)
        self._list_runs(run)

    def _start_process(self, run: BatchRun, retry: bool = False) -> None:
        python, environment = self.engine_python(), self.logic.engine_environment()
        run.start(bool(self.ui.keepBatchCheck.checked), retry, python, environment=environment)

    def _give_up(self, run: BatchRun | None, problem: Exception) -> None:
        """Say why a batch cannot be started; nothing is left of it."""
        if run is not None:
            discard(run)
        self._refuse(sentence(problem))

    def _refuse(self, problem: str) -> None:
        """Show an error below the button that starts."""
        self._start_message.fail(problem)
        self.ui.startBatchLabel.visible = True

    def _tell(self, text: str) -> None:
        """Show a text below the button that starts; "" for none."""
        self._start_message.say(text)
        self.ui.startBatchLabel.visible = bool(text)

    # ---------------------------------------------------------------------------------------------------- batches

    def find_runs(self) -> None:
        """List all batches; the chosen one stays chosen, else one that runs, else the newest."""
        known = {run.folder: run for run in self._runs}
        found = find_batches(batches_folder(), _elsewhere())
        self._runs = [known.pop(run.folder, run) for run in found]
        self._runs += [run for run in known.values() if run.is_running()]  # the folder of results was changed
        chosen = self.run if self.run in self._runs else None
        if chosen is None:
            chosen = next((run for run in self._runs if run.is_running()), None)
        self._list_runs(chosen or (self._runs[0] if self._runs else None))

    def _browse(self) -> None:
        title = _("Choose the folder of a batch")
        folder = qt.QFileDialog.getExistingDirectory(self.widget, title, str(batches_folder()))
        if folder:
            self.open_batch(Path(folder))

    def open_batch(self, folder: Path) -> None:
        """Show the batch in a folder, and remember it."""
        if not is_batch(folder):
            self._say(_("{folder} is not the folder of a batch; choose one with a batch.json.").format(folder=folder))
            return
        others = [str(folder), *(path for path in _elsewhere() if path != str(folder))]
        qt.QSettings().setValue(BATCHES, json.dumps(others[:_REMEMBERED]))
        run = next((run for run in self._runs if run.folder == folder), None) or BatchRun(folder)
        self._runs = [run, *(other for other in self._runs if other is not run)]
        self._list_runs(run)

    def _list_runs(self, chosen: BatchRun | None) -> None:
        box = self.ui.batchesBox
        blocked = box.blockSignals(True)
        box.clear()
        for run in self._runs:
            box.addItem(run.name)
            box.setItemData(box.count - 1, str(run.folder), qt.Qt.ToolTipRole)
        if chosen is not None:
            box.setCurrentIndex(self._runs.index(chosen))
        box.blockSignals(blocked)
        self._choose_run()

    def _choose_run(self, *_args) -> None:
        index = self.ui.batchesBox.currentIndex
        run = self._runs[index] if 0 <= index < len(self._runs) else None
        if run is not self.run:
            self.run, self._shown, self._said = run, (), ""
            self._end_loading()
        if run is not None and run.is_running():
            blocked = self.ui.keepBatchCheck.blockSignals(True)
            self.ui.keepBatchCheck.checked = run.kept
            self.ui.keepBatchCheck.blockSignals(blocked)
        self.refresh()

    def _keep(self, on: bool) -> None:
        if self.run is not None and self.run.is_running():
            self.run.keep(on)

    def stop(self, *_args) -> None:
        """Ask the batch to stop."""
        if self.run is not None:
            self.run.stop()
            self.refresh()

    def resume(self, *_args) -> None:
        """Go on where the batch stopped; one that is done tries again what failed."""
        if self.run is None:
            return
        try:
            self._start_process(self.run, retry=self.run.state().state == "done")
        except (InputError, RunError, OSError) as problem:
            self._say(sentence(problem))
            return
        self._said = ""
        self.refresh()

    def open_report(self, *_args) -> None:
        """Open the report on all pairs in the browser."""
        if self.run is not None and self.run.report is not None:
            qt.QDesktopServices.openUrl(qt.QUrl.fromLocalFile(str(self.run.report)))

    def open_folder(self, *_args) -> None:
        """Open the folder of the batch in the file manager."""
        qt.QDesktopServices.openUrl(qt.QUrl.fromLocalFile(str(self.run.folder)))

    def refresh(self) -> None:
        """Show where the chosen batch stands; the timer goes on as long as a process works on it."""
        ui = self.ui
        state = self.run.state() if self.run is not None else BatchState("new")
        self._show_rows(state)
        left = sum(row.state == "waiting" for row in self._rows)
        failed = any(row.state == "failed" for row in self._rows)
        ui.stopBatchButton.enabled = state.alive and state.state != "stopping"
        can_start = self.run is not None and self.run.startable and not state.alive
        ui.resumeBatchButton.enabled = can_start and (left > 0 or failed or state.state != "done")
        ui.resumeBatchButton.text = _("Try again") if failed and state.state == "done" else _("Go on")
        ui.resumeBatchButton.toolTip = self._why_not_resume(state)
        ui.batchReportButton.enabled = self.run is not None and self.run.report is not None
        ui.batchFolderButton.enabled = self.run is not None
        ui.batchProgressBar.visible = state.alive
        ui.batchProgressBar.value = round(1000 * (1 - left / len(self._rows))) if self._rows else 0
        if self.run is None:
            self._message.say(_("There is no batch yet."))
        elif self._said:
            self._message.fail(self._said, self.run.log())
        elif state.state == "failed":
            self._message.fail(state_sentence(state, self._rows), self.run.log())
        else:
            self._message.say(state_sentence(state, self._rows))
        if state.alive:
            self._timer.start()
        else:
            self._timer.stop()

    def _why_not_resume(self, state: BatchState) -> str:
        if self.run is not None and not self.run.startable:
            return _("The command line started this batch; run the same command again to go on.")
        if state.state == "done":
            return _("Register the pairs again that failed.")
        return _("Register the pairs that are left.")

    def _show_rows(self, state: BatchState) -> None:
        """Fill the table, if anything changed; the worst pairs come first once the batch has ended."""
        now = (self.run.folder, state.alive, self.run.stamp()) if self.run is not None else ()
        if now and now == self._shown:
            return
        rows = self.run.rows() if self.run is not None else []
        self._rows = rows if state.alive else worst_first(rows)
        self._shown = (self.run.folder, state.alive, self.run.stamp()) if self.run is not None else ()
        table = self.ui.rowsTable
        table.setRowCount(len(self._rows))
        for number, row in enumerate(self._rows):
            words = verdict(row)
            table_cell(table, number, 0, row.name, tip=row.name)
            item = table_cell(table, number, 1, words, tip=row.figures.get("verdict") or words)
            if row.color in _COLORS:
                background, text = _COLORS[row.color]
                item.setBackground(qt.QBrush(qt.QColor(background)))
                item.setForeground(qt.QBrush(qt.QColor(text)))
            table_cell(table, number, 2, _number(row.figures, "dice", "{:.3f}"), right=True)
            table_cell(table, number, 3, _number(row.figures, "folded_percent", "{:.3g}"), right=True)
        table.resizeColumnToContents(0)
        table.setColumnWidth(0, min(_WIDEST_NAME, table.columnWidth(0)))
        fit_height(table, 300)
        table.visible = bool(self._rows)

    def _say(self, problem: str) -> None:
        """Show an error in place of where the batch stands."""
        self._said = problem
        self._message.fail(problem, self.run.log() if self.run is not None else ())

    # ----------------------------------------------------------------------------------------------- look at a pair

    def load(self, number: int, _column: int = 0) -> None:
        """Load the results of a pair into the scene, and show them; those that are there already are shown again."""
        if self.run is None or not 0 <= number < len(self._rows):
            return
        self._end_loading()
        row, self._said = self._rows[number], ""
        nodes = result_of(self.run, row) if row.state == "done" else None
        if nodes is not None:
            self._chooser.show_loaded(nodes)
            self.refresh()
            return
        try:
            self.engine_python()  # refuses where there is no engine yet
            loading = prepare_loading(self.run, row, self._unchanged(row))
        except InputError as problem:
            self._say(sentence(problem))
            return
        try:
            client = self.logic.client()
            waits = client.busy
            self._loading = loading, client, client.request("results", loading.params)
        except EngineError as problem:
            loading.discard()
            self._say(sentence(problem))
            return
        words = _("Loading '{name}'; the engine is still at work on something else") if waits else _("Loading '{name}'")
        self._message.say(words.format(name=row.name))
        self._timer.stop()
        self._load_timer.start()

    def _unchanged(self, row: BatchRow) -> tuple[Source, Source] | None:
        """Return the volumes of the scene that a pair was written from, if they are as they were then."""
        both = self._sources.get((self.run.folder, row.name))
        return both if both is not None and all(source.is_unchanged() for source in both) else None

    def _poll_loading(self) -> None:
        loading, client, request = self._loading
        client.poll()
        if not request.done:
            return
        self._loading = None
        self._load_timer.stop()
        try:
            nodes = loading.finish(request.value())
        except EngineCancelled:
            pass
        except (InputError, EngineError) as problem:
            self._said = sentence(problem)
        else:
            self._chooser.show_loaded(nodes)
        finally:
            loading.discard()
        self.refresh()

    def _end_loading(self) -> None:
        self._load_timer.stop()
        if self._loading is not None:
            loading, client, request = self._loading
            client.cancel(request)
            loading.discard()
            self._loading = None


def _elsewhere() -> list[str]:
    """Return the folders of batches that the user opened."""
    try:
        return [str(path) for path in json.loads(slicer.util.settingsValue(BATCHES, "") or "[]")]
    except ValueError:
        return []


def _also(request: Choices) -> str:
    """Return what goes with a pair, in words."""
    parts = {
        _("labels"): (request.fixed_labels_node, request.moving_labels_node),
        _("masks"): (
            request.fixed_mask_node,
            request.fixed_ignore_node,
            request.moving_mask_node,
            request.moving_ignore_node,
        ),
        _("points"): (request.fixed_landmarks_node, request.moving_landmarks_node),
        _("transform"): (request.initial_transform_node,),
    }
    return ", ".join(word for word, nodes in parts.items() if any(node is not None for node in nodes)) or "–"


def _number(figures: Mapping[str, object], name: str, form: str) -> str:
    value = figures.get(name)
    return form.format(value) if isinstance(value, (int, float)) else "–"
