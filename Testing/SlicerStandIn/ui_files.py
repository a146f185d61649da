""".ui files, built as Slicer builds them, strictly.

Slicer's loader falls back silently: an unknown widget becomes a bare QWidget, an unknown property a dynamic one, a
connection that does not exist a line in the log. Each of these is an error here, because each is one in the module.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from PySide6 import QtCore, QtUiTools, QtWidgets

from . import widgets
from .pythonqt import connect_native

_META_PROPERTIES = {"sizePolicy", "geometry"}  # written in a form of their own


class QUiLoader(QtCore.QObject):
    """qt.QUiLoader: ``load(qfile)``."""

    def load(self, file: QtCore.QFile, parent: QtWidgets.QWidget | None = None):
        """The top widget of a .ui file.

        Raises:
            ValueError: an unknown class, property or connection in it.
        """
        root = ElementTree.fromstring(bytes(file.readAll()))
        connections = _take_connections(root)
        buffer = QtCore.QBuffer()
        buffer.setData(ElementTree.tostring(root))
        buffer.open(QtCore.QIODevice.OpenModeFlag.ReadOnly)
        loader = _Loader()
        if file.fileName():
            loader.setWorkingDirectory(QtCore.QFileInfo(file.fileName()).absoluteDir())
        top = loader.load(buffer, parent)
        if loader.problem is not None:
            raise ValueError(f"{file.fileName()}: {loader.problem}")
        if top is None:
            raise ValueError(f"{file.fileName()}: {loader.errorString()}")
        for button in [top, *top.findChildren(widgets.ctkCollapsibleButton)]:
            getattr(button, "settle", lambda: None)()
        _check_properties(root, top, file.fileName())
        for connection in connections:
            _make_connection(connection, top, file.fileName())
        return top


class _Loader(QtUiTools.QUiLoader):
    problem: str | None = None

    def createWidget(self, class_name, parent=None, name=""):
        made = widgets.ALL.get(class_name)
        if made is not None:
            widget = made(parent)
            widget.setObjectName(name)
            return widget
        if class_name not in self.availableWidgets():
            self.problem = f"the stand-in knows no widget class {class_name}"
            return QtWidgets.QWidget(parent)
        return super().createWidget(class_name, parent, name)


def _check_properties(root, top, path: str) -> None:
    for element in root.iter("widget"):
        name = element.get("name")
        widget = top if top.objectName() == name else top.findChild(QtWidgets.QWidget, name)
        if widget is None:
            continue  # an item or page that has no widget of its own
        for prop in element.findall("property"):
            known = widget.metaObject().indexOfProperty(prop.get("name")) >= 0
            if not known and prop.get("stdset") != "0" and prop.get("name") not in _META_PROPERTIES:
                raise ValueError(f"{path}: {element.get('class')} '{name}' has no property '{prop.get('name')}'")


def _take_connections(root) -> list[tuple[str, str, str, str]]:
    """Take the connections out of the tree, which PySide6 would make (or not) without a word."""
    found = []
    for parent in root.findall("connections"):
        found += [
            tuple(c.findtext(key) for key in ("sender", "signal", "receiver", "slot"))
            for c in parent.findall("connection")
        ]
        root.remove(parent)
    return found


def _make_connection(connection, top, path: str) -> None:
    sender_name, signal, receiver_name, slot = connection
    by_name = {child.objectName(): child for child in [top, *top.findChildren(QtCore.QObject)]}
    if sender_name not in by_name or receiver_name not in by_name:
        raise ValueError(f"{path}: a connection of {sender_name} and {receiver_name}, which are not both there")
    sender, receiver = by_name[sender_name], by_name[receiver_name]
    target = getattr(receiver, slot.partition("(")[0], None)
    if not callable(target):
        raise ValueError(f"{path}: {receiver_name} has no slot {slot}")
    connect_native(sender, signal, target)
