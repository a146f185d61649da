"""The part *Landmarks* of the section Inspect: the error of each pair, and arrows in the views."""

from __future__ import annotations

import qt

from .panel import Panel
from .scene import RegistrationNodes, _
from .views import ResultViews
from .widgets import fit_height, spread, table_cell


class LandmarksSection:
    """Shows what a registration's report says of its landmarks.

    Args:
        panel: the section Inspect.
    """

    def __init__(self, panel: Panel) -> None:
        self.ui = panel.ui
        self._views: ResultViews | None = None
        self._points: list[dict] = []
        spread(self.ui.landmarksTable, 0)
        self.ui.landmarksCheckBox.connect("toggled(bool)", lambda _on: self._draw())
        self.ui.landmarksTable.connect("cellClicked(int,int)", lambda row: self._go_to(row))
        self.show(None, None)

    def show(self, nodes: RegistrationNodes | None, views: ResultViews | None) -> None:
        """Show the landmarks of a registration; None for none."""
        self._views = views
        landmarks = (nodes.report.get("landmarks") if nodes is not None else None) or {}
        self._points = landmarks.get("points") or []
        rows = [(point["label"], point) for point in self._points]
        if rows:
            rows.append((_("Mean"), landmarks["mean"]))
        table, ui = self.ui.landmarksTable, self.ui
        table.setRowCount(len(rows))
        for row, (label, errors) in enumerate(rows):
            values = [f"{errors[stage]:.2f}" for stage in ("input", "aligned", "warped")]
            for column, text in enumerate([label, *values]):
                item = table_cell(table, row, column, text, right=column > 0, tip=landmarks["definition"])
                if row == len(self._points):
                    bold = qt.QFont()
                    bold.setBold(True)
                    item.setFont(bold)
        fit_height(table)
        table.visible = ui.landmarksCheckBox.visible = bool(rows)
        ui.landmarksLabel.text = (
            _("Distance in mm between the mapped fixed point and the moving one. Click a row to go there.")
            if rows
            else _("No landmarks: points were not given for both volumes.")
        )

    def _draw(self) -> None:
        if self._views is not None:
            self._views.arrows(self.ui.landmarksCheckBox.checked)

    def _go_to(self, row: int) -> None:
        if self._views is not None and row < len(self._points):
            x, y, z = self._points[row]["fixed"]
            self._views.go_to((-x, -y, z))
