"""The stand-in keeps Slicer's and PythonQt's rules. Each test names the place in their sources that makes the rule."""

from __future__ import annotations

import enum
import os
import pathlib
import subprocess
import sys
from typing import Annotated

import pytest

pytest.importorskip("slicer", reason="needs slicer-core (pip install slicer-core)")
pytest.importorskip("PySide6", reason="needs PySide6 (pip install PySide6-Essentials)")

import slicer
import slicer.util

FOREIGN_PYTHON = sys.executable  # before a test is launched by Slicer's launcher


@pytest.fixture
def qt(stand_in):
    import qt

    return qt


@pytest.fixture
def ctk(stand_in):
    import ctk

    return ctk


def load_ui(tmp_path, body: str, head: str = ""):
    """A .ui file with a qMRMLWidget around ``body``."""
    path = tmp_path / "panel.ui"
    path.write_text(
        f'<ui version="4.0"><class>P</class><widget class="qMRMLWidget" name="P"><layout class="QVBoxLayout" '
        f'name="layout">{body}</layout></widget>{head}</ui>'
    )
    return slicer.util.loadUI(str(path))


# PythonQtInstanceWrapper.cpp, PythonQtInstanceWrapper_getattro: a property is read, not called
def test_properties_are_attributes(qt):
    button = qt.QPushButton("Go")
    assert button.text == "Go"
    button.text = "Stop"
    assert button.text == "Stop"
    with pytest.raises(TypeError, match="not callable"):
        button.text()


# the same, PythonQtInstanceWrapper_setattro: the four refusals
def test_what_is_no_property_cannot_be_assigned(qt):
    button = qt.QPushButton()
    with pytest.raises(AttributeError, match="Slot 'click' can not be overwritten"):
        button.click = None
    with pytest.raises(AttributeError, match="creating new attributes on C\\+\\+ objects is not allowed"):
        button.helper = 1
    with pytest.raises(AttributeError, match="does not accept an object of type"):
        button.text = None
    with pytest.raises(AttributeError, match="is not writable"):
        button.sizeHint = qt.QSize(1, 1)


# PythonQtClassInfo.cpp: "try to map name to objectName"
def test_name_is_the_object_name(qt):
    button = qt.QPushButton()
    button.name = "apply"
    assert button.objectName == "apply"


# PythonQtInstanceWrapper_getattro: dynamic properties, then "look for a child", else AttributeError
def test_unknown_attributes(qt):
    box = qt.QWidget()
    child = qt.QLabel("inside", box)
    child.name = "label"
    box.setProperty("color", "red")
    assert box.color == "red"
    assert box.label == child
    with pytest.raises(AttributeError, match="QWidget has no attribute named 'nothing'"):
        _ = box.nothing


# PythonQtStdDecorators::connect takes the signature; PythonQtSignalTarget::call passes what the function takes
def test_signals(qt):
    button, seen = qt.QPushButton(), []
    button.connect("clicked(bool)", lambda: seen.append("none"))
    button.connect("clicked()", lambda: seen.append("empty"))
    button.clicked.connect(lambda checked: seen.append(checked))
    button.click()
    assert seen == ["none", "empty", False]
    with pytest.raises(AttributeError, match="signal 'pressed\\(bool\\)' does not exist on QPushButton"):
        button.connect("pressed(bool)", print)


# PythonQtStdDecorators::disconnect: by the same function; a bound method equals itself
def test_disconnect(qt):
    class Listener:
        count = 0

        def hear(self) -> None:
            self.count += 1

    button, listener = qt.QPushButton(), Listener()
    button.connect("clicked()", listener.hear)
    button.click()
    assert button.disconnect("clicked()", listener.hear)
    button.click()
    assert listener.count == 1
    assert not button.disconnect("clicked()", listener.hear)


# PythonQtSignalTarget::call ends in PythonQt::handleError: printed, and the application goes on
def test_an_exception_in_a_slot_does_not_stop_the_application(qt, stand_in, capsys):
    def fail() -> None:
        raise ValueError("broken")

    button = qt.QPushButton()
    button.connect("clicked()", fail)
    button.click()
    errors = stand_in.take_errors()
    assert [str(e) for e in errors] == ["broken"]
    assert "broken" in capsys.readouterr().err


# PythonQt has enum values on the class (PythonQtMemberInfo::EnumValue)
def test_enums(qt):
    assert qt.QMessageBox.Ok | qt.QMessageBox.Cancel
    assert qt.Qt.AlignLeft == qt.Qt.AlignLeft
    with pytest.raises(AttributeError, match="enum values on the class itself"):
        _ = qt.QMessageBox.StandardButton.Ok


