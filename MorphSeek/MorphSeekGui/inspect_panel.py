"""The section Inspect: look at a registration, read its figures against limits, go to where it folds, export it.

The widgets and what they call; views.py shows, quality.py judges, export.py writes.
"""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path

import qt
import slicer
import slicer.util
import vtk

from MorphSeekLib.protocol.messages import Progress
from MorphSeekLib.protocol.report import TRUST_COLORS
from MorphSeekLib.protocol.verdict import DEFAULT_LIMITS, Folds, Limits, Verdict, folds, judge, shown

from . import quality, scene
from .apply_section import ApplySection
from .compare_section import CompareSection
from .correct_section import fill_table
from .engine_client import EngineCancelled, EngineClient, EngineError, Request
from .estimated_error_section import EstimatedErrorSection
from .export import Export, prepare
from .landmarks_section import LandmarksSection
from .messages import sentence
from .panel import Panel
from .scene import InputError, RegistrationNodes, _
from .views import ResultViews
from .widgets import SWITCH_STYLE, FolderButton, PlacesTable, fit_height, spread, table_cell

LIMITS_SETTING, FOLDER_SETTING = "MorphSeek/Limits", "MorphSeek/ExportFolder"
# background, text and sign (not everybody can tell the colors apart)
_COLORS = {
    "green": ("#1a9850", "#ffffff", "●"),
    "amber": ("#f5b83d", "#000000", "▲"),
    "red": ("#c62828", "#ffffff", "■"),
}
_INSIDE, _AMBER, _RED = 2, 3, 4  # columns of the figures, behind their names and values
_OPACITY = {"blend": 0.5, "jacobian": 0.6, "trust": 0.5}  # of a layer that is not opaque at first
_POLL_MS, _REDRAW_MS = 100, 250
_JACOBIAN_BAR = "stop:0 #542687, stop:0.5 #f7f7f7, stop:1 #e67305"
_DIFFERENCE_BAR = "stop:0 #7fd4ff, stop:0.25 #1f70d1, stop:0.5 #000000, stop:0.75 #d17a0f, stop:1 #ffe08a"

_TRUST_BAR = ", ".join(
    f"stop:{(n + end) / len(TRUST_COLORS)} {color}" for n, color in enumerate(TRUST_COLORS) for end in (0.001, 0.999)
)


