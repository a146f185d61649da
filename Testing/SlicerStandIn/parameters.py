"""slicer.parameterNodeWrapper: typed attributes over a parameter node, bound to widgets.

Kept from Slicer (Base/Python/slicer/parameterNodeWrapper): defaults are written when the wrapper is made; a value of
the wrong type or outside its annotation is refused; a node is a node reference, and one that was read
while a scene is imported, before its node is there, stays None for this wrapper; a widget with the dynamic property
``SlicerParameterName`` is bound both ways by connectGui, and only pairs of type and widget that Slicer can bind are.
"""

from __future__ import annotations

import enum
import pathlib
import types
import typing
from dataclasses import dataclass

import slicer
import vtk
from PySide6 import QtWidgets

from . import widgets
from .pythonqt import Wrapper, class_of, native

NAME_PROPERTY = "SlicerParameterName"


@dataclass
class Default:
    value: object


@dataclass
class WithinRange:
    minimum: float
    maximum: float

    def validate(self, value) -> None:
        if not self.minimum <= value <= self.maximum:
            raise ValueError(f"Value must be within range [{self.minimum}, {self.maximum}], is {value}")


@dataclass
class Minimum:
    minimum: float

    def validate(self, value) -> None:
        if value < self.minimum:
            raise ValueError(f"Value must be greater than {self.minimum}, is {value}")


@dataclass
class Maximum:
    maximum: float

    def validate(self, value) -> None:
        if value > self.maximum:
            raise ValueError(f"Value must be greater than {self.maximum}, is {value}")


@dataclass
class Choice:
    choices: list

    def validate(self, value) -> None:
        if value not in self.choices:
            raise ValueError(f"Value is {value}, but must be in one of the following: {self.choices}")


@dataclass
class Decimals:
    value: int


@dataclass
class SingleStep:
    value: float


class _Parameter:
    """One typed attribute of the class, stored as text or as a node reference."""

    def __init__(self, name: str, hint, default) -> None:
        self.name = name
        self.kind, self.notes = (hint.__origin__, hint.__metadata__) if hasattr(hint, "__metadata__") else (hint, ())
        self.nodes = _node_classes(self.kind)
        known = (int, float, str, bool, pathlib.Path)
        if not self.nodes and self.kind not in known and not _is_enum(self.kind):
            raise TypeError(f"Unable to create serializer for member {name} of type {hint}")
        self.default = default if default is not _MISSING else self._natural_default()

    def _natural_default(self):
        for note in self.notes:
            if isinstance(note, Default):
                return note.value
            if isinstance(note, Choice):
                return note.choices[0]
        if self.nodes:
            return None
        return next(iter(self.kind)) if _is_enum(self.kind) else self.kind()

    def is_in(self, node) -> bool:
        return (
            bool(node.HasParameter(self.name))
            if hasattr(node, "HasParameter")
            else (self.name in node.GetParameterNames())
        )

    def write(self, node, value) -> None:
        if self.nodes:
            if value is not None and not isinstance(value, self.nodes):
                raise TypeError(f"Value must be of type '{self.kind}', is type '{type(value)}' value '{value}'")
            blocked = node.StartModify()
            node.SetParameter(self.name, "")
            node.SetNodeReferenceID(self.name, value.GetID() if value is not None else None)
            node.EndModify(blocked)
            return
        accepted = (int, float) if self.kind is float else pathlib.PurePath if self.kind is pathlib.Path else self.kind
        if not isinstance(value, accepted) or (self.kind in (int, float) and isinstance(value, bool)):
            raise TypeError(f"Value must be of type '{self.kind}', is type '{type(value)}' value '{value}'")
        for note in self.notes:
            if hasattr(note, "validate"):
                note.validate(value)
        node.SetParameter(self.name, value.name if _is_enum(self.kind) else str(value))

    def read(self, node):
        if self.nodes:
            return node.GetNodeReference(self.name)
        if not self.is_in(node):
            self.write(node, self.default)
        text = node.GetParameter(self.name)
        if self.kind is bool:
            return text == "True"
        return self.kind[text] if _is_enum(self.kind) else self.kind(text)


_MISSING = object()


