"""What the sections of the module's panel have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path

import qt
import slicer.util
from slicer.util import VTKObservationMixin

from . import dependencies
from .details import CopyDetails
from .scene import InputError, _
from .widgets import ink

_UI = Path(__file__).resolve().parents[1] / "Resources" / "UI"


class Message:
    """A line for the progress of the work; errors are in red, with the button Copy details beside them.

    Args:
        label: shows the text.
        details: the button.
    """

    def __init__(self, label, details: CopyDetails) -> None:
        self._label, self._details = label, details

    def say(self, text: str) -> None:
        """Show a text that is no error; HTML where the label holds rich text."""
        self._show(text, "")
        self._details.withdraw()

    def fail(self, text: str, log: Iterable[str] = (), details: str = "") -> None:
        """Show an error.

        Args:
            text: the sentence for the user.
            log: the lines that belong to it, for the button.
            details: the tool tip.
        """
        rich = self._label.textFormat == qt.Qt.RichText
        self._show(escape(text) if rich else text, f"color: {ink(self._label, 'bad')}", details)
        self._details.offer(text, log)

    def _show(self, text: str, style: str, tip: str = "") -> None:
        self._label.text, self._label.styleSheet, self._label.toolTip = text, style, tip

    def close(self) -> None:
        """End what the button started."""
        self._details.close()


class Panel(VTKObservationMixin):
    """One section of the module's panel; a subclass names its .ui file and connects the widgets.

    Args:
        parent: the collapsible section of the module's panel.
        logic: the module's logic.

    Attributes:
        FILE: the name of the .ui file in Resources/UI.
        parent, logic: as given.
        widget: the content of the section.
        ui: its widgets by name.
        scene: the scene of the module; None before the first and after the last.
    """

    FILE: str

    def __init__(self, parent, logic) -> None:
        VTKObservationMixin.__init__(self)
        self.parent, self.logic, self.scene = parent, logic, None
        self.widget = slicer.util.loadUI(str(_UI / self.FILE))
        parent.layout().addWidget(self.widget)
        self.ui = slicer.util.childWidgetVariables(self.widget)
        self._timers: list = []
        self._messages: list[Message] = []

    def message(self, label, button, folders: Callable[[], dict[str, str]] = dict) -> Message:
        """Return the message of a label and its button Copy details; arguments as for :class:`CopyDetails`."""
        self._messages.append(Message(label, CopyDetails(button, self.logic, folders)))
        return self._messages[-1]

    def engine_python(self) -> str | None:
        """Return the Python that runs the engine, None for Slicer's own.

        Raises:
            InputError: the engine is not installed in it yet.
        """
        python = self.logic.engine_python() or None
        if python is None and dependencies.missing():
            raise InputError(_("The engine is not installed yet; press Install in the section Register."))
        return python

    def timer(self, function: Callable[[], None], milliseconds: int, once: bool = False):
        """Return a timer that calls a function when it is started, again and again or once."""
        timer = qt.QTimer()
        timer.setInterval(milliseconds)
        timer.setSingleShot(once)
        timer.connect("timeout()", function)
        self._timers.append(timer)
        return timer

    def setMRMLScene(self, scene) -> None:
        """Take this scene; None at the application's end."""
        self.scene = scene
        self.widget.setMRMLScene(scene)

    def enter(self) -> None:
        """Do what is due when the user opens the module."""

    def exit(self) -> None:
        """Do what is due when the user goes to another module; what runs goes on."""

    def cleanup(self) -> None:
        """End everything: the module is reloaded, or Slicer ends."""
        for timer in self._timers:
            timer.stop()
        for message in self._messages:
            message.close()
        self.removeObservers()
