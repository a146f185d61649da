"""How the panel looks and moves in Slicer's module panel. No engine is started."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("slicer", reason="needs slicer-core (pip install slicer-core)")
pytest.importorskip("PySide6", reason="needs PySide6 (pip install PySide6-Essentials)")

import slicer
import slicer.util
from PySide6 import QtCore, QtGui, QtWidgets

MODULE = Path(__file__).resolve().parents[2] / "MorphSeek" / "MorphSeek.py"
LONG = " ".join(["deformation"] * 60)


@pytest.fixture
def opened(stand_in, tmp_path, monkeypatch):
    """The module with all its sections, in Slicer's module panel."""
    from MorphSeekGui.register_panel import RegisterPanel

    monkeypatch.setattr(RegisterPanel, "_ask_devices", lambda self: None)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    slicer.app.userSettings().setValue("MorphSeek/Training", True)
    module = stand_in.load_module(MODULE)
    holder = stand_in.open_panel(module)
    python = module.widgetRepresentation().python
    yield SimpleNamespace(holder=holder, module=module, ui=python.ui, **python.panels)
    holder.setModule(None)


@pytest.fixture
def training(opened, stand_in):
    """The Fine-tune section, the only one that is open."""
    opened.ui.registerSection.collapsed = True
    opened.ui.trainingSection.collapsed = False
    stand_in.process()
    return opened.training


def widgets_of(opened, kind) -> list:
    return opened.module.widgetRepresentation().findChildren(kind)


def wrapped_labels(opened) -> list[QtWidgets.QLabel]:
    return [label for label in widgets_of(opened, QtWidgets.QLabel) if label.wordWrap()]


def open_everything(opened) -> None:
    for panel in (opened.ui, opened.register.ui, opened.inspect.ui, opened.training.ui):
        for name, widget in vars(panel).items():
            if name.endswith("Section"):
                widget.collapsed = False
    opened.register.ui.setupFrame.visible = True
    opened.register.ui.installLog.visible = True
    opened.training.ui.casesTable.visible = True


def test_no_text_widens_the_panel(opened, stand_in):
    open_everything(opened)
    for text in ("short", LONG):
        for label in wrapped_labels(opened):
            label.setText(text)
            label.setVisible(True)
        for box in widgets_of(opened, QtWidgets.QComboBox):
            box.addItem(text)
        stand_in.process()
        if text == "short":
            least = opened.holder.minimumSizeHint().width()
    assert opened.holder.minimumSizeHint().width() <= least
    assert opened.holder.widget().width() <= opened.holder.viewport().width(), "nothing is cut"


def test_nothing_is_squashed_after_another_module_was_visited(opened, stand_in):
    opened.holder.resize(700, 600)  # so wide that no text widens it: the panel's height is computed for one width
    opened.holder.setModule(None)
    opened.holder.setModule(opened.module)
    open_everything(opened)
    for _ in range(3):
        stand_in.process()
    for label in wrapped_labels(opened):
        label.setText(LONG)

    def squashed() -> list[str]:
        labels = [label for label in wrapped_labels(opened) if label.isVisible()]
        cut = [label.objectName() for label in labels if label.height() < label.heightForWidth(label.width())]
        kinds = (QtWidgets.QAbstractSpinBox, QtWidgets.QComboBox, QtWidgets.QPushButton, QtWidgets.QPlainTextEdit)
        rows = [w for kind in kinds for w in widgets_of(opened, kind) if w.isVisible()]
        return cut + [row.objectName() for row in rows if row.height() < row.minimumSizeHint().height()]

    try:
        stand_in.wait(lambda: not squashed(), 20)
    except TimeoutError:
        assert squashed() == []


def test_logs_take_no_room_from_the_form(opened):
    for log in widgets_of(opened, QtWidgets.QPlainTextEdit):
        assert not log.sizePolicy().expandingDirections() & QtCore.Qt.Orientation.Vertical