def _is_enum(kind) -> bool:
    return isinstance(kind, type) and issubclass(kind, enum.Enum)


def _node_classes(kind) -> tuple:
    """The node classes that a type allows; empty if it is no node type.

    Raises:
        TypeError: a union of node classes without None (UnionSerializer could never be given no node).
    """
    union = isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
    kinds = typing.get_args(kind) if union else (kind,)
    nodes = tuple(k for k in kinds if isinstance(k, type) and issubclass(k, slicer.vtkMRMLNode))
    if nodes and union and type(None) not in kinds:
        raise TypeError(f"{kind}: a union of node types needs None")
    return nodes if len(nodes) == len([k for k in kinds if k is not type(None)]) else ()


def parameterNodeWrapper(cls):
    """The class decorator."""
    parameters = {}
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        parameters[name] = _Parameter(name, hint, cls.__dict__.get(name, _MISSING))
        setattr(cls, name, _property(name))
    for name in _METHODS:
        if name != "__init__" and name in cls.__dict__:
            raise ValueError(f"Cannot use reserved name '{name}' in a parameterNodeWrapper")
    cls.allParameters = parameters
    for name, method in _METHODS.items():
        setattr(cls, name, method)
    return cls


def _property(name: str):
    def read(self):
        parameter = self.allParameters[name]
        if name in self._unresolved:
            return None
        value = parameter.read(self.parameterNode)
        if parameter.nodes and value is None and slicer.mrmlScene.IsImporting():
            self._unresolved.add(name)  # Slicer's wrapper caches what it read before the referenced node was there
        return value

    def write(self, value) -> None:
        self._unresolved.discard(name)
        self.allParameters[name].write(self.parameterNode, value)

    return property(read, write)


def _init(self, parameter_node, prefix=None) -> None:
    self.parameterNode = parameter_node
    self._unresolved: set[str] = set()
    self._bindings, self._tags, self._next, self._updating = {}, {}, 0, False
    for parameter in self.allParameters.values():
        if not parameter.is_in(parameter_node):
            parameter.write(parameter_node, parameter.default)


def _connect_gui(self, gui) -> int:
    found = vars(gui).values() if not isinstance(gui, Wrapper) else gui.findChildren(class_of(QtWidgets.QWidget))
    mapping = {w.property(NAME_PROPERTY): w for w in found if w.property(NAME_PROPERTY)}
    return _connect_parameters(self, mapping)


def _connect_parameters(self, mapping: dict) -> int:
    for name in mapping:
        if name not in self.allParameters:
            raise ValueError(f"Cannot find a param with the given name: {name}")
    bindings = [_Binding(self.allParameters[name], widget) for name, widget in mapping.items()]
    tag, self._next = self._next, self._next + 1
    for binding in bindings:
        binding.write(getattr(self, binding.parameter.name))

        def changed(binding=binding) -> None:
            if not self._updating:
                setattr(self, binding.parameter.name, binding.read())

        binding.changed = changed
        binding.signal().connect(binding.on_signal)
    self._bindings[tag] = bindings
    self._tags[tag] = self.AddObserver(vtk.vtkCommand.ModifiedEvent, lambda *_: _update_gui(self))
    return tag


def _update_gui(self) -> None:
    if self._updating:
        return
    self._updating = True
    try:
        for bindings in self._bindings.values():
            for binding in bindings:
                binding.write(getattr(self, binding.parameter.name))
    finally:
        self._updating = False


def _disconnect_gui(self, tag) -> None:
    for binding in self._bindings.pop(tag, []):
        binding.signal().disconnect(binding.on_signal)
    if tag in self._tags:
        self.RemoveObserver(self._tags.pop(tag))


_METHODS = {
    "__init__": _init,
    "connectGui": _connect_gui,
    "connectParametersToGui": _connect_parameters,
    "disconnectGui": _disconnect_gui,
    "getValue": lambda self, name: getattr(self, name),
    "setValue": lambda self, name, value: setattr(self, name, value),
    "default": lambda self, name: Default(self.allParameters[name].default),
    "dataType": lambda self, name: self.allParameters[name].kind,
    "StartModify": lambda self: self.parameterNode.StartModify(),
    "EndModify": lambda self, blocked: self.parameterNode.EndModify(blocked),
    "AddObserver": lambda self, event, function, priority=0.0: self.parameterNode.AddObserver(
        event, function, priority
    ),
    "RemoveObserver": lambda self, tag: self.parameterNode.RemoveObserver(tag),
    "Modified": lambda self: self.parameterNode.Modified(),
}


