"""ctk's and qMRML's widgets as far as the module uses them: same names, properties, slots, signals and habits.

Each is a PySide6 widget with Qt properties, so that pythonqt.py and the .ui loader treat it like any other. ``SIGNALS``
maps the C++ signature of a signal that carries MRML nodes to the PySide6 signal that stands for it. New widgets are
added to ``ALL`` at the end.
"""

from __future__ import annotations

import functools
import os
import weakref

import shiboken6
import slicer
from PySide6.QtCore import Property, QDir, QEvent, QRect, QSize, Qt, QTimer, Signal, Slot
from PySide6.QtGui import QColor, QPainter
from PySide6.QtWidgets import (
    QAbstractButton,
    QCheckBox,
    QComboBox,
    QDoubleSpinBox,
    QFileDialog,
    QHBoxLayout,
    QLineEdit,
    QMessageBox,
    QPushButton,
    QSizePolicy,
    QSlider,
    QStyle,
    QStyleOptionButton,
    QTextBrowser,
    QToolButton,
    QWidget,
)

# ------------------------------------------------------------------------------------------------------------- qMRML


class qSlicerWidget(QWidget):
    """A widget that knows the scene and passes it on."""

    mrmlSceneChangedObject = Signal(object)
    SIGNALS = {"mrmlSceneChanged(vtkMRMLScene*)": "mrmlSceneChangedObject"}

    def __init__(self, parent=None) -> None:
        super().__init__(parent)
        self._scene = None

    def mrmlScene(self):
        return self._scene

    def setMRMLScene(self, scene) -> None:
        _check_scene(scene)
        if scene is not self._scene:
            self._scene = scene
            self.mrmlSceneChangedObject.emit(scene)


class qMRMLWidget(qSlicerWidget):
    """What the top widget of a .ui file is."""


