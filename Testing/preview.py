# ruff: noqa: E402 - the paths come first
"""The module's panel without Slicer: ``make preview``.

Opens a window with the panel, on Testing/SlicerStandIn, beside slice views that slicer-core draws, with the demo's two
heads and its phantom of an abdomen in two modalities to register. Without a screen it photographs instead what a user
would see: the panel before, during and after a registration, in Inspect and in Fine-tune, into a folder.

    python Testing/preview.py [--photograph FOLDER]

With Colin27 of Debian's mricron-data on the machine, FOLDER may be Resources/Screenshots.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE / "module"), str(HERE.parent / "MorphSeek")]
SCREEN = any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")) or sys.platform in ("darwin", "win32")

if not SCREEN:
    os.environ["QT_QPA_PLATFORM"] = "offscreen"

import numpy as np
import slicer
import slicer.util
import SlicerStandIn
from MorphSeekGui import scene
from PySide6 import QtCore, QtGui, QtWidgets

from MorphSeekLib.app.demo import DemoPair, abdomen_pair, brain_pair

VIEW = (380, 380)
PANEL_WIDTH = 570


class Views(QtWidgets.QWidget):
    """The slice views as pictures, drawn again while something changes; a slider each to go through the slices."""

    def __init__(self, application: SlicerStandIn.Application) -> None:
        super().__init__()
        self.views = application.open_views(VIEW)
        self.setAttribute(QtCore.Qt.WidgetAttribute.WA_StyledBackground)
        self.setStyleSheet("background: black")
        layout = QtWidgets.QGridLayout(self)
        layout.setSpacing(2)
        layout.setContentsMargins(2, 2, 2, 2)
        self.pictures, self.sliders = {}, {}
        for n, name in enumerate(self.views):
            self.pictures[name] = QtWidgets.QLabel()
            self.pictures[name].setFixedSize(*VIEW)
            self.sliders[name] = QtWidgets.QSlider(QtCore.Qt.Orientation.Horizontal)
            self.sliders[name].setRange(-90, 90)
            self.sliders[name].valueChanged.connect(self.draw)
            layout.addWidget(self.pictures[name], 2 * (n // 2), n % 2)
            layout.addWidget(self.sliders[name], 2 * (n // 2) + 1, n % 2)
        self.timer = QtCore.QTimer(self, interval=400)
        self.timer.timeout.connect(self.draw)
        self.timer.start()

    def look_at(self, **offsets: int) -> None:
        """Go to these slices (mm), by view."""
        for name, offset in offsets.items():
            self.sliders[name].setValue(offset)
        self.draw()

    def draw(self) -> None:
        for name, view in self.views.items():
            view.logic.SetSliceOffset(self.sliders[name].value())
            pixels = np.ascontiguousarray(view.draw())
            image = QtGui.QImage(pixels, VIEW[0], VIEW[1], 3 * VIEW[0], QtGui.QImage.Format.Format_RGB888)
            self.pictures[name].setPixmap(QtGui.QPixmap.fromImage(image.copy()))


def open_window(application: SlicerStandIn.Application, panel: QtWidgets.QWidget) -> tuple[QtWidgets.QWidget, Views]:
    """The panel, scrollable as in Slicer, and the views beside it."""
    window = QtWidgets.QWidget()
    window.setWindowTitle("MorphSeek, preview without Slicer")
    area = QtWidgets.QScrollArea()
    area.setWidget(panel)
    area.setWidgetResizable(True)
    area.setFixedWidth(PANEL_WIDTH)
    views = Views(application)
    layout = QtWidgets.QHBoxLayout(window)
    layout.setContentsMargins(0, 0, 0, 0)
    layout.addWidget(area)
    layout.addWidget(views)
    if not SCREEN:
        window.setAttribute(QtCore.Qt.WidgetAttribute.WA_DontShowOnScreen)
    window.show()
    return window, views


NAMES = {
    "MNI152 T1 template (nilearn)": "MNI152",
    "Colin27 (mricron-data)": "Colin27",
    "MNI152 deformed, other contrast": "MNI152, deformed",
    "phantom of an abdomen, CT": "Phantom, CT",
    "the phantom deformed, MRI": "Phantom, MRI",
}
SOFT_TISSUE = (-160.0, 300.0)  # HU


def add_pair(pair: DemoPair) -> list:
    """Add both volumes of a pair to the scene."""
    return [add_volume(NAMES[t], v) for t, v in zip(pair.titles, (pair.fixed, pair.moving), strict=True)]


def add_volume(name: str, volume):
    """An engine volume as a node, with a window that suits it."""
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", name)
    slicer.util.updateVolumeFromArray(node, volume.data.numpy().transpose(2, 1, 0))
    node.SetIJKToRASMatrix(scene.to_vtk(scene.FLIP @ volume.grid.affine))
    node.CreateDefaultDisplayNodes()
    array = slicer.util.arrayFromVolume(node)
    node.GetDisplayNode().AutoWindowLevelOff()
    window = SOFT_TISSUE if array.min() < -500 else (0.0, 1.05 * float(np.percentile(array[array > 0], 99.0)))
    node.GetDisplayNode().SetWindowLevelMinMax(*window)
    return node


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photograph", type=Path, help="write pictures there instead of opening a window")
    folder = parser.parse_args().photograph or (None if SCREEN else HERE.parent / "preview")
    application = SlicerStandIn.start()
    application.qt.testing = False
    module = application.load_module(HERE.parent / "MorphSeek" / "MorphSeek.py")
    window, views = open_window(application, module.widgetRepresentation())
    module.widgetRepresentation().enter()
    abdomen = add_pair(abdomen_pair())
    brain = add_pair(brain_pair())
    panel = slicer.modules.MorphSeekWidget.panels["register"]

    def choose(nodes: list, **places: int) -> None:
        slicer.util.setSliceViewerLayers(*nodes, foregroundOpacity=0.5, fit=True)
        views.look_at(**places)
        panel.ui.fixedSelector.setCurrentNode(nodes[0])
        panel.ui.movingSelector.setCurrentNode(nodes[1])

    choose(brain, Red=8, Yellow=6, Green=-18)
    if folder is None:
        application.qt.exec()
        application.unload()
        return

    def photograph(name: str) -> None:
        views.draw()
        application.process()
        window.grab().save(str(folder / name))
        print(folder / name)

    folder.mkdir(parents=True, exist_ok=True)
    photograph("register-ready.png")
    panel.ui.registerButton.click()
    application.wait(lambda: "Fitting" in panel.ui.statusLabel.text, 600)
    photograph("register-running.png")
    application.wait(lambda: panel._run is None, 600)
    photograph("register.png")
    sections = slicer.modules.MorphSeekWidget.ui
    sections.registerSection.collapsed = True
    inspect = slicer.modules.MorphSeekWidget.panels["inspect"].ui
    inspect.jacobianButton.checked = True
    inspect.gridCheckBox.checked = True
    inspect.foldingCheckBox.checked = True
    application.process()
    photograph("inspect.png")
    inspect.gridCheckBox.checked = inspect.foldingCheckBox.checked = inspect.jacobianButton.checked = False
    application.wait(lambda: panel._estimate._run is None, 600)
    if inspect.trustButton.enabled is False:
        panel.ui.estimateButton.click()
        application.wait(lambda: panel._estimate._run is None, 600)
    inspect.trustButton.checked = True
    inspect.figuresSection.collapsed = True
    application.process()
    photograph("inspect-error.png")
    inspect.trustButton.checked, inspect.figuresSection.collapsed = False, False
    sections.inspectSection.collapsed = True
    panel.ui.trainingCheckBox.checked = True
    sections.trainingSection.collapsed = False
    application.process()
    photograph("training.png")
    panel.ui.trainingCheckBox.checked = False
    sections.trainingSection.collapsed = True
    sections.registerSection.collapsed = False
    choose(abdomen, Red=20, Yellow=-60, Green=0)
    panel.ui.similaritySelector.currentText = "Two modalities (MIND)"
    photograph("register-abdomen-ready.png")
    panel.ui.registerButton.click()
    application.wait(lambda: panel._run is None, 600)
    photograph("register-abdomen.png")
    application.unload()


if __name__ == "__main__":
    main()
