"""A training's curves in Slicer's plot view: the figures of a run as a table node, and a chart for each question.

What is drawn belongs to no saved scene: the run's folder has it all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import slicer
import vtk
from vtk.util import numpy_support

from .scene import _

_SMOOTH = 20  # iterations of the moving mean: one pair each makes a noisy curve

BLUE, PALE, ORANGE, GRAY = (0.12, 0.40, 0.75), (0.62, 0.76, 0.92), (0.88, 0.45, 0.05), (0.55, 0.55, 0.55)
# chart -> the figure it shows, its axis, and its lines: (column, legend, color, width)
CHARTS = {
    "loss": ("loss", _("loss"), [("loss", _("each iteration"), PALE, 1), ("loss mean", _("mean of 20"), BLUE, 3)]),
    "reward": (
        "reward",
        _("reward of a group"),
        [
            ("reward high", _("mean + spread"), PALE, 1),
            ("reward low", _("mean - spread"), PALE, 1),
            ("reward mean", _("mean (of 20 iterations)"), BLUE, 3),
        ],
    ),
    "spread": (
        "reward_spread",
        _("reward's spread in a group"),
        [
            ("reward_spread", _("each iteration"), PALE, 1),
            ("reward_spread mean", _("mean of 20"), BLUE, 3),
        ],
    ),
    "kl": ("kl", _("KL to N(0, I), mean over dimensions"), [("kl", _("KL"), BLUE, 2)]),
    "dice": (
        "validation/dice",
        _("Dice of the validation pairs"),
        [
            ("validation/dice", _("registered"), BLUE, 3),
            ("validation/dice_before", _("before"), GRAY, 1),
        ],
    ),
    "folding": (
        "validation/njd_percent",  # every run has it, those of earlier versions too
        _("folding of the validation pairs, %"),
        [
            ("validation/folded_percent", _("folded cells, %"), ORANGE, 3),
            ("validation/njd_percent", _("NJD by central differences, %"), GRAY, 1),
        ],
    ),
}


def fit(chart) -> None:
    """Fit the axes of every plot view that shows a chart; Slicer does it when a chart comes, not when it grows."""
    manager = slicer.app.layoutManager()
    for view in (manager.plotWidget(n).plotView() for n in range(manager.plotViewCount)):
        if view.mrmlPlotViewNode().GetPlotChartNodeID() == chart.GetID():
            view.fitToContent()


def shows_all(chart) -> bool:
    """Return whether a chart's axes, as they were last fitted or moved by hand, show all that is in its tables."""
    for n in range(chart.GetNumberOfPlotSeriesNodes()):
        series = chart.GetNthPlotSeriesNode(n)
        if series is None or series.GetTableNode() is None:  # the scene was closed
            continue
        table = series.GetTableNode().GetTable()
        axes = (chart.GetXAxisRange(), series.GetXColumnName()), (chart.GetYAxisRange(), series.GetYColumnName())
        for (low, high), column in axes:
            array = table.GetColumnByName(column)
            if array is not None and array.GetNumberOfValues():
                least, most = array.GetRange()
                room = 1e-6 * max(1.0, most - least)
                if least < low - room or most > high + room:
                    return False
    return True


def has_curve(name: str, rows: Iterable[dict[str, float]]) -> bool:
    """Return whether there is anything to draw in a chart."""
    return any(CHARTS[name][0] in row for row in rows)