# PythonQtSlotFunction_CallImpl: positional arguments only
def test_no_keyword_arguments(qt):
    with pytest.raises(TypeError, match="no keyword arguments"):
        qt.QComboBox().addItem(text="a")


# PythonQtStdDecorators::static_QTimer_singleShot
def test_single_shot(qt, stand_in):
    seen = []
    qt.QTimer.singleShot(0, lambda: seen.append(1))
    stand_in.wait(lambda: seen)


# slicer.util.loadUI and childWidgetVariables are Slicer's own; uitools makes the widgets
def test_ui_files(stand_in, tmp_path):
    widget = load_ui(
        tmp_path,
        '<item><widget class="ctkCollapsibleButton" name="advanced"><property name="collapsed"><bool>true</bool>'
        '</property><layout class="QVBoxLayout" name="inner"><item><widget class="QSpinBox" name="steps"><property '
        'name="SlicerParameterName" stdset="0"><string>steps</string></property></widget></item></layout></widget>'
        "</item>",
    )
    ui = slicer.util.childWidgetVariables(widget)
    assert ui.advanced.collapsed is True
    assert ui.steps.property("SlicerParameterName") == "steps"
    assert not ui.steps.isVisibleTo(ui.advanced)
    ui.advanced.collapsed = False
    assert ui.steps.isVisibleTo(ui.advanced)


# ctkCollapsibleButton::setChildVisibility and eventFilter
def test_what_was_hidden_while_a_section_was_closed_stays_hidden(stand_in, tmp_path):
    button = '<item><widget class="QPushButton" name="{}"/></item>'
    widget = load_ui(
        tmp_path,
        '<item><widget class="ctkCollapsibleButton" name="section"><property name="collapsed"><bool>true</bool>'
        f'</property><layout class="QVBoxLayout" name="inner">{button.format("a")}{button.format("b")}</layout>'
        "</widget></item>",
    )
    ui = slicer.util.childWidgetVariables(widget)
    stand_in.show(widget)
    ui.a.visible = False
    ui.section.collapsed = False
    assert [one.isVisibleTo(ui.section) for one in (ui.a, ui.b)] == [False, True]
    ui.section.collapsed = True
    ui.a.visible = True
    assert not ui.a.isVisibleTo(ui.section)
    ui.section.collapsed = False
    assert [one.isVisibleTo(ui.section) for one in (ui.a, ui.b)] == [True, True]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('<item><widget class="ctkNothing" name="a"/></item>', "no widget class ctkNothing"),
        (
            '<item><widget class="QLabel" name="a"><property name="txet"><string>x</string></property></widget></item>',
            "QLabel 'a' has no property 'txet'",
        ),
    ],
)
def test_ui_files_with_mistakes_are_refused(stand_in, tmp_path, body, message):
    with pytest.raises(ValueError, match=message):
        load_ui(tmp_path, body)


# qMRMLWidget::mrmlSceneChanged is connected to the selectors' setMRMLScene in every .ui file of Slicer
def test_connections_of_the_ui_file_are_made(stand_in, tmp_path, mrml):
    connection = (
        "<connections><connection><sender>P</sender><signal>mrmlSceneChanged(vtkMRMLScene*)</signal><receiver>"
        "selector</receiver><slot>setMRMLScene(vtkMRMLScene*)</slot></connection></connections>"
    )
    body = '<item><widget class="qMRMLNodeComboBox" name="selector"/></item>'
    widget = load_ui(tmp_path, body, connection)
    widget.setMRMLScene(mrml)
    assert widget.selector.mrmlScene() is mrml
    with pytest.raises(AttributeError, match="sceneChanged"):
        load_ui(tmp_path, body, connection.replace("mrmlSceneChanged", "sceneChanged"))


# ctkPathLineEdit.cpp, updateHasValidInput: seen in Slicer to speak of paths that exist, and of nothing else
def test_a_path_that_does_not_exist_is_silent(ctk, tmp_path):
    seen, valid = [], []
    edit = ctk.ctkPathLineEdit()
    edit.connect("currentPathChanged(QString)", seen.append)
    edit.connect("validInputChanged(bool)", valid.append)
    edit.currentPath = str(tmp_path)
    edit.currentPath = str(tmp_path / "no such file")
    edit.currentPath = ""
    assert seen == [str(tmp_path)]
    assert valid == [True, False]