class qMRMLNodeComboBox(qSlicerWidget):
    """The list of the scene's nodes of some types.

    Habits kept from Slicer: subclasses of a node type are listed unless showChildNodeTypes is off (a label map is a
    scalar volume); hidden nodes are not; without noneEnabled the first node that is there is chosen; a current node
    that leaves the scene is followed by none, or by another one.
    """

    currentNodeChangedObject = Signal(object)
    currentNodeChangedValid = Signal(bool)
    currentNodeIDChanged = Signal(str)
    nodeAddedObject = Signal(object)
    SIGNALS = {
        "currentNodeChanged(vtkMRMLNode*)": "currentNodeChangedObject",
        "currentNodeChanged(bool)": "currentNodeChangedValid",
        "nodeAdded(vtkMRMLNode*)": "nodeAddedObject",
        "mrmlSceneChanged(vtkMRMLScene*)": "mrmlSceneChangedObject",
    }

    def __init__(self, parent=None) -> None:
        super().__init__(parent)
        self._types: list[str] = []
        self._hidden_types: list[str] = []
        self._attributes: list[tuple[str, str, str | None]] = []
        self._flags = {
            "showHidden": False, "showChildNodeTypes": True, "noneEnabled": False, "addEnabled": True,
            "removeEnabled": True, "editEnabled": False, "renameEnabled": False, "selectNodeUponCreation": True,
        }  # fmt: skip
        self._none, self._base_name = "None", ""
        self._nodes: list = []
        self._current = None
        self._updating = False
        self._tags: list[tuple[object, int]] = []
        self.destroyed.connect(functools.partial(_remove_observers, self._tags))
        self._combo = QComboBox(self)
        self._combo.setSizeAdjustPolicy(QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon)
        self._combo.currentIndexChanged.connect(self._chosen)
        layout = QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self._combo)
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)

    def setMRMLScene(self, scene) -> None:
        _check_scene(scene)
        _remove_observers(self._tags)
        self._scene = scene
        if scene is not None:
            here = weakref.ref(self)
            for event in (
                scene.NodeAddedEvent,
                scene.NodeRemovedEvent,
                scene.EndCloseEvent,
                scene.EndBatchProcessEvent,
            ):
                self._tags.append((scene, scene.AddObserver(event, lambda *_: _refresh(here()))))
        self._refresh()

    def _refresh(self) -> None:
        before = self._current
        self._nodes = [n for n in _all_nodes(self._scene) if self._shows(n)] if self._types else []
        current = before if before in self._nodes else None
        if current is None and not self._flags["noneEnabled"] and self._nodes:
            current = self._nodes[0]
        self._updating = True
        self._combo.clear()
        if self._flags["noneEnabled"] or not self._nodes:
            self._combo.addItem(self._none)
        for node in self._nodes:
            self._combo.addItem(node.GetName())
        self._updating = False
        self._select(current, before)

    def _shows(self, node) -> bool:
        if node.GetHideFromEditors() and not self._flags["showHidden"]:
            return False
        kinds = [
            t for t in self._types if (node.IsA(t) if self._flags["showChildNodeTypes"] else node.GetClassName() == t)
        ]
        if not kinds or any(node.IsA(t) for t in self._hidden_types):
            return False
        for kind, name, value in self._attributes:
            if node.IsA(kind) and (node.GetAttribute(name) is None or value not in (None, node.GetAttribute(name))):
                return False
        return True

    def _select(self, node, before) -> None:
        self._updating = True
        offset = self._combo.count() - len(self._nodes)
        self._combo.setCurrentIndex(self._nodes.index(node) + offset if node is not None else 0)
        self._updating = False
        self._current = node
        if node is not before:
            self.currentNodeChangedObject.emit(node)
            self.currentNodeChangedValid.emit(node is not None)
            self.currentNodeIDChanged.emit(self._get_id())

    def _chosen(self, index: int) -> None:
        if not self._updating:
            index -= self._combo.count() - len(self._nodes)
            self._select(self._nodes[index] if index >= 0 else None, self._current)

    def currentNode(self):
        return self._current

    def setCurrentNode(self, node) -> None:
        if isinstance(node, str):
            node = self._scene.GetNodeByID(node) if self._scene is not None else None
        if node is not None and not isinstance(node, slicer.vtkMRMLNode):
            raise ValueError(f"setCurrentNode takes a MRML node, not {node!r}")
        self._select(node if node in self._nodes else None, self._current)

    def addNode(self, kind: str | None = None):
        kind = kind or self._types[0]
        node = self._scene.AddNewNodeByClass(kind, self._scene.GenerateUniqueName(self._base_name or kind[7:-4]))
        for name, key, value in self._attributes:
            if node.IsA(name) and value is not None:
                node.SetAttribute(key, value)
        self._refresh()
        if self._flags["selectNodeUponCreation"]:
            self.setCurrentNode(node)
        return node

    def addAttribute(self, kind: str, name: str, value: str | None = None) -> None:
        self._attributes.append((kind, name, value))
        self._refresh()

    def nodeCount(self) -> int:
        return len(self._nodes)

    def nodeFromIndex(self, index: int):
        return self._nodes[index] if 0 <= index < len(self._nodes) else None

    def setCurrentNodeIndex(self, index: int) -> None:
        self.setCurrentNode(self.nodeFromIndex(index))

    def setCurrentNodeID(self, node_id: str) -> None:
        self.setCurrentNode(node_id)

    def _get_id(self) -> str:
        return self._current.GetID() if self._current is not None else ""

    def _get_types(self) -> list:
        return self._types

    def _set_types(self, kinds) -> None:
        for kind in kinds:
            if not hasattr(slicer, kind):
                raise ValueError(f"There is no node class {kind}")
        self._types = list(kinds)
        self._refresh()

    def _set_hidden_types(self, kinds) -> None:
        self._hidden_types = list(kinds)
        self._refresh()

    def _set_none(self, text: str) -> None:
        self._none = text
        self._refresh()

    def _set_base_name(self, text: str) -> None:
        self._base_name = text

    nodeTypes = Property("QStringList", _get_types, _set_types)
    hideChildNodeTypes = Property("QStringList", lambda self: self._hidden_types, _set_hidden_types)
    noneDisplay = Property(str, lambda self: self._none, _set_none)
    baseName = Property(str, lambda self: self._base_name, _set_base_name)
    currentNodeID = Property(str, _get_id, setCurrentNode)

    def _flag(name: str):  # noqa: N805
        def write(self, on) -> None:
            self._flags[name] = on
            self._refresh()

        return Property(bool, lambda self: self._flags[name], write)

    showHidden = _flag("showHidden")
    showChildNodeTypes = _flag("showChildNodeTypes")
    noneEnabled = _flag("noneEnabled")
    addEnabled = _flag("addEnabled")
    removeEnabled = _flag("removeEnabled")
    editEnabled = _flag("editEnabled")
    renameEnabled = _flag("renameEnabled")
    selectNodeUponCreation = _flag("selectNodeUponCreation")


