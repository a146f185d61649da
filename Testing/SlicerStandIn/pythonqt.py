"""QObjects as PythonQt shows them to Python, over PySide6's.

PythonQt's rules that are kept (PythonQtInstanceWrapper.cpp, PythonQtSignalReceiver.cpp, PythonQtStdDecorators.cpp):

- A Qt property is an attribute: ``button.text``, ``button.text = "x"``; calling it is calling a str.
- ``name`` is ``objectName``.
- Assigning to anything that is no property, a slot say, is an AttributeError; so is a new attribute.
- An unknown attribute is looked for among dynamic properties, then among the children's names.
- ``connect("clicked(bool)", f)`` by normalized C++ signature, or ``clicked.connect(f)``. A function gets as many of the
  signal's arguments as it has parameters. PythonQt only prints that a signal does not exist; here it raises.
- An exception in a slot is printed and does not stop anything; here it is kept in :data:`errors` too, for tests.
- Enum values belong to the class: ``qt.QMessageBox.Ok``; the scoped form of PySide6 is refused.

Values that are no QObjects (QIcon, QColor, QSize, table items) have no properties in PythonQt either and are PySide6's.
"""

from __future__ import annotations

import enum
import inspect
import sys
import traceback
import types
import weakref

import shiboken6
from PySide6 import QtCore, QtGui, QtWidgets

errors: list[BaseException] = []  # what slots raised

_classes: dict[type, type] = {}
_living: weakref.WeakValueDictionary[int, Wrapper] = weakref.WeakValueDictionary()
_connections: dict[int, list[tuple[str, object, object]]] = {}  # pointer -> (signature, callable, relay)


def wrap(value):
    """A PySide6 value as PythonQt would hand it out."""
    if isinstance(value, QtCore.QObject):
        pointer = _pointer(value)
        known = _living.get(pointer)
        if known is not None and native(known) is value:
            return known
        wrapper = object.__new__(class_of(type(value)))
        object.__setattr__(wrapper, "_native", value)
        _living[pointer] = wrapper
        return wrapper
    if isinstance(value, (list, tuple)):
        return type(value)(wrap(v) for v in value)
    return value


def native(value):
    """The PySide6 value behind a wrapper."""
    if isinstance(value, Wrapper):
        return object.__getattribute__(value, "_native")
    if isinstance(value, (list, tuple)):
        return type(value)(native(v) for v in value)
    return value


def _pointer(thing: QtCore.QObject) -> int:
    return shiboken6.getCppPointer(thing)[0] if shiboken6.isValid(thing) else id(thing)


def class_of(native_class: type) -> type:
    """The wrapper class of a QObject class; what inherits there inherits here."""
    if native_class not in _classes:
        parents = [class_of(base) for base in native_class.__bases__ if issubclass(base, QtCore.QObject)]
        _WrapperType.open = True
        try:
            _classes[native_class] = _WrapperType(
                native_class.__name__, tuple(parents) or (Wrapper,), {"_class": native_class}
            )
        finally:
            _WrapperType.open = False
    return _classes[native_class]


class _WrapperType(type):
    """Class attributes: enum values and static functions."""

    open = False

    def __new__(cls, name, bases, namespace):
        if bases and not _WrapperType.open:
            raise TypeError(f"{name}: the stand-in knows no Python subclasses of Qt classes")
        return super().__new__(cls, name, bases, namespace)

    def __getattr__(cls, name: str):
        if name.startswith("_") or "_class" not in cls.__dict__:
            raise AttributeError(name)
        return _class_attribute(cls._class, name)