class TrainingCurves:
    """The nodes of the charts; made with the first figures, removed by :meth:`remove`."""

    def __init__(self, scene) -> None:
        self.scene = scene
        self._tables: dict[str, slicer.vtkMRMLTableNode] = {}
        self._charts: dict[str, slicer.vtkMRMLPlotChartNode] = {}
        self._nodes: list = []

    def chart(self, name: str):
        """Return the chart node of that name in :data:`CHARTS`, None as long as there is nothing to draw in it."""
        return self._charts.get(name)

    def update(self, title: str, rows: list[dict[str, float]]) -> None:
        """Show these figures, a row per iteration; a figure that a row lacks is left out of its curve."""
        if not all(self.scene.IsNodePresent(node) for node in self._nodes):  # the scene was closed
            self.remove()
        columns = _columns(rows)
        for name, (_figure, axis, lines) in CHARTS.items():
            found = {column: columns[column] for column, *_rest in lines if column in columns}
            if not found:
                continue
            if name not in self._charts:
                self._make(name, axis, lines)
            self._charts[name].SetTitle(title)
            _fill(self._tables[name], found)

    def clear(self) -> None:
        """Nothing to draw, for another run; the charts stay where they are shown."""
        for table in self._tables.values():
            _fill(table, {})

    def remove(self) -> None:
        """Take all nodes out of the scene."""
        for node in reversed(self._nodes):
            if self.scene.IsNodePresent(node):
                self.scene.RemoveNode(node)
        self._nodes.clear()
        self._tables.clear()
        self._charts.clear()

    def _make(self, name: str, axis: str, lines) -> None:
        table = self._add("vtkMRMLTableNode", f"MorphSeek training: {name}")
        chart = self._add("vtkMRMLPlotChartNode", f"MorphSeek training: {name}")
        chart.SetXAxisTitle(_("iteration"))
        chart.SetYAxisTitle(axis)
        chart.SetTitleVisibility(True)
        chart.SetLegendVisibility(len(lines) > 1)
        _fill(table, {})
        for column, legend, color, width in lines:
            series = self._add("vtkMRMLPlotSeriesNode", legend)
            series.SetPlotType(series.PlotTypeScatter)  # numbers on both axes, with lines between them
            series.SetMarkerStyle(series.MarkerStyleCircle if "/" in column else series.MarkerStyleNone)
            series.SetLineStyle(series.LineStyleSolid)
            series.SetLineWidth(width)
            series.SetColor(*color)
            series.SetXColumnName(f"{column} iteration")
            series.SetYColumnName(column)
            series.SetAndObserveTableNodeID(table.GetID())
            chart.AddAndObservePlotSeriesNodeID(series.GetID())
        self._tables[name], self._charts[name] = table, chart

    def _add(self, kind: str, name: str):
        node = self.scene.CreateNodeByClass(kind)
        node.UnRegister(None)
        node.SetName(name)
        node.SetSaveWithScene(False)
        self.scene.AddNode(node)
        self._nodes.append(node)
        return node


def _columns(rows: Iterable[dict[str, float]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Figure -> (iterations, values), with moving means and the band of the reward's spread."""
    found: dict[str, tuple[list, list]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "iteration" and value is not None and math.isfinite(value):
                at, values = found.setdefault(name, ([], []))
                at.append(row["iteration"])
                values.append(value)
    columns = {name: (np.array(at), np.array(values)) for name, (at, values) in found.items()}
    for name in ("loss", "reward", "reward_spread"):
        if name in columns:
            columns[f"{name} mean"] = (columns[name][0], moving_mean(columns[name][1]))
    if "reward mean" in columns and "reward_spread mean" in columns:
        (at, mean), spread = columns["reward mean"], columns["reward_spread mean"][1]
        columns |= {"reward high": (at, mean + spread), "reward low": (at, mean - spread)}
    return columns


def moving_mean(values: np.ndarray, width: int = _SMOOTH) -> np.ndarray:
    """Return the mean of each value and those before it, ``width`` at most."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    begin = np.maximum(0, np.arange(1, len(total)) - width)
    return (total[1:] - total[begin]) / (np.arange(1, len(total)) - begin)


def _fill(node, columns: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Replace a table node's content; each curve brings its own iterations, padded to one length with its last."""
    table = vtk.vtkTable()
    length = max((len(at) for at, _values in columns.values()), default=0)
    for name, (at, values) in columns.items():
        for column, data in ((f"{name} iteration", at), (name, values)):
            array = numpy_support.numpy_to_vtk(np.pad(data.astype(float), (0, length - len(data)), "edge"), deep=True)
            array.SetName(column)
            table.AddColumn(array)
    node.SetAndObserveTable(table)