def face(button) -> str:
    """What stands on a ctkDirectoryButton."""
    return button.findChild(QtWidgets.QPushButton).text()


def test_no_folder_is_shown_until_one_is_chosen(opened, stand_in, training, tmp_path, monkeypatch):
    from SlicerStandIn.pythonqt import native

    monkeypatch.chdir(tmp_path)
    buttons = [native(training.ui.casesFolder), native(opened.register.ui.modelsFolderButton)]
    assert [button.text for button in buttons] == ["Choose a folder..."] * 2
    assert face(buttons[0]) == "Choose a folder..."
    training.ui.checkButton.click()
    assert training.ui.casesSummary.text == "Choose the folder with the cases first."
    training._report = {}
    training.ui.casesFolder.directory = str(tmp_path)  # the working directory, which is no change for the button
    assert training._report is None, "what was checked is not what is chosen"
    assert training._folder.folder == str(tmp_path)
    assert face(buttons[0]) != "Choose a folder..."
    assert training.ui.casesFolder.toolTip.startswith(str(tmp_path))


def test_the_export_goes_to_a_whole_path_where_slicer_was_started_at_home(stand_in, tmp_path, monkeypatch):
    import ctk
    import qt
    from MorphSeekGui.inspect_panel import InspectPanel

    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    section = ctk.ctkCollapsibleButton()
    section.setLayout(qt.QVBoxLayout())
    panel = InspectPanel(section, SimpleNamespace())
    assert panel._folder.folder == str(tmp_path)
    panel.cleanup()
    section.deleteLater()


def darkest(image: QtGui.QImage, columns: range) -> int:
    return min(image.pixelColor(x, y).lightness() for x in columns for y in range(image.height()))


@pytest.mark.parametrize("running", [False, True])
def test_the_card_pales_as_a_whole(opened, stand_in, running):
    from SlicerStandIn.pythonqt import native

    opened.register.ui.settingsWidget.enabled = not running
    stand_in.process()
    image = native(opened.register.ui.cardLabel).grab().toImage()
    names, texts = darkest(image, range(60)), darkest(image, range(90, image.width()))
    assert abs(names - texts) < 10


@pytest.mark.parametrize("window", ["#efefef", "#353535"])
def test_messages_can_be_read_in_light_and_dark_styles(opened, window):
    from SlicerStandIn.pythonqt import native

    widget, ui = native(opened.training.widget), opened.training.ui
    widget.setPalette(QtGui.QPalette(QtGui.QColor(window)))
    cases = [checked("a", problems=["Bad."]), checked("b", warnings=["Look."])]
    opened.training._export_warnings = []
    opened.training._show_report({"cases": cases, "problems": ["Too few."], "warnings": []})
    found = [ui.casesTable.item(row, 1).foreground().color() for row in range(2)]
    found.append(QtGui.QColor(ui.casesSummary.styleSheet.removeprefix("color: ")))
    for color in found:
        assert abs(luminance(color) - luminance(QtGui.QColor(window))) > 0.25


def luminance(color: QtGui.QColor) -> float:
    return 0.3 * color.redF() + 0.6 * color.greenF() + 0.1 * color.blueF()


