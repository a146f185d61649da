"""The part *Correct* of the section Register: draw where the last result is wrong, have it corrected, take it back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import slicer
import slicer.util
import vtk

from MorphSeekLib.protocol.report import SavedReport

from . import corrections, landmark_arrows, scene
from .corrections import Corrections
from .messages import sentence
from .panel import Panel
from .scene import FLIP, REPORT, InputError, RegistrationNodes, _
from .widgets import fit_height, spread, table_cell


class Corrector(Protocol):
    """What the section needs of the one that registers."""

    def correct(self, points: Corrections, fit: bool) -> bool:
        """Start the correction of the last result; return whether that was possible."""

    def show_earlier(self, nodes: RegistrationNodes) -> None:
        """Show an earlier result, which is in its nodes again."""


@dataclass(frozen=True)
class Earlier:
    """A result as it was before a correction.

    Attributes:
        nodes: with the report and the state of then.
        parts: by the name of each node, what it held.
        used: of each line, by its node, how it had been used.
        estimate: of its error, whose nodes a correction removes; None without one.
    """

    nodes: RegistrationNodes
    parts: dict[str, Any]
    used: list[tuple[Any, str | None]]
    estimate: scene.Estimate | None = None

    @classmethod
    def of(cls, nodes: RegistrationNodes) -> Earlier:
        """Copy what a correction will change."""
        parts = {}
        for name, node in vars(nodes).items():
            if name in ("fixed", "moving", *scene.ESTIMATED) or not isinstance(node, slicer.vtkMRMLNode):
                continue
            if isinstance(node, slicer.vtkMRMLTransformNode):
                parts[name] = node.GetTransformFromParent()  # a later result brings its own
                continue
            segments = isinstance(node, slicer.vtkMRMLSegmentationNode)
            parts[name] = slicer.vtkSegmentation() if segments else vtk.vtkImageData()
            parts[name].DeepCopy(node.GetSegmentation() if segments else node.GetImageData())
        used = [(line, line.GetAttribute(corrections.USED)) for line in corrections.lines(nodes)]
        return cls(replace(nodes, trust=None, trust_colors=None), parts, used, scene.estimate_of(nodes))

    def come_back(self) -> None:
        """Give the nodes what they held."""
        for name, part in self.parts.items():
            node = getattr(self.nodes, name)
            if isinstance(node, slicer.vtkMRMLTransformNode):
                node.SetAndObserveTransformFromParent(part)
            elif isinstance(node, slicer.vtkMRMLSegmentationNode):
                node.GetSegmentation().DeepCopy(part)
            else:
                node.SetAndObserveImageData(part)
        self.nodes.transform.SetAttribute(REPORT, json.dumps(self.nodes.report))
        scene.forget_estimate(self.nodes.transform)
        if self.estimate is not None:
            scene.add_estimate(self.nodes, self.estimate)
        for line, text in self.used:
            corrections.mark(line, text)


class CorrectPanel(Panel):
    """Draws lines on a result and lists them; the one that registers corrects by them.

    Args:
        parent: the collapsible section.
        logic: the module's logic.
        corrector: corrects the last result, and calls :meth:`settle` at the end of each run.
    """

    FILE = "Correct.ui"

    def __init__(self, parent, logic, corrector: Corrector) -> None:
        super().__init__(parent, logic)
        self._corrector = corrector
        self._nodes: RegistrationNodes | None = None
        self._enabled = False
        self._begun: Earlier | None = None  # before the correction that runs
        self._stack: list[Earlier] = []
        self._watched: list = []
        self._arrows = None
        self._message = self.message(self.ui.correctLabel, self.ui.copyCorrectDetailsButton)
        self._say("")
        ui = self.ui
        spread(ui.correctionsTable, 0)
        ui.drawButton.connect("clicked(bool)", lambda _on: self.draw())
        ui.removeButton.connect("clicked(bool)", lambda _on: self.remove())
        ui.correctButton.connect("clicked(bool)", lambda _on: self.correct())
        ui.undoButton.connect("clicked(bool)", lambda _on: self.undo())
        ui.correctionsTable.connect("cellClicked(int,int)", lambda row: self._go_to(row))
        for selector in (ui.fixedPointsSelector, ui.movingPointsSelector):
            selector.connect("currentNodeChanged(vtkMRMLNode*)", lambda _node: self._look())

    def setMRMLScene(self, scene) -> None:
        """Take this scene; None at the application's end."""
        self._watch([])
        self.removeObservers()
        super().setMRMLScene(scene)
        if scene is not None:
            self.addObserver(scene, slicer.vtkMRMLScene.NodeRemovedEvent, self._node_left)

    def cleanup(self) -> None:
        """End everything: the module is reloaded, or Slicer ends."""
        self.forget()
        super().cleanup()

    def show(self, nodes: RegistrationNodes | None, enabled: bool) -> None:
        """Show the corrections of a result.

        Args:
            nodes: of the last registration; None without.
            enabled: it can be gone on from now.
        """
        self._nodes, self._enabled = nodes, enabled
        self._look()

    def forget(self) -> None:
        """Show no result any more; the lines stay in the scene."""
        self._nodes, self._begun = None, None
        self._stack.clear()
        self._say("")
        self.show(None, False)

    def draw(self) -> None:
        """Let the user draw a line in the views: where a place is seen, and where it belongs."""
        line = corrections.new_line(self._nodes)
        selection = self.scene.GetFirstNodeByClass("vtkMRMLSelectionNode")
        selection.SetReferenceActivePlaceNodeClassName(corrections.LINE)
        selection.SetActivePlaceNodeID(line.GetID())
        interaction = self.scene.GetFirstNodeByClass("vtkMRMLInteractionNode")
        interaction.SetPlaceModePersistence(0)
        interaction.SetCurrentInteractionMode(interaction.Place)
        self._say("")
        self._look()

    def remove(self) -> None:
        """Remove the line of the chosen row from the scene."""
        row, lines = self.ui.correctionsTable.currentRow(), corrections.lines(self._nodes)
        if 0 <= row < len(lines):
            self.scene.RemoveNode(lines[row])

    def correct(self) -> None:
        """Start the correction by what is drawn and chosen."""
        ui = self.ui
        lists = ui.fixedPointsSelector.currentNode(), ui.movingPointsSelector.currentNode()
        self._say("")
        try:
            points = corrections.gather(self._nodes, *lists, ui.errorSpinBox.value)
        except InputError as problem:
            self._say(sentence(problem))
            return
        earlier = Earlier.of(self._nodes)
        if self._corrector.correct(points, ui.fitCheckBox.checked):
            self._begun = earlier

    def settle(self, nodes: RegistrationNodes | None) -> None:
        """Take note that a run has ended.

        Args:
            nodes: its result; None where it has none.
        """
        begun, self._begun = self._begun, None
        if begun is not None and nodes is not None:
            self._stack.append(begun)

    def undo(self) -> None:
        """Show the result of before the last correction; its lines can be changed and used again."""
        earlier = self._stack.pop()
        left = [node for node in earlier.used if self.scene.IsNodePresent(node[0])]
        missing = [name for name in earlier.parts if not self.scene.IsNodePresent(getattr(earlier.nodes, name))]
        if missing:
            self._say(_("Part of the result was removed from the scene; register again."))
            self._look()
            return
        known = {line.GetID() for line, _text in left}
        later = [(line, None) for line in corrections.lines(earlier.nodes) if line.GetID() not in known]
        replace(earlier, used=[*left, *later]).come_back()
        self._corrector.show_earlier(earlier.nodes)

    def _say(self, problem: str) -> None:
        """Show an error; "" for none."""
        if problem:
            self._message.fail(problem)
        else:
            self._message.say("")
        self.ui.correctLabel.visible = bool(problem)

    def _look(self, _caller=None, _event=None) -> None:
        """Show what there is."""
        there, ui = self._nodes is not None, self.ui
        lines = corrections.lines(self._nodes) if there else []
        self._watch(lines)
        fill_table(ui.correctionsTable, self._nodes.report if there else {}, lines)
        lists = ui.fixedPointsSelector.currentNode(), ui.movingPointsSelector.currentNode()
        some = any(corrections.is_drawn(line) for line in lines) or None not in lists
        ui.drawButton.enabled = self._enabled
        ui.removeButton.enabled = self._enabled and bool(lines)
        ui.correctButton.enabled = self._enabled and some
        ui.undoButton.enabled = self._enabled and bool(self._stack)
        self._draw_arrows([line for line in lines if corrections.is_drawn(line)])

    def _watch(self, lines: list) -> None:
        """Look again when one of these lines is drawn or its end was moved; no longer at others."""
        if self._watched == lines:
            return
        events = (slicer.vtkMRMLMarkupsNode.PointPositionDefinedEvent, slicer.vtkMRMLMarkupsNode.PointModifiedEvent)
        for event in events:
            for line in self._watched:
                self.removeObserver(line, event, self._look)
            for line in lines:
                self.addObserver(line, event, self._look)
        self._watched = lines

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def _node_left(self, _caller, _event, node) -> None:
        if self._nodes is not None and node.IsA(corrections.LINE) and not self.scene.IsClosing():
            self._look()

    def _draw_arrows(self, lines: list) -> None:
        """Show each line as an arrow to where the place belongs, in slices, for display only."""
        there = self._arrows is not None and self.scene.IsNodePresent(self._arrows)
        if not lines:
            for part in (self._arrows.GetDisplayNode(), self._arrows) if there else ():
                self.scene.RemoveNode(part)
            self._arrows = None
            return
        both = [corrections.ends(line).tolist() for line in lines]
        points = [{"fixed": begin, "moving_in_fixed": end} for begin, end in both]
        thickness = 1.5 * landmark_arrows.fitting_thickness(self._nodes.fixed)
        if there:
            self._arrows.SetAndObserveMesh(landmark_arrows.shapes(points, thickness))
            return
        name = _("{name} (corrections)").format(name=self._nodes.transform.GetName())
        self._arrows = landmark_arrows.add_model(self.scene, name, points, thickness)
        self._arrows.GetDisplayNode().SetVisibility3D(False)  # a point that is dragged in 3D would stick to them

    def _go_to(self, row: int) -> None:
        lines = corrections.lines(self._nodes) if self._nodes is not None else []
        if row < len(lines) and corrections.is_drawn(lines[row]):
            place = FLIP[:3, :3] @ corrections.ends(lines[row])[1]
            slicer.vtkMRMLSliceNode.JumpAllSlices(self.scene, *place, slicer.vtkMRMLSliceNode.CenteredJumpSlice)


