"""MorphSeek in Slicer: the module, its panel, its logic and its self test. Each is thin and delegates.

The panel is made of sections, each a plain class in MorphSeekGui with a .ui file of its own: Register, Inspect and, once
switched on in the settings, Fine-tune. What they do stands in the logic, which needs no panel:

    from MorphSeek import MorphSeekLogic
    nodes = MorphSeekLogic().register(getNode("fixed"), getNode("moving"))
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import slicer
import slicer.util
from slicer.i18n import tr as _
from slicer.i18n import translate
from slicer.ScriptedLoadableModule import (
    ScriptedLoadableModule,
    ScriptedLoadableModuleLogic,
    ScriptedLoadableModuleTest,
    ScriptedLoadableModuleWidget,
)
from slicer.util import VTKObservationMixin

# section of MorphSeek.ui -> (module in MorphSeekGui, its class)
PANELS = {
    "registerSection": ("register_panel", "RegisterPanel"),
    "inspectSection": ("inspect_panel", "InspectPanel"),
    "trainingSection": ("training_panel", "TrainingPanel"),
}
TRAINING_SETTING = "MorphSeek/Training"  # fine-tuning is shown when this is true, or in developer mode


class MorphSeek(ScriptedLoadableModule):
    """What Slicer's module list says."""

    def __init__(self, parent) -> None:
        ScriptedLoadableModule.__init__(self, parent)
        parent.title = "MorphSeek"
        parent.categories = [translate("qSlicerAbstractCoreModule", "Registration")]
        parent.dependencies = ["Sequences"]
        parent.contributors = ["The MorphSeek developers"]
        parent.helpText = _("Learned deformable registration that shows where the deformation folds.")
        parent.acknowledgementText = _("MorphSeek: Zhang et al., CVPR 2026.")


class MorphSeekWidget(ScriptedLoadableModuleWidget, VTKObservationMixin):
    """The panel: makes the sections and passes on what Slicer says."""

    def __init__(self, parent=None) -> None:
        ScriptedLoadableModuleWidget.__init__(self, parent)
        VTKObservationMixin.__init__(self)
        self.logic = None
        self.panels: dict[str, object] = {}

    def setup(self) -> None:
        ScriptedLoadableModuleWidget.setup(self)
        self.logic = MorphSeekLogic()
        widget = slicer.util.loadUI(self.resourcePath("UI/MorphSeek.ui"))
        self.layout.addWidget(widget)
        self.ui = slicer.util.childWidgetVariables(widget)
        widget.setMRMLScene(slicer.mrmlScene)
        for section, (module, name) in PANELS.items():
            if importlib.util.find_spec(f"MorphSeekGui.{module}") is None:
                getattr(self.ui, section).visible = False
                continue
            make = getattr(importlib.import_module(f"MorphSeekGui.{module}"), name)
            self.panels[section] = make(getattr(self.ui, section), self.logic)
            self.panels[section].setMRMLScene(slicer.mrmlScene)

    def enter(self) -> None:
        """The person opens the module."""
        for panel in self.panels.values():
            panel.enter()

    def exit(self) -> None:
        """The person goes to another module."""
        for panel in self.panels.values():
            panel.exit()

    def cleanup(self) -> None:
        """The module is reloaded, or Slicer ends."""
        self.removeObservers()
        for panel in self.panels.values():
            panel.cleanup()
        self.panels.clear()


class MorphSeekLogic(ScriptedLoadableModuleLogic):
    """What the module does; takes nodes, needs no panel."""

    def __init__(self) -> None:
        ScriptedLoadableModuleLogic.__init__(self)


class MorphSeekTest(ScriptedLoadableModuleTest):
    """The self test that Slicer runs."""


RESOURCES = Path(__file__).resolve().parent / "Resources"