def test_the_pressed_switch_is_filled(opened, stand_in, training):
    from SlicerStandIn.pythonqt import native

    inspect = opened.inspect.ui
    opened.ui.inspectSection.collapsed = False
    inspect.showSection.enabled = training.ui.plotButton.enabled = True
    stand_in.process()
    for button in (inspect.blendButton, inspect.jacobianButton, training.ui.plotButton):
        button = native(button)
        fill = button.palette().color(QtGui.QPalette.ColorRole.Highlight)
        pixels = []
        for on in (False, True):
            button.blockSignals(True)
            button.setChecked(on)
            button.blockSignals(False)
            image = button.grab().toImage()
            pixels.append(image.pixelColor(6, image.height() // 2))
        assert pixels[0].name() != fill.name()
        assert pixels[1].name() == fill.name()


def checked(name: str, **found) -> dict:
    """A case as the engine's check reports it."""
    case = {"name": name, "problems": [], "warnings": [], "labels": [1, 2], "shape": [192, 224, 160]}
    return case | {"spacing": [1, 1, 1.2]} | found


def test_the_cases_table_shows_all_columns(opened, stand_in, training):
    path = "derivatives/preprocessed/sub-{n:03d}/ses-01/anat/sub-{n:03d}_ses-01_T1w.nii.gz"
    cases = [checked(path.format(n=n), labels=list(range(1, 36))) for n in range(6)]
    cases[2] |= {"problems": ["The label map has another grid than the image."]}
    training._export_warnings = []
    training._show_report({"cases": cases, "problems": ["Too few."], "warnings": []})
    stand_in.process()
    table = training.ui.casesTable
    header = table.horizontalHeader()
    assert table.horizontalScrollBar().maximum == 0
    assert header.length() == table.viewport().width
    for column in range(table.columnCount):
        assert header.sectionSize(column) >= header.sectionSizeHint(column)
    assert table.item(0, 0).text().startswith("sub-000/")
    assert table.item(0, 0).toolTip() == cases[0]["name"]
    assert (table.item(0, 2).text(), table.item(0, 2).toolTip()[:7]) == ("35", "1, 2, 3")
    assert table.item(2, 1).toolTip() == "The label map has another grid than the image."


def test_case_names_are_shortened_to_what_tells_them_apart(stand_in):
    from MorphSeekGui.training_texts import distinct_names

    assert distinct_names(["a/b/img_0.nii", "a/b/img_1.nii"]) == ["img_0.nii", "img_1.nii"]
    assert distinct_names(["img_0.nii", "img_1.nii"]) == ["img_0.nii", "img_1.nii"]
    assert distinct_names(["a/b/img_0.nii"]) == ["img_0.nii"]
    long = ["x/study_of_liver_patient_007.nii", "x/study_of_liver_patient_008.nii"]
    assert distinct_names(long) == ["…t_007.nii", "…t_008.nii"]


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_remaining_time_counts_down_between_two_reports(stand_in):
    from MorphSeekGui.remaining_time import RemainingTime

    clock = Clock()
    time = RemainingTime(clock)
    clock.now += 1
    time.report(0.5)
    assert time.text() == "", "nobody needs it in the first seconds"
    time = RemainingTime(clock)
    clock.now += 30
    time.report(0.25)
    assert time.text() == "(30 s so far, about 90 s left)"
    clock.now += 20
    time.report(0.25)  # another message, and nothing more done
    assert time.text() == "(50 s so far, about 70 s left)"
    clock.now += 100
    assert time.text() == "(2 min 30 s so far)", "an estimate that was wrong is not repeated"
    time.report(0.5)
    assert time.text() == "(2 min 30 s so far, about 2 min 30 s left)"


def test_the_expected_time_is_the_median_of_runs_of_about_the_same_size(stand_in):
    from MorphSeekGui.expected_time import ExpectedTime

    time = ExpectedTime()
    assert time.seconds("best", 1000) is None
    time.learn("best", 1000, 10.0)
    assert (time.seconds("best", 1000), time.seconds("best", 2000)) == (10.0, 20.0)
    assert time.seconds("fast", 1000) is None
    assert time.seconds("best", 100_000) is None, "of volumes so much larger nothing is known"
    for seconds in (12.0, 12.0, 80.0):
        time.learn("best", 1000, seconds)
    assert time.seconds("best", 1000) == 12.0


def test_an_estimate_of_the_engine_is_corrected_by_how_others_turned_out(stand_in):
    from MorphSeekGui.expected_time import ExpectedTime

    time = ExpectedTime()
    assert time.corrected(8.0) == 8.0
    time.learn("best", 1000, 12.0, estimate=8.0)
    assert ExpectedTime(time.to_text()).corrected(4.0) == 6.0
    assert time.corrected(100.0) == 100.0, "of runs so much longer nothing is known"


def test_expected_times_are_kept_as_a_text(stand_in):
    from MorphSeekGui.expected_time import ExpectedTime

    time = ExpectedTime()
    time.learn("best", 1000, 10.0)
    assert ExpectedTime(time.to_text()).seconds("best", 1000) == 10.0
    for unusable in ("", "[1]", "{", '{"best": [[0, 1]]}', '{"best": 3}'):
        assert ExpectedTime(unusable).seconds("best", 1000) is None


def test_stages_are_named_in_a_run_as_in_its_report(stand_in):
    from MorphSeekGui.stages import LiveStages, stage_names

    live = LiveStages()
    for message in ({"phase": "align"}, {"phase": "search"}, {"phase": "search"}):
        live.hear(message)
    for row in (0, 2, 3):
        live.picture(row)
    for phase in ("step", "fit", "fit", "resample"):
        live.hear({"phase": phase})
    live.picture(4)
    rows = [("align", 0), ("search", 0), ("network", 1), ("network", 2), ("fit", 2)]
    report = [{"stage": stage, "step": step} for stage, step in rows]
    assert live.names() == stage_names(report) == ["Aligned", "Search", "Step 1", "Step 2", "Fitted"]
    longer = LiveStages(report)
    longer.hear({"phase": "fit"})
    longer.picture(5)
    assert longer.names()[4:] == ["Fitted", "Fitted (2)"]


def test_the_status_moves_while_the_engine_is_silent(opened, monkeypatch):
    from MorphSeekGui.remaining_time import RemainingTime

    panel, clock = opened.register, Clock()
    silent = SimpleNamespace(poll=lambda: False, cancel=lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(panel, "logic", SimpleNamespace(client=lambda: SimpleNamespace(poll=lambda: None)))
        patch.setattr(panel, "_run", silent)
        panel._time = RemainingTime(clock)
        clock.now += 10
        panel._hear({"message": "Step 1 of 2", "fraction": 0.5})
        assert panel.ui.statusLabel.text == "Step 1 of 2 (10 s so far, about 10 s left)"
        clock.now += 3
        panel._poll()
        assert panel.ui.statusLabel.text == "Step 1 of 2 (13 s so far, about 7 s left)"
        panel.cancel()
        panel._hear({"message": "Step 2 of 2", "fraction": 0.6})
        panel._poll()
        assert panel.ui.statusLabel.text == "Canceling ..."


def write_rows(run: Path, numbers: range) -> None:
    with (run / "finetune.safetensors.jsonl").open("a") as file:
        file.writelines(json.dumps({"iteration": n, "loss": 1 / n}) + "\n" for n in numbers)


def test_the_axes_follow_the_curve_unless_the_user_zoomed_in(opened, stand_in, training, tmp_path):
    slicer.mrmlScene.AddNode(slicer.vtkMRMLLayoutNode())
    view = stand_in.open_plot_view()
    run = tmp_path / "MorphSeek" / "Trainings" / "2026-01-01-one"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"name": "One"}))
    write_rows(run, range(1, 50))
    training.find_runs()
    training.ui.plotButton.click()
    assert view.axes == ((1.0, 49.0), (1 / 49, 1.0))
    write_rows(run, range(50, 81))
    training.refresh()
    assert view.axes == ((1.0, 80.0), (1 / 80, 1.0))
    view.zoom((10.0, 20.0))
    write_rows(run, range(81, 100))
    training.refresh()
    assert view.axes[0] == (10.0, 20.0)
    view.fitToContent()
    write_rows(run, range(100, 121))
    training.refresh()
    assert view.axes[0] == (1.0, 120.0)