# qMRMLNodeComboBox.cxx and qMRMLSortFilterProxyModel.cxx
def test_node_selector(stand_in, mrml):
    seen = []
    selector = slicer.qMRMLNodeComboBox()
    selector.nodeTypes = ["vtkMRMLScalarVolumeNode"]
    selector.noneEnabled = True
    selector.connect("currentNodeChanged(vtkMRMLNode*)", seen.append)
    selector.setMRMLScene(mrml)
    volume = mrml.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "V")
    labels = mrml.AddNewNodeByClass("vtkMRMLLabelMapVolumeNode", "L")
    assert selector.nodeCount() == 2, "a label map is a scalar volume"
    selector.showChildNodeTypes = False
    assert selector.nodeCount() == 1
    selector.setCurrentNode(volume)
    selector.setCurrentNode(labels)
    assert selector.currentNode() is None
    selector.setCurrentNode(volume)
    mrml.RemoveNode(volume)
    assert seen == [volume, None, volume, None]
    with pytest.raises(ValueError, match="no node class"):
        selector.nodeTypes = ["vtkMRMLNothingNode"]


class Mode(enum.Enum):
    FAST = "fast"
    GOOD = "good"

    def label(self) -> str:
        return f"the {self.value} one"


# parameterNodeWrapper/wrapper.py, serializers.py, validators.py, guiConnectors.py
def test_parameter_node(qt, ctk, stand_in, mrml):
    from slicer.parameterNodeWrapper import WithinRange, parameterNodeWrapper

    class Parameters:
        volume: slicer.vtkMRMLScalarVolumeNode
        steps: Annotated[int, WithinRange(1, 8)] = 2
        mode: Mode
        folder: pathlib.Path

    Parameters.__annotations__ = {
        "volume": slicer.vtkMRMLScalarVolumeNode,
        "steps": Annotated[int, WithinRange(1, 8)],
        "mode": Mode,
        "folder": pathlib.Path,
    }
    parameters = parameterNodeWrapper(Parameters)(mrml.AddNewNodeByClass("vtkMRMLScriptedModuleNode"))
    assert (parameters.volume, parameters.steps, parameters.mode) == (None, 2, Mode.FAST)
    with pytest.raises(ValueError, match="within range"):
        parameters.steps = 9
    with pytest.raises(TypeError, match="Value must be of type"):
        parameters.steps = "3"
    spin, combo = qt.QSpinBox(), qt.QComboBox()
    tag = parameters.connectParametersToGui({"steps": spin, "mode": combo})
    assert (spin.value, spin.minimum, spin.maximum) == (2, 1, 8)
    spin.value = 5
    assert parameters.steps == 5
    parameters.mode = Mode.GOOD
    assert combo.currentText == "the good one"
    parameters.disconnectGui(tag)
    spin.value = 1
    assert parameters.steps == 5
    with pytest.raises(RuntimeError, match="Unable to create GUI connector"):
        parameters.connectParametersToGui({"steps": qt.QLineEdit()})
    union = type("U", (), {"__annotations__": {"labels": slicer.vtkMRMLModelNode | slicer.vtkMRMLTextNode}})
    with pytest.raises(TypeError, match="needs None"):
        parameterNodeWrapper(union)
    with pytest.raises(RuntimeError, match="Choice annotation"):
        parameters.connectParametersToGui({"steps": qt.QComboBox()})


# a Python class cannot be derived from what PythonQt wraps without its own rules; the module has no need to
def test_no_subclasses(qt):
    with pytest.raises(TypeError, match="no Python subclasses"):
        type("Mine", (qt.QWidget,), {})


def test_slicer_util_is_slicers_own(stand_in, mrml):
    assert slicer.util.settingsValue("nothing", 3) == 3
    assert slicer.app.applicationName == "Slicer"
    assert pathlib.Path(slicer.util.tempDirectory()).is_dir()


# Slicer's launcher: SlicerLauncherSettings.ini sets these for all below it; qSlicerCoreApplication::startupEnvironment
def test_no_python_but_slicers_own_runs_in_slicers_environment(stand_in):
    from MorphSeekGui.engine_client import default_python

    def run(python: str, environment: dict | None = None):
        return subprocess.run([python, "-c", "import numpy"], env=environment, capture_output=True, text=True)

    other = FOREIGN_PYTHON
    died = run(other)
    assert died.returncode != 0
    assert "Fatal Python error: init_fs_encoding" in died.stderr
    without_home = {name: value for name, value in os.environ.items() if name != "PYTHONHOME"}
    assert "Slicer's numpy cannot be imported by another Python" in run(other, without_home).stderr
    assert run(other, slicer.util.startupEnvironment()).returncode == 0
    assert pathlib.Path(default_python()).is_relative_to(slicer.app.slicerHome)
    assert run(default_python()).returncode == 0