def _remove_observers(tags: list, *_) -> None:
    while tags:
        observed, tag = tags.pop()
        observed.RemoveObserver(tag)


def _refresh(selector: qMRMLNodeComboBox | None) -> None:
    if selector is not None and shiboken6.isValid(selector):
        selector._refresh()


def _check_scene(scene) -> None:
    if scene is not None and not isinstance(scene, slicer.vtkMRMLScene):
        raise ValueError(f"setMRMLScene takes a vtkMRMLScene, not {scene!r}")


def _all_nodes(scene) -> list:
    return [scene.GetNthNode(n) for n in range(scene.GetNumberOfNodes())] if scene is not None else []


# --------------------------------------------------------------------------------------------------------------- ctk


class ctkCollapsibleButton(QAbstractButton):
    """A header to fold away what lies below it. What was hidden before it closed, or while it was, stays hidden when it
    opens: CTK takes back the mark that hiding leaves on a child, so that hiding it again is noticed."""

    contentsCollapsed = Signal(bool)

    def __init__(self, parent=None) -> None:
        super().__init__(parent)
        self._hidden_by_me: list[QWidget] = []
        self._forcing = False
        self.setCheckable(True)
        self.setChecked(True)
        # no narrower than its content likes to be: a wrapped label that may not shrink widens the whole panel
        self.setSizePolicy(QSizePolicy.Policy.Minimum, QSizePolicy.Policy.Preferred)
        self.setContentsMargins(0, self._header(), 0, 0)
        self.toggled.connect(self._toggle)

    def _header(self) -> int:
        return self.fontMetrics().height() + 8

    def _toggle(self, opened: bool) -> None:
        if opened:
            hidden, self._hidden_by_me = self._hidden_by_me, []
            for child in hidden:
                if shiboken6.isValid(child):
                    child.show()
        self.settle()
        self.updateGeometry()
        self.contentsCollapsed.emit(not opened)

    def settle(self) -> None:
        """Hide what came while closed."""
        if not self.isChecked():
            for child in self.findChildren(QWidget, options=Qt.FindChildOption.FindDirectChildrenOnly):
                if not child.isHidden():
                    self._hide(child)

    def _hide(self, child: QWidget) -> None:
        self._forcing = True
        child.hide()
        child.setAttribute(Qt.WidgetAttribute.WA_WState_ExplicitShowHide, False)
        self._forcing = False
        if child not in self._hidden_by_me:
            self._hidden_by_me.append(child)

    def eventFilter(self, child, event) -> bool:
        if not self._forcing and not self.isChecked() and isinstance(child, QWidget):
            if event.type() == QEvent.Type.HideToParent and child in self._hidden_by_me:
                self._hidden_by_me.remove(child)
            elif event.type() == QEvent.Type.ShowToParent:
                self._hide(child)
        return False

    def childEvent(self, event) -> None:
        if event.added():
            event.child().installEventFilter(self)
        if event.added() and not self.isChecked():
            QTimer.singleShot(0, self, self.settle)
        super().childEvent(event)

    def sizeHint(self) -> QSize:
        width = self.fontMetrics().horizontalAdvance(self.text()) + 40
        if self.layout() is not None and self.isChecked():
            return self.layout().totalSizeHint().expandedTo(QSize(width, self._header()))
        return QSize(width, self._header())

    def minimumSizeHint(self) -> QSize:
        if self.layout() is not None and self.isChecked():
            return self.layout().totalMinimumSize().expandedTo(QSize(40, self._header()))
        return QSize(40, self._header())

    def hitButton(self, position) -> bool:
        return position.y() < self._header()

    def paintEvent(self, _event) -> None:
        painter = QPainter(self)
        option = QStyleOptionButton()
        option.initFrom(self)
        option.rect = QRect(0, 0, self.width(), self._header())
        option.state |= QStyle.StateFlag.State_Raised
        self.style().drawControl(QStyle.ControlElement.CE_PushButtonBevel, option, painter, self)
        arrow = QStyleOptionButton()
        arrow.initFrom(self)
        arrow.rect = QRect(8, (self._header() - 10) // 2, 10, 10)
        down = QStyle.PrimitiveElement.PE_IndicatorArrowDown
        right = QStyle.PrimitiveElement.PE_IndicatorArrowRight
        self.style().drawPrimitive(down if self.isChecked() else right, arrow, painter, self)
        painter.drawText(option.rect.adjusted(24, 0, 0, 0), Qt.AlignmentFlag.AlignVCenter, self.text())
        if self.isChecked():
            painter.setPen(QColor(0, 0, 0, 50))
            painter.drawRect(0, self._header() - 1, self.width() - 1, self.height() - self._header())

    def _get_collapsed(self) -> bool:
        return not self.isChecked()

    def _set_collapsed(self, on: bool) -> None:
        self.setChecked(not on)

    collapsed = Property(bool, _get_collapsed, _set_collapsed)
    contentsFrameShape = Property(int, lambda self: 0, lambda self, _value: None)


class ctkPathLineEdit(QWidget):
    """A path, typed or browsed for; silent about one that does not exist, and about being cleared."""

    currentPathChanged = Signal(str)
    validInputChanged = Signal(bool)

    def __init__(self, parent=None) -> None:
        super().__init__(parent)
        self._edit, self._browse = QLineEdit(self), QToolButton(self)
        self._browse.setText("...")
        self._browse.clicked.connect(self.browse)
        self._filters, self._name_filters, self._key, self._valid = 0, [], "", False
        layout = QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self._edit)
        layout.addWidget(self._browse)
        self._edit.textChanged.connect(self._tell)

    def _tell(self, path: str) -> None:
        before, self._valid = self._valid, bool(path) and os.path.exists(path)
        if self._valid:
            self.currentPathChanged.emit(path)
        if self._valid != before:
            self.validInputChanged.emit(self._valid)

    @Slot()
    def browse(self) -> None:
        path, _filter = QFileDialog.getOpenFileName(self, "", self._get_path(), ";;".join(self._name_filters))
        if path:
            self._set_path(path)

    def addCurrentPathToHistory(self) -> None:
        """The stand-in keeps no history."""

    def _get_path(self) -> str:
        return self._edit.text()

    def _set_path(self, path: str) -> None:
        self._edit.setText(path)

    def _set_name_filters(self, filters) -> None:
        self._name_filters = list(filters)

    def _set_filters(self, filters: int) -> None:
        self._filters = filters

    def _set_key(self, key: str) -> None:
        self._key = key

    currentPath = Property(str, _get_path, _set_path)
    nameFilters = Property("QStringList", lambda self: self._name_filters, _set_name_filters)
    filters = Property(int, lambda self: self._filters, _set_filters)
    settingKey = Property(str, lambda self: self._key, _set_key)
    showHistoryButton = Property(bool, lambda self: False, lambda self, _on: None)