class Wrapper(metaclass=_WrapperType):
    """One QObject."""

    def __init__(self, *arguments) -> None:
        object.__setattr__(self, "_native", type(self)._class(*[native(a) for a in arguments]))
        _living[_pointer(native(self))] = self

    def __bool__(self) -> bool:
        return shiboken6.isValid(native(self))

    def __eq__(self, other) -> bool:
        return isinstance(other, Wrapper) and _pointer(native(self)) == _pointer(native(other))

    def __hash__(self) -> int:
        return _pointer(native(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__} (QObject '{native(self).objectName() if self else 'destroyed'}')"

    def __dir__(self):
        meta = native(self).metaObject()
        names = {meta.property(n).name() for n in range(meta.propertyCount())}
        return sorted(names | {n for n in dir(type(self)._class) if not n.startswith("_")})

    def __getattribute__(self, name: str):
        if name.startswith("__") or name in ("_native", "_class"):
            return object.__getattribute__(self, name)
        return _read(self, name)

    def __setattr__(self, name: str, value) -> None:
        _write(self, name, value)


def _read(wrapper: Wrapper, name: str):
    thing = native(wrapper)
    if not shiboken6.isValid(thing):
        raise ValueError(f"Trying to read '{name}' from a destroyed {type(wrapper).__name__} object")
    name = "objectName" if name == "name" else name
    if thing.metaObject().indexOfProperty(name) >= 0:
        return wrap(thing.property(name))
    if name in _INTERNAL:
        return types.MethodType(_INTERNAL[name], wrapper)
    signature = signal_signature(thing, name)
    if signature is not None:
        return BoundSignal(wrapper, signature)
    if not name.startswith("_"):
        try:
            return _member(wrapper, "exec" if name == "exec_" else name)
        except AttributeError:
            pass
    if name.encode() in [bytes(n) for n in thing.dynamicPropertyNames()]:
        return thing.property(name)
    for child in thing.children():
        if child.objectName() == name:
            return wrap(child)
    raise AttributeError(f"{type(wrapper).__name__} has no attribute named '{name}'")


def _write(wrapper: Wrapper, name: str, value) -> None:
    thing = native(wrapper)
    kind = type(wrapper).__name__
    if not shiboken6.isValid(thing):
        raise AttributeError(f"Trying to set property '{name}' on a destroyed {kind} object")
    name = "objectName" if name == "name" else name
    meta = thing.metaObject()
    index = meta.indexOfProperty(name)
    if index >= 0:
        prop = meta.property(index)
        if not prop.isWritable():
            raise AttributeError(f"Property '{name}' of {kind} object is not writable")
        fits = _fits(prop.typeName(), value)
        if fits and isinstance(inspect.getattr_static(type(thing), name, None), QtCore.Property):
            setattr(thing, name, native(value))  # a stand-in's own: its refusals arrive as they are
        elif not fits or not thing.setProperty(name, native(value)):
            raise AttributeError(
                f"Property '{name}' of type '{prop.typeName()}' does not accept an object of type "
                f"{type(value).__name__} ({value!r})"
            )
    elif name.encode() in [bytes(n) for n in thing.dynamicPropertyNames()]:
        thing.setProperty(name, native(value))
    elif hasattr(type(thing), name):
        raise AttributeError(f"Slot '{name}' can not be overwritten on {kind} object")
    else:
        raise AttributeError(
            f"'{name}' does not exist on {kind} and creating new attributes on C++ objects is not allowed"
        )


_TYPES = {
    "QString": str,
    "bool": (bool, int),
    "int": (int, float),
    "double": (int, float),
    "float": (int, float),
    "QStringList": (list, tuple),
}


def _fits(type_name: str, value) -> bool:
    # None is no QVariant that a typed property takes
    return isinstance(value, _TYPES[type_name]) if type_name in _TYPES else value is not None


def _member(wrapper: Wrapper, name: str):
    """A method, bound; an enum value."""
    thing = native(wrapper)
    member = getattr(thing, name)
    if isinstance(member, (enum.Enum, enum.EnumMeta)):
        return _class_attribute(type(thing), name)
    if not callable(member) or isinstance(member, QtCore.SignalInstance):
        raise AttributeError(name)
    return Slot(wrapper, name)


def _class_attribute(native_class: type, name: str):
    value = getattr(native_class, name)
    if isinstance(value, enum.EnumMeta):
        raise AttributeError(
            f"{native_class.__name__}.{name}: PythonQt has enum values on the class itself, {native_class.__name__}.X"
        )
    if isinstance(value, enum.Enum):
        return value
    if inspect.isbuiltin(value) or inspect.isfunction(value):
        # PySide6 returns what C++ writes into its arguments too (the chosen filter); PythonQt the name alone
        first = native_class is QtWidgets.QFileDialog and name.startswith(("getOpen", "getSave"))

        def call(*arguments):
            result = value(*[_argument(a) for a in arguments])
            return result[0] if first else wrap(result)

        return call
    raise AttributeError(f"type object '{native_class.__name__}' has no attribute '{name}'")


def _argument(value):
    """A function that Qt will call gets no chance to break the event loop, as in PythonQt."""
    return _relay(value) if inspect.isfunction(value) or inspect.ismethod(value) else native(value)


class Slot:
    """A method of a QObject, ready to be called."""

    def __init__(self, wrapper: Wrapper, name: str) -> None:
        self._wrapper, self._name = wrapper, name

    def __call__(self, *arguments, **keywords):
        if keywords:
            raise TypeError(f"{self._name}() takes no keyword arguments: PythonQt has none")
        thing = native(self._wrapper)
        if not shiboken6.isValid(thing):
            raise ValueError(f"Trying to call '{self._name}' on a destroyed {type(self._wrapper).__name__} object")
        return wrap(getattr(thing, self._name)(*[_argument(a) for a in arguments]))

    def __eq__(self, other) -> bool:
        return isinstance(other, Slot) and (self._wrapper, self._name) == (other._wrapper, other._name)

    def __hash__(self) -> int:
        return hash((self._wrapper, self._name))


class BoundSignal:
    """``widget.valueChanged``: connect, disconnect, and emit by calling it."""

    def __init__(self, wrapper: Wrapper, signature: str) -> None:
        self._wrapper, self._signature = wrapper, signature

    def connect(self, function) -> bool:
        return _connect(self._wrapper, self._signature, function)

    def disconnect(self, function) -> bool:
        return _disconnect(self._wrapper, self._signature, function)

    def __call__(self, *arguments) -> None:
        thing = native(self._wrapper)
        signal = _own_signal(thing, self._signature) or getattr(thing, self._signature.partition("(")[0])
        signal.emit(*[native(a) for a in arguments])

    emit = __call__


def signal_signature(thing: QtCore.QObject, name: str) -> str | None:
    """The full signature of the signal of that name, None if there is none."""
    for signature in getattr(type(thing), "SIGNALS", {}):
        if signature.split("(")[0] == name:
            return signature
    meta = thing.metaObject()
    methods = [meta.method(n) for n in range(meta.methodCount())]
    signals = [
        m for m in methods if m.methodType() == QtCore.QMetaMethod.MethodType.Signal and m.name() == name.encode()
    ]
    # a default argument makes a second, shorter signature
    longest = max(signals, key=lambda m: m.parameterCount(), default=None)
    return bytes(longest.methodSignature()).decode() if longest is not None else None


def _own_signal(thing: QtCore.QObject, signature: str) -> QtCore.SignalInstance | None:
    """The signal of a stand-in widget that stands for a C++ signature (PySide6 would call a node's type PyObject); None
    if Qt knows the signature itself.

    Raises:
        AttributeError: there is no such signal.
    """
    wanted = _normalized(signature)
    attribute = getattr(type(thing), "SIGNALS", {}).get(wanted)
    if attribute is not None:
        return getattr(thing, attribute)
    if thing.metaObject().indexOfSignal(wanted) < 0 or "PyObject" in wanted:
        raise AttributeError(f"signal '{signature}' does not exist on {type(thing).__name__}")
    return None


def connect_native(thing: QtCore.QObject, signature: str, function) -> None:
    """Connect a signal, named by its C++ signature, to a function that takes its arguments as they come."""
    own = _own_signal(thing, signature)
    if own is not None:
        own.connect(function)
    else:
        QtCore.QObject.connect(thing, QtCore.SIGNAL(_normalized(signature)), function)


def _connect(wrapper: Wrapper, signature: str, function, slot: str | None = None) -> bool:
    if isinstance(function, Wrapper) and slot is not None:  # connect(signal, receiver, "slot()")
        function = getattr(function, slot.split("(")[0])
    if not callable(function):
        raise TypeError(f"{function!r} cannot be connected to '{signature}': it is not callable")
    thing = native(wrapper)
    _own_signal(thing, signature)  # refuses what does not exist
    given = [a for a in signature.partition("(")[2].rstrip(") ").split(",") if a.strip()]
    relay = _relay(function, len(given))
    pointer = _pointer(thing)
    if pointer not in _connections:
        _connections[pointer] = []
        thing.destroyed.connect(lambda *_: _connections.pop(pointer, None))
    _connections[pointer].append((_normalized(signature), function, relay))
    connect_native(thing, signature, relay)
    return True


def _disconnect(wrapper: Wrapper, signature: str, function=None) -> bool:
    thing = native(wrapper)
    own = _own_signal(thing, signature)
    connections = _connections.get(_pointer(thing), [])
    found = [c for c in connections if c[0] == _normalized(signature) and (function is None or c[1] == function)]
    for connection in found:
        if own is not None:
            own.disconnect(connection[2])
        else:
            QtCore.QObject.disconnect(thing, QtCore.SIGNAL(_normalized(signature)), connection[2])
        connections.remove(connection)
    return bool(found)


def _normalized(signature: str) -> str:
    return bytes(QtCore.QMetaObject.normalizedSignature(signature)).decode()


def _relay(function, most: int | None = None):
    """What Qt calls instead of the function: trims arguments, keeps exceptions."""
    accepted = _parameter_count(function)

    def relay(*arguments):
        arguments = [wrap(a) for a in arguments[:most]]
        try:
            function(*arguments[:accepted])
        except BaseException as error:
            errors.append(error)
            traceback.print_exc(file=sys.stderr)

    return relay


def _parameter_count(function) -> int | None:
    """How many arguments a Python function or method takes, defaults included; None: as many as come."""
    bound = inspect.ismethod(function)
    code = getattr(function.__func__ if bound else function, "__code__", None)
    if code is None or code.co_flags & inspect.CO_VARARGS:
        return None
    return code.co_argcount - bound


def _find_children(wrapper: Wrapper, kind, name: str | None = None) -> list:
    """QObject.findChildren(type, name)."""
    kind_native = kind._class if isinstance(kind, _WrapperType) else None
    if kind_native is None:
        raise TypeError("findChildren needs a Qt class")
    found = native(wrapper).findChildren(kind_native)
    return [wrap(child) for child in found if name is None or child.objectName() == name]


_INTERNAL = {
    "connect": _connect,
    "disconnect": _disconnect,
    "className": lambda wrapper: type(native(wrapper)).__name__,
    "delete": lambda wrapper: shiboken6.delete(native(wrapper)),
    "findChildren": _find_children,
    "findChild": lambda wrapper, kind, name=None: next(iter(_find_children(wrapper, kind, name)), None),
}


class QtModule(types.ModuleType):
    """``import qt``, or ``import ctk`` with a dictionary of stand-in classes: every name is looked up when used."""

    def __init__(self, name: str, stand_ins: dict[str, type], modules: tuple = ()) -> None:
        super().__init__(name)
        self._stand_ins, self._modules = stand_ins, modules

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        value = self._stand_ins.get(name)
        for module in self._modules:
            value = value or getattr(module, name, None)
        if value is None or name in ("Signal", "Slot", "Property", "SIGNAL", "SLOT"):
            raise AttributeError(f"module '{self.__name__}' has no attribute '{name}'")
        if isinstance(value, type) and issubclass(value, QtCore.QObject):
            return class_of(value)
        return _Values(value) if value is QtCore.Qt else value


class _Values:
    """The Qt namespace: enum values only."""

    def __init__(self, namespace) -> None:
        self._namespace = namespace

    def __getattr__(self, name: str):
        return _class_attribute(self._namespace, name)


QT_MODULES = (QtWidgets, QtGui, QtCore)