# ctkCollapsibleButton.cpp, init: QSizePolicy::Minimum; QLabel's policy is Preferred
def test_a_wrapped_label_in_a_collapsible_button_asks_for_width(qt, ctk, stand_in):
    button, label = ctk.ctkCollapsibleButton(), qt.QLabel()
    outer = qt.QWidget()
    qt.QVBoxLayout(outer).addWidget(button)
    qt.QVBoxLayout(button).addWidget(label)
    label.setWordWrap(True)
    label.text = "short"
    stand_in.show(outer)
    short = outer.minimumSizeHint.width()
    label.text = "word " * 100
    stand_in.process()
    assert outer.minimumSizeHint.width() > short + 100
    label.setSizePolicy(qt.QSizePolicy.Ignored, qt.QSizePolicy.Preferred)
    stand_in.process()
    assert outer.minimumSizeHint.width() <= short


# ctkDirectoryButton.cpp: Directory is a QDir, "." at first; setDirectory compares QDirs; updateDisplayText
def test_a_directory_button_has_always_a_directory(ctk, tmp_path, monkeypatch):
    from SlicerStandIn.pythonqt import native

    monkeypatch.chdir(tmp_path)
    button, changed, selected = ctk.ctkDirectoryButton(), [], []
    native(button).resize(2000, 30)
    button.connect("directoryChanged(QString)", changed.append)
    button.connect("directorySelected(QString)", selected.append)
    assert (button.directory, native(button).button.text()) == (".", str(tmp_path))
    button.directory = str(tmp_path)
    assert (button.directory, changed, selected) == (".", [], [str(tmp_path)])
    (tmp_path / "a").mkdir()
    button.directory = str(tmp_path / "a")
    assert (button.directory, changed) == (str(tmp_path / "a"), [str(tmp_path / "a")])
    button.text = "none"
    button.directory = str(tmp_path)
    assert native(button).button.text() == "none"


# qMRMLPlotView.cxx: RecalculateBounds is called by fitToContent and for a new chart, not from updateWidgetFromMRML
def test_a_plot_view_does_not_follow_its_table(stand_in, mrml):
    from MorphSeekGui.training_curves import TrainingCurves

    view, curves = stand_in.open_plot_view(), TrainingCurves(mrml)
    curves.update("t", [{"iteration": n, "loss": 1.0} for n in (1, 2)])
    view.node.SetPlotChartNodeID(curves.chart("loss").GetID())
    assert view.axes[0] == (1.0, 2.0)
    curves.update("t", [{"iteration": n, "loss": 1.0} for n in (1, 2, 3)])
    assert view.axes[0] == (1.0, 2.0)
    view.fitToContent()
    assert view.axes[0] == curves.chart("loss").GetXAxisRange() == (1.0, 3.0)


# qSlicerModulePanel.cxx, removeModule: takeAt without delete; qlayoutitem.cpp: QWidgetItemV2 caches height for width
def test_the_module_panel_remembers_a_height_after_a_visit(qt, stand_in):
    from PySide6 import QtWidgets
    from SlicerStandIn.application import qSlicerModulePanel

    class Panel(QtWidgets.QWidget):
        enter = exit = lambda self: None

    def heights(visited: bool) -> list[int]:
        """What the panel gives a module at one width, before and after its text has grown."""
        widget, label = Panel(), QtWidgets.QLabel("short")
        label.setWordWrap(True)
        QtWidgets.QVBoxLayout(widget).addWidget(label)
        module = type("Module", (), {"widgetRepresentation": lambda self: widget})()
        panel = qSlicerModulePanel()
        panel.show()
        for shown in (module, None, module) if visited else (module,):
            panel.setModule(shown)
            stand_in.process()
        found = []
        for text in ("short", "word " * 300):
            label.setText(text)
            stand_in.process()
            found.append(panel.widget().layout().itemAt(1).heightForWidth(280))
        return found

    before, after = heights(visited=False)
    assert after > before
    before, after = heights(visited=True)
    assert after == before