class ctkSliderWidget(QWidget):
    """A slider with a spin box."""

    valueChanged = Signal(float)
    SIGNALS = {"valueChanged(double)": "valueChanged"}

    def __init__(self, parent=None) -> None:
        super().__init__(parent)
        self._slider, self._box = QSlider(Qt.Orientation.Horizontal, self), QDoubleSpinBox(self)
        layout = QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self._slider)
        layout.addWidget(self._box)
        self._page, self._tracking = 10.0, True
        self._box.valueChanged.connect(self._from_box)
        self._slider.valueChanged.connect(self._from_slider)
        self._box.setRange(0.0, 99.0)
        self._box.setSingleStep(1.0)
        self._fit()

    def _fit(self) -> None:
        blocked = self._slider.blockSignals(True)
        step = self._box.singleStep() or 1.0
        self._slider.setRange(0, round((self._box.maximum() - self._box.minimum()) / step))
        self._slider.setValue(round((self._box.value() - self._box.minimum()) / step))
        self._slider.blockSignals(blocked)

    def _from_box(self, value: float) -> None:
        self._fit()
        self.valueChanged.emit(value)

    def _from_slider(self, position: int) -> None:
        self._box.setValue(self._box.minimum() + position * (self._box.singleStep() or 1.0))

    def setRange(self, low: float, high: float) -> None:
        self._box.setRange(low, high)
        self._fit()

    def setValue(self, value: float) -> None:
        self._box.setValue(value)

    def _of_box(getter: str, setter: str, kind=float):  # noqa: N805
        def write(self, value) -> None:
            getattr(self._box, setter)(value)
            self._fit()

        return Property(kind, lambda self: getattr(self._box, getter)(), write)

    value = _of_box("value", "setValue")
    minimum = _of_box("minimum", "setMinimum")
    maximum = _of_box("maximum", "setMaximum")
    singleStep = _of_box("singleStep", "setSingleStep")
    decimals = _of_box("decimals", "setDecimals", int)
    suffix = _of_box("suffix", "setSuffix", str)
    prefix = _of_box("prefix", "setPrefix", str)

    def _set_page(self, step: float) -> None:
        self._page = step

    def _set_tracking(self, on: bool) -> None:
        self._tracking = on

    pageStep = Property(float, lambda self: self._page, _set_page)
    tracking = Property(bool, lambda self: self._tracking, _set_tracking)