class InspectPanel(Panel):
    """See the module's text; ``show`` takes the nodes of a registration, the selector any that the scene holds.

    Attributes:
        on_choice: called with the nodes of each registration that is looked at.
    """

    FILE = "Inspect.ui"

    def __init__(self, parent, logic) -> None:
        super().__init__(parent, logic)
        self.on_choice: list[Callable[[RegistrationNodes], None]] = []
        self._nodes: RegistrationNodes | None = None
        self._views: ResultViews | None = None
        self._figures: list[quality.Figure] = []
        self._regions: list[quality.Region] = []
        self._layer: str | None = None
        self._export: tuple[Export, EngineClient, Request] | None = None
        self._limits = quality.limits_from_text(qt.QSettings().value(LIMITS_SETTING))
        self._layer_buttons = {
            "blend": self.ui.blendButton,
            "flicker": self.ui.flickerButton,
            "checkerboard": self.ui.checkerboardButton,
            "before": self.ui.differenceBeforeButton,
            "after": self.ui.differenceAfterButton,
            "jacobian": self.ui.jacobianButton,
            "trust": self.ui.trustButton,
            "compare": self.ui.compareButton,
        }
        self._opacity = {name: _OPACITY.get(name, 1.0) for name in self._layer_buttons}
        self._flicker = self.timer(self._flip, 1000)
        self._redraw = self.timer(self._draw_again, _REDRAW_MS, once=True)
        self._poll = self.timer(self._poll_export, _POLL_MS)
        self._message = self.message(self.ui.messageLabel, self.ui.copyDetailsButton)
        self._export_message = self.message(self.ui.exportLabel, self.ui.copyExportDetailsButton)
        self._apply = ApplySection(self, lambda: self._nodes)
        self._landmarks = LandmarksSection(self)
        self._folded = PlacesTable(self.ui.regionsTable, 4, self._go_to)
        self._estimated = EstimatedErrorSection(self.ui, self._go_to)
        self._set_up()
        self._compare = CompareSection(self, self._other_was_chosen)
        self._choose(None)

    # ----------------------------------------------------------------------------------- what the module's widget calls

    def setMRMLScene(self, mrml_scene) -> None:
        """Take the scene whose results can be chosen; None when the application ends."""
        self._forget()
        self.removeObservers()
        super().setMRMLScene(mrml_scene)
        if mrml_scene is not None:
            self.addObserver(mrml_scene, slicer.vtkMRMLScene.NodeAboutToBeRemovedEvent, self._node_leaves)
            self.addObserver(mrml_scene, slicer.vtkMRMLScene.StartCloseEvent, self._scene_closes)
            self.addObserver(mrml_scene, slicer.vtkMRMLScene.EndImportEvent, self._scene_was_loaded)
            scene.keep_results_linear(mrml_scene)

    def enter(self) -> None:
        """Look again: parts of a result may have come or gone meanwhile."""
        if self._nodes is None:
            self._choose(self.ui.resultSelector.currentNode())

    def exit(self) -> None:
        """Stop the flicker, which would go on behind another module; what the views show stays."""
        self.ui.flickerButton.checked = False

    def cleanup(self) -> None:
        """Restore the views, end the export, and leave no file half written."""
        self._forget()
        self._apply.close()
        self._cancel_export()
        self._end_export()
        super().cleanup()

    def show(self, nodes: RegistrationNodes) -> None:
        """Choose a registration that was just made, also where it was made again in the same nodes."""
        self.ui.resultSelector.setCurrentNode(nodes.transform)
        self._look_at(nodes.transform)

    def take_estimate(self, nodes: RegistrationNodes) -> None:
        """Take over the estimated error of a registration, which came after its result; what the views show stays."""
        if self._nodes is None or self._nodes.transform is not nodes.transform:
            return
        own = self._nodes
        own.trust, own.trust_colors, own.report = nodes.trust, nodes.trust_colors, nodes.report
        self._figures = quality.measure(own.report)
        self._fill_figures()
        self._estimated.show(own)

    # ---------------------------------------------------------------------------------------------------------- widgets

    def _set_up(self) -> None:
        ui = self.ui
        ui.resultSelector.addAttribute("vtkMRMLTransformNode", scene.REPORT)
        ui.resultSelector.connect("currentNodeChanged(vtkMRMLNode*)", self._choose)
        for name, button in self._layer_buttons.items():
            button.styleSheet = SWITCH_STYLE
            button.connect("toggled(bool)", lambda on, name=name: self._toggle_layer(name, on))
        ui.opacitySlider.connect("valueChanged(double)", self._fade)
        ui.tileSlider.connect("valueChanged(double)", lambda _value: self._redraw.start())
        ui.rateSlider.connect("valueChanged(double)", lambda _value: self._set_rate())
        ui.gridCheckBox.connect("toggled(bool)", lambda _on: self._draw_grid())
        ui.gridSpacingSlider.connect("valueChanged(double)", lambda _value: self._redraw.start())
        ui.grid3DCheckBox.connect("toggled(bool)", lambda _on: self._draw_grid())
        ui.foldingCheckBox.connect("toggled(bool)", lambda _on: self._draw_folding())
        ui.folding3DCheckBox.connect("toggled(bool)", lambda _on: self._draw_folding())
        ui.restoreButton.connect("clicked(bool)", lambda _on: self._restore())
        ui.figuresTable.connect("cellChanged(int,int)", self._edit_limit)
        ui.defaultLimitsButton.connect("clicked(bool)", lambda _on: self._set_limits(dict(DEFAULT_LIMITS)))
        self._folder = FolderButton(ui.folderButton, qt.QSettings().value(FOLDER_SETTING) or str(Path.home()))
        ui.exportButton.connect("clicked(bool)", lambda _on: self._start_export())
        ui.cancelExportButton.connect("clicked(bool)", lambda _on: self._cancel_export())
        for table in (ui.figuresTable, ui.structuresTable, ui.correctionsTable):
            spread(table, 0)
        self._show_export(False)

    def _choose(self, transform) -> None:
        """Show the registration of the transform node that was chosen."""
        if self._nodes is None or transform is not self._nodes.transform:
            self._look_at(transform)

    def _look_at(self, transform) -> None:
        """Read the registration that a transform node stands for."""
        self._forget()
        nodes = scene.result_nodes(transform)
        if nodes is None:
            if transform is not None:
                self._say(_("Not everything of this registration is left in the scene; register again to inspect it."))
            return
        self._nodes, self._views = nodes, ResultViews(nodes)
        self._regions = quality.folded_regions(nodes.report)
        self._figures = quality.measure(nodes.report)
        size = _longest_mm(nodes.warped)
        self.ui.gridSpacingSlider.maximum = max(10.0, round(size / 4))
        self.ui.gridSpacingSlider.value = max(1.0, round(size / 24))
        self._redraw.stop()
        self._fill()
        for function in self.on_choice:
            function(nodes)

    def _forget(self) -> None:
        """No registration any more, and the views as they were."""
        self._restore()
        self._nodes = self._views = None
        self._figures, self._regions = [], []
        self._say("")
        self._fill()

    def _fill(self) -> None:
        there = self._nodes is not None
        ui = self.ui
        parts = (ui.showSection, ui.figuresSection, ui.trustSection, ui.landmarksSection, ui.compareSection)
        for section in (*parts, ui.regionsSection, ui.applySection, ui.exportSection):
            section.enabled = there
        self.ui.differenceBeforeButton.enabled = there and self._nodes.aligned is not None
        folding = (self._nodes.report.get("folding") or {}) if there else {}
        self.ui.definitionLabel.text = (folding.get("cells") or folding).get("definition", "")
        self._fill_figures()
        self._fill_structures()
        fill_table(ui.correctionsTable, self._nodes.report if there else {})
        ui.correctionsLabel.visible = ui.correctionsTable.rowCount > 0
        self._fill_regions()
        self._estimated.show(self._nodes)
        self._landmarks.show(self._nodes, self._views)
        self._compare.show(self._nodes)

    def _fill_figures(self) -> None:
        found = folds(self._nodes.report) if self._nodes is not None else None
        verdict = judge({figure.key: figure.value for figure in self._figures}, self._limits, found)
        table = self.ui.figuresTable
        blocked = table.blockSignals(True)
        table.setRowCount(len(self._figures))
        inside, of_what = quality.inside_of(self._nodes.report if self._nodes is not None else {})
        table.horizontalHeaderItem(_INSIDE).setText(inside)
        table.horizontalHeaderItem(_INSIDE).setToolTip(of_what)
        for row, figure in enumerate(self._figures):
            table_cell(table, row, 0, figure.label, tip=figure.definition)
            value = table_cell(table, row, 1, figure.text, right=True, tip=figure.definition)
            if figure.key in verdict.colors:
                background, text, sign = _COLORS[verdict.colors[figure.key]]
                value.setText(f"{sign} {figure.text}")
                value.setBackground(qt.QBrush(qt.QColor(background)))
                value.setForeground(qt.QBrush(qt.QColor(text)))
            tip = f"{figure.definition} {of_what}" if figure.inside is not None else ""
            table_cell(table, row, _INSIDE, figure.text_inside, right=True, tip=tip)
            limits = self._limits[figure.key] if figure.worse else None
            for column, bound in ((_AMBER, limits and f"{limits.amber:g}"), (_RED, limits and f"{limits.red:g}")):
                table_cell(table, row, column, bound or "", right=True, editable=limits is not None)
        table.blockSignals(blocked)
        fit_height(table, 450)
        self._show_verdict(verdict, found)

    def _show_verdict(self, verdict: Verdict, found: Folds | None) -> None:
        label = self.ui.verdictLabel
        label.visible = self._nodes is not None
        if verdict.color is None:
            label.text = quality.headline(None)
            label.styleSheet = ""
            return
        background, text, sign = _COLORS[verdict.color]
        lines = [f"{sign} {quality.headline(verdict.color)}"]
        if found is not None:
            lines.append(f"{_COLORS[verdict.folds][2]} {quality.folds_sentence(found)}")
        label.text = "\n".join([*lines, *quality.reasons(verdict)])
        label.styleSheet = f"background: {background}; color: {text}; border-radius: 3px; font-weight: bold"

    def _fill_structures(self) -> None:
        labels = self._nodes.warped_labels if self._nodes is not None else None
        names = scene.label_names(labels)
        rows = quality.structures(self._nodes.report, names) if self._nodes is not None else []
        table = self.ui.structuresTable
        table.setRowCount(len(rows))
        for row, (name, *values) in enumerate(rows):
            table_cell(table, row, 0, name)
            for column, value in enumerate(values, 1):
                table_cell(table, row, column, "–" if value is None else f"{value:.3f}", right=True)
        fit_height(table)
        table.visible = bool(rows)
        self.ui.structuresLabel.text = (
            _("Overlap by structure (Dice)") if rows else _("No overlap: labels were not given for both volumes.")
        )

    def _fill_regions(self) -> None:
        rows = []
        for row, region in enumerate(self._regions):
            size = shown("largest_region_mm3", region.mm3)
            rows.append((region.position, [str(row + 1), size, f"{region.voxels:,}", f"{region.determinant:.3f}"]))
        self._folded.fill(rows)
        folding = (self._nodes.report.get("folding") or {}) if self._nodes is not None else {}
        count = quality.count_regions(self._nodes.report) if self._nodes is not None else 0
        if self._nodes is None:
            text = ""
        elif "regions" not in folding:
            text = _("The report lists no regions; register again to have them listed.")
        elif not count:
            text = _("No folded region was found.")
        else:
            text = _("{n} folded regions, the largest first. Click one to go there.").format(n=count)
            if count > len(self._regions):
                text += " " + _("The {n} smallest are not listed.").format(n=count - len(self._regions))
        self.ui.regionsLabel.text = text

    def _say(self, problem: str) -> None:
        """Show an error; "" for none."""
        if problem:
            self._message.fail(problem)
        else:
            self._message.say("")
        self.ui.messageLabel.visible = bool(problem)

    # ------------------------------------------------------------------------------------------------------------- show

    def _toggle_layer(self, name: str, on: bool) -> None:
        """Show or remove a layer; one at a time, since the slice views have one foreground."""
        self._say("")
        if self._views is None:
            self._layer_buttons[name].checked = False
            return
        try:
            self._draw_layer(name, on)
        except InputError as problem:
            _set_silently(self._layer_buttons[name], False)
            self._draw_layer(name, False)
            self._say(sentence(problem))
            return
        if on and self._layer not in (None, name):
            _set_silently(self._layer_buttons[self._layer], False)
            self._draw_layer(self._layer, False)
        if on or self._layer == name:
            self._layer = name if on else None
        self._show_controls()

    def _draw_layer(self, name: str, on: bool) -> None:
        opacity = self._opacity[name]
        if name == "blend":
            self._views.overlay(on, opacity)
        elif name == "flicker":
            self._views.flicker(on)
            self._set_rate()
            self._flicker.start() if on else self._flicker.stop()
        elif name == "compare":
            self._views.compare(on, self._compare.other.warped if on else None)
            self._set_rate()
            self._flicker.start() if on else self._flicker.stop()
            self._name_what_is_seen()
        elif name == "checkerboard":
            self._views.checkerboard(on, self.ui.tileSlider.value, opacity)
        elif name == "jacobian":
            self._views.jacobian(on, opacity)
        elif name == "trust":
            self._views.trust(on, opacity)
        else:
            self._views.difference(on, before=name == "before", opacity=opacity)

    def _show_controls(self) -> None:
        """Only the controls and the legend of the layer that is seen."""
        ui, layer = self.ui, self._layer
        for widget in (ui.opacityLabel, ui.opacitySlider):
            widget.visible = layer not in (None, "flicker", "compare")
        for widget in (ui.tileLabel, ui.tileSlider):
            widget.visible = layer == "checkerboard"
        for widget in (ui.rateLabel, ui.rateSlider):
            widget.visible = layer in ("flicker", "compare")
        ui.gridLabel.visible = ui.gridCheckBox.checked
        if layer is not None:
            _set_silently(ui.opacitySlider, self._opacity[layer], "value")
        difference = _("Blue: fixed brighter. Black: equal. Orange: moving brighter.")
        bar, text = {
            "jacobian": (
                _JACOBIAN_BAR,
                _("Volume from fixed to moving. Purple: half and less. White: kept. Orange: double and more."),
            ),
            "before": (_DIFFERENCE_BAR, difference),
            "after": (_DIFFERENCE_BAR, difference),
            "trust": (_TRUST_BAR, self._estimated.legend()),
        }.get(layer, ("", ""))
        ui.legendBar.visible = ui.legendLabel.visible = bool(bar)
        ui.legendBar.styleSheet = f"background: qlineargradient(x1:0, y1:0, x2:1, y2:0, {bar})" if bar else ""
        ui.legendLabel.text = text

    def _fade(self, opacity: float) -> None:
        if self._layer not in (None, "flicker", "compare"):
            self._opacity[self._layer] = opacity
            self._views.fade(opacity)

    def _set_rate(self) -> None:
        self._flicker.setInterval(round(1000 / self.ui.rateSlider.value))

    def _flip(self) -> None:
        if self._views is not None:
            self._views.flip()
            self._name_what_is_seen()

    def _name_what_is_seen(self) -> None:
        """Say which of two compared results the views show."""
        seen = self._views.seen if self._views is not None else None
        self.ui.compareSeenLabel.text = _("Seen: {node}").format(node=seen.GetName()) if seen is not None else ""

    def _other_was_chosen(self) -> None:
        """Stop the flicker between two results when there is another one, or none, to compare with."""
        if self.ui.compareButton.checked:
            self.ui.compareButton.checked = False

    def _draw_again(self) -> None:
        """Draw again what depends on a slider, once it has come to rest."""
        if self._layer == "checkerboard":
            self._toggle_layer("checkerboard", True)
        if self.ui.gridCheckBox.checked:
            self._draw_grid()

    def _draw_grid(self) -> None:
        switch = self.ui.gridCheckBox
        self._say("")
        try:
            if self._views is not None:
                in_3d = self.ui.grid3DCheckBox.checked
                self._views.grid(switch.checked, self.ui.gridSpacingSlider.value, in_3d=in_3d)
        except InputError as problem:
            _set_silently(switch, False)
            self._say(sentence(problem))
        self._show_controls()

    def _draw_folding(self) -> None:
        if self._views is not None:
            self._views.folding(self.ui.foldingCheckBox.checked, self.ui.folding3DCheckBox.checked)

    def _go_to(self, place: tuple[float, float, float]) -> None:
        if self._views is not None:
            self._views.go_to(place)

    def _restore(self) -> None:
        """Switch all off and show the views as they were."""
        self._flicker.stop()
        self._redraw.stop()
        self._layer = None
        ui = self.ui
        for switch in (*self._layer_buttons.values(), ui.gridCheckBox, ui.foldingCheckBox, ui.landmarksCheckBox):
            _set_silently(switch, False)
        if self._views is not None:
            self._views.restore()
        self._name_what_is_seen()
        self._show_controls()

    # ----------------------------------------------------------------------------------------------------------- limits

    def _edit_limit(self, row: int, column: int) -> None:
        """Take over what the user typed into the table."""
        if column not in (_AMBER, _RED) or not 0 <= row < len(self._figures):
            return
        figure = self._figures[row]
        name = "amber" if column == _AMBER else "red"
        self._say("")
        try:
            text = self.ui.figuresTable.item(row, column).text()
            limits = self._limits | {figure.key: quality.edited_limits(figure, self._limits[figure.key], name, text)}
        except ValueError as problem:
            self._say(sentence(problem))
            limits = self._limits  # the table shows what holds
        self._set_limits(limits)

    def _set_limits(self, limits: dict[str, Limits]) -> None:
        self._limits = limits
        qt.QSettings().setValue(LIMITS_SETTING, quality.limits_to_text(limits))
        self._fill_figures()

    # ----------------------------------------------------------------------------------------------------------- export

    def _start_export(self) -> None:
        ui = self.ui
        boxes = {"report": ui.reportCheckBox, "transform": ui.transformCheckBox, "jacobian": ui.jacobianCheckBox}
        self._export_message.say("")
        self._say("")
        try:
            job = prepare(self._nodes, self._folder.folder, [name for name, box in boxes.items() if box.checked])
        except InputError as problem:
            self._fail_export(problem)
            return
        try:
            client = self.logic.client()
            request = client.request("export", job.params, self._show_progress)
        except EngineError as problem:
            job.discard()
            self._fail_export(problem)
            return
        qt.QSettings().setValue(FOLDER_SETTING, self._folder.folder)
        self._export = job, client, request
        self._show_export(True)
        self._poll.start()

    def _show_progress(self, progress: Progress) -> None:
        self.ui.exportProgressBar.value = round(100 * progress.get("fraction", 0))
        self.ui.exportLabel.text = escape(progress.get("message", ""))

    def _poll_export(self) -> None:
        job, client, request = self._export
        client.poll()
        if not request.done:
            return
        self._end_export()
        try:
            files = request.value().get("files", [])
        except EngineCancelled:
            self._export_message.say(_("Canceled; no file was written."))
        except EngineError as problem:
            self._fail_export(problem)
        else:
            opened = job.output / "report.html" if "report.html" in files else job.output
            link = f'<a href="{opened.as_uri()}">{escape(str(opened))}</a>'
            self._export_message.say(_("Written: {files} in {link}").format(files=escape(", ".join(files)), link=link))

    def _fail_export(self, problem: Exception) -> None:
        details = getattr(problem, "details", "")
        self._export_message.fail(sentence(problem), details.splitlines(), details)

    def _cancel_export(self) -> None:
        if self._export is not None:
            _job, client, request = self._export
            client.cancel(request)

    def _end_export(self) -> None:
        self._poll.stop()
        if self._export is not None:
            self._export[0].discard()
            self._export = None
        self._show_export(False)

    def _show_export(self, running: bool) -> None:
        self.ui.exportButton.enabled = not running
        self.ui.cancelExportButton.visible = self.ui.exportProgressBar.visible = running
        self.ui.exportProgressBar.value = 0

    # ------------------------------------------------------------------------------------------------------------ scene

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def _node_leaves(self, _caller, _event, node) -> None:
        """Stop showing the registration before one of its nodes is removed."""
        if self._compare.uses(node):
            self._compare.forget()
        if self._nodes is not None and any(node is part for part in vars(self._nodes).values()):
            name = node.GetName()
            self._forget()
            if not self.scene.IsClosing():
                self._say(_("'{node}' was removed from the scene; choose another registration.").format(node=name))

    def _scene_closes(self, _caller=None, _event=None) -> None:
        self._forget()

    def _scene_was_loaded(self, caller, _event) -> None:
        scene.keep_results_linear(caller)


def _set_silently(widget, value, name: str = "checked") -> None:
    """Set a property without the widget telling anyone."""
    blocked = widget.blockSignals(True)
    setattr(widget, name, value)
    widget.blockSignals(blocked)


def _longest_mm(volume) -> float:
    return max(n * mm for n, mm in zip(volume.GetImageData().GetDimensions(), volume.GetSpacing(), strict=True))