class _Binding:
    """One parameter and one widget (guiConnectors.py)."""

    def __init__(self, parameter: _Parameter, widget: Wrapper) -> None:
        self.parameter, self.widget = parameter, widget
        self.changed = lambda: None
        kind, shown = parameter.kind, type(native(widget))
        number = {QtWidgets.QSpinBox, QtWidgets.QSlider} if kind is int else set()
        number |= {QtWidgets.QDoubleSpinBox, widgets.ctkSliderWidget} if kind in (int, float) else set()
        combo = shown in (QtWidgets.QComboBox, widgets.ctkComboBox)
        limits = [n for n in parameter.notes if isinstance(n, (WithinRange, Minimum, Maximum))]
        choice = next((n for n in parameter.notes if isinstance(n, Choice)), None)
        if parameter.nodes and shown is widgets.qMRMLNodeComboBox:
            widget.nodeTypes = [cls.__name__ for cls in parameter.nodes]
            self._use("currentNodeChanged", widget.currentNode, widget.setCurrentNode)
        elif kind is bool and shown in (QtWidgets.QCheckBox, widgets.ctkCheckBox):
            self._use_property("stateChanged", "checked")
        elif kind is bool and shown is QtWidgets.QPushButton:
            widget.checkable = True
            self._use_property("toggled", "checked")
        elif shown in number:
            if shown in (QtWidgets.QSlider, widgets.ctkSliderWidget) and not limits:
                raise RuntimeError(f"Cannot have a connection to {shown.__name__} where the type is unbounded.")
            self._set_limits(limits)
            self._use_property("valueChanged", "value", kind)
        elif combo and kind in (int, float, str, bool):
            if choice is None:
                raise RuntimeError("ComboBoxToStringableConnector requires the Choice annotation to be used.")
            self._fill([str(c) for c in choice.choices])
            self._use_index(choice.choices)
        elif combo and _is_enum(kind):
            label = getattr(kind, "label", lambda member: member.name)
            self._fill([label(member) for member in kind])
            self._use_index(list(kind))
        elif kind is str and shown is QtWidgets.QLineEdit:
            self._use_property("textChanged", "text")
        elif kind is str and shown is QtWidgets.QTextEdit:
            self._use("textChanged", widget.toPlainText, widget.setPlainText)
        elif kind is pathlib.Path and shown in (widgets.ctkPathLineEdit, widgets.ctkDirectoryButton):
            name = "currentPath" if shown is widgets.ctkPathLineEdit else "directory"
            self._use(
                f"{name}Changed", lambda: pathlib.Path(getattr(widget, name)), lambda v: setattr(widget, name, str(v))
            )
        else:
            raise RuntimeError(
                f"Unable to create GUI connector from datatype '{kind}' to widget type '{shown.__name__}'."
            )

    def on_signal(self, *_) -> None:
        self.changed()

    def signal(self):
        return getattr(self.widget, self._signal)

    def _use(self, signal: str, read, write) -> None:
        self._signal, self.read, self.write = signal, read, write

    def _use_property(self, signal: str, name: str, kind=lambda value: value) -> None:
        self._use(signal, lambda: kind(getattr(self.widget, name)), lambda value: setattr(self.widget, name, value))

    def _use_index(self, values: list) -> None:
        self._use(
            "currentIndexChanged",
            lambda: values[self.widget.currentIndex],
            lambda value: setattr(self.widget, "currentIndex", values.index(value)),
        )

    def _fill(self, texts: list[str]) -> None:
        self.widget.clear()
        for text in texts:
            self.widget.addItem(text)

    def _set_limits(self, limits) -> None:
        if self.parameter.kind is int and hasattr(self.widget, "decimals"):
            self.widget.decimals = 0
        for note in limits:
            if hasattr(note, "minimum"):
                self.widget.minimum = note.minimum
            if hasattr(note, "maximum"):
                self.widget.maximum = note.maximum