class ctkComboBox(QComboBox):
    """A combo box that can have a text of its own."""


class ctkCheckBox(QCheckBox):
    """A check box."""


class ctkMessageBox(QMessageBox):
    """A message box; slicer.util.messageBox makes these."""


class ctkFittedTextBrowser(QTextBrowser):
    """A text browser as high as its text."""

    def __init__(self, parent=None) -> None:
        super().__init__(parent)
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self.setVerticalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.textChanged.connect(self.updateGeometry)

    def heightForWidth(self, width: int) -> int:
        document = self.document().clone()
        document.setTextWidth(max(40, width - 2 * self.frameWidth()))
        return int(document.size().height()) + 2 * self.frameWidth() + 2

    def sizeHint(self) -> QSize:
        return QSize(200, self.heightForWidth(self.width()))

    minimumSizeHint = sizeHint

    def resizeEvent(self, event) -> None:
        super().resizeEvent(event)
        self.updateGeometry()


class ctkDirectoryButton(QWidget):
    """A button that shows a folder and lets the user choose another one.

    Habits kept from CTK: there is always a folder, the working directory at first; choosing the one that it has already
    is only "selected", not "changed"; ``text``, once it is set, is shown instead of the path.
    """

    directoryChanged = Signal(str)
    directorySelected = Signal(str)

    def __init__(self, parent=None) -> None:
        super().__init__(parent)
        self._directory, self._text = QDir(), None
        self.button = QPushButton(self)
        self.button.setMinimumWidth(60)  # CTK elides the path
        self.button.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self.button.clicked.connect(self.browse)
        layout = QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self.button)
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self._show()

    @Slot()
    def browse(self) -> None:
        path = QFileDialog.getExistingDirectory(self, "", self._directory.path())
        if path:
            self._set_directory(path)

    def resizeEvent(self, event) -> None:
        super().resizeEvent(event)
        self._show()

    def _show(self) -> None:
        text = self._directory.absolutePath() if self._text is None else self._text
        room = max(40, self.width() - 20)
        self.button.setText(self.fontMetrics().elidedText(text, Qt.TextElideMode.ElideMiddle, room))

    def _set_directory(self, path: str) -> None:
        new = QDir(path)
        if new == self._directory:
            self.directorySelected.emit(new.absolutePath())
            return
        self._directory.setPath(new.absolutePath())
        self._show()
        self.directorySelected.emit(new.absolutePath())
        self.directoryChanged.emit(new.absolutePath())

    def _set_text(self, text: str) -> None:
        self._text = text
        self._show()

    directory = Property(str, lambda self: self._directory.path(), _set_directory)
    text = Property(str, lambda self: self._text or "", _set_text)


CTK = {
    cls.__name__: cls
    for cls in (
        ctkCheckBox,
        ctkCollapsibleButton,
        ctkComboBox,
        ctkDirectoryButton,
        ctkFittedTextBrowser,
        ctkMessageBox,
        ctkPathLineEdit,
        ctkSliderWidget,
    )
}
SLICER = {cls.__name__: cls for cls in (qSlicerWidget, qMRMLWidget, qMRMLNodeComboBox)}
ALL = CTK | SLICER