def points_of(report: SavedReport) -> list[dict]:
    """Return the points that a report says a result was corrected by."""
    return (report.get("corrections") or {}).get("points") or []


def summary(report: SavedReport) -> list[str]:
    """Return what a report says of corrections: one line, or none."""
    points = points_of(report)
    if not points:
        return []
    before, after = (float(np.mean([point[stage] for point in points])) for stage in ("before", "after"))
    return [
        _("Corrections {before:.1f} to {after:.1f} mm from where they belong, mean of {n}.").format(
            before=before, after=after, n=len(points)
        )
    ]


def fill_table(table, report: SavedReport, lines: Sequence = ()) -> None:
    """List corrections in a table: name, distance before and after, stated error.

    Args:
        table: with four columns.
        report: of the result.
        lines: that belong to it; those that are not in the report are listed with their length alone.
    """
    points = {point["label"]: point for point in points_of(report)}
    names = [line.GetName() for line in lines]
    lengths = {line.GetName(): corrections.length(line) for line in lines if corrections.is_drawn(line)}
    names += [label for label in points if label not in names]
    tip = (report.get("corrections") or {}).get("definition", "")
    table.setRowCount(len(names))
    for row, name in enumerate(names):
        point = points.get(name)
        if point is not None:
            texts = [f"{point['before']:.1f}", f"{point['after']:.1f}", f"{point['error_mm']:g}"]
        else:
            texts = [f"{lengths[name]:.1f}" if name in lengths else "–", "–", "–"]
        for column, text in enumerate([name, *texts]):
            table_cell(table, row, column, text, right=column > 0, tip=tip)
    fit_height(table)
    table.visible = bool(names)
